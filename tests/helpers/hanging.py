"""Plugins that do not come back, or that raise what ends a process: one class per stage and one option for how."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mm.plugins.drafter import Draft
from mm.plugins.reducer import Matched, Reduction, Stage
from pruning.base import BaseReducer, keep_all

RAISED: dict[str, type[BaseException]] = {
    "exits": SystemExit,
    "interrupts": KeyboardInterrupt,
    "closes": GeneratorExit,
    "recurses": RecursionError,
    "fills": MemoryError,
    "bare": BaseException,
}
HANGS = ("loops", "clings", "sleeps")


class Release:
    """Lets what hangs go. Tests do so at their end, so that no thread is left."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def set(self) -> None:
        """Let go of everything that hangs now; what comes later hangs again."""
        self.event, before = threading.Event(), self.event
        before.set()


RELEASE = Release()


def misbehave(how: str) -> None:
    """Raise, loop, loop and catch everything, or sleep."""
    gone = RELEASE.event
    if how in RAISED:
        raise RAISED[how]
    if how == "loops":
        while not gone.is_set():
            pass
    if how == "sleeps":
        gone.wait(60)
    while how == "clings" and not gone.is_set():
        try:
            gone.wait(0.01)
        except BaseException:
            continue


@dataclass(frozen=True, kw_only=True)
class Tower(BaseReducer):
    """Misbehaves inside the tower."""

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.IN_VIT,)
    how: str = "loops"

    def plan(self, num_tokens: int, *_: object) -> int:
        return num_tokens

    def merges(self, num_patches: int, num_blocks: int) -> tuple[int, ...]:
        misbehave(self.how)
        return (0,) * num_blocks

    def match(self, keys: Tensor, num_merged: int, num_prefix: int) -> Matched:
        raise AssertionError("nothing is merged")


@dataclass(frozen=True, kw_only=True)
class Projected(BaseReducer):
    """Misbehaves after the projector."""

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.PRE_LLM,)
    how: str = "loops"

    def plan(self, num_tokens: int, *_: object) -> int:
        return num_tokens

    def after_encode(self, tokens, context) -> Reduction:
        misbehave(self.how)
        return keep_all(tokens)


@dataclass(frozen=True, kw_only=True)
class Layered(BaseReducer):
    """Misbehaves between two layers."""

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.IN_PREFILL,)
    how: str = "loops"

    def layers(self, num_layers: int) -> tuple[int, ...]:
        return (1,)

    def in_prefill(self, layer: int, view) -> Tensor:
        misbehave(self.how)
        return torch.arange(len(view.visual))


@dataclass(frozen=True, kw_only=True)
class Cached(BaseReducer):
    """Misbehaves when the prompt is in."""

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.IN_DECODE,)
    how: str = "loops"

    def prefill_done(self, view) -> Mapping[int, Tensor]:
        misbehave(self.how)
        return {}


@dataclass(frozen=True, kw_only=True)
class Built(BaseReducer):
    """Misbehaves in its constructor."""

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.PRE_LLM,)
    how: str = "loops"

    def __post_init__(self) -> None:
        misbehave(self.how)

    def plan(self, num_tokens: int, *_: object) -> int:
        return num_tokens

    def after_encode(self, tokens, context) -> Reduction:
        return keep_all(tokens)


REDUCERS = {
    "tower": "tests.helpers.hanging:Tower",
    "projected": "tests.helpers.hanging:Projected",
    "layered": "tests.helpers.hanging:Layered",
    "cached": "tests.helpers.hanging:Cached",
    "built": "tests.helpers.hanging:Built",
}


@dataclass(frozen=True, kw_only=True)
class Stuck:
    """A drafter that misbehaves in one of its methods, while `BAD` says so."""

    trained: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    how: str = "loops"
    method: str = "propose"

    def load(self, target):
        return LoadedStuck(self)


BAD = threading.Event()


class LoadedStuck:
    def __init__(self, options: Stuck) -> None:
        self.options = options

    def _in(self, method: str) -> None:
        if method == self.options.method and BAD.is_set():
            misbehave(self.options.how)

    def open(self, prompt, *, private: bool = False) -> list[int]:
        self._in("open")
        return []

    def propose(self, sessions, budgets) -> list[Draft]:
        self._in("propose")
        return [
            Draft.chain(session[-1:] if budget.max_depth else [])
            for session, budget in zip(sessions, budgets, strict=True)
        ]

    def observe(self, sessions, seen) -> None:
        self._in("observe")
        for session, one in zip(sessions, seen, strict=True):
            session += one.token_ids

    def close(self, session) -> None:
        self._in("close")


DRAFTERS = {"stuck": "tests.helpers.hanging:Stuck"}
