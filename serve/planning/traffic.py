"""Requests of a plan as columns: made by a random process, or read from a trace. Contents are never part of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from serve.planning.curves import Picture, PlanError

Column = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Requests in order of arrival; each field has one entry per request.

    Attributes:
        arrival_s: From the first request on.
        prompt_tokens: What a decoder prefills: text and visual tokens.
        pictures: Pictures, or sampled frames of clips.
        patches: Of all pictures of the request.
        visual_tokens: Part of the prompt's tokens.
        output_tokens: At least 1.
        has_sizes: Whether the size of each picture is known, and not taken to be that of one picture.
        notes: What was assumed about the requests, in words.
    """

    arrival_s: Column
    prompt_tokens: Counts
    pictures: Counts
    patches: Counts
    visual_tokens: Counts
    output_tokens: Counts
    has_sizes: bool = False
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def rate(self) -> float:
        """Requests per second, over the time from the first to the last arrival."""
        span = float(self.arrival_s[-1] - self.arrival_s[0])
        return (len(self) - 1) / span if span > 0 else float("inf")

    def at_rate(self, rate: float) -> Traffic:
        """The same requests in the same order, closer together or further apart."""
        return replace(self, arrival_s=self.arrival_s * (self.rate / rate))

    def part(self, start: int, stop: int) -> Traffic:
        """Consecutive requests, with times from the first of them on."""
        columns = {name: getattr(self, name)[start:stop] for name in COLUMNS}
        columns["arrival_s"] = columns["arrival_s"] - columns["arrival_s"][0]
        return replace(self, **columns)


COLUMNS = ("arrival_s", "prompt_tokens", "pictures", "patches", "visual_tokens", "output_tokens")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What every request of a random process looks like.

    Attributes:
        text_tokens: Of a prompt, beside its visual tokens.
        keep_ratio: Share of the visual tokens that a reducer leaves.
    """

    pictures: int = 1
    text_tokens: int = 32
    output_tokens: int = 64
    keep_ratio: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("pictures", 0), ("text_tokens", 0), ("output_tokens", 1)):
            if (value := getattr(self, name)) < least:
                raise PlanError(f"{name} is {value}; it has to be at least {least}")
        check_keep_ratio(self.keep_ratio)
        if not self.pictures and not self.text_tokens:
            raise PlanError("a request needs a picture or text tokens; give --images or --prompt-tokens")


def check_keep_ratio(keep_ratio: float) -> None:
    if not 0 < keep_ratio <= 1:
        raise PlanError(f"keep_ratio is {keep_ratio:g}; it has to be above 0 and at most 1")


def random_traffic(
    shape: Shape,
    picture: Picture | None,
    *,
    rate: float,
    num_requests: int = 2000,
    burstiness: float = 1.0,
    seed: int = 0,
) -> Traffic:
    """Requests of one shape whose gaps are gamma distributed.

    Args:
        rate: Requests per second.
        burstiness: Shape of the gamma distribution: 1 is a Poisson process, less comes in bursts, more is evener.

    Raises:
        PlanError: A number cannot be used.
    """
    if not (rate > 0 and np.isfinite(rate)):
        raise PlanError(f"rate is {rate:g}; it has to be above 0 requests per second")
    if not (burstiness > 0 and np.isfinite(burstiness)):
        raise PlanError(f"burstiness is {burstiness:g}; it has to be above 0 (1 is a Poisson process)")
    if num_requests < 2:
        raise PlanError(f"requests is {num_requests}; it has to be at least 2")
    if shape.pictures and picture is None:
        raise PlanError("the curves name no picture; give --patches and --tokens-per-image")
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), num_requests)
    gaps[0] = 0.0
    arrivals = np.cumsum(gaps)
    arrivals *= (num_requests - 1) / (rate * arrivals[-1])  # exactly the rate that was asked for
    patches, tokens = (picture.patches, picture.tokens) if picture else (0, 0)
    visual = round(shape.pictures * tokens * shape.keep_ratio)

    def same(value: int) -> Counts:
        return np.full(num_requests, value, dtype=np.int64)

    return Traffic(
        arrival_s=arrivals,
        prompt_tokens=same(max(1, shape.text_tokens + visual)),
        pictures=same(shape.pictures),
        patches=same(shape.pictures * patches),
        visual_tokens=same(visual),
        output_tokens=same(shape.output_tokens),
    )


def kept(traffic: Traffic, keep_ratio: float) -> Traffic:
    """The same requests with a reducer that leaves this share of the visual tokens.

    Raises:
        PlanError: The share is no share.
    """
    check_keep_ratio(keep_ratio)
    if keep_ratio == 1:
        return traffic
    visual = np.rint(traffic.visual_tokens * keep_ratio).astype(np.int64)
    prompt = np.maximum(1, traffic.prompt_tokens - traffic.visual_tokens + visual)
    return replace(traffic, visual_tokens=visual, prompt_tokens=prompt)
