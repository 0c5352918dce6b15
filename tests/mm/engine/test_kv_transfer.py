"""A request that begins at one engine and goes on at another one gives the events of one that stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mm
from mm.config import SpeculationLimits
from mm.data.outputs import Delta, Event, Summary
from mm.data.request import Emitted, TextPart
from mm.data.tokens import EncodedMedia
from mm.encode.pipeline import encode
from mm.engine.engine import LLMEngine
from mm.engine.scheduler import SchedulerConfig
from mm.errors import EngineError
from mm.plugins.cache_view import CacheView
from mm.plugins.spec import bind, reducer_spec
from tests.helpers.engines import KeepEverySecond, Question, assert_idle, build, run_until
from tests.helpers.families import write
from tests.helpers.handing import Taker, answer, prefilled, received_by

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["one", "two"]}, "b": {"type": "string", "maxLength": 8}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
CHUNK = 32
"""Tokens of a step: prompts take several."""


@pytest.fixture(scope="module")
def model():
    return mm.load("tiny", dtype="float32")


@pytest.fixture
def engines(model) -> tuple[LLMEngine, LLMEngine]:
    """One that computes prompts and one that goes on; nothing is cached in either."""
    first, then = (build(model.engine.family, max_num_seqs=6, max_num_batched_tokens=CHUNK) for _ in range(2))
    return first, then


def question(
    model, reducer: Any = "none", *, picture: int = 3, text: str = "What is there?", **options: Any
) -> Question:
    pixels = np.random.default_rng(picture).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    plain: dict[str, Any] = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    request = mm.api.build_request(text, images=[pixels], **plain | options)
    found = reducer
    if isinstance(reducer, str):
        found = bind(reducer_spec(reducer), model.engine.family.folder, "cpu").plugin
    spec = reducer if isinstance(reducer, str) else "none"
    media = encode(replace(request, vision=replace(request.vision, reducer=spec)), model.encode_parts)
    return Question(request=request, encoded=media.items, reducer=found)


def alone(engine: LLMEngine, asked: Question) -> list[Event]:
    """The events of a request that stays at one engine."""
    _, sink = asked.put_to(engine)
    run_until(engine, lambda: bool(sink.num_ends))
    if sink.error is not None:
        raise sink.error
    return sink.events


def deltas(events: list[Event], choice: int) -> list[Delta]:
    return [replace(one, num_drafted=0) for one in events if isinstance(one, Delta) and one.choice == choice]


def assert_same(found: list[Event], expected: list[Event]) -> None:
    """The same tokens, texts, log-probabilities, ends and summary, but for the clock."""
    for choice in range(8):
        assert shown(found, choice) == shown(expected, choice)
    ours, theirs = found[-1], expected[-1]
    assert isinstance(ours, Summary)
    assert isinstance(theirs, Summary)
    assert replace(ours, timings=theirs.timings) == theirs


def shown(events: list[Event], choice: int) -> list[Any]:
    return [
        (one.text, one.token_ids, one.finish_reason, one.num_prompt_tokens, [entry.token for entry in one.logprobs])
        for one in deltas(events, choice)
    ]


SAMPLED = {"temperature": 1.0, "seed": 11}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": SAMPLED,
    "n = 3": SAMPLED | {"n": 3},
    "penalties": SAMPLED | {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    "stop strings": SAMPLED | {"stop": ("e", "zz"), "min_tokens": 6, "ignore_eos": False},
    "schema": SAMPLED | {"response_format": FORMAT, "ignore_eos": False, "max_new_tokens": 60},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "one token": {"max_new_tokens": 1},
    "before the tower": {"reducer": "pixelprune"},
    "in the tower": {"reducer": "tome:keep_ratio=0.5"},
    "before the decoder": {"reducer": "divprune:keep_ratio=0.25"},
    "in prefill": {"reducer": "fastv:keep_ratio=0.3"},
    "in prefill, at several layers": {"reducer": "pyramiddrop:keep_ratio=0.5"},
    "positions that begin anew": {"reducer": "pyramiddrop:keep_ratio=0.5", "positions": "as_published"},
    "in prefill, n = 2": SAMPLED | {"reducer": "fastv:keep_ratio=0.3", "n": 2},
    "in the cache": {"reducer": "infinipot:keep_ratio=0.5"},
    "in the cache, from layer 1": {"reducer": KeepEverySecond()},
    "generated tokens": {"reducer": "dynamic:keep_ratio=0.5,text_keep_ratio=0.5"},
    "a learned reducer": {"reducer": "router:keep_ratio=0.5"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_the_answer_is_that_of_one_engine(model, engines, options):
    asked = question(model, **options)
    expected = alone(build(model.engine.family, max_num_seqs=6, max_num_batched_tokens=CHUNK), asked)
    assert_same(answer(*engines, asked), expected)
    for engine in engines:
        assert_idle(engine)


DRAFTED = {
    "copy": {"speculation": {"drafter": "copy:min_match=1"}},
    "copy, n = 2": SAMPLED | {"speculation": {"drafter": "copy:min_match=1"}, "n": 2},
    "recycle, which reads logits": {"speculation": {"drafter": "recycle"}},
    "eagle, which reads hidden states": {"speculation": {"drafter": "eagle"}},
    "eagle, n = 2": SAMPLED | {"speculation": {"drafter": "eagle"}, "n": 2},
    "eagle, behind a reducer": {"speculation": {"drafter": "eagle"}, "reducer": "fastv:keep_ratio=0.3"},
}


@pytest.fixture(scope="module")
def drafting(model) -> list[LLMEngine]:
    """Three engines that draft at each step, since the controller is off."""
    family = model.engine.family
    shape = family.language.kv_cache_spec
    return [
        LLMEngine(
            family,
            config=SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=CHUNK),
            kv_bytes=shape.num_blocks(4096) * shape.num_layers * shape.block_bytes,
            prefix_caching=False,
            speculation=SpeculationLimits(drafters=("copy:min_match=1", "recycle", "eagle"), control=False),
        )
        for _ in range(3)
    ]


@pytest.mark.parametrize("options", DRAFTED.values(), ids=DRAFTED.keys())
def test_drafters_begin_where_they_would_have_begun(model, drafting, options):
    """So that even the counts of drafts are the same."""
    asked = question(model, max_new_tokens=40, **options)
    expected = alone(drafting[2], asked)
    found = answer(*drafting[:2], asked)
    assert_same(found, expected)
    assert summary(found).usage.num_drafts > 0
    for engine in drafting:
        assert_idle(engine)


def summary(events: list[Event]) -> Summary:
    assert isinstance(events[-1], Summary)
    return events[-1]


@pytest.mark.parametrize(
    "name",
    [
        "lfm2_vl",
        "llava_next (mistral window)",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_5", "gemma3", "qwen3_vl")),
    ],
)
def test_families_with_states_windows_masks_and_planes(name: str, tmp_path: Path):
    """And a second turn finds what was handed over, states of recurrent layers included."""
    model = mm.load(str(write(name, tmp_path / "checkpoint")), dtype="float32")
    first, then, one = (build(model.engine.family, max_num_seqs=6, max_num_batched_tokens=64) for _ in range(3))
    asked = question(model, **SAMPLED, max_new_tokens=8)
    assert_same(answer(first, then, asked), alone(one, asked))
    again, once_more = alone(then, asked), alone(one, asked)
    assert summary(again).usage.num_cached_tokens == summary(once_more).usage.num_cached_tokens
    assert (summary(again).usage.num_cached_tokens > 0) == (name != "gemma3")  # whose prompt is one block of an image
    assert shown(again, 0) == shown(once_more, 0)
    for engine in (first, then):
        assert_idle(engine)


def test_bytes_are_what_arithmetic_says(model, engines):
    spec = model.engine.family.language.kv_cache_spec
    row = spec.num_layers * 2 * spec.num_heads * spec.head_dim * 4
    whole, quarter = (question(model, reducer=spec) for spec in ("none", "uniform:keep_ratio=0.25"))
    num_bytes = []
    for asked in (whole, quarter):
        request, sink = prefilled(engines[0], asked)
        assert sink.num_bytes == request.prompt.length * row
        num_bytes.append(sink.num_bytes)
        engines[0].abort(request, wait=True)
    num_visual = [asked.encoded[0].tokens.num_tokens for asked in (whole, quarter)]
    assert num_visual[1] * 4 == num_visual[0]
    assert num_bytes[0] - num_bytes[1] == (num_visual[0] - num_visual[1]) * row
    stats = engines[0].stats
    assert (stats.kv_sent_bytes, stats.kv_saved_bytes, stats.num_handed_over) == (
        sum(num_bytes),
        num_bytes[0] - num_bytes[1],
        2,
    )


def test_of_a_reducer_in_prefill_the_layers_above_move_less(model, engines):
    spec = model.engine.family.language.kv_cache_spec
    asked = question(model, reducer="fastv:keep_ratio=0.25")
    request, sink = prefilled(engines[0], asked)
    assert request.prune_state is not None
    num_dropped = asked.encoded[0].tokens.num_tokens - len(request.prune_state.origins)
    first = min(request.pruning_layers)
    rows = [request.prompt.length - (num_dropped if layer >= first else 0) for layer in range(spec.num_layers)]
    assert [sum(counts) for counts in zip(*(piece.counts for piece in sink.pieces), strict=True)] == rows
    assert sink.num_bytes == sum(rows) * spec.token_bytes
    assert engines[0].stats.kv_saved_bytes == num_dropped * (spec.num_layers - first) * spec.token_bytes
    received_by(engines[1], asked, sink)
    engines[1].step()
    assert engines[1].stats.kv_received_bytes == sink.num_bytes


def test_pieces_leave_while_the_rest_is_computed(model, engines):
    sink, asked = Taker(), question(model)
    media = EncodedMedia(items=tuple(asked.encoded))
    request = engines[0].submit(asked.request, media, sink)
    engines[0].step()
    engines[0].step()
    assert [piece.counts[0] for piece in sink.pieces] == [CHUNK, CHUNK]
    assert not sink.events
    engines[0].abort(request, wait=True)
    assert_idle(engines[0])


def test_several_requests_at_once_and_preemption_where_they_go_on(model, engines):
    """The second engine has room for fewer tokens than come, and gives up sequences that it computes again."""
    first, one = engines[0], build(model.engine.family, max_num_seqs=6, max_num_batched_tokens=CHUNK)
    then = build(model.engine.family, num_rows=700, max_num_seqs=6, max_num_batched_tokens=CHUNK)
    every = [question(model, **SAMPLED, picture=i, max_new_tokens=60) for i in range(4)]
    every += [question(model, reducer="fastv:keep_ratio=0.3", picture=9, max_new_tokens=60)]
    expected = [alone(one, asked) for asked in every]
    sinks = [prefilled(first, asked)[1] for asked in every]
    feeds = [received_by(then, asked, sink) for asked, sink in zip(every, sinks, strict=True)]
    for step in range(4000):
        if all(feed.num_ends for feed in feeds):
            break
        then.step()
        if step % 7 == 0 and then._scheduler.running:
            then._scheduler.preempt(then._scheduler.running[-1])
    assert then.stats.num_preemptions > 3
    for sink, feed, events in zip(sinks, feeds, expected, strict=True):
        assert shown([*sink.events, *feed.events], 0) == shown(events, 0)
    assert_idle(then)


def test_what_is_not_confirmed_holds_the_next_prompt_back(model):
    """The cache of the first engine has room for two prompts. A third one is computed once one of them is confirmed."""
    first = build(model.engine.family, num_rows=560, max_num_seqs=6, max_num_batched_tokens=512)
    asked = [question(model, picture=i) for i in range(3)]
    parked = [prefilled(first, one) for one in asked[:2]]
    waiting = Taker()
    first.submit(asked[2].request, EncodedMedia(items=tuple(asked[2].encoded)), waiting)
    for _ in range(5):
        assert not first.step()
    stats = first.stats
    assert (stats.num_parked, stats.num_waiting, stats.num_running) == (2, 1, 0)
    assert not waiting.pieces
    first.abort(parked[0][0], wait=True)
    first.step()
    assert waiting.state is not None


def test_one_that_was_handed_over_goes_on_at_a_third_engine_when_the_second_is_lost(model, engines):
    """Another engine computes prompt and tokens again and hands them over, though the choices differ in length."""
    one, third = (build(model.engine.family, max_num_seqs=6, max_num_batched_tokens=CHUNK) for _ in range(2))
    asked = question(model, **SAMPLED, n=2, reducer="dynamic:keep_ratio=0.5,text_keep_ratio=0.5")
    expected = alone(one, asked)
    given = [[token for delta in deltas(expected, choice) for token in delta.token_ids] for choice in range(2)]
    emitted = tuple(Emitted(token_ids=tuple(given[i][: 3 + 4 * i])) for i in range(2))
    asked = replace(asked, request=replace(asked.request, emitted=emitted))
    request, sink = prefilled(engines[0], asked)
    engines[0].abort(request, wait=True)
    received_by(third, asked, sink)
    third._lifecycle.update()
    assert [len(seq.kept_tokens) for seq in third._scheduler.waiting] == [3, 7]
    third.fail_all(EngineError("enough was seen"))
    rest = answer(engines[0], third, asked)
    for choice in range(2):
        found = [token for delta in deltas(rest, choice) for token in delta.token_ids]
        assert [*emitted[choice].token_ids, *found] == given[choice]
    assert summary(rest).usage.num_completion_tokens == summary(expected).usage.num_completion_tokens
    assert_idle(engines[0])
    assert_idle(third)


class DropSecondToken(KeepEverySecond):
    """Evicts a token of the text before the picture, so that no block is what its hash says."""

    def prefill_done(self, view: CacheView) -> dict[int, torch.Tensor]:
        kept = {layer: torch.arange(length) for layer, length in enumerate(view.lengths)}
        return {layer: rows[rows != 1] for layer, rows in kept.items()}


def test_blocks_that_a_reducer_changed_are_not_found_by_others(model, engines):
    asked = question(model, reducer=DropSecondToken())
    (message,) = asked.request.messages
    long = TextPart(text="Look at the picture that follows this sentence, and say what is in it. " * 3)
    messages = (replace(message, parts=(long, *message.parts)),)
    asked = replace(asked, request=replace(asked.request, messages=messages))
    answer(*engines, asked)
    plain = replace(asked, reducer=question(model).reducer)
    one = build(model.engine.family, max_num_seqs=6, max_num_batched_tokens=CHUNK)
    assert_same(alone(engines[1], plain), alone(one, plain))


def test_a_choice_that_ends_with_its_first_token_is_not_handed_over(model, engines):
    asked = question(model, n=3, temperature=2.0, seed=1, max_new_tokens=6)
    first_tokens = [deltas(alone(engines[1], asked), choice)[0].token_ids[0] for choice in range(3)]
    assert len(set(first_tokens)) > 1
    stop = replace(asked.request.sampling, stop_token_ids=(first_tokens[0],))
    asked = replace(asked, request=replace(asked.request, sampling=stop))
    one = build(model.engine.family, max_num_seqs=6, max_num_batched_tokens=CHUNK)
    assert_same(answer(*engines, asked), alone(one, asked))


@pytest.mark.parametrize("num_before", [0, 5])
def test_nothing_is_sent_of_a_request_with_one_token_left(model, engines, num_before: int):
    asked = question(model, n=2, temperature=1.0, seed=1, max_new_tokens=num_before + 1)
    whole = alone(engines[1], asked)
    if num_before:
        given = tuple(tuple(token for one in deltas(whole, i) for token in one.token_ids) for i in range(2))
        emitted = tuple(Emitted(token_ids=tokens[:-1]) for tokens in given)
        asked = replace(asked, request=replace(asked.request, emitted=emitted))
    _, sink = prefilled(engines[0], asked)
    last = [[token for one in deltas(sink.events, i) for token in one.token_ids] for i in range(2)]
    assert last == [[token for one in deltas(whole, i) for token in one.token_ids][-1:] for i in range(2)]
    assert (sink.pieces, sink.state, sink.num_ends) == ([], None, 1)
    assert engines[0].stats.kv_sent_bytes == 0
    assert_idle(engines[0])


def test_what_was_handed_over_is_refused_by_another_request_and_another_model(model, engines):
    asked = question(model)
    _, sink = prefilled(engines[0], asked)
    assert sink.state is not None
    with pytest.raises(EngineError, match="another prompt"):
        received_by(engines[1], question(model, text="Something else?"), sink)
    with pytest.raises(EngineError, match="other generated tokens"):
        received_by(engines[1], asked, sink, emitted=(Emitted(token_ids=(5,)),))
    half = Taker()
    half.state = sink.state
    half.pieces = [replace(one, keys=one.keys.half(), values=one.values.half()) for one in sink.pieces]
    with pytest.raises(EngineError, match="do not fit this model"):
        received_by(engines[1], asked, half)
    lost = Taker()
    lost.state, lost.pieces = sink.state, sink.pieces[:-1]
    with pytest.raises(EngineError, match="per layer came"):
        received_by(engines[1], asked, lost)
    assert_idle(engines[1])


def test_a_part_of_the_heads_cannot_move(model, engines):
    engines[0].cache.has_all_heads = False
    with pytest.raises(EngineError, match="tensor-parallel"):
        prefilled(engines[0], question(model))


def test_a_sink_that_fails_ends_its_request_only(model, engines):
    class Failing(Taker):
        def put_piece(self, piece: Any) -> None:
            raise OSError("on purpose")

    sink, asked = Failing(), question(model)
    engines[0].submit(asked.request, EncodedMedia(items=tuple(asked.encoded)), sink)
    request, other = prefilled(engines[0], question(model, picture=5))
    assert isinstance(sink.error, EngineError)
    assert other.state is not None
    engines[0].abort(request, wait=True)
    assert_idle(engines[0])
