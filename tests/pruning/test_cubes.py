"""Cubes as they serve: against the network as trained, chunk by chunk, in the prompt, and in the answer's map."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import mm
from demos.train.cube_data import build_prompt
from demos.train.cubing import CubeNetwork as Trained
from demos.train.cubing import uniform_borders
from mm.data.media import Video
from mm.data.tokens import VisualTokens
from mm.encode.pipeline import encode
from mm.errors import BadWeights
from mm.models.checkpoint import find
from mm.plugins.apply import reduce_tokens
from mm.plugins.spec import bind, reducer_spec
from pruning.learned.cubes import WINDOW, Cubes
from pruning.learned.cubing import num_borders
from tests.helpers.learned import untrained


def cubes_of(frames_per_cube: int, width: int = 32, seed: int = 7, borders: str = "learned") -> Cubes:
    """With weights as a training starts with, but for a resampler that is not silent and digits that differ."""
    weights = untrained(Cubes, width, seed)
    drawn = torch.Generator().manual_seed(seed)
    loud = {"digits": (10, width), "resampler.out.weight": (width, width), "cubing.mlp.3.weight": (2, width)}
    noise = {name: torch.randn(shape, generator=drawn) for name, shape in loud.items()}
    return Cubes(frames_per_cube=frames_per_cube, borders=borders).bind(
        replace(weights, tensors={**weights.tensors, **noise})
    )


def clip(num_frames: int, width: int = 32, seed: int = 0) -> VisualTokens:
    drawn = torch.Generator().manual_seed(seed)
    steps = torch.randn(num_frames, 64, width, generator=drawn) * (torch.rand(num_frames, 1, 1, generator=drawn) < 0.4)
    return VisualTokens.full(steps.cumsum(0).flatten(0, 1), (num_frames, 8, 8), "video")


def in_chunks(reducer: Cubes, tokens: VisualTokens, size: int) -> VisualTokens:
    stream, frames = reducer.stream(), tokens.embeddings.unflatten(0, (-1, 64))
    for part in frames.split(size):
        stream.add(VisualTokens.full(part.flatten(0, 1), (len(part), 8, 8), "video"))
    return stream.finish()


@pytest.mark.parametrize("num_frames", [1, 2, 3, 7, 24, 65])
@pytest.mark.parametrize("frames_per_cube", [1, 3, 8])
@pytest.mark.parametrize("borders", ["learned", "uniform"])
def test_serving_equals_the_trained_network_and_its_prompt(num_frames, frames_per_cube, borders):
    """One-frame and two-frame clips too: borders, tokens, digits between them, and where each stands."""
    tokens, reducer = clip(num_frames), cubes_of(frames_per_cube, borders=borders)
    given = uniform_borders(num_frames, num_borders(num_frames, frames_per_cube)) if borders == "uniform" else None
    trained = Trained(reducer.shape)
    trained.load_state_dict({k: v for k, v in reducer.loaded.tensors.items() if k != "digits"})
    with torch.no_grad():
        made = trained(tokens.embeddings.unflatten(0, (-1, 64)), frames_per_cube, borders=given)
        prompt = build_prompt(reducer.shape, made)
    embed = torch.nn.Embedding.from_pretrained(reducer.loaded.tensors["digits"])
    out = reduce_tokens(reducer, tokens)
    assert out.borders == tuple(made.borders)
    assert out.placement.offsets.tolist() == prompt.places
    assert out.placement.advance == prompt.length
    torch.testing.assert_close(out.embeddings, prompt.embeddings(embed, list(range(10))), rtol=1e-5, atol=1e-5)
    assert out.num_tokens <= reducer.plan(tokens.num_tokens, tokens.grid, "video")
    assert torch.equal(out.indices, out.indices.unique())
    assert float(out.sizes.sum()) == pytest.approx(tokens.num_tokens, abs=1e-2)


@pytest.mark.parametrize("num_frames", [1, 2, WINDOW, WINDOW + 1, WINDOW + 2, 3 * WINDOW + 5])
@pytest.mark.parametrize("borders", ["learned", "uniform"])
def test_the_chunks_in_which_frames_come_do_not_matter(num_frames, borders):
    tokens, reducer = clip(num_frames), cubes_of(3, borders=borders)
    whole = reduce_tokens(reducer, tokens)
    for size in (1, 7, 16, num_frames):
        parts = in_chunks(reducer, tokens, size)
        assert (parts.borders, parts.grid, parts.kind) == (whole.borders, whole.grid, whole.kind)
        assert torch.equal(parts.positions, whole.positions)
        torch.testing.assert_close(parts.embeddings, whole.embeddings, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(parts.sizes, whole.sizes)


@pytest.mark.parametrize("num_frames", [WINDOW + 1, 3 * WINDOW + 5])
def test_what_is_settled_is_the_beginning_of_what_is_left(num_frames):
    """Tokens, positions and borders that were told once are those of the end, and more are told as frames come."""
    tokens, reducer = clip(num_frames), cubes_of(8)
    stream, told = reducer.stream(), []
    for part in tokens.embeddings.unflatten(0, (-1, 64)).split(16):
        stream.add(VisualTokens.full(part.flatten(0, 1), (len(part), 8, 8), "video"))
        told.append(stream.settled())
    whole = stream.finish()
    assert told[: WINDOW // 16] == [None] * (WINDOW // 16)
    counts = [early.num_tokens for early in told if early is not None]
    assert counts == sorted(counts)
    assert len(set(counts)) == (num_frames - 1) // WINDOW
    for early in (early for early in told if early is not None):
        n = early.num_tokens
        assert n < whole.num_tokens
        assert torch.equal(early.embeddings, whole.embeddings[:n])
        assert torch.equal(early.placement.offsets, whole.placement.offsets[:n])
        assert early.borders == whole.borders[: len(early.borders)]
        assert early.grid[0] == whole.borders[len(early.borders)]


def test_memory_does_not_grow_with_the_clip():
    """What a stream holds of frames is bounded by two windows and a cube, also where nothing ever happens."""
    reducer, held = cubes_of(8), []
    stream, still = reducer.stream(), VisualTokens.full(torch.zeros(16 * 64, 32), (16, 8, 8), "video")
    for _ in range(40):
        stream.add(still)
        held.append(len(stream._open) + len(stream._scores))
    assert max(held) <= 3 * WINDOW
    out = stream.finish()
    assert out.grid[0] == 640
    assert len(out.borders) == 80


def test_images_stay_and_frames_of_another_grid_are_refused():
    image = VisualTokens.full(torch.randn(64, 32), (1, 8, 8), "image")
    assert reduce_tokens(cubes_of(3), image).num_tokens == 64
    with pytest.raises(BadWeights, match="are for frames of 8x8 tokens, and these have 4x4"):
        reduce_tokens(cubes_of(3), VisualTokens.full(torch.randn(32, 32), (2, 4, 4), "video"))


def video(num_frames: int) -> Video:
    pixels = np.random.default_rng(num_frames).integers(0, 256, (num_frames, 56, 56, 3), dtype=np.uint8)
    times = tuple(i * 0.5 for i in range(num_frames))
    return Video(frames=pixels, timestamps_s=times, duration_s=num_frames * 0.5, content_hash=f"clip {num_frames}")


@pytest.mark.parametrize("num_frames", [1, 2, 20])
def test_a_clip_is_answered_and_its_map_says_where_it_was_cut(num_frames):
    model = mm.load("tiny", dtype="float32", num_threads=1)
    options = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True, "return_map": True}
    request = mm.api.build_request("What happens?", videos=[video(num_frames)], reducer="cubes", **options)
    (item,) = encode(request, model.encode_parts).items
    answer = mm.api.collect(model.run(request))
    assert len(answer.token_ids[0]) == 4
    (kept,) = answer.kept
    assert kept.cubes == item.cubes
    assert [cube.first_frame for cube in kept.cubes] == list(item.tokens.borders)
    assert (kept.cubes[0].start_s, kept.cubes[-1].end_s) == (0.0, num_frames * 0.5)
    assert all(a.end_s == b.start_s for a, b in zip(kept.cubes, kept.cubes[1:], strict=False))
    assert sum(cube.num_frames for cube in kept.cubes) == num_frames
    assert answer.usage.num_video_tokens_in == 64 * num_frames
    assert answer.usage.num_video_tokens_prompt == item.tokens.num_tokens < 64 * num_frames
    again = encode(request, model.encode_parts).items[0]
    assert again.cache_hit
    assert again.cubes == item.cubes
    whole = bind(reducer_spec("cubes"), find("tiny")).plugin
    tokens = model.encode_parts.encoder.encode([video(num_frames)])[0]
    torch.testing.assert_close(reduce_tokens(whole, tokens).embeddings, item.tokens.embeddings, rtol=1e-3, atol=1e-2)
