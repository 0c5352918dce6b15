"""The media of one request, shared out to several encoders: which gets what, the order that comes back, and losses."""

from __future__ import annotations

import asyncio
import random
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mm.config import MediaLimits
from mm.data.media import MediaSource
from mm.data.request import MediaPart, Message, Request, TextPart, VisionOptions
from mm.data.tokens import Encoded, EncodeTimings, VisualTokens
from mm.encode.pipeline import question
from mm.errors import InvalidRequest
from serve.deployments.affinity import Balancer, media_keys, order_of
from serve.deployments.sharing import WORTH_S, Pace, parts_of, with_items
from serve.runtime import MediaLost

with warnings.catch_warnings():  # Ray's own, while it is imported
    warnings.simplefilter("ignore")
    from ray.exceptions import ActorDiedError, ObjectLostError

    from serve.deployments import calls
    from serve.deployments.encoding import Encoding
    from serve.deployments.messages import TransferredMedia
    from serve.deployments.tier import Tier
    from serve.deployments.transport import pack, receive

NAMES = ("a", "b", "c", "d")
SLOW = Pace(1.0)


def asking(num: int, *clips: int, **vision: Any) -> Request:
    """A question about so many media, of which those at `clips` are clips."""
    kinds = ["video" if i in clips else "image" for i in range(num)]
    media = tuple(MediaSource(kind=kind, source=f"item {i}".encode()) for i, kind in enumerate(kinds))
    parts = tuple(MediaPart(index=i, kind=kind) for i, kind in enumerate(kinds))
    messages = (
        Message(role="user", parts=(*parts[:1], TextPart(text="First"))),
        Message(role="user", parts=(*parts[1:], TextPart(text="Which?"))),
    )
    return Request(request_id="r", messages=messages, media=media, vision=VisionOptions(**vision))


def balancer(names: tuple[str, ...] = NAMES) -> Balancer:
    made = Balancer()
    made.update({name: {} for name in names})
    return made


def sizes(request: Request, balancer: Balancer, pace: Pace = SLOW, limits: MediaLimits | None = None) -> list[int]:
    return sorted(len(part.items) for part in parts_of(request, media_keys(request), balancer, pace, limits))


def test_pictures_are_spread_evenly_over_idle_encoders() -> None:
    assert sizes(asking(8), balancer()) == [2, 2, 2, 2]
    assert sizes(asking(3), balancer()) == [1, 1, 1]


def test_every_item_is_in_one_part_and_parts_are_in_order() -> None:
    request = asking(9, 2, 5)
    parts = parts_of(request, media_keys(request), balancer(), SLOW, None)
    assert sorted(i for part in parts for i in part.items) == list(range(9))
    assert all(list(part.items) == sorted(part.items) for part in parts)
    assert len({part.replica for part in parts}) == len(parts)


def test_a_clip_weighs_as_much_as_its_frames() -> None:
    request = asking(9, 0)
    (alone,) = (part for part in parts_of(request, media_keys(request), balancer(), SLOW, None) if 0 in part.items)
    assert alone.items == (0,), "a clip of 8 frames beside 8 pictures on three other encoders"


def test_busy_encoders_get_less() -> None:
    routing = balancer()
    routing.take("a", 100.0)
    parts = parts_of(request := asking(6), media_keys(request), routing, SLOW, None)
    assert {part.replica for part in parts} == {"b", "c", "d"}


def test_cached_items_stay_where_they_are() -> None:
    routing, request = balancer(), asking(4)
    keys = media_keys(request)
    for key in keys:
        routing.learn("c", key)
    assert len(parts_of(request, keys, routing, Pace(0.2), None)) == 1
    assert len(parts_of(request, keys, balancer(), Pace(0.2), None)) == 4


@pytest.mark.parametrize(
    ("request_", "routing", "pace"),
    [
        (asking(8), balancer(("a",)), SLOW),
        (asking(8), Balancer(), SLOW),
        (asking(1), balancer(), SLOW),
        (asking(0), balancer(), SLOW),
        (asking(8), balancer(), Pace()),
        (asking(8), balancer(), Pace(WORTH_S / 6.1)),
        (asking(8, max_visual_tokens=100), balancer(), SLOW),
    ],
    ids=["one encoder", "no encoder", "one item", "no item", "nothing measured", "too quick", "a common budget"],
)
def test_a_request_stays_whole(request_: Request, routing: Balancer, pace: Pace) -> None:
    (part,) = parts_of(request_, media_keys(request_), routing, pace, None)
    assert part.items == tuple(range(len(request_.media)))
    assert part.replica == ""


def test_sharing_begins_where_it_saves_time() -> None:
    assert len(sizes(asking(8), balancer(), Pace(WORTH_S / 5.9))) == 4


def test_too_many_items_stay_together_so_that_they_are_refused() -> None:
    limits = MediaLimits(max_images=8, max_videos=1)
    assert len(sizes(asking(8), balancer(), limits=limits)) == 4
    assert len(sizes(asking(9), balancer(), limits=limits)) == 1
    assert len(sizes(asking(8, 0, 1), balancer(), limits=limits)) == 1


def test_a_part_keeps_its_texts_and_numbers_its_media_anew() -> None:
    whole = asking(5, 3)
    part = with_items(whole, (1, 3, 4))
    marks = [one for message in part.messages for one in message.parts if isinstance(one, MediaPart)]
    assert [(mark.index, mark.kind) for mark in marks] == [(0, "image"), (1, "video"), (2, "image")]
    assert part.media == tuple(whole.media[i] for i in (1, 3, 4))
    assert question(part) == question(whole)
    assert part.num_images == 4


class Encoders:
    """Encoders that answer after a random time, and with what they were asked for."""

    deployment_name = "encoders"

    def __init__(self, *, by_reference: bool = False) -> None:
        self.asked: list[tuple[str, Request]] = []
        self.lost: set[str] = set()
        self.fault: Exception | None = None
        self.num_cancelled = 0
        self._by_reference, self._rng = by_reference, random.Random(3)

    def options(self, *, session_id: str = "", **_: Any) -> Any:
        order = order_of(session_id)
        remote = SimpleNamespace(remote=lambda request: _Call(self._answer(order, request)))
        remote.options = self.options
        return SimpleNamespace(encode=remote, encode_inline=remote, remote=remote.remote, options=self.options)

    @property
    def encode_inline(self) -> Any:
        return self.options()

    async def _answer(self, order: list[str], request: Request) -> TransferredMedia:
        name = order[0] if order else ""
        self.asked.append((name, request))
        if self.fault is not None and b"item 5" in [one.source for one in request.media]:
            raise self.fault
        try:
            await asyncio.sleep(self._rng.random() / 50)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if name in self.lost:
            self.lost.remove(name)
            raise ActorDiedError()
        items = pack([encoded(one.source) for one in request.media])
        found = TransferredMedia(
            reducer="none", num_items=len(items), num_bytes=len(items), seconds=1.0 * len(items), inline=items
        )
        large = self._by_reference and b"item 2" in [one.source for one in request.media]
        return replace(found, inline=None, reference=(_Reference(items),)) if large else found


class _Call:
    def __init__(self, work: Any) -> None:
        self._task = asyncio.ensure_future(work)

    def __await__(self) -> Any:
        return self._task.__await__()

    def cancel(self) -> None:
        self._task.cancel()


class _Reference:
    def __init__(self, items: Any, error: Exception | None = None) -> None:
        self.items, self.error = items, error

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        if self.error is not None:
            raise self.error
        return self.items


def encoded(source: bytes) -> Encoded:
    number = float(source.split()[-1])
    tokens = VisualTokens.full(torch.full((2, 3), number), (1, 1, 2), "image")
    return Encoded(tokens=tokens, timings=EncodeTimings(encode_s=1.0), key="")


async def encoding(encoders: Encoders) -> Encoding:
    tier = Tier.of(encoders, "encoder")  # type: ignore[arg-type]
    tier.stage.report(len(NAMES))
    tier.balancer.update({name: {} for name in NAMES})
    made = Encoding(encoders, tier, is_whole=False)  # type: ignore[arg-type]
    await made.encode(one := asking(1), media_keys(one), is_new=True)
    encoders.asked.clear()
    return made


async def numbers_of(media: TransferredMedia) -> list[float]:
    return [float(item.tokens.embeddings[0, 0]) for item in (await receive(media)).items]


@pytest.mark.parametrize("by_reference", [False, True])
async def test_items_come_back_in_order_whoever_is_first(by_reference: bool) -> None:
    encoders = Encoders(by_reference=by_reference)
    made = await encoding(encoders)
    for _ in range(20):
        request = asking(8)
        made._tier.balancer._answered.clear()
        media = await made.encode(request, media_keys(request), is_new=True)
        assert await numbers_of(media) == list(range(8))
        assert media.num_items == 8
        assert media.keys == media_keys(request)
        assert (media.reference is not None) == by_reference
    assert made._tier.balancer.stats.num_shared == 20
    assert {name for name, _ in encoders.asked} == set(NAMES)


async def test_a_lost_part_is_encoded_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "PAUSE_S", 0.0)
    encoders = Encoders()
    made = await encoding(encoders)
    encoders.lost = {"b"}
    media = await made.encode(request := asking(8), media_keys(request), is_new=True)
    assert await numbers_of(media) == list(range(8))
    assert len(encoders.asked) == 5


async def test_an_error_of_one_part_ends_the_others() -> None:
    encoders = Encoders()
    made = await encoding(encoders)
    encoders.fault = InvalidRequest("the image is damaged", "messages[1].content[4]")
    with pytest.raises(InvalidRequest, match="damaged"):
        await made.encode(request := asking(8), media_keys(request), is_new=True)
    await asyncio.sleep(0.1)
    assert encoders.num_cancelled == 3
    assert not any(made._tier.balancer.load(name) for name in NAMES)


async def test_lost_references_of_a_part_lose_the_media() -> None:
    items = pack([encoded(b"item 0")])
    gone = _Reference(None, ObjectLostError("00" * 28, "", ""))
    media = TransferredMedia(reducer="none", num_items=2, inline=items, reference=(gone,), order=(1, 0))
    with pytest.raises(MediaLost):
        await receive(media)
