"""Train a router for a finished checkpoint: which groups of 2x2 patches go on whole, and which as their mean.

The idea of ViR in InternVL3.5-Flash (arXiv:2508.18265): whether the loss gets worse when something is compressed. Here
it is asked of every group at once. The loss is followed while all groups shrink to their means in STEPS_OF_PATH steps;
the gradients on the way, times the way, share the loss's rise out among the groups (integrated gradients). The groups
whose share of the rise is among the largest OPEN_SHARE of recent ones are labelled "all". The checkpoint is frozen.

    python -m demos.train.frozen --base mm/models/weights/tiny --run RUN
    python -m demos.train.train_router --base mm/models/weights/tiny --run RUN --steps 120 [--resume] [--device cuda]
    python -m demos.train.train_router --base mm/models/weights/tiny --run RUN --evaluate --scenes 200

RUN/router gets state.pt, training.jsonl, model.safetensors and config.json.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer

from demos.train.compare import Answers, answers_by_row, paired, summary
from demos.train.data.questions import Question
from demos.train.frozen import (
    CHECK_SEED,
    FrozenBatches,
    FrozenFeatures,
    fingerprint,
    load_base,
    pack_rows,
    save_reducer,
)
from demos.train.train_lm import run_decoder, splice, to_device
from demos.train.training import append_record, save_checkpoint

GROUP = 2  # patches along a side of a group
HIDDEN = 64
STEPS_OF_PATH = 4
OPEN_SHARE = 0.25  # of the groups of recent pictures that are labelled "all"
LR, BATCH, UPDATES, MINIBATCH = 1e-3, 6, 30, 1024  # scenes per step; updates of the head per step, groups in each
RECENT = 60_000  # groups that are gone through again
BUDGETS = (0.3, 0.4, 0.5)  # kept tokens / tokens, those of compressed groups included
SAVE_EVERY = 20


class Router(nn.Module):
    """Groups (..., 4, D) of projected tokens → (...,) score, higher = keep all four."""

    def __init__(self, width: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.norm_mean, self.norm_spread = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(2 * width + 1, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, groups: Tensor) -> Tensor:
        mean = groups.mean(-2)
        spread = (groups - mean[..., None, :]).abs().mean(-2)
        size = (
            spread.mean(-1, keepdim=True).add(1e-6).log()
        )  # what the norm takes away, and the training-free rule reads
        return self.mlp(torch.cat([self.norm_mean(mean), self.norm_spread(spread), size], dim=-1))[..., 0]


def group_index(side: int) -> Tensor:
    """(G, 4): the tokens of each group, in reading order."""
    cells = torch.arange(side * side).view(side // GROUP, GROUP, side // GROUP, GROUP)
    return cells.transpose(1, 2).reshape(-1, GROUP * GROUP)


def num_open(num_groups: int, keep_ratio: float) -> int:
    """Groups that may go on whole so that keep_ratio of all tokens are kept, one per group at least."""
    per_group = GROUP * GROUP
    return max(0, min(num_groups, math.floor((keep_ratio * per_group - 1) * num_groups / (per_group - 1) + 1e-9)))


def route(tokens: Tensor, score: Tensor, opened: int) -> tuple[Tensor, list[int]]:
    """(kept tokens (n, D), their positions): the groups of highest score whole, of the others the mean at its first."""
    index = group_index(math.isqrt(len(tokens))).to(tokens.device)
    whole = score.sort(descending=True, stable=True).indices[:opened]
    is_whole = torch.zeros(len(index), dtype=torch.bool, device=tokens.device).index_fill_(0, whole, True)
    result, keep = tokens.clone(), torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    result[index[~is_whole][:, 0]] = tokens[index[~is_whole]].mean(1)
    keep[index[is_whole].flatten()], keep[index[~is_whole][:, 0]] = True, True
    return result[keep], keep.nonzero().flatten().tolist()


# ── labels ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def project(model: nn.Module, features: FrozenFeatures, items: list[int], device: str) -> Tensor:
    with torch.no_grad():
        return model.model.multi_modal_projector(features.scenes[items].to(device).float()).float()


def rise_by_group(model: nn.Module, batches: FrozenBatches, features: FrozenFeatures, step: int) -> tuple[Tensor, ...]:
    """(groups (B, G, 4, D), share (B, G) of each in the rise of its picture's loss, the rise (B,), the loss (B,))."""
    rng, device = np.random.default_rng([41, step]), model.device.type
    items = rng.integers(features.info["scenes"], size=BATCH).tolist()
    packed = to_device(batches.draw("scenes", items, rng).packed, device)
    with torch.autocast(device, torch.bfloat16):
        tokens = project(model, features, items, device)
        index = group_index(math.isqrt(tokens.shape[1])).to(device)
        groups = tokens[:, index]
        way = torch.zeros_like(tokens)
        way[:, index] = groups.mean(2, keepdim=True) - groups
        gradient, losses = torch.zeros_like(tokens), []
        for i in range(STEPS_OF_PATH):
            here = (tokens + (i + 0.5) / STEPS_OF_PATH * way).requires_grad_()
            loss = losses_by_row(model, here, packed)
            gradient += torch.autograd.grad(loss.sum(), here)[0] / STEPS_OF_PATH
        with torch.no_grad():
            losses = [losses_by_row(model, at, packed) for at in (tokens, tokens + way)]
    share = (gradient * way).sum(-1)[:, index].sum(-1)
    return groups, share, losses[1] - losses[0], losses[0]


def losses_by_row(model: nn.Module, tokens: Tensor, packed: object) -> Tensor:
    """(B,) loss of each picture's answers, weighed as in the training of the checkpoint."""
    logits, *_ = run_decoder(model, splice(model, packed, list(tokens)), packed, clip=False)
    losses = F.cross_entropy(logits.float(), packed.target_token, reduction="none") * packed.target_weight
    total = torch.zeros(len(tokens), device=tokens.device).index_add(0, packed.target_row, losses)
    return total / torch.zeros_like(total).index_add(0, packed.target_row, packed.target_weight)


# ── evaluation ────────────────────────────────────────────────────────────────────────────────────────────────────────


def scores_of(router: Router, groups: Tensor, variant: str, rng: np.random.Generator) -> Tensor:
    if variant == "router":
        return router(groups)
    if variant == "spread":  # the training-free rule: groups whose patches differ most
        return (groups - groups.mean(-2, keepdim=True)).norm(dim=-1).mean(-1)
    return torch.from_numpy(rng.random(len(groups))).to(groups.device)


@torch.no_grad()
def ask(
    model: nn.Module, router: Router, batches: FrozenBatches, features: FrozenFeatures, variant: str, keep_ratio: float
) -> Answers:
    """(task, right) of every question, by picture."""
    device, result = model.device.type, []
    rng, asking = np.random.default_rng(42), np.random.default_rng(43)
    for start in range(0, features.info["scenes"], 8):
        items = list(range(start, min(start + 8, features.info["scenes"])))
        drawn = batches.draw("scenes", items, asking, unseen=bool((start // 8) % 2))
        starts = [drawn.packed.target_question[drawn.packed.target_row == b].min().item() for b in range(len(items))]
        asked: list[list[Question]] = [
            drawn.questions[a:b] for a, b in zip(starts, [*starts[1:], len(drawn.questions)], strict=True)
        ]
        with torch.autocast(device, torch.bfloat16):
            tokens = project(model, features, items, device)
            index = group_index(math.isqrt(tokens.shape[1])).to(device)
            opened = num_open(len(index), keep_ratio)
            made = [route(one, scores_of(router, one[index], variant, rng), opened) for one in tokens]
            places = [at for _, at in made]
            batch = pack_rows(batches.packer, asked, places, [tokens.shape[1]] * len(items), clip=False)
            packed = to_device(batch.packed, device)
            logits, *_ = run_decoder(model, splice(model, packed, [kept for kept, _ in made]), packed, clip=False)
        result += answers_by_row(logits, batch)
    return result


def evaluate(
    model: nn.Module, router: Router, batches: FrozenBatches, features: FrozenFeatures, *, short: bool = False
) -> dict:
    """Accuracy at each budget beside the training-free rule and chance; short: the router at one budget."""
    if short:
        return {"router 0.4": summary(ask(model, router, batches, features, "router", 0.4))["mean"]}
    result, found = {}, {}
    plan = [("none", 1.0), ("pooled", 0.25)] + [(v, b) for b in BUDGETS for v in ("router", "spread", "random")]
    for variant, budget in plan:
        found[variant, budget] = ask(model, router, batches, features, variant, budget)
        result[f"{variant} {budget}"] = summary(found[variant, budget])
    for budget in BUDGETS:
        result[f"router - spread {budget}"] = paired(found["router", budget], found["spread", budget])
    return result


# ── run ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Recent:
    """Groups and their shares of the last pictures."""

    def __init__(self) -> None:
        self.groups, self.shares = torch.zeros(0), torch.zeros(0)

    def add(self, groups: Tensor, shares: Tensor) -> None:
        groups, shares = groups.flatten(0, 1).cpu(), shares.flatten().cpu()
        self.groups = torch.cat([self.groups, groups])[-RECENT:] if len(self.groups) else groups
        self.shares = torch.cat([self.shares, shares])[-RECENT:]

    def threshold(self) -> float:
        return self.shares.quantile(1 - OPEN_SHARE).item()


def update(
    router: Router, optimiser: torch.optim.Optimizer, recent: Recent, rng: torch.Generator, device: str
) -> float:
    """Some updates of the head on recent groups; the mean loss."""
    threshold, losses = recent.threshold(), []
    for _ in range(UPDATES):
        drawn = torch.randint(len(recent.shares), (MINIBATCH,), generator=rng)
        label = (recent.shares[drawn] > threshold).float().to(device)
        loss = F.binary_cross_entropy_with_logits(router(recent.groups[drawn].to(device)), label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return float(np.mean(losses))


def ship(args: argparse.Namespace, router: Router, threshold: float, step: int, more: dict) -> None:
    config = {"reducer": "router", "base": fingerprint(args.base), "group": GROUP, "hidden": HIDDEN}
    config |= {"input": "projected tokens of an image", "default_keep_ratio": 0.4, "loss_threshold": threshold}
    config |= {"parameters": sum(p.numel() for p in router.parameters())}
    config["trained"] = {"steps": step, "seed": args.seed, "pictures": step * BATCH, **more}
    config["data"] = {"scenes": args.info["scenes"], "first_seed": args.info["first_seed"]}
    save_reducer(args.run / args.name, dict(router.state_dict()), config)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="exported folder of the finished checkpoint")
    parser.add_argument("--run", type=Path, required=True, help="folder with its features; results go to RUN/NAME")
    parser.add_argument("--name", default="router")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--stop-at", type=int, help="leave early")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scenes", type=int, default=32, help="held-out ones")
    parser.add_argument("--resume", action="store_true", help="recent groups are gathered anew")
    parser.add_argument("--evaluate", action="store_true", help="measure RUN/NAME and train nothing")
    return parser


def main() -> None:
    args = arguments().parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    run(args)


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model, features = load_base(args.base, args.device), FrozenFeatures(args.run)
    if features.info["base"] != fingerprint(args.base):
        raise SystemExit(
            f"{args.run} holds features of another checkpoint than {args.base}; run demos.train.frozen anew"
        )
    args.info, out = features.info, args.run / args.name
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    router, batches = (
        Router(model.config.text_config.hidden_size).to(args.device),
        FrozenBatches(tokenizer, features.info),
    )
    optimiser, recent, first, seconds = torch.optim.AdamW(router.parameters(), lr=LR), Recent(), 0, 0.0
    threshold = 0.0
    if args.resume or args.evaluate:
        state = torch.load(out / "state.pt", map_location=args.device)
        router.load_state_dict(state["router"])
        optimiser.load_state_dict(state["optimiser"])
        first, seconds, threshold = state["step"], state["seconds"], state["threshold"]
    checks = FrozenFeatures.of_seeds(model, args.scenes, 0, CHECK_SEED)
    asking = FrozenBatches(tokenizer, checks.info)
    if args.evaluate:
        result = evaluate(model, router, asking, checks)
        ship(args, router, threshold, first, {"seconds": round(seconds), "held_out": result, "scenes": args.scenes})
        print(json.dumps(result, indent=1))
        return
    start, rng = time.time() - seconds, torch.Generator().manual_seed(args.seed + first)
    for step in (bar := tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=10)):
        groups, shares, rise, whole = rise_by_group(model, batches, features, step)
        recent.add(groups, shares)
        loss = update(router, optimiser, recent, rng, args.device)
        record = {"loss": round(loss, 4), "rise": round(rise.mean().item(), 4), "whole": round(whole.mean().item(), 4)}
        append_record(out / "training.jsonl", step=step, shared_out=round(shares.sum(1).mean().item(), 4), **record)
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        last = step + 1 == (args.stop_at or args.steps)
        if (step + 1) % SAVE_EVERY == 0 or last:
            seconds, threshold = time.time() - start, recent.threshold()
            scores = evaluate(model, router, asking, checks, short=True)
            append_record(out / "training.jsonl", step=step + 1, seconds=round(seconds), held_out=scores)
            tqdm.write(f"step {step + 1} {scores}")
            save_checkpoint(
                out / "state.pt",
                router=router.state_dict(),
                optimiser=optimiser.state_dict(),
                step=step + 1,
                seconds=seconds,
                threshold=threshold,
            )
            ship(args, router, threshold, step + 1, {"seconds": round(seconds)})
        if last:
            break


if __name__ == "__main__":
    main()
