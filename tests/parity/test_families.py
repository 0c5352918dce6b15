"""Every architecture that the generic encoder and family serve, against `generate` of transformers in float32.

Random weights and random biases. One picture, three of different sizes, two turns, a clip, picture and clip together,
and all of them as one batch. `docs/families.md` is the table of what is compared here.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

import mm
from mm.api import collect
from mm.data.media import Image, Video
from mm.data.request import MediaPart, Message, Request, TextPart
from mm.data.tokens import Prompt
from mm.encode.counting import count_tokens
from mm.encode.feature_cache import FeatureCache
from mm.encode.pipeline import encode
from mm.engine.self_test import TESTED, self_test
from mm.errors import IncompatiblePlugin, InvalidRequest
from mm.models.families.generic import TransformersFamily
from mm.models.folder import BadCheckpoint
from mm.plugins.features import RESOLUTION
from tests.helpers.families import FAMILIES, write
from tests.helpers.passes import Alone

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
"""NumPy says it of a processor of transformers."""

NEW_TOKENS = 10
DOCS = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- table: made by tests/parity/test_families.py -->", "<!-- end of the table -->"
RNG = np.random.default_rng(7)
PICTURES = [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in [(60, 90), (120, 70), (64, 64)]]
FRAMES = RNG.integers(0, 256, (5, 60, 90, 3), dtype=np.uint8)
CLIP = Video(frames=FRAMES, timestamps_s=(0.0, 0.5, 1.0, 1.5, 2.0), duration_s=2.5, content_hash="clip")
TURNS: dict[str, list[tuple[str, list[str | int]]]] = {
    "one": [("user", [0, "What is it?"])],
    "three": [("user", ["First", 0, "then", 1, 2, "How do they differ?"])],
    "two turns": [("user", [1, "What is it?"]), ("assistant", ["A circle."]), ("user", [2, "And this one?"])],
    "text": [("user", ["Hello"])],
    "clip": [("user", ["clip", "What happens?"])],
    "picture and clip": [("user", [0, "and", "clip", "What happens?"])],
}
"""Role and parts of each message: text, or the number of a picture, or "clip"."""
OTHERS: dict[str, list[tuple[str, list[str | int]]]] = {
    "pictures": [("user", [0, 1, "What is it?"])],
    "same pictures": [("user", [0, 1, "Which colours are there?"])],
    "repeats": [("user", [0, "red blue red blue red blue red blue red blue red"])],
}
"""For tests that need them."""


@dataclass
class Both:
    """One checkpoint in transformers and here."""

    name: str
    folder: Path
    model: Any
    processor: Any
    ours: mm.Model
    _expected: dict[str, list[int]] = field(default_factory=dict)

    @property
    def cases(self) -> list[str]:
        family = FAMILIES[self.name]
        return [case for case in TURNS if case not in family.without and ("clip" not in case or family.video)]

    def expected(self, case: str) -> list[int]:
        """The tokens of `generate`, which runs once for each case."""
        if case not in self._expected:
            inputs = self.inputs(case)
            out = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            self._expected[case] = out[0, inputs["input_ids"].shape[1] :].tolist()
        return self._expected[case]

    def inputs(self, case: str) -> Any:
        messages, pictures, clips = [], [], []
        for role, parts in (TURNS | OTHERS)[case]:
            content: list[dict[str, str]] = []
            for part in parts:
                if isinstance(part, int):
                    pictures.append(PIL.Image.fromarray(PICTURES[part]))
                    content.append({"type": "image"})
                elif part == "clip":
                    clips.append(FRAMES)
                    content.append({"type": "video"})
                else:
                    content.append({"type": "text", "text": part})
            messages.append({"role": role, "content": content})
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        one_list = FAMILIES[self.name].in_one_list
        options: dict[str, Any] = {"images": pictures if one_list else [pictures]} if pictures else {}
        if clips:
            metadata = VideoMetadata(total_num_frames=50, fps=20.0, frames_indices=[0, 10, 20, 30, 40])
            options |= {"videos": clips, "video_metadata": [metadata], "do_sample_frames": False}
        return self.processor(text=[text], return_tensors="pt", add_special_tokens=False, **options)


def request(case: str, **options: Any) -> Request:
    """The same conversation for us."""
    messages, media = [], list[Image | Video]()
    for role, parts in (TURNS | OTHERS)[case]:
        ours: list[Any] = []
        for part in parts:
            if isinstance(part, str) and part != "clip":
                ours.append(TextPart(text=part))
                continue
            media.append(CLIP if part == "clip" else Image(pixels=PICTURES[part], content_hash=f"picture {part}"))
            ours.append(MediaPart(index=len(media) - 1, kind=media[-1].kind))
        messages.append(Message(role=role, parts=tuple(ours)))
    base = mm.api.build_request("?", **{"temperature": 0, "max_new_tokens": NEW_TOKENS, **options})
    return replace(base, messages=tuple(messages), media=tuple(media))


def load(name: str, folder: Path, **options: Any) -> Both:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    return Both(name, folder, model, processor, mm.load(folder, dtype="float32", num_threads=1, **options))


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory) -> Iterator[Both]:
    found = load(request.param, write(request.param, tmp_path_factory.mktemp("family")))
    yield found
    found.ours.close()


def answer(both: Both, case: str, **options: Any) -> list[int]:
    return list(collect(both.ours.run(request(case, **options))).token_ids[0])


def test_tokens_are_those_of_generate(both):
    for case in both.cases:
        expected = both.expected(case)
        assert answer(both, case) == expected, case
        assert answer(both, case) == expected, f"{case}, from what the first answer left in the caches"
    kinds = {"image", "video"} if FAMILIES[both.name].video else {"image"}
    assert both.ours.engine.family.kinds == kinds == set(both.ours.encode_parts.encoder.kinds)


def test_what_is_counted_beforehand_is_what_comes(both, monkeypatch):
    """Of items, whole and reduced, and of the prompt. The tower does not run for it."""
    parts, inputs = both.ours.encode_parts, both.ours.engine.inputs
    for case, reducer in itertools.product(both.cases, ("none", "uniform:keep_ratio=0.3", "pool2")):
        asked = request(case, reducer=reducer, max_visual_tokens=11 if reducer == "pool2" else None)
        found = encode(asked, parts)
        with monkeypatch.context() as patch:
            patch.setattr(type(parts.encoder), "encode", lambda *_, **__: pytest.fail("the tower ran"))
            counted = count_tokens(asked, replace(parts, cache=FeatureCache(0)))
        assert [one.num_tokens for one in counted] == [item.tokens.num_tokens for item in found.items]
        assert [one.grid for one in counted] == [item.tokens.grid for item in found.items]
        assert all(one.is_exact for one in counted)
        prompt = both.ours.engine.family.splice(asked.messages, [item.tokens for item in found.items])
        assert inputs.prompt_length(asked, counted) == prompt.length


HALVED = frozenset({"qwen3_vl", "glm4v", "video_llama_3"})
"""Families whose pictures and clips here can be halved; those of others are too small, or have one setting only."""


def test_a_knob_of_the_processor_makes_fewer_tokens(both):
    """`native` is refused by name where there is none; else at most the share is made, as counted beforehand."""
    parts = both.ours.encode_parts
    for case in ("one", "clip"):
        if case not in both.cases:
            continue
        if RESOLUTION not in parts.encoder.provides:
            with pytest.raises(IncompatiblePlugin, match="no setting for fewer tokens"):
                encode(request(case, reducer="native"), parts)
            continue
        (whole,) = encode(request(case), parts).items
        asked = request(case, reducer="native:keep_ratio=0.5")
        try:
            (counted,) = count_tokens(asked, replace(parts, cache=FeatureCache(0)))
        except InvalidRequest:  # no setting of the processor makes so few
            assert both.name not in HALVED
            continue
        (item,) = encode(asked, parts).items
        assert item.tokens.num_tokens_in == counted.num_tokens <= whole.tokens.num_tokens_in // 2
        assert len(answer(both, case, reducer="native:keep_ratio=0.5")) > 0


def test_an_unequal_batch_gives_the_same(both):
    from concurrent.futures import ThreadPoolExecutor

    cases = both.cases
    with ThreadPoolExecutor(len(cases)) as pool:
        given = dict(zip(cases, pool.map(lambda case: answer(both, case, cache_salt="batch"), cases), strict=True))
    assert given == {case: both.expected(case) for case in cases}


def test_the_self_test_passes(both):
    """It raises where it does not."""
    self_test(TransformersFamily(both.folder))


def test_what_reduces_keeps_positions_and_planes(both):
    """Logits with a third of the visual tokens equal transformers' with exactly these rows, at their positions."""
    if both.ours.engine.family.whole.masks is not None:
        pytest.skip("its masks have no form of transformers' own for dropped rows")
    whole, left = prompt_of(both, "one"), prompt_of(both, "one", reducer="uniform:keep_ratio=0.34")
    assert left.length < whole.length
    ours = Alone(both.ours.engine.family.language, left.length).feed_prompt(left)
    reference = masked_reference(both, left)
    assert float((ours - reference).abs().max()) < 2e-5 * max(5.0, float(reference.abs().max()))


def prompt_of(both: Both, case: str, **options: Any) -> Prompt:
    asked = request(case, **options)
    visual = [item.tokens for item in encode(asked, both.ours.encode_parts).items]
    return both.ours.engine.family.splice(asked.messages, visual)


def masked_reference(both: Both, prompt: Prompt) -> torch.Tensor:
    """Logits behind a prompt by transformers' language model, from embeddings and positions."""
    decoder = both.model.get_decoder()
    options: dict[str, Any] = {}
    if prompt.layer_planes is not None:
        options = {
            "visual_pos_masks": prompt.is_visual.unsqueeze(0),
            "deepstack_visual_embeds": list(prompt.layer_planes),
        }
    positions = prompt.positions if prompt.positions.shape[0] == 1 else prompt.positions.unsqueeze(1)
    scale = both.ours.engine.family.language.arithmetic.input_scale
    with torch.no_grad():
        hidden = decoder(inputs_embeds=prompt.embeddings.unsqueeze(0) / scale, position_ids=positions, **options)
        logits = both.model.get_output_embeddings()(hidden.last_hidden_state[0, -1:])
    return both.ours.engine.family.language.arithmetic.finish(logits)[0]


def test_wrong_arithmetic_fails_the_self_test(tmp_path):
    """Negative controls: a position off by one, planes of other layers, a decoder without its multipliers."""
    family: Any = TransformersFamily(write("qwen3_vl", tmp_path / "deepstack"))
    true = family.splice
    for change in (
        lambda p: replace(p, positions=p.positions + p.is_visual),
        lambda p: replace(p, layer_planes=p.layer_planes.flip(0)),
        lambda p: replace(p, embeddings=p.embeddings * ~p.is_visual.unsqueeze(1)),
    ):
        family.splice = lambda *args, change=change: change(true(*args))
        with pytest.raises(BadCheckpoint, match="not computed right"):
            self_test(family)
    family.splice = true
    self_test(family)


def test_tested_names_what_is_tested(both):
    text = both.model.config.get_text_config()
    assert (both.model.config.model_type, text.model_type) in TESTED


def row(both: Both) -> str:
    family = both.ours.engine.family
    text, facts = both.model.config.get_text_config(), family.language.arithmetic
    special = [
        f"windows of {facts.shortest_window} tokens" if facts.shortest_window else "",
        "DeepStack" if family.whole.num_planes else "",
        "positions in 3 axes" if family.num_position_rows > 1 else "",
        "masks both ways" if family.whole.masks is not None else "",
        "layers with a state" if facts.is_recurrent else "",
        "shared keys and values" if facts.shares_keys else "",
        "inputs of each layer" if family.language.reads_ids else "",
        "factors" if (facts.input_scale, facts.logit_scale) != (1.0, 1.0) else "",
    ]
    what = ", ".join(one for one in special if one).replace(f" of {facts.shortest_window} tokens", "")
    return (
        f"| {both.name} | {text.model_type} | {'pictures, clips' if len(family.kinds) > 1 else 'pictures'} | {what} |"
    )


def test_the_docs_have_the_row(both):
    line = row(both)
    sys.stdout.write(line + "\n")
    if os.environ.get("WRITE_FAMILIES"):
        before, rest = DOCS.read_text().split(BEGIN)
        table, after = rest.split(END)
        rows = [old for old in table.strip().splitlines() if not old.startswith(f"| {both.name} |")]
        DOCS.write_text("\n".join([before + BEGIN, *rows, line, END]) + after)
    assert line in DOCS.read_text().splitlines()
