"""What a check is, and the table of what the campaign promises. Checks register themselves; nothing here measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

PROMISES = {
    "R1": "malformed media through HTTP",
    "R2": "requests to addresses that no request may reach",
    "R3": "decompression bombs",
    "R4": "killed encoders",
    "R5": "killed decoders",
    "R6": "killed controller, proxy, ingress and node",
    "R7": "clients that leave",
    "R8": "slow readers and writers",
    "R9": "overload at ten times",
    "R10": "out of memory in tower and decoder",
    "R11": "soak",
    "R12": "API fuzz",
    "R13": "event loop",
    "R14": "plugin faults",
    "R15": "killed jobs",
    "R16": "supply chain",
    "R17": "auth",
    "R18": "drain",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How large the campaign is.

    Attributes:
        is_release: Hours instead of minutes.
        seed: Of everything random. It is a new one for each run unless it is given.
    """

    is_release: bool
    seed: int

    def size(self, ci: int, release: int) -> int:
        return release if self.is_release else ci


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured figure, the goal for it, and whether it was reached."""

    what: str
    value: str
    goal: str
    is_reached: bool


Check = Callable[[Settings], Iterable[Figure]]
CHECKS: dict[str, list[Check]] = {}


def check(name: str) -> Callable[[Check], Check]:
    """Register a function that measures figures of a promise.

    Args:
        name: A key of `PROMISES`.
    """
    if name not in PROMISES:
        raise ValueError(f"{name!r} is no promise; they are {', '.join(PROMISES)}")

    def register(function: Check) -> Check:
        CHECKS.setdefault(name, []).append(function)
        return function

    return register


def at_most(what: str, value: float, limit: float, unit: str = "") -> Figure:
    """A figure that must not be larger than `limit`."""
    return Figure(what=what, value=_with(value, unit), goal=f"≤ {_with(limit, unit)}", is_reached=value <= limit)


def at_least(what: str, value: float, limit: float, unit: str = "") -> Figure:
    """A figure that must not be smaller than `limit`."""
    return Figure(what=what, value=_with(value, unit), goal=f"≥ {_with(limit, unit)}", is_reached=value >= limit)


def noted(what: str, value: float) -> Figure:
    """A figure without a goal."""
    return Figure(what=what, value=_with(value, ""), goal="", is_reached=True)


def _with(value: float, unit: str) -> str:
    return f"{value:.4g} {unit}".rstrip()
