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
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer

from demos.train.compare import summary
from demos.train.dynamic_eval import HeldOut, ask, report
from demos.train.frozen import FrozenBatches, FrozenFeatures, fingerprint, load_base, save_reducer
from demos.train.lm_data import Batch, Features
from demos.train.packing import Packed
from demos.train.sparse import Decide, Predictors, Shape, by_answer, run_sparse
from demos.train.train_lm import splice, to_device, visual_tokens
from demos.train.training import Optimisers, append_record, mean_where, save_checkpoint, split_matrices

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
SAVE_EVERY = 200


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


def ship(args: argparse.Namespace, model: nn.Module, predictors: Predictors, step: int, more: dict) -> None:
    changed = dict(adapted(model, args.adapt)) if step > FREE_FROM * args.steps else {}
    config = {"reducer": "dynamic", "base": fingerprint(args.base), **predictors.shape.as_dict()}
    config |= {"image_keep_ratio": IMAGE_RATIO, "text_keep_ratio": TEXT_RATIO, "text_threshold": 0.0, "keep_class": 0}
    config |= {
        "parameters": {p: sum(t.numel() for t in getattr(predictors, p).parameters()) for p in ("image", "text")}
    }
    config["parameters"]["decoder"] = sum(p.numel() for p in changed.values())
    config["media"] = ["image"]  # whose visual tokens are dropped
    config["decoder_prefix"] = "model.language_model."
    config["trained"] = {"steps": step, "of_steps": args.steps, "seed": args.seed, "adapt": args.adapt, **more}
    config["data"] = {"scenes": args.info["scenes"], "clips": args.info["clips"], "first_seed": args.info["first_seed"]}
    save_reducer(args.run / args.name, dict(predictors.state_dict()), config, changed)


def learn(
    model: nn.Module,
    predictors: Predictors,
    features: Features,
    batch: Batch,
    plain: bool,
    args: argparse.Namespace,
    step: int,
) -> tuple[Tensor, dict]:
    """The loss of one step, with what is to be recorded."""
    goals, temperature = progress(step, args.steps)
    packed = to_device(batch.packed, args.device)
    decide = Decide(temperature, torch.Generator(args.device).manual_seed(args.seed * 1_000_003 + step), text=plain)
    decide.images = not batch.clip  # clips keep their visual tokens; they are here for the decoder not to forget them
    with torch.autocast(args.device, torch.bfloat16):
        embeds = splice(model, packed, visual_tokens(model, features, batch, args.device))
        logits, decisions = run_sparse(model, predictors, embeds, packed, decide)
    losses = F.cross_entropy(logits.float(), packed.target_token, reduction="none")
    answer = mean_where(losses, packed.target_weight)
    budget = budget_losses(packed, decisions.image, decisions.output, goals, predictors.shape.keep_first)
    record = {"answer_loss": round(answer.item(), 4), "budget_loss": round(budget.item(), 5), "clip": batch.clip}
    if decisions.image:
        record["image_kept"] = round(float(torch.stack([k.detach().mean() for k in decisions.image]).mean()), 3)
    if plain:
        count, share = by_answer(packed, decisions.output.detach(), predictors.shape.keep_first)
        record["text_kept"] = round(mean_where(share, count >= LONG_TOKENS).item(), 3)
    return answer + RATIO_WEIGHT * budget, record


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="exported folder of the finished checkpoint")
    parser.add_argument("--run", type=Path, required=True, help="folder with its features; results go to RUN/NAME")
    parser.add_argument("--name", default="dynamic")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--stop-at", type=int, help="leave early, the schedule being that of --steps")
    parser.add_argument("--adapt", choices=("all", "attention", "none"), default="all", help="of the decoder's layers")
    parser.add_argument("--channels", type=int, help="of the predictors; an eighth of the width by default")
    parser.add_argument("--image-layer", type=int, default=0)
    parser.add_argument("--text-layer", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scenes", type=int, default=48, help="held-out ones")
    parser.add_argument("--clips", type=int, default=8, help="held-out ones")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--evaluate", action="store_true", help="measure RUN/NAME and train nothing")
    return parser


def main() -> None:
    args = arguments().parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    run(args)


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model = load_base(args.base, args.device)
    width, decoder = model.config.text_config.hidden_size, model.model.language_model
    base = {name: t.clone() for name, t in decoder.state_dict().items()}
    shape = Shape(width, args.channels or width // 8, image_layer=args.image_layer, text_layer=args.text_layer)
    predictors = Predictors(shape).to(args.device)
    features = FrozenFeatures(args.run)
    args.info, out = features.info, args.run / args.name
    if features.info["base"] != fingerprint(args.base):
        raise SystemExit(
            f"{args.run} holds features of another checkpoint than {args.base}; run demos.train.frozen anew"
        )
    batches = FrozenBatches(AutoTokenizer.from_pretrained(args.base), features.info)
    trained = [p for _, p in adapted(model, args.adapt)]
    inside = {id(p) for p in trained}
    matrices, _ = split_matrices(decoder, decoder.layers)
    optimisers = Optimisers(
        [p for p in matrices if id(p) in inside] or [nn.Parameter(torch.zeros(1, 1))],
        list(predictors.parameters()),
        muon_lr=MUON_LR,
        adam_lr=PREDICTOR_LR,
        num_steps=args.steps,
        warmup_steps=WARMUP_STEPS,
        decay_from=DECAY_FROM,
        calmed=[p for p in trained if p.ndim < 2],
    )
    optimisers.calm(NORM_SHARE if any(p.ndim < 2 for p in trained) else 1.0)
    first, seconds = 0, 0.0
    if args.resume or args.evaluate:
        state = torch.load(out / "state.pt", map_location=args.device)
        decoder.load_state_dict(state["decoder"])
        predictors.load_state_dict(state["predictors"])
        optimisers.load_state_dict(state["optimisers"])
        first, seconds = state["step"], state["seconds"]
    held_out = HeldOut(model, batches, args.scenes, args.clips)
    if args.evaluate:
        result = report(model, base, predictors, held_out, IMAGE_RATIO)
        ship(args, model, predictors, first, {"seconds": round(seconds), "held_out": result, "scenes": args.scenes})
        print(json.dumps(result, indent=1))
        return
    start = time.time() - seconds
    for step in (bar := tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=10)):
        if step >= FREE_FROM * args.steps:
            for parameter in trained:
                parameter.requires_grad_(True)
        batch, plain = batch_of(batches, step)
        loss, record = learn(model, predictors, features, batch, plain, args, step)
        if loss.requires_grad:  # not where nothing is decided and the decoder is frozen
            loss.backward()
            optimisers.step(step)
        if step % 10 == 0:
            bar.set_postfix_str(f"answer {record['answer_loss']} kept {record.get('image_kept')}", refresh=False)
            append_record(out / "training.jsonl", step=step, **record)
        last = step + 1 == (args.stop_at or args.steps)
        if (step + 1) % SAVE_EVERY == 0 or last:
            seconds = time.time() - start
            pictures, clips, kept = ask(model, predictors, held_out, Decide(image_ratio=IMAGE_RATIO))
            scores = {"pictures": summary(pictures), "clips": summary(clips), "kept": kept}
            append_record(out / "training.jsonl", step=step + 1, seconds=round(seconds), held_out=scores)
            tqdm.write(f"step {step + 1} {scores}")
            save_checkpoint(
                out / "state.pt",
                decoder=decoder.state_dict(),
                predictors=predictors.state_dict(),
                optimisers=optimisers.state_dict(),
                step=step + 1,
                seconds=seconds,
            )
            ship(args, model, predictors, step + 1, {"seconds": round(seconds), "held_out": scores})
        if last:
            break


if __name__ == "__main__":
    main()
