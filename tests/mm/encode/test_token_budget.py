"""Budgets in visual tokens: never exceeded, known before the tower runs, and one word each for OpenAI's `detail`."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mm.api import build_request
from mm.build import build_encode_parts
from mm.config import MediaLimits, ModelConfig, ReducerPolicy
from mm.data.messages import parse_messages
from mm.data.request import MediaPart, Request, VisionOptions
from mm.encode.counting import count_tokens
from mm.encode.feature_cache import FeatureCache
from mm.encode.parts import EncodeParts
from mm.encode.pipeline import encode
from mm.encode.policy import resolve_reducer
from mm.encode.token_budget import TokenBudget, check_budget_by
from mm.errors import IncompatiblePlugin, InvalidOption, InvalidRequest, MediaError, MmError, ReducerNotAllowed
from mm.media import MediaBudget, image_from_array, video_from_array
from mm.models.checkpoint import find
from mm.plugins.registry import get, names, options_of
from tests.helpers.checkpoints import random_idefics3, random_llava, random_qwen2_5_vl, random_video_llava
from tests.helpers.families import FAMILIES as GENERIC
from tests.helpers.families import write

NUM_REQUESTS = int(os.environ.get("MM_BUDGET_REQUESTS", "105"))
"""Of all families together. `MM_BUDGET_REQUESTS=1000` draws from every architecture that is served."""

OWN: dict[str, Callable[[Path], Path]] = {
    "tiny": lambda _: find("tiny"),
    "llava": random_llava,
    "video": random_video_llava,
    "qwen": random_qwen2_5_vl,
    "idefics3": random_idefics3,
}
ALL = {**OWN, **{name: functools.partial(write, name) for name in GENERIC}}
FEW = ("llava_next", "qwen3_vl")
FAMILIES = list(ALL) if NUM_REQUESTS >= 1000 else [*OWN, *FEW]


def reducers_of(parts: EncodeParts) -> list[str]:
    """Every registered reducer, and pairs of them, that works with an encoder."""
    rng, found = random.Random(parts.encoder.fingerprint), list[str]()
    single = [
        f"{name}:keep_ratio={ratio}" if "keep_ratio" in options_of(get("reducer", name)) else name
        for name in names("reducer")
        if get("reducer", name).__module__.startswith("pruning.")
        for ratio in (0.1, 0.5, 0.9)
    ]
    for text in [*single, "pixelprune:tau=0.2", *(" + ".join(rng.sample(single, 2)) for _ in range(60))]:
        try:
            resolve_reducer(VisionOptions(reducer=text), parts)
        except MmError:
            continue
        found.append(text)
    return found


@functools.cache
def parts_for(family: str, folder: Path) -> EncodeParts:
    return build_encode_parts(ModelConfig(model=str(ALL[family](folder)), dtype="float32"))


@pytest.fixture(scope="module")
def parts_of(tmp_path_factory) -> Callable[[str], EncodeParts]:
    folder = tmp_path_factory.mktemp("families")

    def parts(family: str) -> EncodeParts:
        (folder / family).mkdir(exist_ok=True)
        return parts_for(family, folder / family)

    yield parts
    parts_for.cache_clear()


def picture(rng: random.Random, budget: MediaBudget):
    height, width = rng.choice([(40, 40), (56, 90), (30, 120), (90, 56)])
    pixels = np.random.default_rng(rng.randrange(20)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if rng.random() < 0.3:
        pixels[: height // 2] = 255
    return image_from_array(pixels, budget)


def clip(rng: random.Random, budget: MediaBudget):
    frames = np.random.default_rng(rng.randrange(9)).integers(0, 256, (rng.randint(1, 5), 60, 60, 3), dtype=np.uint8)
    return video_from_array(frames, [i / 2 for i in range(len(frames))], len(frames) / 2, budget)


def drawn(rng: random.Random, parts: EncodeParts, reducers: list[str]) -> Request:
    """A request with up to four items, any reducer and any budgets."""
    budget = MediaBudget(MediaLimits())
    images = [picture(rng, budget) for _ in range(rng.randint(1, 3))]
    videos = [clip(rng, budget)] if "video" in parts.encoder.kinds and rng.random() < 0.5 else []
    most = rng.choice([None, 4, rng.randint(4, 12), rng.randint(4, 120)])
    request = build_request("What is it?", images=images, videos=videos, max_visual_tokens=most)
    (message,) = request.messages
    wished = tuple(
        replace(
            part,
            **(
                {
                    "detail": rng.choice(["low", "high", "auto"]),
                    "max_visual_tokens": rng.choice([None, rng.randint(1, 40)]),
                }
                if hasattr(part, "index")
                else {}
            ),
        )
        for part in message.parts
    )
    vision = replace(request.vision, reducer=rng.choice([None, *reducers]))
    return replace(request, messages=(replace(message, parts=wished),), vision=vision)


@pytest.mark.parametrize("family", FAMILIES)
def test_never_more_than_asked_for_and_as_told_before(parts_of, family):
    """Any items, any reducer that works there, any budgets."""
    rng, parts = random.Random(family), parts_of(family)
    reducers = reducers_of(parts)
    assert len(reducers) > 8
    wanted, done = -(-NUM_REQUESTS // len(FAMILIES)), 0
    while done < wanted:
        request = drawn(rng, parts, reducers)
        try:
            found = encode(request, parts).items
        except (IncompatiblePlugin, InvalidOption, MediaError):  # such as ToMe for the clips of a LLaVA
            continue
        done += 1
        counts = count_tokens(request, replace(parts, cache=FeatureCache(0)))
        for part, count, item in zip(request.messages[0].parts, counts, found, strict=False):
            assert item.tokens.num_tokens <= count.num_tokens <= count.num_tokens_in
            assert item.tokens.num_tokens == count.num_tokens or not count.is_exact
            assert count.num_tokens_in == item.tokens.num_tokens_in
            assert item.tokens.num_tokens <= (part.max_visual_tokens or 10**9)
            assert item.tokens.num_tokens >= 1
            if part.detail == "low":
                assert item.tokens.num_tokens <= max(1, item.tokens.num_tokens_in // 4)
        most = request.vision.max_visual_tokens
        assert sum(item.tokens.num_tokens for item in found) <= (most or 10**9)
        assert len({item.key for item in found}) == len({(item.key, item.tokens.num_tokens) for item in found})


def test_what_a_reducer_protects_is_cut_last(parts_of):
    """MustDrop's key tokens."""
    parts = parts_of("llava")
    request = build_request("?", images=[picture(random.Random(1), MediaBudget(MediaLimits()))])
    vision = replace(request.vision, reducer="mustdrop:window=1,key_ratio=0.5")
    (whole,) = encode(replace(request, vision=vision), parts).items
    keys = set(whole.tokens.indices[whole.tokens.protected].tolist())
    assert len(keys) == whole.tokens.num_tokens // 2
    for limit in (len(keys) // 2, len(keys), len(keys) + 3):
        (left,) = encode(replace(request, vision=replace(vision, max_visual_tokens=limit)), parts).items
        kept = set(left.tokens.indices.tolist())
        assert len(kept) == limit
        assert kept <= keys if limit < len(keys) else kept >= keys
        assert left.tokens.protected.sum() == min(limit, len(keys))


def wishing(parts: EncodeParts, *wishes: dict) -> Request:
    rng, budget = random.Random(1), MediaBudget(MediaLimits())
    images = [picture(rng, budget) for _ in wishes]
    request = build_request("What is it?", images=images)
    (message,) = request.messages
    wished = tuple(replace(part, **wish) for part, wish in zip(message.parts, wishes, strict=False))
    return replace(request, messages=(replace(message, parts=(*wished, message.parts[-1])),))


def test_no_tower_runs_for_a_count(parts_of, monkeypatch):
    parts = parts_of("qwen")
    monkeypatch.setattr(type(parts.encoder), "encode", lambda *_, **__: pytest.fail("the tower ran"))
    request = wishing(parts, {"detail": "low"}, {"detail": "high"})
    low, high = count_tokens(request, parts)
    assert high.num_tokens == high.num_tokens_in
    assert low.num_tokens == max(1, low.num_tokens_in // 4)


@pytest.mark.parametrize(("high", "low"), [(400, 85), (340, 85), (100, 25), (7, 1), (1, 1), (0, 0)])
def test_low_is_a_quarter_and_a_fixed_number(high, low):
    budget = TokenBudget(parts=(MediaPart(index=0, kind="image", detail="low"),))
    assert budget.limits([high], ReducerPolicy()) == [low]
    assert budget.limits([high], ReducerPolicy(detail_low_tokens=1)) == [min(1, high)]


def test_a_budget_below_one_token_per_item_is_refused(parts_of):
    parts = parts_of("llava")
    request = wishing(parts, {}, {}, {})
    request = replace(request, vision=replace(request.vision, max_visual_tokens=2))
    for run in (count_tokens, encode):
        with pytest.raises(InvalidRequest, match=r"was 2 for 3 images and clips"):
            run(request, parts)


def test_a_clip_whose_tower_merges_none_is_refused_before_it_is_decoded(parts_of):
    parts = parts_of("video")
    request = build_request("?", videos=[b"no clip at all"], reducer="tome:keep_ratio=0.5")
    for run in (count_tokens, encode):
        with pytest.raises(IncompatiblePlugin, match="tome cannot be used with clips of this model"):
            run(request, parts)
    with pytest.raises(MediaError):
        encode(build_request("?", videos=[b"no clip at all"]), parts)


def test_the_operators_share_holds_for_budgets_too(parts_of):
    parts = replace(parts_of("llava"), policy=ReducerPolicy(min_keep_ratio=0.5))
    for run in (count_tokens, encode):
        with pytest.raises(ReducerNotAllowed, match=r"not go below 0\.5"):
            run(wishing(parts, {"max_visual_tokens": 2}), parts)


def test_budgets_by_a_lower_resolution(parts_of):
    """No more than asked for, as counted before, each item its share; the tower makes no more than that."""
    parts = replace(parts_of("qwen"), policy=ReducerPolicy(budget_by="native"), cache=FeatureCache(10**8))
    rng, lowered = random.Random(3), 0
    for _ in range(25):
        request = drawn(rng, parts, ["divprune", "uniform:keep_ratio=0.8", "pixelprune:tau=0.2", "fastvid"])
        plain = replace(parts, policy=ReducerPolicy())
        whole = encode(replace(request, vision=replace(request.vision, max_visual_tokens=None)), plain).items
        counts = count_tokens(request, parts)
        found = encode(request, parts).items
        again = encode(request, parts)
        assert [item.tokens.num_tokens for item in again.items] == [item.tokens.num_tokens for item in found]
        assert sum(item.tokens.num_tokens for item in found) <= (request.vision.max_visual_tokens or 10**9)
        for part, count, item, full in zip(request.messages[0].parts, counts, found, whole, strict=False):
            tokens = item.tokens
            assert tokens.num_tokens == count.num_tokens or (
                not count.is_exact and tokens.num_tokens < count.num_tokens
            )
            assert tokens.grid == count.grid
            assert 1 <= tokens.num_tokens <= (part.max_visual_tokens or 10**9)
            if part.detail == "low":
                assert tokens.num_tokens <= max(1, full.tokens.num_tokens_in // 4)
            if item.budget_by == "native":
                lowered += tokens.num_tokens_in < full.tokens.num_tokens_in
                assert item.num_before_budget > tokens.num_tokens
    assert lowered > 10


def test_the_operator_says_how_budgets_are_reached(parts_of):
    """By another reducer; what a model cannot do is refused when it is loaded."""
    uniform = replace(parts_of("llava"), policy=ReducerPolicy(budget_by="uniform"), cache=FeatureCache(0))
    request = wishing(uniform, {"max_visual_tokens": 3})
    (item,) = encode(request, uniform).items
    assert item.budget_by == "uniform"
    (alone,) = encode(
        replace(request, messages=(), vision=replace(request.vision, reducer=f"uniform:keep_ratio={3 / 16}")), uniform
    ).items
    assert item.tokens.indices.tolist() == alone.tokens.indices.tolist()
    for name, what in (
        ("native", "resolution"),
        ("visionzip", "budget_by"),
        ("evs", "budget_by"),
        ("divprunne", "divprune"),
    ):
        with pytest.raises(MmError, match=what):
            check_budget_by(ReducerPolicy(budget_by=name), uniform.encoder, "llava")
    check_budget_by(ReducerPolicy(budget_by="native"), parts_of("qwen").encoder, "qwen")


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"detail": "tiny"}, "detail"),
        ({"detail": 1}, "detail"),
        ({"max_visual_tokens": 0}, "max_visual_tokens"),
        ({"max_visual_tokens": True}, "max_visual_tokens"),
        ({"max_visual_tokens": "9"}, "max_visual_tokens"),
    ],
)
def test_wishes_that_cannot_be_are_refused(given, param):
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", **given}}
    with pytest.raises(InvalidRequest) as caught:
        parse_messages([{"role": "user", "content": [part]}])
    assert caught.value.param == f"messages[0].content[0].image_url.{param}"


def test_wishes_are_read():
    url = {"url": "data:image/png;base64,AA==", "detail": "low", "max_visual_tokens": 7}
    (message,), _ = parse_messages([{"role": "user", "content": [{"type": "image_url", "image_url": url}]}])
    assert (message.parts[0].detail, message.parts[0].max_visual_tokens) == ("low", 7)
