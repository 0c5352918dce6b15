"""Service curves of one kind of GPU: how many seconds each stage takes, as measured, and read from `curves.json`.

A curve is a table of measured seconds. Between its points it is linear, and beyond them it goes on as its last two
points say. `Curves.beyond` names what a plan asks beyond the measured points.
"""

from __future__ import annotations

import itertools
import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from mm.errors import MmError, nearest

SCHEMA = 1
FAR = 1.5
"""Over the largest measured point, from which on a plan says that it goes by extrapolation."""


class PlanError(MmError):
    """A plan cannot be made of what was given. The text names it, what is allowed and what to do."""

    code = "invalid_plan"


class Table:
    """Seconds over one quantity.

    Args:
        xs: Ascending.
        seconds: As many, none negative.
    """

    def __init__(self, xs: Sequence[float], seconds: Sequence[float]) -> None:
        self.xs, self.seconds = [float(x) for x in xs], [float(s) for s in seconds]
        self._slopes = [
            (self.seconds[i + 1] - self.seconds[i]) / (self.xs[i + 1] - self.xs[i]) for i in range(len(self.xs) - 1)
        ]

    def __call__(self, x: float) -> float:
        """Seconds at `x`, never below zero."""
        if not self._slopes:
            return self.seconds[0]
        i = min(max(bisect_right(self.xs, x) - 1, 0), len(self._slopes) - 1)
        found = self.seconds[i] + self._slopes[i] * (x - self.xs[i])
        return found if found > 0 else 0.0


class Grid:
    """Seconds over two quantities.

    Args:
        xs, ys: Ascending.
        seconds: One row per x, with one value per y.
    """

    def __init__(self, xs: Sequence[float], ys: Sequence[float], seconds: Sequence[Sequence[float]]) -> None:
        self.xs, self.ys = [float(x) for x in xs], [float(y) for y in ys]
        self.rows = [[float(value) for value in row] for row in seconds]

    def __call__(self, x: float, y: float) -> float:
        """Seconds at `(x, y)`, never below zero."""
        xs, ys = self.xs, self.ys
        i = min(max(bisect_right(xs, x) - 1, 0), len(xs) - 2) if len(xs) > 1 else 0
        j = min(max(bisect_right(ys, y) - 1, 0), len(ys) - 2) if len(ys) > 1 else 0
        share = (y - ys[j]) / (ys[j + 1] - ys[j]) if len(ys) > 1 else 0.0
        found = self._between(i, j, share)
        if len(xs) > 1:
            found += (self._between(i + 1, j, share) - found) * (x - xs[i]) / (xs[i + 1] - xs[i])
        return found if found > 0 else 0.0

    def _between(self, i: int, j: int, share: float) -> float:
        row = self.rows[i]
        return row[j] + (row[j + 1] - row[j]) * share if len(row) > 1 else row[0]


@dataclass(frozen=True, kw_only=True)
class EngineBounds:
    """Bounds of one decoder; see `SchedulerConfig`.

    Attributes:
        kv_tokens: Tokens that its KV cache holds; None does not bound it.
    """

    max_num_seqs: int = 64
    max_batch_tokens: int = 512
    kv_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture whose size nobody gives.

    Attributes:
        patches: What the tower computes.
        tokens: What the prompt gets of it, before a reducer.
    """

    patches: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Curves:
    """All curves of one kind of GPU. Seconds are those of a GPU that does nothing else.

    Attributes:
        encode: Seconds over (patches of one picture, pictures in the batch); None where the GPU holds no encoder.
        prefill: Over (new tokens, tokens before them); None where the GPU holds no decoder.
        decode: One step, over (sequences, mean context in tokens).
        step_s: What prefill and decode share, and a step that does both pays once.
        hand_off: Over bytes, by transport.
        front_end: Seconds of an ingress per request, per picture and per prompt token.
        front_end_workers: Requests that one ingress prepares at a time.
        lanes: Computations that run on one GPU at a time at full speed; more share it.
        visual_token_bytes, kv_token_bytes: Of one token, between encoder and decoder, and between prefill and decode.
        about: Where the figures come from.
    """

    encode: Grid | None
    prefill: Grid | None
    decode: Grid | None
    step_s: float = 0.0
    hand_off: Mapping[str, Table] = field(default_factory=dict[str, Table])
    front_end: tuple[float, float, float] = (0.0, 0.0, 0.0)
    front_end_workers: int = 1
    lanes: float = 1.0
    visual_token_bytes: int = 0
    kv_token_bytes: int = 0
    picture: Picture | None = None
    engine: EngineBounds = field(default_factory=EngineBounds)
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def decodes(self) -> bool:
        """Whether a GPU of this kind can prefill and decode."""
        return self.prefill is not None and self.decode is not None

    def front_end_s(self, num_pictures: int, num_prompt_tokens: int) -> float:
        base, per_picture, per_token = self.front_end
        return base + per_picture * num_pictures + per_token * num_prompt_tokens

    def hand_off_s(self, transport: str, num_bytes: float) -> float:
        """Seconds of a hand-off; none where the transport was not measured and nothing has to be moved."""
        table = self.hand_off.get(transport)
        return table(num_bytes) if table else 0.0

    def beyond(self, patches: int, pictures: int, prompt_tokens: int, context: int) -> list[str]:
        """What lies far beyond the measured points, in words."""
        asked: list[tuple[str, Grid | None, float, float]] = [
            ("encode", self.encode, patches, pictures),
            ("prefill", self.prefill, min(prompt_tokens, self.engine.max_batch_tokens), prompt_tokens),
            ("decode", self.decode, 1, context),
        ]
        names = {"encode": ("patches", "pictures"), "prefill": ("tokens", "cached"), "decode": ("batch", "context")}
        found = list[str]()
        for curve, grid, *values in asked:
            if grid is None:
                continue
            for name, axis, value in zip(names[curve], (grid.xs, grid.ys), values, strict=True):
                if len(axis) > 1 and cast(float, value) > FAR * axis[-1]:
                    found.append(f"{curve} was measured up to {axis[-1]:g} {name}, and the traffic asks {value:g}")
        return found


GRIDS = {"encode": ("patches", "batch"), "prefill": ("tokens", "cached"), "decode": ("batch", "context")}
NUMBERS = {"step_s", "lanes"}
COUNTS = {"visual_token_bytes", "kv_token_bytes"}
KEYS = {"schema", *GRIDS, *NUMBERS, *COUNTS, "hand_off", "front_end", "picture", "engine", "about"}


def read_curves(path: Path) -> Curves:
    """The curves of a file that `mm bench calibrate` wrote, or that was written by hand.

    Raises:
        PlanError: Names the file, the key and what it has to be.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise PlanError(f"{path} is no JSON: {error}") from None
    return parse_curves(data, str(path))


def parse_curves(data: object, owner: str) -> Curves:
    """The curves of plain data; see docs/planning.md for its form.

    Args:
        owner: Named first in errors.

    Raises:
        PlanError: As `read_curves`.
    """
    if not isinstance(data, dict):
        raise PlanError(f"{owner} has to hold one JSON object")
    data = cast("dict[str, Any]", data)
    _check_keys(data, KEYS, owner)
    if data.get("schema") != SCHEMA:
        raise PlanError(f"{owner}: schema is {data.get('schema')!r}, and this version reads {SCHEMA}")
    grids = {name: _grid(data[name], name, axes, owner) for name, axes in GRIDS.items() if data.get(name) is not None}
    if (("prefill" in grids) != ("decode" in grids)) or not grids:
        raise PlanError(f"{owner} needs prefill and decode together, or encode alone for a GPU that only encodes")
    given = {name: _number(data[name], f"{owner}: {name}") for name in NUMBERS if name in data}
    counts = {name: int(_number(data[name], f"{owner}: {name}")) for name in COUNTS if name in data}
    if given.get("lanes", 1.0) < 1:
        raise PlanError(f"{owner}: lanes is {given['lanes']:g}; it has to be at least 1")
    hand_off = {
        name: _table(table, f"hand_off.{name}", "bytes", owner) for name, table in data.get("hand_off", {}).items()
    }
    front, workers = _front_end(data.get("front_end", {}), owner)
    return Curves(
        encode=grids.get("encode"),
        prefill=grids.get("prefill"),
        decode=grids.get("decode"),
        hand_off=hand_off,
        front_end=front,
        front_end_workers=workers,
        picture=_picture(data.get("picture"), owner),
        engine=_engine(data.get("engine", {}), owner),
        about=data.get("about", {}),
        **given,
        **cast("dict[str, Any]", counts),
    )


def _check_keys(data: Mapping[str, Any], known: set[str], owner: str) -> None:
    if unknown := next((key for key in data if key not in known), None):
        raise PlanError(f"{owner}: {unknown!r} is unknown{nearest(str(unknown), sorted(known))}")


def _number(value: object, what: str, *, above: float | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise PlanError(f"{what} is {value!r}; it has to be a number, at least 0")
    if above is not None and value <= above:
        raise PlanError(f"{what} is {value!r}; it has to be above {above:g}")
    return float(value)


def _axis(values: object, what: str) -> list[float]:
    if not isinstance(values, list) or not values:
        raise PlanError(f"{what} has to be a list of numbers")
    axis = [_number(value, what) for value in cast("list[object]", values)]
    if any(b <= a for a, b in itertools.pairwise(axis)):
        raise PlanError(f"{what} is {axis}; it has to ascend")
    return axis


def _seconds(values: object, what: str, length: int) -> list[float]:
    if not isinstance(values, list) or len(cast("list[object]", values)) != length:
        raise PlanError(f"{what} has to be a list of {length} numbers, as many as its axis has")
    return [_number(value, what) for value in cast("list[object]", values)]


def _table(data: object, name: str, axis: str, owner: str) -> Table:
    if not isinstance(data, dict):
        raise PlanError(f"{owner}: {name} has to be an object with {axis} and seconds")
    data = cast("dict[str, Any]", data)
    _check_keys(data, {axis, "seconds"}, f"{owner}: {name}")
    xs = _axis(data.get(axis), f"{owner}: {name}.{axis}")
    return Table(xs, _seconds(data.get("seconds"), f"{owner}: {name}.seconds", len(xs)))


def _grid(data: object, name: str, axes: tuple[str, str], owner: str) -> Grid:
    if not isinstance(data, dict):
        raise PlanError(f"{owner}: {name} has to be an object with {axes[0]}, {axes[1]} and seconds")
    data = cast("dict[str, Any]", data)
    _check_keys(data, {*axes, "seconds"}, f"{owner}: {name}")
    xs, ys = (_axis(data.get(axis), f"{owner}: {name}.{axis}") for axis in axes)
    rows = data.get("seconds")
    if not isinstance(rows, list) or len(cast("list[object]", rows)) != len(xs):
        raise PlanError(f"{owner}: {name}.seconds has to have {len(xs)} rows, one per {axes[0]}")
    what = f"{owner}: {name}.seconds"
    return Grid(xs, ys, [_seconds(row, what, len(ys)) for row in cast("list[object]", rows)])


def _front_end(data: object, owner: str) -> tuple[tuple[float, float, float], int]:
    if not isinstance(data, dict):
        raise PlanError(f"{owner}: front_end has to be an object")
    data = cast("dict[str, Any]", data)
    names = ("request_s", "picture_s", "prompt_token_s")
    _check_keys(data, {*names, "workers"}, f"{owner}: front_end")
    base, picture, token = (_number(data.get(name, 0.0), f"{owner}: front_end.{name}") for name in names)
    return (base, picture, token), _count(data.get("workers", 1), f"{owner}: front_end.workers")


def _count(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(f"{what} is {value!r}; it has to be a whole number, at least 1")
    return value


def _picture(data: object, owner: str) -> Picture | None:
    if data is None:
        return None
    data = cast("dict[str, Any]", data if isinstance(data, dict) else {})
    _check_keys(data, {"patches", "tokens"}, f"{owner}: picture")
    patches, tokens = (_count(data.get(name), f"{owner}: picture.{name}") for name in ("patches", "tokens"))
    return Picture(patches=patches, tokens=tokens)


def _engine(data: object, owner: str) -> EngineBounds:
    if not isinstance(data, dict):
        raise PlanError(f"{owner}: engine has to be an object")
    data = cast("dict[str, Any]", data)
    names = ("max_num_seqs", "max_batch_tokens", "kv_tokens")
    _check_keys(data, set(names), f"{owner}: engine")
    given = {name: data[name] for name in names if data.get(name) is not None}
    return EngineBounds(**{name: _count(value, f"{owner}: engine.{name}") for name, value in given.items()})
