"""The encoder's half of a request: one budget, drawn from once per item, whichever form the item comes in."""

from __future__ import annotations

import base64
import gc
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL.Image
import pytest
import torch

from mm.api import build_request
from mm.build import build_encode_parts
from mm.config import MediaLimits, ModelConfig, SourcePolicy
from mm.data.media import MediaFile, MediaSource
from mm.data.request import Request
from mm.data.tokens import Encoded
from mm.encode import pipeline
from mm.encode.parts import EncodeParts
from mm.encode.pipeline import encode, encode_loaded, load
from mm.errors import InvalidRequest, MediaError
from mm.media import MediaBudget, fetch, image_from_array, video_from_array
from tests.helpers.checkpoints import random_llava
from tests.helpers.clips import clip_bytes

SIDE = 56
PIXELS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def file_of(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PNG = file_of(PIXELS)
FORMS: dict[str, Callable[[Path], Any]] = {
    "bytes": lambda _: PNG,
    "path": lambda folder: folder / "a.png",
    "text path": lambda folder: str(folder / "a.png"),
    "data URL": lambda _: "data:image/png;base64," + base64.b64encode(PNG).decode(),
    "PIL": lambda _: PIL.Image.fromarray(PIXELS),
    "array": lambda _: PIXELS,
    "image": lambda _: image_from_array(PIXELS, MediaBudget(MediaLimits())),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("media")
    (path / "a.png").write_bytes(PNG)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return random_llava(tmp_path_factory.mktemp("llava"), video=True)


@pytest.fixture
def make_parts(checkpoint) -> Callable[..., EncodeParts]:
    def make(cache_bytes: int = 0, **limits: Any) -> EncodeParts:
        sources, found = SourcePolicy(allow_paths=True), MediaLimits(**limits)
        config = ModelConfig(
            model=str(checkpoint), dtype="float32", cache_bytes=cache_bytes, sources=sources, limits=found
        )
        return build_encode_parts(config)

    return make


def refusal(request: Request, parts: EncodeParts) -> tuple[str, str | None]:
    with pytest.raises(MediaError) as caught:
        encode(request, parts)
    return caught.value.reason, caught.value.param


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_picture_gives_the_same_tokens(make_parts, folder, form):
    request = build_request("What?", images=[FORMS[form](folder)])
    (item,) = encode(request, make_parts()).items
    (expected,) = encode(build_request("What?", images=[PNG]), make_parts()).items
    assert torch.equal(item.tokens.embeddings, expected.tokens.embeddings)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_draws_one_item_and_its_pixels(make_parts, folder, form):
    """Two fit exactly. A second draw for any of them, or none, would show."""
    pictures = [FORMS[form](folder) for _ in range(3)]
    parts = make_parts(max_images=2)
    assert encode(build_request("What?", images=pictures[:2]), parts).num_items == 2
    reason, param = refusal(build_request("What?", images=pictures), parts)
    assert reason == "too_many_items"
    assert param in ("images[2]", None if form == "image" else "images[2]")
    parts = make_parts(max_total_pixels=2 * SIDE * SIDE)
    assert encode(build_request("What?", images=pictures[:2]), parts).num_items == 2
    assert refusal(build_request("What?", images=pictures), parts)[0] == "too_many_pixels"


@pytest.mark.parametrize("form", ["bytes", "path", "data URL"])
def test_encoded_files_draw_their_bytes_once(make_parts, folder, form):
    pictures = [FORMS[form](folder) for _ in range(3)]
    parts = make_parts(max_request_bytes=2 * len(PNG))
    assert encode(build_request("What?", images=pictures[:2]), parts).num_items == 2
    assert refusal(build_request("What?", images=pictures), parts) == ("too_many_bytes", "images[2]")


def test_forms_share_one_budget(make_parts, folder):
    pictures = [make(folder) for make in FORMS.values()]
    parts = make_parts(max_images=len(FORMS), max_total_pixels=len(FORMS) * SIDE * SIDE)
    assert encode(build_request("What?", images=pictures), parts).num_items == len(FORMS)
    assert refusal(build_request("What?", images=[*pictures, PNG]), parts)[0] == "too_many_items"


def test_a_file_that_was_fetched_is_not_drawn_again(make_parts):
    """What a batch job does: it reads a file to name it, and has it encoded from the same budget."""
    parts = make_parts(max_images=1, max_request_bytes=len(PNG))
    budget = MediaBudget(parts.limits)
    source = MediaSource(kind="image", source=PNG)
    file = MediaFile(kind="image", data=fetch(source, parts.sources, budget))
    request = build_request("What?", images=[PNG])
    fetched = Request(request_id="a", messages=request.messages, media=(file,))
    assert encode(fetched, parts, budget).items[0].num_media_bytes == len(PNG)
    with pytest.raises(MediaError, match="more images"):
        encode(request, parts, budget)


def test_frames_of_clips_draw_their_pixels(make_parts):
    clip = clip_bytes(num_frames=8)
    frames, times_s = np.zeros((2, SIDE, SIDE, 3), np.uint8), (0.0, 0.5)
    ready = video_from_array(frames, times_s, 1.0, MediaBudget(MediaLimits()))
    for video, num_pixels in ((ready, 2 * SIDE * SIDE), (clip, None)):
        request = build_request("What?", videos=[video], num_frames=2)
        if num_pixels is not None:
            assert encode(request, make_parts(max_total_pixels=num_pixels)).num_items == 1
            assert refusal(request, make_parts(max_total_pixels=num_pixels - 1))[0] == "too_many_pixels"
        assert refusal(request, make_parts(max_videos=0))[0] == "too_many_items"
        assert refusal(request, make_parts(max_sampled_frames=1))[0] == "too_many_frames"


def test_pixels_of_the_wrong_form_name_their_field(make_parts):
    with pytest.raises(InvalidRequest, match="uint8"):
        encode(build_request("What?", images=[PIXELS.astype(float)]), make_parts())
    with pytest.raises(InvalidRequest, match="cannot use a Image as video"):
        build_request("What?", videos=[PIL.Image.fromarray(PIXELS)])


def test_loading_decodes_only_what_is_not_cached(make_parts):
    parts = make_parts(cache_bytes=1 << 20)
    request = build_request("What?", images=[PNG, PNG], reducer="uniform:keep_ratio=0.5")
    first = load(request, parts)
    assert not any(isinstance(item.content, Encoded) for item in first.items)
    media = encode_loaded(first, parts)
    assert (media.num_items, media.num_cache_hits, media.reducer) == (2, 0, "uniform:keep_ratio=0.5")
    again = load(request, parts)
    assert all(isinstance(item.content, Encoded) for item in again.items)
    cached = encode_loaded(again, parts)
    assert cached.num_cache_hits == 2
    assert [item.num_media_bytes for item in cached.items] == [len(PNG)] * 2
    assert torch.equal(cached.items[1].tokens.embeddings, media.items[0].tokens.embeddings)


class DecodesOnly:
    """An encoder that cannot prepare single items."""

    def __init__(self, inner: Any) -> None:
        self.kinds, self.fingerprint, self.provides, self.encode = (
            inner.kinds,
            inner.fingerprint,
            inner.provides,
            inner.encode,
        )


def test_pixels_of_one_item_are_freed_before_the_next_is_decoded(make_parts):
    """So many pictures need the memory of one; an encoder that takes whole pictures needs that of all."""
    one = SIDE * SIDE * 8
    parts = make_parts(max_decoded_bytes=one)
    request = build_request("What?", images=[PNG] * 5)
    assert encode(request, parts).num_items == 5
    assert load(request, parts).budget.memory is parts.memory
    assert parts.memory is not None
    assert parts.memory.num_bytes == 0
    whole = replace(parts, encoder=cast(Any, DecodesOnly(parts.encoder)))
    assert refusal(request, whole) == ("too_much_memory", "images[1]")
    assert parts.memory.num_bytes == 0
    assert encode(build_request("What?", images=[PNG]), whole).num_items == 1
    assert parts.memory.num_bytes == 0


def test_a_request_that_is_dropped_between_its_steps_gives_its_memory_back(make_parts):
    parts = make_parts()
    parts = replace(parts, encoder=cast(Any, DecodesOnly(parts.encoder)))
    assert parts.memory is not None
    loaded = load(build_request("What?", images=[PNG]), parts)
    assert parts.memory.num_bytes == PIXELS.nbytes
    del loaded
    gc.collect()
    assert parts.memory.num_bytes == 0


def test_the_largest_picture_is_decoded_first_and_named_if_it_is_too_large(make_parts, monkeypatch):
    large = file_of(np.zeros((SIDE * 2, SIDE * 2, 3), np.uint8))
    order: list[int] = []
    real = pipeline.decode
    monkeypatch.setattr(pipeline, "decode", lambda file, *rest: order.append(len(file.data)) or real(file, *rest))
    request = build_request("What?", images=[PNG, large, PNG])
    items = load(request, make_parts()).items
    assert order == [len(large), len(PNG), len(PNG)]
    assert [item.num_media_bytes for item in items] == [len(PNG), len(large), len(PNG)]
    order.clear()
    assert refusal(request, make_parts(max_decoded_bytes=SIDE * SIDE * 8)) == ("too_much_memory", "images[1]")
    assert order == [len(large)]


def test_the_reducer_is_named_where_there_are_no_media(make_parts):
    media = encode(build_request("What?", reducer="uniform", keep_ratio=0.25), make_parts())
    assert (media.items, media.reducer) == ((), "uniform:keep_ratio=0.25")
