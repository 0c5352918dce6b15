"""What every registered encoder promises. A new one is tested as soon as it has its entry point."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mm.data.media import Image, Kind, Video
from mm.data.tokens import VisualTokens
from mm.errors import MediaError
from mm.plugins.capabilities import SUPPLIED_AFTER_MERGING
from mm.plugins.encoder import PreparesItems
from mm.plugins.features import BLOCK_KEYS, PATCHES, RESOLUTION, TEXT_EMBEDDINGS
from mm.plugins.registry import create, get, names
from mm.plugins.spec import build_reducer

NOT_CHECKPOINTS: dict[str, dict[str, Any]] = {"timm": {"model_name": "test_vit", "image_size": 64}}
"""Encoders that are not built from a checkpoint's folder, and how they are built here."""

NAMES = [*names("encoder"), "tiny"]
NOT_OF_TOKENS = frozenset({BLOCK_KEYS, PATCHES, RESOLUTION, TEXT_EMBEDDINGS})
KINDS: tuple[Kind, ...] = ("image", "video")


@pytest.fixture(scope="module")
def build(checkpoint):
    made: dict[tuple, Any] = {}

    def of(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, *, again: bool = False) -> Any:
        if (name, seed, dtype) in made and not again:
            return made[name, seed, dtype]
        if name in NOT_CHECKPOINTS:
            torch.manual_seed(seed)
            encoder = create("encoder", name, dtype=dtype, **NOT_CHECKPOINTS[name])
        else:
            encoder = create("encoder", "llava" if name == "tiny" else name, folder=checkpoint(name, seed), dtype=dtype)
        made[name, seed, dtype] = encoder
        return encoder

    return of


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def encoder(name, build) -> Any:
    return build(name)


def image(seed: int, height: int = 60, width: int = 90) -> Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image(pixels=pixels, content_hash=f"image-{seed}")


def video(seed: int, num_frames: int = 4) -> Video:
    frames = np.random.default_rng(seed).integers(0, 256, (num_frames, 70, 60, 3), dtype=np.uint8)
    times = tuple(i / 2 for i in range(num_frames))
    return Video(frames=frames, timestamps_s=times, duration_s=num_frames / 2, content_hash=f"video-{seed}")


def items_of(encoder: Any) -> list[Image | Video]:
    """Pictures of two shapes, and a clip where it takes some."""
    clips = [video(3)] if "video" in encoder.kinds else []
    return [image(0), *clips, image(1, 200, 64)] if "image" in encoder.kinds else clips


def close(a: VisualTokens, b: VisualTokens) -> bool:
    return (a.grid, a.kind) == (b.grid, b.kind) and torch.allclose(a.embeddings, b.embeddings, atol=1e-4)


def test_what_an_encoder_declares(name, encoder):
    plugin = get("encoder", "llava" if name == "tiny" else name)
    assert encoder.provides <= plugin.provides, "its class has to name all that a checkpoint may supply"
    assert encoder.kinds <= plugin.kinds
    assert encoder.kinds <= {*KINDS}
    assert encoder.kinds
    assert isinstance(encoder.fingerprint, str)
    assert encoder.fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_cell_of_the_grid_is_one_token(name, build, dtype):
    encoder = build(name, dtype=dtype)
    items = items_of(encoder)
    encoded = encoder.encode(items)
    assert len(encoded) == len(items)
    widths = set()
    for item, tokens in zip(items, encoded, strict=True):
        t, h, w = tokens.grid
        assert tokens.kind == item.kind
        assert tokens.num_tokens == t * h * w > 0
        assert tokens.embeddings.dtype is dtype
        assert tokens.embeddings.device.type == "cpu"
        assert torch.equal(tokens.indices, torch.arange(t * h * w)), "tokens are not in raster order"
        assert (tokens.sizes == 1).all()
        assert torch.isfinite(tokens.embeddings).all()
        assert not tokens.embeddings.requires_grad
        assert tokens.crops is None or item.kind == "image"
        widths.add(tokens.embeddings.shape[1])
    assert len(widths) == 1


def test_an_item_s_tokens_do_not_depend_on_the_other_items(encoder):
    items = items_of(encoder)
    together = encoder.encode(items)
    assert all(close(encoder.encode([item])[0], tokens) for item, tokens in zip(items, together, strict=True))
    turned = encoder.encode(items[::-1])[::-1]
    assert all(close(a, b) for a, b in zip(turned, together, strict=True))
    assert encoder.encode([]) == []


def test_prepared_items_have_the_same_tokens_and_hold_no_pixels(encoder):
    if not isinstance(encoder, PreparesItems):
        pytest.skip("takes whole items only")
    items = items_of(encoder)
    expected = encoder.encode(items)
    prepared = [encoder.prepare(item) for item in items]
    assert [item.kind for item in prepared] == [item.kind for item in items]
    sources = [item.pixels if isinstance(item, Image) else item.frames for item in items]
    for source in sources:
        source[:] = 0
    found = encoder.encode(prepared)
    assert all(torch.equal(a.embeddings, b.embeddings) for a, b in zip(found, expected, strict=True))
    assert [tokens.grid for tokens in found] == [tokens.grid for tokens in expected]
    assert [tokens.seconds_per_step for tokens in found] == [tokens.seconds_per_step for tokens in expected]


def test_is_deterministic_and_changes_no_pixel(encoder):
    items = items_of(encoder)
    pixels = [(item.pixels if isinstance(item, Image) else item.frames).copy() for item in items]
    first, second = encoder.encode(items), encoder.encode(items)
    assert all(torch.equal(a.embeddings, b.embeddings) for a, b in zip(first, second, strict=True))
    after = [item.pixels if isinstance(item, Image) else item.frames for item in items]
    assert all(np.array_equal(a, b) for a, b in zip(pixels, after, strict=True))


def test_other_pixels_are_other_tokens(encoder):
    kind = "image" if "image" in encoder.kinds else "video"
    make = image if kind == "image" else video
    a, b = encoder.encode([make(0), make(1)])
    assert not torch.equal(a.embeddings, b.embeddings)


def test_what_it_provides_it_supplies(encoder):
    """Each auxiliary feature alone and all of them together, of every item, at unchanged tokens."""
    items, offered = items_of(encoder), sorted(encoder.provides - NOT_OF_TOKENS)
    plain, everything = encoder.encode(items), encoder.encode(items, needs=frozenset(encoder.provides))
    alone = {feature: encoder.encode(items, needs=frozenset({feature})) for feature in offered}
    for i, tokens in enumerate(everything):
        assert close(tokens, plain[i])
        for feature in offered:
            plane = tokens.aux_features[feature]
            assert plane.dtype is torch.float32
            assert plane.dim() == 2
            assert plane.shape[1] == tokens.num_tokens, f"{feature} is not per token"
            assert torch.isfinite(plane).all()
            assert torch.allclose(alone[feature][i].aux_features[feature], plane, atol=1e-4)
            if "attention" in feature:
                assert (plane >= 0).all()
    if TEXT_EMBEDDINGS in encoder.provides:
        text = encoder.embed_text("what colour is the circle")
        assert text.shape[0] > 1
        assert text.shape[1] == everything[0].embeddings.shape[1]
        assert encoder.embed_text("").shape == (0, text.shape[1])


def test_a_reducer_in_its_tower_leaves_what_it_plans(name, encoder):
    if BLOCK_KEYS not in encoder.provides:
        assert name != "timm", "of timm's test model the blocks are run one by one"
        pytest.skip("hosts no reducer in its tower")
    reducer = build_reducer("tome:keep_ratio=0.5")
    needs = frozenset(encoder.provides & SUPPLIED_AFTER_MERGING)
    whole, (merged,) = encoder.encode([image(0)])[0], encoder.encode([image(0)], needs=needs, merging=reducer)
    assert merged.num_tokens == reducer.plan(whole.num_tokens, whole.grid) < whole.num_tokens
    assert merged.grid == whole.grid
    assert torch.equal(merged.indices, merged.indices.unique())
    assert merged.sizes.sum() == whole.num_tokens
    assert all(plane.shape[-1] == merged.num_tokens for plane in merged.aux_features.values())


def test_other_kinds_are_refused_by_name(encoder):
    refused = [item for item in (image(0), video(0)) if item.kind not in encoder.kinds]
    for item in refused:
        with pytest.raises(MediaError, match=item.kind):
            encoder.encode([item])
    assert len(refused) == 2 - len(encoder.kinds)


def test_the_fingerprint_names_weights_and_dtype(name, build):
    first = build(name).fingerprint
    assert build(name, dtype=torch.bfloat16).fingerprint != first
    if name not in NOT_CHECKPOINTS:  # those have new random weights every time
        assert build(name, again=True).fingerprint == first
    if name != "tiny":
        assert build(name, seed=1).fingerprint != first
