"""What both training stages share: optimisers with their schedule, checkpoints, and the curve file."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

ADAM_BETAS = (0.9, 0.95)


class Optimisers:
    """Muon for the given matrices, AdamW for the rest, one warm-up and linear decay for both.

    The rate is flat until `decay_from` (a share of all steps) and falls to 2 % at the end. Gradients are clipped to
    norm 1. `calmed` parameters are AdamW's too, and can be trained slower than the others from some step on.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        *,
        muon_lr: float,
        adam_lr: float,
        num_steps: int,
        warmup_steps: int = 50,
        decay_from: float = 0.6,
        calmed: Sequence[nn.Parameter] = (),
    ) -> None:
        self.parameters = [*matrices, *others, *calmed]
        self.muon = torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.0)
        groups = [{"params": list(part), "share": 1.0} for part in (others, calmed) if part]
        self.adam = torch.optim.AdamW(groups, lr=adam_lr, betas=ADAM_BETAS, weight_decay=0.0)
        self.peak = {self.muon: muon_lr, self.adam: adam_lr}
        self.num_steps, self.warmup_steps, self.decay_from = num_steps, warmup_steps, decay_from

    def scale(self, step: int) -> float:
        flat_until = self.decay_from * self.num_steps
        decay = 1.0 if step < flat_until else (self.num_steps - step) / (self.num_steps - flat_until)
        return min(1.0, (step + 1) / self.warmup_steps) * max(0.02, decay)

    def step(self, step: int) -> None:
        """Apply the gradients at hand with the rate of this step, then forget them."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser, peak in self.peak.items():
            for group in optimiser.param_groups:
                group["lr"] = peak * self.scale(step) * group.get("share", 1.0)  # Muon's group has none
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    @property
    def calmed_share(self) -> float:
        """Rate of the calmed parameters / rate of the others; kept in checkpoints."""
        return self.adam.param_groups[-1]["share"]

    def calm(self, share: float) -> None:
        self.adam.param_groups[-1]["share"] = share

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


def split_matrices(module: nn.Module, layers: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(2-D weights inside `layers`, all other parameters of `module`)."""
    inside = {id(p) for p in layers.parameters() if p.ndim == 2}
    parameters = list(module.parameters())
    return [p for p in parameters if id(p) in inside], [p for p in parameters if id(p) not in inside]


def save_checkpoint(path: Path, **state: object) -> None:
    """Write under another name first, so that a stopped run never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def append_record(path: Path, **record: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"time_s": round(time.time(), 1), **record}) + "\n")


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values under a mask; 0 where the mask is empty."""
    return (values * mask).sum() / mask.sum().clamp(min=1)
