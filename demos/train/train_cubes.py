"""Train cubes for a finished checkpoint: where a clip is cut, a resampler per cube, a thumbnail, and the decoder.

The cubing learns from two sides: the decoder's loss by way of the thumbnail, as published, and the generator's own
event times as labels of the changes (LABEL_WEIGHT; 0 where there are none). Every clip draws its frames per cube, so
that one network serves several budgets; a part of the clips is cut into uniform cubes, so that these are no stranger to
the decoder than learned ones. cubing.py has the method.

    python -m demos.train.frozen --base mm/models/weights/tiny --run RUN
    python -m demos.train.train_cubes --base mm/models/weights/tiny --run RUN --steps 2000 [--resume] [--device cuda]
    python -m demos.train.train_cubes --base mm/models/weights/tiny --run RUN --evaluate --clips 200

RUN/cubes gets state.pt, training.jsonl, model.safetensors, decoder.safetensors and config.json.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer

from demos.train.cube_data import Asked, CubeBatches, Prompt, build_prompt, changed_frames, frame_tokens
from demos.train.cube_eval import evaluate, held_out_clips
from demos.train.cubing import CubeNetwork, CubeShape, num_borders, uniform_borders
from demos.train.frozen import FrozenFeatures, fingerprint, load_base, save_reducer
from demos.train.train_lm import run_decoder, splice, to_device
from demos.train.training import Optimisers, append_record, mean_where, save_checkpoint

FRAMES_PER_CUBE = (3, 5, 8)
AUX_WEIGHT, LABEL_WEIGHT = 1e-3, 0.5
NOISE, NOISE_UNTIL = (1.0, 0.01), 0.6  # of the Gumbel noise, by a cosine; share of the steps
UNIFORM_SHARE = 0.25
FEATURE_NOISE = 0.05  # at most, of the tokens' size: what codecs and cameras add
MUON_LR, ADAM_LR = 3e-3, 1e-3
FREE_FROM = 0.08  # share of the steps after which the decoder is trained too
WARMUP_STEPS, DECAY_FROM = 40, 0.4
CLIPS = 4  # per batch
SAVE_EVERY = 250


def noise_at(step: int, num_steps: int) -> float:
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


def learn(
    model: nn.Module,
    network: CubeNetwork,
    batches: CubeBatches,
    features: FrozenFeatures,
    args: argparse.Namespace,
    step: int,
) -> tuple[Tensor, dict]:
    """The loss of one step, with what is to be recorded."""
    rng = np.random.default_rng([31, step])
    items = rng.integers(features.info["clips"], size=args.batch).tolist()
    with torch.autocast(args.device, torch.bfloat16):
        frames = [frame_tokens(model, features, item, args.device) for item in items]
        prompts, logits = cut(network, frames, rng, noise_at(step, args.steps), args.seed * 1_000_003 + step)
        asked = [batches.ask(item, rng) for item in items]
        batch = batches.pack(asked, prompts)
        packed = to_device(batch.packed, args.device)
        visual = [prompt.embeddings(model.model.language_model.embed_tokens, batches.digits) for prompt in prompts]
        states, *_ = run_decoder(model, splice(model, packed, visual), packed, clip=False)
    losses = F.cross_entropy(states.float(), packed.target_token, reduction="none")
    answer = mean_where(losses, packed.target_weight)
    size, label = cubing_losses(logits, asked)
    record = {
        "answer_loss": round(answer.item(), 4),
        "label_loss": round(label.item(), 4),
        "size": round(size.item(), 3),
    }
    return answer + AUX_WEIGHT * size + args.label_weight * label, record


# ── run ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def ship(args: argparse.Namespace, model: nn.Module, network: CubeNetwork, step: int, more: dict) -> None:
    layers = model.model.language_model.layers
    changed = {f"layers.{n}": p for n, p in layers.named_parameters()} if step > FREE_FROM * args.steps else {}
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    config = {"reducer": "cubes", "base": fingerprint(args.base), **network.shape.as_dict()}
    config |= {"frames_per_cube": list(FRAMES_PER_CUBE), "default_frames_per_cube": FRAMES_PER_CUBE[0]}
    config |= {"input": "projected frames, pooled 2x2", "timestamps": "frame number, digits before each cube"}
    config |= {"parameters": {**parts, "decoder": sum(p.numel() for p in changed.values())}}
    config["decoder_prefix"] = "model.language_model."
    config["trained"] = {"steps": step, "of_steps": args.steps, "seed": args.seed, "batch": args.batch, **more}
    config["data"] = {"clips": args.info["clips"], "first_seed": args.info["first_seed"]}
    save_reducer(args.run / args.name, dict(network.state_dict()), config, changed)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="exported folder of the finished checkpoint")
    parser.add_argument("--run", type=Path, required=True, help="folder with its features; results go to RUN/NAME")
    parser.add_argument("--name", default="cubes")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--stop-at", type=int, help="leave early, the schedule being that of --steps")
    parser.add_argument("--batch", type=int, default=CLIPS, help="clips per step")
    parser.add_argument("--query-side", type=int, default=4, help="tokens per cube: its square")
    parser.add_argument("--label-weight", type=float, default=LABEL_WEIGHT, help="0: no labels of changes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clips", type=int, default=40, help="held-out ones")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--evaluate", action="store_true", help="measure RUN/NAME and train nothing")
    return parser


def main() -> None:
    args = arguments().parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    run(args)


def mean_size(model: nn.Module, features: FrozenFeatures) -> float:
    with torch.no_grad():
        parts = [frame_tokens(model, features, i, model.device.type) for i in range(min(8, features.info["clips"]))]
    return round(torch.cat(parts).float().square().mean().sqrt().item(), 2)


def build_optimisers(model: nn.Module, network: CubeNetwork, num_steps: int) -> Optimisers:
    layers = list(model.model.language_model.layers.parameters())
    parameters = [*layers, *network.parameters()]
    return Optimisers(
        [p for p in parameters if p.ndim == 2],
        [p for p in parameters if p.ndim != 2],
        muon_lr=MUON_LR,
        adam_lr=ADAM_LR,
        num_steps=num_steps,
        warmup_steps=WARMUP_STEPS,
        decay_from=DECAY_FROM,
    )


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model, features = load_base(args.base, args.device), FrozenFeatures(args.run)
    if features.info["base"] != fingerprint(args.base):
        raise SystemExit(
            f"{args.run} holds features of another checkpoint than {args.base}; run demos.train.frozen anew"
        )
    args.info, out, decoder = features.info, args.run / args.name, model.model.language_model
    base = {name: t.clone() for name, t in decoder.state_dict().items()}
    shape = CubeShape(
        model.config.text_config.hidden_size, query_side=args.query_side, scale=mean_size(model, features)
    )
    network = CubeNetwork(shape).to(args.device)
    batches = CubeBatches(AutoTokenizer.from_pretrained(args.base), features.info)
    optimisers, first, seconds = build_optimisers(model, network, args.steps), 0, 0.0
    if args.resume or args.evaluate:
        state = torch.load(out / "state.pt", map_location=args.device)
        decoder.load_state_dict(state["decoder"])
        network.load_state_dict(state["network"])
        optimisers.load_state_dict(state["optimisers"])
        first, seconds = state["step"], state["seconds"]
    held_out = held_out_clips(model, args.clips)
    if args.evaluate:
        result = evaluate(model, base, network, batches.packer.tokenizer, held_out, FRAMES_PER_CUBE)
        ship(args, model, network, first, {"seconds": round(seconds), "held_out": result, "held_out_clips": args.clips})
        print(json.dumps(result, indent=1))
        return
    start = time.time() - seconds
    for step in (bar := tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=10)):
        if step >= FREE_FROM * args.steps:
            decoder.layers.requires_grad_(True)
        loss, record = learn(model, network, batches, features, args, step)
        loss.backward()
        optimisers.step(step)
        if step % 10 == 0:
            bar.set_postfix_str(f"answer {record['answer_loss']}", refresh=False)
            append_record(out / "training.jsonl", step=step, **record)
        last = step + 1 == (args.stop_at or args.steps)
        if (step + 1) % SAVE_EVERY == 0 or last:
            seconds = time.time() - start
            scores = evaluate(model, base, network, batches.packer.tokenizer, held_out, (3,), short=True)
            append_record(out / "training.jsonl", step=step + 1, seconds=round(seconds), held_out=scores)
            tqdm.write(f"step {step + 1} {scores}")
            save_checkpoint(
                out / "state.pt",
                decoder=decoder.state_dict(),
                network=network.state_dict(),
                optimisers=optimisers.state_dict(),
                step=step + 1,
                seconds=seconds,
            )
            ship(args, model, network, step + 1, {"seconds": round(seconds)})
        if last:
            break


if __name__ == "__main__":
    main()
