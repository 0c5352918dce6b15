"""Which GPU does what: the candidates of a plan.

`none` is the colocated plan: every GPU has an encoder and a decoder. `ep` puts encoders on GPUs of their own, `epd`
prefill and decode apart too. `pd` is for comparison with published figures: encoder and prefill share GPUs.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from serve.planning.curves import Curves, PlanError

Split = Literal["none", "ep", "epd", "pd"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        price: Per GPU and hour, in any currency; None where prices are not compared.
    """

    name: str
    curves: Curves
    price: float | None = None


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The GPUs that a plan divides.

    Attributes:
        counts: How many there are of each kind, by name.
    """

    gpus: Mapping[str, Gpu]
    counts: Mapping[str, int]

    def __post_init__(self) -> None:
        for name, count in self.counts.items():
            if count < 1:
                raise PlanError(f"gpus of kind {name} is {count}; it has to be at least 1")

    @property
    def num_gpus(self) -> int:
        return sum(self.counts.values())

    def price_of(self, kinds: Sequence[str]) -> float | None:
        """Of these GPUs, per hour; None where a price is missing."""
        prices = [self.gpus[kind].price for kind in kinds]
        return None if any(price is None for price in prices) else sum(price for price in prices if price is not None)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A candidate: the kind of each GPU that a stage has.

    Attributes:
        encode: GPUs that only encode; empty where encoders share GPUs.
        prefill: GPUs that only prefill, and with `pd` encode too.
        decode: GPUs that decode, and where there are no others prefill and encode too.
    """

    split: Split
    encode: tuple[str, ...] = ()
    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...]

    @property
    def gpus(self) -> tuple[str, ...]:
        return (*self.encode, *self.prefill, *self.decode)

    @property
    def counts(self) -> tuple[int, int, int]:
        return len(self.encode), len(self.prefill), len(self.decode)

    @property
    def name(self) -> str:
        """Such as "8 x colocated", "2E 6PD" or "5E 1P 2D", with kinds where there are several."""
        if self.split == "none":
            return self._group(self.decode, " x colocated")
        if self.split == "ep":
            return f"{self._group(self.encode, 'E')} {self._group(self.decode, 'PD')}"
        first = f"{self._group(self.encode, 'E')} " if self.encode else ""
        prefill = "EP" if self.split == "pd" else "P"
        return f"{first}{self._group(self.prefill, prefill)} {self._group(self.decode, 'D')}"

    def _group(self, kinds: Sequence[str], role: str) -> str:
        if len(set(self.gpus)) == 1:
            return f"{len(kinds)}{role}"
        return "+".join(f"{count}{role}({kind})" for kind, count in sorted(Counter(kinds).items()))


def colocated(fleet: Fleet) -> Layout:
    """The plan that every other one is compared with: each GPU that can do both does both.

    Raises:
        PlanError: No GPU can.
    """
    able = [name for name, gpu in fleet.gpus.items() if gpu.curves.encode and gpu.curves.decodes]
    kinds = tuple(kind for kind in able for _ in range(fleet.counts[kind]))
    if not kinds:
        raise PlanError("no kind of GPU has curves of encode, prefill and decode, so there is no colocated plan")
    return Layout(split="none", decode=kinds)


def layouts(fleet: Fleet, splits: Sequence[Split], *, needs_encoder: bool = True) -> Iterator[Layout]:
    """Every division of all GPUs, the colocated one first.

    Args:
        needs_encoder: Whether there are pictures; without them no GPU only encodes.
    """
    if "none" in splits:
        yield colocated(fleet)
    for split in splits:
        if split == "ep" and needs_encoder:
            for encode, decode in divisions(fleet, 2):
                yield Layout(split="ep", encode=encode, decode=decode)
        elif split == "epd":
            for parts in divisions(fleet, 3 if needs_encoder else 2):
                yield Layout(split="epd", encode=parts[0] if needs_encoder else (), prefill=parts[-2], decode=parts[-1])


def divisions(fleet: Fleet, num_parts: int) -> Iterator[tuple[tuple[str, ...], ...]]:
    """Every way to give the GPUs to stages of which none is empty. The first of three, or of two, may only encode."""
    kinds = list(fleet.counts)
    ways = [list(compositions(fleet.counts[kind], num_parts)) for kind in kinds]
    for chosen in itertools.product(*ways):
        parts = tuple(
            tuple(kind for kind, counts in zip(kinds, chosen, strict=True) for _ in range(counts[part]))
            for part in range(num_parts)
        )
        if all(parts):
            yield parts


def compositions(total: int, num_parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `total` as a sum of so many whole numbers, none negative, in order."""
    if num_parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in compositions(total - first, num_parts - 1):
            yield (first, *rest)


def can_run(layout: Layout, fleet: Fleet, *, needs_encoder: bool = True) -> bool:
    """Whether every GPU has the curves that its stage needs."""
    curves = {name: gpu.curves for name, gpu in fleet.gpus.items()}
    encoding = {"none": layout.decode, "pd": layout.prefill}.get(layout.split, layout.encode)
    able = all(curves[kind].decodes for kind in (*layout.prefill, *layout.decode))
    return able and (not needs_encoder or all(curves[kind].encode is not None for kind in encoding))
