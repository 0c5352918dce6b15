"""Qwen2-VL and Qwen2.5-VL against transformers: the same rows and positions into the decoder, the same tokens out.

Ours: pixels -> our encoder (tower tensors only) -> splice with our M-RoPE -> our layer loop and cache. Theirs:
AutoProcessor and `generate`. Nothing is shared but the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

import mm
from mm.config import MediaLimits, ModelConfig
from mm.data.request import Request
from mm.data.tokens import Prompt
from mm.encode.pipeline import encode
from mm.media import MediaBudget, video_from_array
from pruning.base import budget
from tests.helpers.checkpoints import random_qwen2_5_vl
from tests.helpers.passes import logits_along

NEW_TOKENS = 16
TEXT = "What colour is the circle, and where?"


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames and how many seconds each stays on screen."""

    frames: np.ndarray
    frame_s: float

    @property
    def metadata(self) -> VideoMetadata:
        num = len(self.frames)
        return VideoMetadata(total_num_frames=num, fps=1 / self.frame_s, frames_indices=list(range(num)))


def picture(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def clip(seed: int, num_frames: int, height: int, width: int, frame_s: float) -> Clip:
    frames = np.stack([picture(100 * seed + i, height, width) for i in range(num_frames)])
    return Clip(frames=frames, frame_s=frame_s)


MEDIA: dict[str, tuple[list[np.ndarray], list[Clip]]] = {
    "text": ([], []),
    "one image": ([picture(0, 60, 80)], []),
    "two images of different sizes": ([picture(1, 224, 224), picture(2, 200, 31)], []),
    "two images of one size": ([picture(3, 90, 120), picture(4, 90, 120)], []),
    "clip": ([], [clip(5, 6, 84, 112, 0.5)]),
    "clip with an odd frame, slow": ([], [clip(6, 5, 100, 70, 3.1)]),
    "clip longer in time than in space": ([], [clip(7, 8, 56, 56, 5.0)]),
    "image and two clips": ([picture(8, 150, 90)], [clip(9, 4, 60, 60, 1.0), clip(10, 3, 56, 112, 0.75)]),
}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl", "qwen2_5_vl tied"])
def folder(request, tmp_path_factory):
    model_type, _, tied = request.param.partition(" ")
    shape = {"width": 96, "num_heads": 6, "num_kv_heads": 1, "tie_word_embeddings": True} if tied else {}
    return random_qwen2_5_vl(tmp_path_factory.mktemp("qwen"), model_type=model_type, **shape)


@pytest.fixture(scope="module")
def ours(folder):
    """As transformers places text behind clips; see `test_text_goes_on_after_the_highest_position_of_a_clip`."""
    return mm.load(folder, dtype="float32", text_after_clip="longer_side")


@pytest.fixture(scope="module")
def theirs(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return model, AutoProcessor.from_pretrained(folder, local_files_only=True)


def request_for(images, clips, **options) -> Request:
    budget = MediaBudget(MediaLimits())
    videos = [
        video_from_array(
            item.frames,
            [i * item.frame_s for i in range(len(item.frames))],
            item.frame_s * len(item.frames),
            budget,
        )
        for item in clips
    ]
    return mm.api.build_request(TEXT, images=images, videos=videos, **options)


def our_prompt(ours, request: Request) -> Prompt:
    visual = [item.tokens for item in encode(request, ours.encode_parts).items]
    return ours.engine.family.splice(request.messages, visual)


def our_logits(ours, prompt: Prompt, tokens: list[int]) -> list[torch.Tensor]:
    """Logits at each of `tokens`, fed one by one through our cache."""
    return logits_along(ours.engine.family.language, prompt, tokens)


def reference(theirs, images, clips):
    """Inputs of `generate`, its tokens and its logits step by step."""
    model, processor = theirs
    content = [{"type": "image"} for _ in images] + [{"type": "video"} for _ in clips]
    content += [{"type": "text", "text": TEXT}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(
        text=prompt,
        images=images or None,
        videos=[item.frames for item in clips] or None,
        return_tensors="pt",
        **({"video_metadata": [item.metadata for item in clips], "do_sample_frames": False} if clips else {}),
    )
    out = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return inputs, out.sequences[0, inputs.input_ids.shape[1] :].tolist(), [step[0] for step in out.logits]


def furthest(ours, theirs) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", MEDIA)
def test_tokens_and_logits_equal_generate(ours, theirs, name):
    images, clips = MEDIA[name]
    _, tokens, logits = reference(theirs, images, clips)
    request = request_for(images, clips, max_new_tokens=NEW_TOKENS, temperature=0)
    assert list(mm.api.collect(ours.run(request)).token_ids[0]) == tokens
    assert furthest(our_logits(ours, our_prompt(ours, request), tokens), logits) <= 1e-4  # sums in another order


@pytest.mark.parametrize("name", MEDIA)
def test_the_decoder_gets_the_same_rows_at_the_same_positions(ours, theirs, name):
    """Ids, embeddings and all three position rows; the answer goes on behind the last row, as `generate` does."""
    images, clips = MEDIA[name]
    model, processor = theirs
    inputs, _, _ = reference(theirs, images, clips)
    prompt = our_prompt(ours, request_for(images, clips))
    assert prompt.token_ids.tolist() == inputs.input_ids[0].tolist()
    if not images and not clips:
        assert prompt.positions.tolist() == [list(range(prompt.length))] * 3
        return
    positions, _ = model.model.get_rope_index(
        inputs.input_ids,
        mm_token_type_ids=inputs.mm_token_type_ids,
        **{name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")},
    )
    assert torch.equal(prompt.positions, positions[:, 0])
    assert prompt.next_position == int(positions[0, 0, -1]) + 1
    rows = model.get_input_embeddings()(inputs.input_ids)[0].detach().clone()
    with torch.inference_mode():
        if images:
            found = model.get_image_features(inputs.pixel_values, inputs.image_grid_thw).pooler_output
            rows[inputs.input_ids[0] == processor.image_token_id] = torch.cat(found)
        if clips:
            found = model.get_video_features(inputs.pixel_values_videos, inputs.video_grid_thw).pooler_output
            rows[inputs.input_ids[0] == processor.video_token_id] = torch.cat(found)
    assert torch.equal(prompt.embeddings, rows)


def test_the_comparison_notices_errors(ours, theirs):
    """Negative controls: another picture, or positions without M-RoPE, change the logits."""
    images, clips = MEDIA["image and two clips"]
    _, tokens, logits = reference(theirs, images, clips)
    other = our_prompt(ours, request_for([picture(11, 150, 90)], clips))
    assert furthest(our_logits(ours, other, tokens), logits) > 1e-2
    right = our_prompt(ours, request_for(images, clips))
    flat = replace(right, positions=torch.arange(right.length).expand(3, -1), next_position=right.length)
    assert furthest(our_logits(ours, flat, tokens), logits) > 1e-2


def test_clip_time_counts_for_qwen2_5_alone(ours):
    """The same frames at another speed: other positions for Qwen2.5-VL, the same for Qwen2-VL."""
    frames = clip(5, 6, 84, 112, 0.5).frames
    slow, fast = (our_prompt(ours, request_for([], [Clip(frames=frames, frame_s=s)])) for s in (4.0, 0.5))
    assert torch.equal(slow.embeddings, fast.embeddings)
    assert torch.equal(slow.positions, fast.positions) == ("Qwen2_5" not in type(ours.engine.family.config).__name__)


def test_text_goes_on_after_the_highest_position_of_a_clip(ours, theirs):
    """The default: as the authors' code has it, `llm_pos_ids_list[-1].max() + 1`. Positions are the only difference."""
    images, clips = MEDIA["clip longer in time than in space"]
    request = request_for(images, clips)
    within = our_prompt(ours, request)
    family = ours.engine.family
    family.text_after_clip = ModelConfig().text_after_clip
    try:
        behind = our_prompt(ours, request)
    finally:
        family.text_after_clip = "longer_side"
    last = int(torch.nonzero(behind.is_visual)[-1])
    text = torch.arange(behind.length - last - 1) + int(behind.positions[:, : last + 1].max()) + 1
    assert behind.positions[:, last + 1 :].tolist() == text.expand(3, -1).tolist()
    assert behind.next_position == int(behind.positions.max()) + 1
    assert torch.equal(behind.positions[:, : last + 1], within.positions[:, : last + 1])
    assert int(within.positions[0, last + 1]) <= int(within.positions[:, : last + 1].max())
    assert torch.equal(behind.embeddings, within.embeddings)
    pictures = request_for(*MEDIA["image and two clips"][:1], [])
    assert our_prompt(ours, pictures).next_position == int(our_prompt(ours, pictures).positions.max()) + 1


def test_a_reducer_that_keeps_all_equals_generate(ours, theirs):
    images, clips = MEDIA["image and two clips"]
    _, tokens, logits = reference(theirs, images, clips)
    request = request_for(
        images, clips, reducer="divprune:keep_ratio=1", max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True
    )
    assert list(mm.api.collect(ours.run(request)).token_ids[0]) == tokens
    assert furthest(our_logits(ours, our_prompt(ours, request), tokens), logits) <= 1e-4  # sums in another order


def test_kept_tokens_keep_their_places(ours):
    """After reduction each kept row is a row of the unreduced prompt, at its three positions; no text row moves."""
    images, clips = MEDIA["image and two clips"]
    full = our_prompt(ours, request_for(images, clips))
    options = {"reducer": "divprune:keep_ratio=0.25", "max_new_tokens": 4, "ignore_eos": True}
    request = request_for(images, clips, **options)
    kept = our_prompt(ours, request)
    assert int(kept.is_visual.sum()) == sum(
        budget(item.tokens.num_tokens_in, 0.25) for item in encode(request, ours.encode_parts).items
    )
    assert kept.next_position == full.next_position
    assert torch.equal(kept.positions[:, ~kept.is_visual], full.positions[:, ~full.is_visual])
    row_of = {tuple(row.tolist()): i for i, row in enumerate(full.embeddings) if full.is_visual[i]}
    for i in torch.nonzero(kept.is_visual).flatten().tolist():
        j = row_of[tuple(kept.embeddings[i].tolist())]
        assert torch.equal(kept.positions[:, i], full.positions[:, j])
    answer = mm.api.collect(ours.run(request))
    assert answer.usage.num_visual_tokens_kept == int(kept.is_visual.sum())
    assert len(answer.token_ids[0]) == 4


def test_dropped_tokens_equal_masked_tokens(ours, theirs):
    """The logits behind a reduced prompt: those of transformers with the dropped rows masked, at the same positions."""
    model, _ = theirs
    images, clips = MEDIA["image and two clips"]
    whole = our_prompt(ours, request_for(images, clips))
    kept = our_prompt(ours, request_for(images, clips, reducer="random:keep_ratio=0.3"))
    rows = [tuple(row.tolist()) for row in torch.cat([whole.positions, whole.token_ids[None]]).T]
    kept_rows = {tuple(row.tolist()) for row in torch.cat([kept.positions, kept.token_ids[None]]).T}
    mask = torch.tensor([[row in kept_rows for row in rows]])
    assert int(mask.sum()) == kept.length < whole.length
    with torch.no_grad():
        masked = model(
            inputs_embeds=whole.embeddings.clone()[None],
            attention_mask=mask.long(),
            position_ids=whole.positions[:, None],
        ).logits[0, -1]
    logits = our_logits(ours, kept, [0])[0]
    assert float((logits - masked).abs().max()) < 1e-4 * max(1.0, float(masked.abs().max()))
