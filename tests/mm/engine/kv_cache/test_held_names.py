"""What a prefix cache says that it holds of prompts, by the sender's names, is what the next prompt finds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

import mm
from mm.encode.pipeline import encode
from mm.engine.kv_cache.prefix_cache import MAX_NAMES
from tests.helpers.engines import Question, build, run_until


def test_named_beginnings_are_told_with_their_lengths_until_they_are_evicted():
    model = mm.load("tiny", dtype="float32")
    pixels = np.random.default_rng(3).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    request = mm.api.build_request("What is in it?", images=[pixels], temperature=0, max_new_tokens=2)
    request = replace(request, prefix_keys=("picture", "whole"))
    asked = Question(request=request, encoded=encode(request, model.encode_parts).items)
    engine = build(model.engine.family, max_num_seqs=2)
    size = engine.cache.shape.block_size

    def ask(text: str) -> int:
        """Prompt tokens that were found in the cache."""
        other = mm.api.build_request(text, images=[pixels], temperature=0, max_new_tokens=2)
        _, sink = replace(asked, request=replace(other, prefix_keys=())).put_to(engine)
        run_until(engine, lambda: bool(sink.num_ends))
        assert sink.summary is not None
        return sink.summary.usage.num_cached_tokens

    _, sink = asked.put_to(engine)
    run_until(engine, lambda: bool(sink.num_ends))
    held = engine.prefix_cache.held_names
    prompt = sink.deltas[0].num_prompt_tokens
    assert prompt is not None
    assert held.keys() == {"picture", "whole"}
    assert held["whole"] == (prompt - 1) // size * size
    assert 0 < held["picture"] <= held["whole"]
    assert ask("What is in it?") == held["whole"]
    assert ask("Why so?") == held["picture"]
    engine.prefix_cache.clear()
    assert engine.prefix_cache.held_names == {}
    for i in range(MAX_NAMES + 5):
        engine.prefix_cache.name(f"{i}", b"", 1)
    assert len(engine.prefix_cache._names) == MAX_NAMES
