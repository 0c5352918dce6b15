"""Which items of a request go to which encoder. Pure: it knows neither Ray nor HTTP.

A request stays whole unless sharing its items out saves `WORTH_S`, by the time that encoders reported for earlier ones.
The largest items are given away first, each to the encoder that would be done with it earliest: what waits there, what
it was given before, and the item itself, which costs little where it is cached. Of two equal encoders the one that
follows the item's hash on the ring first is taken, so that repeated items meet their features again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from serve.deployments.affinity import Balancer, media_loads

if TYPE_CHECKING:
    from mm.config import MediaLimits
    from mm.data.request import Request

WORTH_S = 0.03
"""Seconds that sharing out has to save: a call to one more replica takes 7 to 10 ms (`demos.bench.ray_overhead`)."""
LEARNT_SHARE = 0.2
"""Of the newest measurement in the pace."""


@dataclass
class Pace:
    """Seconds that a load of 1, a picture or a frame of a clip, takes an encoder. None before the first report."""

    seconds: float | None = None

    def learn(self, load: float, seconds: float) -> None:
        """Take note of what an encoder reported of items that it computed."""
        if load > 0:
            newest = seconds / load
            old = newest if self.seconds is None else self.seconds
            self.seconds = old + LEARNT_SHARE * (newest - old)


@dataclass(frozen=True)
class Part:
    """Items of a request for one encoder.

    Attributes:
        items: Their places among the request's media, in order.
        replica: The encoder; "" leaves it to the routing of whole requests.
        load: What they cost there.
    """

    items: tuple[int, ...]
    replica: str = ""
    load: float = 0.0


def parts_of(
    request: Request, keys: Sequence[str], balancer: Balancer, pace: Pace, limits: MediaLimits | None
) -> list[Part]:
    """How a request is shared out; a single part where it stays whole.

    Args:
        keys: Hash of each item.
        limits: Of a request. One that has too many items stays whole, so that an encoder refuses it.
    """
    whole = [Part(tuple(range(len(request.media))))]
    names, num_items = balancer.names, len(request.media)
    if min(len(names), num_items) < 2 or pace.seconds is None or not _may_be_shared(request, limits):
        return whole
    loads = media_loads(request)
    waiting = {name: balancer.load(name) for name in names}
    given: dict[str, list[int]] = {name: [] for name in waiting}
    costs = dict.fromkeys(waiting, 0.0)
    for i in sorted(range(num_items), key=lambda i: -loads[i]):
        here = {name: balancer.load_at(name, keys[i], loads[i]) for name in balancer.around(keys[i])}
        best = min(here, key=lambda name: waiting[name] + costs[name] + here[name])
        given[best].append(i)
        costs[best] += here[best]
    home = balancer.around(keys[0])[0]
    alone = sum(balancer.load_at(home, key, load) for key, load in zip(keys, loads, strict=True))
    if (alone - max(costs.values())) * pace.seconds < WORTH_S:
        return whole
    return [Part(tuple(sorted(items)), name, costs[name]) for name, items in given.items() if items]


def _may_be_shared(request: Request, limits: MediaLimits | None) -> bool:
    """Whether no limit counts all items together."""
    if request.vision.max_visual_tokens is not None:
        return False
    counts = Counter(item.kind for item in request.media)
    return limits is None or (counts["image"] <= limits.max_images and counts["video"] <= limits.max_videos)


def with_items(request: Request, items: Sequence[int]) -> Request:
    """The request with some of its media only. Its texts stay, for reducers that read the question."""
    from mm.data.request import MediaPart

    place = {old: new for new, old in enumerate(items)}
    messages = tuple(
        replace(
            message,
            parts=tuple(
                replace(part, index=place[part.index]) if isinstance(part, MediaPart) else part
                for part in message.parts
                if not isinstance(part, MediaPart) or part.index in place
            ),
        )
        for message in request.messages
    )
    num_images = sum(item.kind == "image" for item in request.media)
    return replace(request, messages=messages, media=tuple(request.media[i] for i in items), num_images=num_images)
