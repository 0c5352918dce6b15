"""Train Dynamic-LLaVA for a finished checkpoint: predictors of what to drop, and a decoder that is used to it.

First the predictors alone, the decoder frozen; from FREE_FROM on the decoder too, at a small rate (--adapt). The share
of tokens to keep falls from START_RATIO to its goal within the first ANNEAL of the steps, so that there is something
to choose between from the first step on. sparse.py has the method.

    python -m demos.train.frozen --base mm/models/weights/tiny --run RUN
    python -m demos.train.train_dynamic --base mm/models/weights/tiny --run RUN --steps 1600 [--resume] [--device cuda]
    python -m demos.train.train_dynamic --base mm/models/weights/tiny --run RUN --evaluate --scenes 256

RUN holds the features. RUN/dynamic gets state.pt, training.jsonl, and what ships: model.safetensors (predictors),
decoder.safetensors (the changed tensors), config.json.
"""

import argparse
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer

from demos.train.compare import summary
from demos.train.dynamic_eval import HeldOut, ask, report
from demos.train.frozen import FrozenBatches, save_reducer
from demos.train.lm_data import Batch
from demos.train.packing import Packed
from demos.train.reducer_training import ReducerTraining, build_parser, main
from demos.train.sparse import Decide, by_answer, run_sparse
from demos.train.train_lm import splice, to_device, visual_tokens
from demos.train.training import Optimisers, mean_where, split_matrices
from mm.plugins.weights import checkpoint_fingerprint
from pruning.learned.predictors import Predictors, PredictorShape

IMAGE_RATIO, TEXT_RATIO = 0.22, 0.3  # of the visual tokens of an image; of generated tokens after the first few
RATIO_WEIGHT = 100.0
START_RATIO, ANNEAL = 0.9, 0.25
FREE_FROM = 0.15
LONG_TOKENS = 20  # answers of so many tokens are held to TEXT_RATIO
TEMPERATURE = (1.0, 0.1)
PREDICTOR_LR, MUON_LR, NORM_SHARE = 2e-3, 7e-4, 0.1
WARMUP_STEPS, DECAY_FROM = 30, 0.4
SCENES, CLIPS, CLIP_SHARE = 6, 2, 0.12  # per batch; share of the batches that are clips
OTHER_ROWS = 0.25  # of the batches: with turns, system messages, questions first; nothing generated is dropped there


# ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def batch_of(batches: FrozenBatches, step: int) -> tuple[Batch, bool]:
    """The batch of a step, and whether generated tokens may be dropped in it."""
    rng = np.random.default_rng([21, step])
    clip, plain = rng.random() < CLIP_SHARE, rng.random() > OTHER_ROWS
    kind, count = ("clips", CLIPS) if clip and batches.info["clips"] else ("scenes", SCENES)
    return batches.draw(kind, rng.integers(batches.info[kind], size=count).tolist(), rng, plain=plain), plain


# ── losses ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def budget_losses(
    packed: Packed, image: list[Tensor], output: Tensor | None, goals: tuple[float, float], skip: int
) -> Tensor:
    """Squared distance of the kept shares from the goals: over pictures, and over long answers."""
    loss = torch.stack([(kept.mean() - goals[0]) ** 2 for kept in image]).mean() if image else torch.zeros(())
    if output is None:
        return loss
    count, share = by_answer(packed, output, skip)
    return loss + mean_where((share - goals[1]) ** 2, count >= LONG_TOKENS)


def progress(step: int, num_steps: int) -> tuple[tuple[float, float], float]:
    """(shares to keep of image and text, temperature) at a step."""
    done = min(1.0, step / (ANNEAL * num_steps))
    goals = tuple(START_RATIO + done * (goal - START_RATIO) for goal in (IMAGE_RATIO, TEXT_RATIO))
    return goals, TEMPERATURE[0] * (TEMPERATURE[1] / TEMPERATURE[0]) ** (step / num_steps)


# ── run ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def adapted(model: nn.Module, adapt: str) -> list[tuple[str, nn.Parameter]]:
    """Parameters of the decoder's layers that are trained: all, those of attention, or none."""
    layers = model.model.language_model.layers
    names = {"all": "", "attention": "self_attn", "none": "?"}
    return [(f"layers.{name}", p) for name, p in layers.named_parameters() if names[adapt] in name]


def build_optimisers(model: nn.Module, predictors: Predictors, trained: list[nn.Parameter], steps: int) -> Optimisers:
    """Muon for the trained matrices of the decoder, AdamW for the predictors and, slower, for the decoder's norms."""
    decoder, inside = model.model.language_model, {id(p) for p in trained}
    matrices, _ = split_matrices(decoder, decoder.layers)
    norms = [p for p in trained if p.ndim < 2]
    optimisers = Optimisers(
        [p for p in matrices if id(p) in inside] or [nn.Parameter(torch.zeros(1, 1))],  # Muon refuses an empty list
        list(predictors.parameters()),
        muon_lr=MUON_LR,
        adam_lr=PREDICTOR_LR,
        num_steps=steps,
        warmup_steps=WARMUP_STEPS,
        decay_from=DECAY_FROM,
        calmed=norms,
    )
    optimisers.calm(NORM_SHARE if norms else 1.0)
    return optimisers


def kept_at(held_out: dict[str, Any]) -> list[list[float]]:
    """[share of the generated tokens of long answers that was kept, threshold] of each threshold that was measured."""
    found = []
    for name, figures in held_out.items():
        if name == "dynamic" or name.startswith("dynamic, threshold"):
            kept = figures["kept"]
            share = kept["long kept"] / max(1, kept["long"])
            found.append([round(share, 4), float(name.rpartition(" ")[2]) if "threshold" in name else 0.0])
    return sorted(found)


class DynamicTraining(ReducerTraining):
    """Trains the predictors and, from FREE_FROM on, the adapted part of the decoder."""

    save_every: ClassVar[int] = 200

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        width, decoder = self.model.config.text_config.hidden_size, self.model.model.language_model
        self.base = {name: t.clone() for name, t in decoder.state_dict().items()}
        layers = {"image_layer": args.image_layer, "text_layer": args.text_layer}
        shape = PredictorShape(width=width, channels=args.channels or width // 8, **layers)
        self.predictors = Predictors(shape).to(args.device)
        tokenizer = AutoTokenizer.from_pretrained(args.base, trust_remote_code=False)
        self.batches = FrozenBatches(tokenizer, self.features.info)
        self.trained = [p for _, p in adapted(self.model, args.adapt)]
        self.optimisers = build_optimisers(self.model, self.predictors, self.trained, args.steps)
        self.held_out = HeldOut(tokenizer, self.held_out_features())
        self.parts = {"decoder": decoder, "predictors": self.predictors, "optimisers": self.optimisers}

    def learn(self, step: int) -> dict[str, Any]:
        if step >= FREE_FROM * self.args.steps:
            for parameter in self.trained:
                parameter.requires_grad_(True)
        batch, plain = batch_of(self.batches, step)
        loss, record = self.loss(batch, plain, step)
        if loss.requires_grad:  # not where nothing is decided and the decoder is frozen
            loss.backward()
            self.optimisers.step(step)
        return record

    def loss(self, batch: Batch, plain: bool, step: int) -> tuple[Tensor, dict[str, Any]]:
        """The loss of one step, with what is to be recorded."""
        args, keep_first = self.args, self.predictors.shape.keep_first
        goals, temperature = progress(step, args.steps)
        packed = to_device(batch.packed, args.device)
        decide = Decide(temperature, torch.Generator(args.device).manual_seed(args.seed * 1_000_003 + step), text=plain)
        decide.images = (
            not batch.clip
        )  # clips keep their visual tokens; they are in the data so that the decoder does not forget them
        with torch.autocast(args.device, torch.bfloat16):
            embeds = splice(self.model, packed, visual_tokens(self.model, self.features, batch, args.device))
            logits, decisions = run_sparse(self.model, self.predictors, embeds, packed, decide)
        losses = F.cross_entropy(logits.float(), packed.target_token, reduction="none")
        answer = mean_where(losses, packed.target_weight)
        budget = budget_losses(packed, decisions.image, decisions.output, goals, keep_first)
        record = {"answer_loss": round(answer.item(), 4), "budget_loss": round(budget.item(), 5), "clip": batch.clip}
        if decisions.image:
            record["image_kept"] = round(float(torch.stack([k.detach().mean() for k in decisions.image]).mean()), 3)
        if plain:
            count, share = by_answer(packed, decisions.output.detach(), keep_first)
            record["text_kept"] = round(mean_where(share, count >= LONG_TOKENS).item(), 3)
        return answer + RATIO_WEIGHT * budget, record

    def check(self) -> dict[str, Any]:
        pictures, clips, kept = ask(self.model, self.predictors, self.held_out, Decide(image_ratio=IMAGE_RATIO))
        return {"pictures": summary(pictures), "clips": summary(clips), "kept": kept}

    def evaluate(self) -> dict[str, Any]:
        return report(self.model, self.base, self.predictors, self.held_out, IMAGE_RATIO)

    def save(self, step: int, trained: dict[str, Any]) -> None:
        args, info, predictors = self.args, self.features.info, self.predictors
        changed = dict(adapted(self.model, args.adapt)) if step > FREE_FROM * args.steps else {}
        sizes = {p: sum(t.numel() for t in getattr(predictors, p).parameters()) for p in ("image", "text")}
        config = {"reducer": "dynamic", "base": checkpoint_fingerprint(args.base), **asdict(predictors.shape)}
        config |= {"image_keep_ratio": IMAGE_RATIO, "text_keep_ratio": TEXT_RATIO, "text_threshold": 0.0}
        config["text_kept_at"] = kept_at(trained.get("held_out", {}))
        config |= {"keep_class": 0, "media": ["image"]}  # media: whose visual tokens are dropped
        config["parameters"] = {**sizes, "decoder": sum(p.numel() for p in changed.values())}
        config["decoder_prefix"] = "model.language_model."
        config["trained"] = {"steps": step, "of_steps": args.steps, "seed": args.seed, "adapt": args.adapt, **trained}
        config["data"] = {name: info[name] for name in ("scenes", "clips", "first_seed")}
        save_reducer(self.out, dict(predictors.state_dict()), config, changed)


def arguments() -> argparse.ArgumentParser:
    parser = build_parser(__doc__, name="dynamic", steps=1600, scenes=48, clips=8)
    parser.add_argument("--adapt", choices=("all", "attention", "none"), default="all", help="of the decoder's layers")
    parser.add_argument("--channels", type=int, help="of the predictors; an eighth of the width by default")
    parser.add_argument("--image-layer", type=int, default=0)
    parser.add_argument("--text-layer", type=int, default=1)
    return parser


if __name__ == "__main__":
    main(DynamicTraining, arguments())
