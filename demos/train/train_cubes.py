"""Train cubes for a finished checkpoint: where a clip is cut, a resampler per cube, a thumbnail, and the decoder.

The cubing learns from two sides: the decoder's loss by way of the thumbnail, as published, and the generator's own
event times as labels of the changes (LABEL_WEIGHT; 0 where there are none). Every clip draws its frames per cube, so
that one network serves several budgets; a part of the clips is cut into uniform cubes, so that these are no stranger to
the decoder than learned ones. cubing.py has the method.

    python -m demos.train.frozen --base mm/models/weights/tiny --run RUN
    python -m demos.train.train_cubes --base mm/models/weights/tiny --run RUN --steps 2000 [--resume] [--device cuda]
        [--init FOLDER]
    python -m demos.train.train_cubes --base mm/models/weights/tiny --run RUN --evaluate --clips 200

With --init the training goes on from finished cubes, as after a change of the checkpoint: the decoder learns from the
first step, and borders get little noise.

RUN/cubes gets state.pt, training.jsonl, model.safetensors, decoder.safetensors and config.json.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer

from demos.train.cube_data import Asked, CubeBatches, Prompt, build_prompt, changed_frames, frame_tokens
from demos.train.cube_eval import evaluate
from demos.train.cubing import CubeNetwork, CubeShape, num_borders, uniform_borders
from demos.train.frozen import FrozenFeatures, save_reducer
from demos.train.reducer_training import ReducerTraining, build_parser, load_reducer, main
from demos.train.train_lm import run_decoder, splice, to_device
from demos.train.training import Optimisers, mean_where
from mm.plugins.weights import checkpoint_fingerprint

FRAMES_PER_CUBE = (3, 5, 8)
AUX_WEIGHT, LABEL_WEIGHT = 1e-3, 0.5
NOISE, NOISE_UNTIL = (1.0, 0.01), 0.6  # of the Gumbel noise, by a cosine; share of the steps
UNIFORM_SHARE = 0.25
FEATURE_NOISE = 0.05  # at most, of the tokens' size: what codecs and cameras add
MUON_LR, ADAM_LR = 3e-3, 1e-3
FREE_FROM = 0.08  # share of the steps after which the decoder is trained too
WARMUP_STEPS, DECAY_FROM = 40, 0.4
CLIPS = 4  # per batch


def noise_at(step: int, num_steps: int, *, warm: bool = False) -> float:
    """Of the Gumbel noise, in a training that began anew or from finished cubes."""
    if warm:
        return NOISE[1]
    done = min(1.0, step / (NOISE_UNTIL * num_steps))
    return NOISE[1] + (NOISE[0] - NOISE[1]) * 0.5 * (1 + float(np.cos(np.pi * done)))


def cubing_losses(logits: list[Tensor], asked: list[Asked]) -> tuple[Tensor, Tensor]:
    """(mean size of the logits, cross-entropy of the changes); those where a cube should begin weigh as the others."""
    size = torch.cat(logits).float().norm(dim=-1).mean()
    labels = torch.cat([changed_frames(one.clip, len(own) + 1)[1:] for own, one in zip(logits, asked, strict=True)])
    labels = labels.to(size.device)
    losses = F.cross_entropy(torch.cat(logits).float(), labels, reduction="none")
    return size, mean_where(losses, labels > 0) + mean_where(losses, labels == 0)


def cut(
    network: CubeNetwork, frames: list[Tensor], rng: np.random.Generator, noise: float, seed: int
) -> tuple[list[Prompt], list[Tensor]]:
    """Visual part of each clip's prompt, with drawn budgets, and the logits of its changes."""
    generator, prompts, logits = torch.Generator(frames[0].device).manual_seed(seed), [], []
    for own in frames:
        per_cube = int(rng.choice(FRAMES_PER_CUBE))
        uniform = rng.random() < UNIFORM_SHARE
        borders = uniform_borders(len(own), num_borders(len(own), per_cube)) if uniform else None
        own = own + torch.randn(own.shape, generator=generator, device=own.device) * (
            rng.random() * FEATURE_NOISE * network.shape.scale
        )
        cubes = network(own, per_cube, borders=borders, noise=noise, rng=generator)
        prompts.append(build_prompt(network.shape, cubes))
        logits.append(cubes.logits)
    return prompts, logits


# ── run ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


class CubesTraining(ReducerTraining):
    """Trains the cubing and, from FREE_FROM on, the decoder's layers with it."""

    save_every: ClassVar[int] = 250

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.decoder = self.model.model.language_model
        self.base = {name: t.clone() for name, t in self.decoder.state_dict().items()}
        width, scale = self.model.config.text_config.hidden_size, mean_size(self.model, self.features)
        self.network = CubeNetwork(CubeShape(width, query_side=args.query_side, scale=scale)).to(args.device)
        if args.init:
            load_reducer(args.init, self.network, self.decoder)
        self.batches = CubeBatches(
            AutoTokenizer.from_pretrained(args.base, trust_remote_code=False), self.features.info
        )
        self.optimisers = build_optimisers(self.decoder.layers, self.network, args.steps)
        self.held_out = self.held_out_features()
        self.parts = {"decoder": self.decoder, "network": self.network, "optimisers": self.optimisers}

    def learn(self, step: int) -> dict[str, Any]:
        if self.args.init or step >= FREE_FROM * self.args.steps:
            self.decoder.layers.requires_grad_(True)
        loss, record = self.loss(step)
        loss.backward()
        self.optimisers.step(step)
        return record

    def loss(self, step: int) -> tuple[Tensor, dict[str, Any]]:
        """The loss of one step, with what is to be recorded."""
        args, rng = self.args, np.random.default_rng([31, step])
        items = rng.integers(self.features.info["clips"], size=args.batch).tolist()
        with torch.autocast(args.device, torch.bfloat16):
            frames = [frame_tokens(self.model, self.features, item, args.device) for item in items]
            noise = noise_at(step, args.steps, warm=bool(args.init))
            prompts, logits = cut(self.network, frames, rng, noise, args.seed * 1_000_003 + step)
            asked = [self.batches.ask(item, rng) for item in items]
            packed = to_device(self.batches.pack(asked, prompts).packed, args.device)
            visual = [prompt.embeddings(self.decoder.embed_tokens, self.batches.digits) for prompt in prompts]
            states, *_ = run_decoder(self.model, splice(self.model, packed, visual), packed, clip=False)
        losses = F.cross_entropy(states.float(), packed.target_token, reduction="none")
        answer = mean_where(losses, packed.target_weight)
        size, label = cubing_losses(logits, asked)
        record = {
            "answer_loss": round(answer.item(), 4),
            "label_loss": round(label.item(), 4),
            "size": round(size.item(), 3),
        }
        return answer + AUX_WEIGHT * size + args.label_weight * label, record

    def check(self) -> dict[str, Any]:
        tokenizer = self.batches.packer.tokenizer
        return evaluate(self.model, self.base, self.network, tokenizer, self.held_out, (3,), short=True)

    def evaluate(self) -> dict[str, Any]:
        tokenizer = self.batches.packer.tokenizer
        return evaluate(self.model, self.base, self.network, tokenizer, self.held_out, tuple(self.args.budgets))

    def save(self, step: int, trained: dict[str, Any]) -> None:
        args, network, info = self.args, self.network, self.features.info
        free = args.init or step > FREE_FROM * args.steps
        changed = {f"layers.{n}": p for n, p in self.decoder.layers.named_parameters()} if free else {}
        parts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
        config = {"reducer": "cubes", "base": checkpoint_fingerprint(args.base), **asdict(network.shape)}
        config |= {"frames_per_cube": list(FRAMES_PER_CUBE), "default_frames_per_cube": FRAMES_PER_CUBE[0]}
        config |= {"input": "projected frames, pooled 2x2", "timestamps": "frame number, digits before each cube"}
        config |= {"parameters": {**parts, "decoder": sum(p.numel() for p in changed.values())}}
        config["decoder_prefix"] = "model.language_model."
        config["trained"] = {"steps": step, "of_steps": args.steps, "seed": args.seed, "batch": args.batch, **trained}
        config["data"] = {"clips": info["clips"], "first_seed": info["first_seed"]}
        digits = self.decoder.embed_tokens.weight[torch.tensor(self.batches.digits)]
        save_reducer(self.out, {**network.state_dict(), "digits": digits}, config, changed)


def mean_size(model: nn.Module, features: FrozenFeatures) -> float:
    with torch.no_grad():
        parts = [frame_tokens(model, features, i, model.device.type) for i in range(min(8, features.info["clips"]))]
    return round(torch.cat(parts).float().square().mean().sqrt().item(), 2)


def build_optimisers(layers: nn.Module, network: CubeNetwork, num_steps: int) -> Optimisers:
    parameters = [*layers.parameters(), *network.parameters()]
    return Optimisers(
        [p for p in parameters if p.ndim == 2],
        [p for p in parameters if p.ndim != 2],
        muon_lr=MUON_LR,
        adam_lr=ADAM_LR,
        num_steps=num_steps,
        warmup_steps=WARMUP_STEPS,
        decay_from=DECAY_FROM,
    )


def arguments() -> argparse.ArgumentParser:
    parser = build_parser(__doc__, name="cubes", steps=2000, clips=40)
    parser.add_argument("--init", type=Path, help="folder of finished `cubes` from which to go on")
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=FRAMES_PER_CUBE, help="frames per cube at which --evaluate measures"
    )
    parser.add_argument("--batch", type=int, default=CLIPS, help="clips per step")
    parser.add_argument("--query-side", type=int, default=4, help="tokens per cube: its square")
    parser.add_argument("--label-weight", type=float, default=LABEL_WEIGHT, help="0: no labels of changes")
    return parser


if __name__ == "__main__":
    main(CubesTraining, arguments())
