"""Cells that never enter a tower: the others are computed as if they were alone, at their places."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from encoders.llava import LlavaEncoder
from encoders.qwen2_vl import Patches, Qwen2VLEncoder
from mm.data.media import Image, Video
from mm.errors import IncompatiblePlugin, InvalidOption, ReducerFault
from mm.plugins.capabilities import before_tower, check_compatible
from mm.plugins.features import TOWER_FEATURES
from mm.plugins.spec import build_reducer
from pruning.base import BaseReducer
from tests.helpers.checkpoints import random_llava, random_qwen2_5_vl, random_siglip_llava, random_video_llava


@dataclass(frozen=True, kw_only=True)
class Part(BaseReducer):
    """Keeps a rectangle of each step, from the first cell on."""

    acts_at: ClassVar[tuple[object, ...]] = ()
    height: int = 2
    width: int = 2

    def keep_cells(self, pixels: torch.Tensor) -> torch.Tensor:
        keep = torch.zeros(pixels.shape[:3], dtype=torch.bool)
        keep[:, : self.height, : self.width] = True
        return keep


@dataclass(frozen=True, kw_only=True)
class Steps(Part):
    """Keeps whole steps."""

    steps: tuple[int, ...] = (0,)

    def keep_cells(self, pixels: torch.Tensor) -> torch.Tensor:
        keep = torch.zeros(pixels.shape[:3], dtype=torch.bool)
        keep[list(self.steps)] = True
        return keep


def picture(height: int, width: int, seed: int = 0) -> Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image(pixels=pixels, content_hash=f"{height} {width} {seed}")


def page(height: int, width: int) -> Image:
    """White, with a block of noise."""
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    pixels[height // 4 : height // 3, width // 4 : width // 2] = np.random.default_rng(3).integers(0, 256, 3)
    return Image(pixels=pixels, content_hash=f"page {height} {width}")


def clip(num_frames: int, height: int, width: int) -> Video:
    frames = np.random.default_rng(1).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
    times = tuple(i / 2 for i in range(num_frames))
    return Video(frames=frames, timestamps_s=times, duration_s=num_frames / 2, content_hash="clip")


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def qwen(request, tmp_path_factory) -> Qwen2VLEncoder:
    return Qwen2VLEncoder(random_qwen2_5_vl(tmp_path_factory.mktemp("qwen"), model_type=request.param))


def top_left(item: Patches, height: int, width: int) -> Patches:
    """The item cut to so many tokens, before the tower."""
    steps, rows, columns = item.grid
    cells = item.pixels.reshape(steps, rows // 2, columns // 2, 4, -1)[:, :height, :width]
    return replace(item, pixels=cells.reshape(-1, cells.shape[-1]), grid=(steps, 2 * height, 2 * width))


@pytest.mark.parametrize(("height", "width"), [(2, 2), (3, 5), (4, 1)])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_rest_of_a_picture_is_never_seen(qwen, kind, height, width):
    """Whatever lies outside: as the tower of transformers encodes the part alone. Its windows begin at the corner."""
    item = qwen.prepare(picture(140, 168) if kind == "image" else clip(4, 140, 168))
    needs = frozenset({TOWER_FEATURES})
    (part,) = qwen.encode([item], needs, dropping=Part(height=height, width=width))
    (alone,) = qwen.encode([top_left(item, height, width)], needs)
    assert torch.allclose(part.embeddings, alone.embeddings, atol=1e-5)
    assert torch.allclose(part.aux_features[TOWER_FEATURES], alone.aux_features[TOWER_FEATURES], atol=1e-5)
    assert part.positions.tolist() == alone.positions.tolist()
    assert part.grid == (item.grid[0], item.grid[1] // 2, item.grid[2] // 2)
    assert part.seconds_per_step == alone.seconds_per_step


def test_a_step_may_be_left_out(qwen):
    item = qwen.prepare(clip(6, 84, 112))
    (whole,), (part,) = qwen.encode([item]), qwen.encode([item], dropping=Steps(steps=(0, 2)))
    stays = whole.positions[:, 0] != 1
    assert torch.allclose(part.embeddings, whole.embeddings[stays], atol=1e-5)
    assert part.positions.tolist() == whole.positions[stays].tolist()


@pytest.mark.parametrize("checkpoint", [random_llava, random_siglip_llava])
def test_a_llava_tower_sees_the_kept_patches_alone(checkpoint, tmp_path):
    """As transformers' blocks under a mask that hides all other patches."""
    encoder = LlavaEncoder(checkpoint(tmp_path))
    item = encoder.prepare(picture(90, 90))
    needs = frozenset({TOWER_FEATURES})
    (part,) = encoder.encode([item], needs, dropping=Part(height=1, width=3))
    inner = getattr(encoder.tower, "vision_model", encoder.tower)
    with torch.inference_mode():
        hidden = inner.embeddings(item.pixels)
        hidden = inner.pre_layrnorm(hidden) if encoder._has_cls else hidden
        first = int(encoder._has_cls)
        kept = torch.zeros(hidden.shape[1], dtype=torch.bool)
        kept[: first + 3] = True
        mask = torch.zeros(1, 1, len(kept), len(kept)).masked_fill(~kept, -torch.inf)
        for block in inner.encoder.layers[: max(encoder._layers)]:
            hidden = block(hidden, attention_mask=mask)
        features = hidden[:, kept][:, first:]
        expected = encoder.projector(features)[0]
    assert torch.allclose(part.embeddings, expected, atol=1e-5)
    assert torch.allclose(part.aux_features[TOWER_FEATURES], features[0].T, atol=1e-5)
    assert part.positions.tolist() == [[0, 0, i] for i in range(3)]


def test_pixelprune_changes_nothing_where_nothing_repeats(qwen, tmp_path):
    """Bit for bit, in one batch with others; flat pages lose most of their tokens, and the rest stay where they are."""
    for encoder in (qwen, LlavaEncoder(random_video_llava(tmp_path))):
        noise = [encoder.prepare(picture(112, 140, seed)) for seed in range(2)] + [encoder.prepare(clip(4, 112, 112))]
        plain = encoder.encode(noise)
        pruned = encoder.encode(noise, dropping=build_reducer("pixelprune"))
        for one, other in zip(plain, pruned, strict=True):
            assert torch.equal(one.embeddings, other.embeddings)
            assert torch.equal(one.positions, other.positions)
        flat = encoder.prepare(page(280, 280))
        (mixed, lean) = encoder.encode([noise[0], flat], dropping=build_reducer("pixelprune"))
        assert torch.equal(mixed.embeddings, plain[0].embeddings)
        assert lean.num_tokens < 0.7 * lean.num_tokens_in
        assert torch.equal(lean.indices, lean.indices.unique())
        still = clip(1, 112, 112)
        still = replace(still, frames=still.frames.repeat(4, axis=0), timestamps_s=(0.0, 0.5, 1.0, 1.5))
        (one,), (kept,) = encoder.encode([still]), encoder.encode([still], dropping=build_reducer("pixelprune"))
        first = one.positions[:, 0] == 0
        assert torch.allclose(kept.embeddings, one.embeddings[first], atol=1e-5)


@pytest.mark.parametrize("share", [0.5, 0.25, 0.01])
def test_native_makes_fewer_tokens_of_the_same_picture(qwen, share):
    """At most the share, never none; the steps of a clip stay."""
    check_compatible(build_reducer("native + divprune"), qwen, "qwen")
    for item in (picture(280, 420), clip(4, 140, 168)):
        whole, part = qwen.prepare(item), qwen.prepare(item, share)
        steps, height, width = qwen.grid_of(part)
        full_steps, full_height, full_width = qwen.grid_of(whole)
        assert steps == full_steps
        assert height * width <= max(1, share * full_height * full_width)
        assert height * width >= min(1, 0.5 * share * full_height * full_width)
        assert qwen.encode([part])[0].num_tokens == steps * height * width
    assert torch.equal(qwen.prepare(picture(280, 420), 1).pixels, qwen.prepare(picture(280, 420)).pixels)


def test_what_cannot_be_hosted_is_refused(qwen):
    check_compatible(build_reducer("pixelprune + divprune"), qwen, "qwen")
    with pytest.raises(IncompatiblePlugin, match="attention_received with pixelprune before its tower"):
        check_compatible(build_reducer("pixelprune + visionzip"), qwen, "qwen")
    with pytest.raises(IncompatiblePlugin, match=r"block_keys \(this tower joins squares"):
        check_compatible(build_reducer("tome"), qwen, "qwen")
    with pytest.raises(InvalidOption, match="before or inside the tower, not several"):
        before_tower(build_reducer("pixelprune + tome"))
    with pytest.raises(ReducerFault, match="kept none"):
        qwen.encode([picture(56, 56)], dropping=Part(height=0))
