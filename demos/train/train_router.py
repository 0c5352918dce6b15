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
import math
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer

from demos.train.compare import Answers, answers_by_row, paired, summary
from demos.train.data.questions import Question
from demos.train.frozen import FrozenBatches, FrozenFeatures, pack_rows, save_reducer
from demos.train.reducer_training import ReducerTraining, build_parser, main
from demos.train.train_lm import run_decoder, splice, to_device
from mm.plugins.weights import checkpoint_fingerprint
from pruning.learned.routing import RouterNetwork

GROUP = 2  # patches along a side of a group
HIDDEN = 64
STEPS_OF_PATH = 4
OPEN_SHARE = 0.25  # of the groups of recent pictures that are labelled "all"
LR, BATCH, UPDATES, MINIBATCH = 1e-3, 6, 30, 1024  # scenes per step; updates of the head per step, groups in each
RECENT = 60_000  # groups that are gone through again
BUDGETS = (0.3, 0.4, 0.5)  # kept tokens / tokens, those of compressed groups included


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


def scores_of(router: RouterNetwork, groups: Tensor, variant: str, rng: np.random.Generator) -> Tensor:
    if variant == "router":
        return router(groups)
    if variant == "spread":  # the training-free rule: groups whose patches differ most
        return (groups - groups.mean(-2, keepdim=True)).norm(dim=-1).mean(-1)
    return torch.from_numpy(rng.random(len(groups))).to(groups.device)


@torch.no_grad()
def ask(
    model: nn.Module,
    router: RouterNetwork,
    batches: FrozenBatches,
    features: FrozenFeatures,
    variant: str,
    keep_ratio: float,
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
    model: nn.Module, router: RouterNetwork, batches: FrozenBatches, features: FrozenFeatures, *, short: bool = False
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
    """Groups and their shares of the last pictures.

    A checkpoint stores the threshold only; a resumed run gathers groups anew.
    """

    def __init__(self) -> None:
        self.groups, self.shares, self.stored_threshold = torch.zeros(0), torch.zeros(0), 0.0

    def add(self, groups: Tensor, shares: Tensor) -> None:
        groups, shares = groups.flatten(0, 1).cpu(), shares.flatten().cpu()
        self.groups = torch.cat([self.groups, groups])[-RECENT:] if len(self.groups) else groups
        self.shares = torch.cat([self.shares, shares])[-RECENT:]

    def threshold(self) -> float:
        return self.shares.quantile(1 - OPEN_SHARE).item() if len(self.shares) else self.stored_threshold

    def state_dict(self) -> dict[str, float]:
        return {"threshold": self.threshold()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.stored_threshold = state["threshold"]


def update(
    router: RouterNetwork, optimiser: torch.optim.Optimizer, recent: Recent, rng: torch.Generator, device: str
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


class RouterTraining(ReducerTraining):
    """Trains the router; the checkpoint stays as it is."""

    save_every: ClassVar[int] = 20
    record_every: ClassVar[int] = 1

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        tokenizer = AutoTokenizer.from_pretrained(args.base, trust_remote_code=False)
        self.width: int = self.model.config.text_config.hidden_size
        self.router = RouterNetwork(self.width, HIDDEN).to(args.device)
        self.batches = FrozenBatches(tokenizer, self.features.info)
        self.optimiser, self.recent = torch.optim.AdamW(self.router.parameters(), lr=LR), Recent()
        self.held_out = self.held_out_features()
        self.held_out_batches = FrozenBatches(tokenizer, self.held_out.info)
        self.parts = {"router": self.router, "optimiser": self.optimiser, "recent": self.recent}

    def learn(self, step: int) -> dict[str, Any]:
        rng = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
        groups, shares, rise, whole = rise_by_group(self.model, self.batches, self.features, step)
        self.recent.add(groups, shares)
        loss = update(self.router, self.optimiser, self.recent, rng, self.args.device)
        record = {"loss": round(loss, 4), "rise": round(rise.mean().item(), 4), "whole": round(whole.mean().item(), 4)}
        return {**record, "shared_out": round(shares.sum(1).mean().item(), 4)}

    def check(self) -> dict[str, Any]:
        return evaluate(self.model, self.router, self.held_out_batches, self.held_out, short=True)

    def evaluate(self) -> dict[str, Any]:
        return evaluate(self.model, self.router, self.held_out_batches, self.held_out)

    def save(self, step: int, trained: dict[str, Any]) -> None:
        args, info = self.args, self.features.info
        config = {
            "reducer": "router",
            "base": checkpoint_fingerprint(args.base),
            "group": GROUP,
            "hidden": HIDDEN,
            "width": self.width,
        }
        config |= {"input": "projected tokens of an image", "default_keep_ratio": 0.4}
        config |= {"loss_threshold": self.recent.threshold()}
        config |= {"parameters": sum(p.numel() for p in self.router.parameters())}
        config["trained"] = {"steps": step, "seed": args.seed, "pictures": step * BATCH, **trained}
        config["data"] = {"scenes": info["scenes"], "first_seed": info["first_seed"]}
        save_reducer(self.out, dict(self.router.state_dict()), config)


def arguments() -> argparse.ArgumentParser:
    return build_parser(__doc__, name="router", steps=120, scenes=32)


if __name__ == "__main__":
    main(RouterTraining, arguments())
