"""One engine under hard conditions: what fails, is cancelled or comes too late costs nobody else anything."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

import mm
from mm.data.outputs import Delta, Event, Summary
from mm.data.tokens import EncodedMedia
from mm.encode.pipeline import encode
from mm.engine.engine import LLMEngine
from mm.engine.loop import EngineLoop
from mm.errors import CapacityError, DeadlineExceeded, EngineError, InvalidRequest, ReducerFault
from mm.plugins.reducer import Stage
from mm.plugins.spec import build_reducer
from tests.helpers.checkpoints import random_llava
from tests.helpers.engines import KeepEverySecond, Question, Recorder, answer_alone, assert_idle, build, run_until


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return mm.load(random_llava(tmp_path_factory.mktemp("llava"), num_layers=3), dtype="float32")


@pytest.fixture
def ask(model):
    """Makes a question; greedy and of a fixed length unless told otherwise."""

    def make(text: str = "What?", *, num_images: int = 1, reducer: Any = "none", seed: int = 0, **options: Any):
        images = [
            np.random.default_rng(seed + i).integers(0, 256, (56, 56, 3), dtype=np.uint8) for i in range(num_images)
        ]
        plain = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        request = mm.api.build_request(text, images=images, **plain | options)
        found = build_reducer(reducer) if isinstance(reducer, str) else reducer
        return Question(request=request, encoded=encode(request, model.encode_parts).items, reducer=found)

    return make


@pytest.fixture
def engine(model):
    return build(model.engine.family, max_num_seqs=6, max_num_batched_tokens=32)


def put_all(engine: LLMEngine, questions: list[Question]) -> list[Recorder]:
    return [question.put_to(engine)[1] for question in questions]


def alone(model, questions: list[Question]) -> list[dict[int, list[int]]]:
    single = build(model.engine.family, sharing=False, max_num_seqs=4)
    return [answer_alone(single, question) for question in questions]


def check_neighbours(model, engine: LLMEngine, questions: list[Question], sinks: list[Recorder]) -> None:
    """They get what they get alone, and the engine holds nothing at the end."""
    run_until(engine, lambda: not engine.has_work)
    assert [sink.error for sink in sinks] == [None] * len(sinks)
    assert [sink.token_ids() for sink in sinks] == alone(model, questions)
    assert_idle(engine)


def test_events_come_in_order(model, engine, ask):
    """Per answer one delta a token and one finish; the summary behind all of them; the end once."""
    questions = [ask(n=3, temperature=1.0, seed=4), ask("Why?", num_images=0), ask(max_new_tokens=1)]
    sinks = put_all(engine, questions)
    run_until(engine, lambda: not engine.has_work)
    for question, sink in zip(questions, sinks, strict=True):
        sampling = question.request.sampling
        assert (sink.num_ends, sink.error) == (1, None)
        assert [isinstance(event, Summary) for event in sink.events] == [False] * len(sink.deltas) + [True]
        assert [delta.num_prompt_tokens is None for delta in sink.deltas] == [False] + [True] * (len(sink.deltas) - 1)
        for choice in range(sampling.n):
            reasons = [delta.finish_reason for delta in sink.deltas if delta.choice == choice]
            assert reasons == [None] * (sampling.max_new_tokens - 1) + ["length"]
        timings = sink.summary.timings
        assert min(timings.queue_s, timings.prefill_s, timings.decode_s) >= 0
    assert_idle(engine)


class Broken(Recorder):
    """A sink that fails at its `at`-th event, from 0; with `at_end` also when it is told of an end."""

    def __init__(self, at: int, at_end: bool) -> None:
        super().__init__()
        self._at, self._at_end = at, at_end

    def put(self, event: Event) -> None:
        if len(self.events) == self._at:
            raise RuntimeError("the other side is gone")
        super().put(event)

    def end(self, error: BaseException | None = None) -> None:
        super().end(error)
        if self._at_end:
            raise RuntimeError("the other side is gone for good")


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("at", [0, 3, 8], ids=["first token", "in the middle", "summary"])
def test_a_sink_that_fails_ends_its_own_request(model, engine, ask, at, at_end):
    questions = [ask(seed=1), ask("Why?", n=2)]
    broken, lost = Broken(at, at_end), ask("Hello")
    first = questions[0].put_to(engine)[1]
    engine.submit(lost.request, EncodedMedia(items=lost.encoded), broken)
    sinks = [first, questions[1].put_to(engine)[1]]
    check_neighbours(model, engine, questions, sinks)
    assert broken.num_ends == 1
    assert isinstance(broken.error, EngineError)


class Faulty:
    """A reducer that goes wrong inside the decoder."""

    acts_at, needs, query_aware, count = (Stage.IN_PREFILL,), frozenset(), True, "fixed"

    def __init__(self, result: Any) -> None:
        self._result = result

    def layers(self, num_layers: int) -> tuple[int, ...]:
        return (1,)

    def in_prefill(self, layer: int, view: Any) -> Any:
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


class FaultyEvictor:
    acts_at, needs, query_aware, count = (Stage.IN_DECODE,), frozenset(), False, "fixed"

    def __init__(self, result: Any) -> None:
        self._result = result

    def prefill_done(self, *seen: Any) -> Any:
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


FAULTS = {
    "raises": Faulty(RuntimeError("oops")),
    "keeps none": Faulty(torch.zeros(0, dtype=torch.int64)),
    "keeps what is not there": Faulty(torch.tensor([0, 99])),
    "not ascending": Faulty(torch.tensor([3, 2])),
    "no tensor": Faulty([0, 1]),
    "evictor raises": FaultyEvictor(RuntimeError("oops")),
    "evictor names no layer": FaultyEvictor({9: torch.tensor([0])}),
    "evictor keeps none": FaultyEvictor({1: torch.zeros(0, dtype=torch.int64)}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_reducer_that_fails_ends_its_own_request(model, engine, ask, name):
    questions = [ask(seed=1), ask(seed=2, reducer="fastv:keep_ratio=0.5,layer=1"), ask(reducer=KeepEverySecond())]
    sinks = put_all(engine, questions[:2])
    _, lost = ask("Hello", n=2, reducer=FAULTS[name]).put_to(engine)
    sinks += put_all(engine, questions[2:])
    check_neighbours(model, engine, questions, sinks)
    assert (lost.num_ends, lost.events) == (1, [])
    assert isinstance(lost.error, ReducerFault)


def test_a_pass_that_fails_costs_those_in_it_and_nobody_else(model, engine, ask, caplog):
    first = put_all(engine, [ask(seed=i) for i in range(2)])
    run_until(engine, lambda: all(sink.deltas for sink in first))
    run = engine._decoders._runners[""].forward
    engine._decoders._runners[""].forward = lambda *args: (_ for _ in ()).throw(RuntimeError("out of memory"))
    with caplog.at_level(logging.CRITICAL):
        engine.step()
    engine._decoders._runners[""].forward = run
    assert [type(sink.error) for sink in first] == [EngineError] * 2
    assert [sink.num_ends for sink in first] == [1, 1]
    assert engine.stats.num_running == 0
    questions = [ask(seed=i) for i in range(3)]
    check_neighbours(model, engine, questions, put_all(engine, questions))


def test_a_pass_that_breaks_in_mid_layers_leaves_no_rows_behind(model, engine, ask, caplog):
    """The cache has grown by then, in some layers and not in others."""
    question = ask(reducer="fastv:keep_ratio=0.5,layer=2")
    attention = engine._decoders._runners[""]._attention
    attend, calls = attention.attend, []

    def third_time_fails(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a kernel failed")
        return attend(*args)

    attention.attend = third_time_fails
    _, lost = question.put_to(engine)
    with caplog.at_level(logging.CRITICAL):
        engine.step()
    attention.attend = attend
    assert isinstance(lost.error, EngineError)
    assert not engine.has_work
    check_neighbours(model, engine, [question], put_all(engine, [question]))


@pytest.mark.parametrize("when", ["in line", "in the prompt", "in the answer"])
def test_cancelling_frees_everything_at_once(engine, ask, when):
    others = put_all(engine, [ask(seed=i, num_images=2, max_new_tokens=40) for i in range(6)])
    job, sink = ask("Never mind " * 20, n=3, max_new_tokens=40, temperature=1.0, seed=1).put_to(engine)
    if when == "in line":
        engine.step()
    else:
        for other in others[3:]:
            assert not other.num_ends
        run_until(engine, lambda: job.first_scheduled_time is not None)
        if when == "in the answer":
            run_until(engine, lambda: len(sink.deltas) > 4)
    used, waiting = engine.stats.kv_used_bytes - engine.stats.kv_idle_bytes, engine.stats.num_waiting
    engine.abort(job)
    assert (sink.num_ends, sink.error, sink.summary) == (1, None, None)
    assert job.is_finished
    if when == "in line":
        assert engine.stats.num_waiting < waiting
    else:
        assert engine.stats.kv_used_bytes - engine.stats.kv_idle_bytes < used
    engine.cache.check(engine.prefix_cache.held)
    engine.abort(job)  # twice does nothing
    run_until(engine, lambda: not engine.has_work)
    assert sink.num_ends == 1
    assert [other.num_ends for other in others] == [1] * 6
    assert_idle(engine)


def test_cancelling_from_another_thread_is_seen_at_the_next_step(engine, ask):
    job, sink = ask(max_new_tokens=400).put_to(engine)
    engine.step()
    with engine._lock:  # as if a pass were running
        thread = threading.Thread(target=engine.abort, args=(job,))
        thread.start()
        thread.join(5)
        assert not thread.is_alive()
        assert not sink.num_ends
    engine.step()
    assert sink.num_ends == 1
    assert_idle(engine)


def test_deadlines_end_those_requests_that_are_late(engine, ask, monkeypatch):
    """Some run and some wait; the first deadline to pass is of a request that is over by then."""
    over, last, late, unlimited = put_all(
        engine,
        [
            ask(max_new_tokens=2, timeout_s=10),
            ask(max_new_tokens=1500, timeout_s=90),
            ask(max_new_tokens=1500, timeout_s=30),
            ask(max_new_tokens=1500),
        ],
    )
    run_until(engine, lambda: len(late.deltas) > 4)
    assert over.num_ends == 1
    now = time.perf_counter
    for passed, ended in ((20, []), (31, [late]), (91, [late, last])):
        monkeypatch.setattr(time, "perf_counter", lambda passed=passed: now() + passed)
        engine.step()
        assert [sink for sink in (last, late, unlimited) if sink.num_ends] == [s for s in (last, late) if s in ended]
    assert isinstance(late.error, DeadlineExceeded)
    assert isinstance(last.error, DeadlineExceeded)
    engine.fail_all(DeadlineExceeded("the test is over"))
    assert_idle(engine)


def test_a_full_line_refuses_and_says_when_to_come_back(model, ask):
    engine = build(model.engine.family, max_num_seqs=1, max_waiting=2)
    sinks = put_all(engine, [ask()])
    engine.step()
    sinks += put_all(engine, [ask(), ask()])
    with pytest.raises(CapacityError, match="2 requests are waiting") as caught:
        ask().put_to(engine)
    assert 1 <= caught.value.retry_after_s <= 60
    run_until(engine, lambda: not engine.has_work)
    assert [sink.error for sink in sinks] == [None] * 3
    assert put_all(engine, [ask()])
    run_until(engine, lambda: not engine.has_work)
    assert_idle(engine)


def test_what_can_run_at_the_next_step_does_not_wait(model, ask):
    engine = build(model.engine.family, max_num_seqs=3, max_waiting=1)
    sinks = put_all(engine, [ask(seed=i) for i in range(4)])
    with pytest.raises(CapacityError, match="4 requests are waiting"):
        ask().put_to(engine)
    run_until(engine, lambda: not engine.has_work)
    assert [sink.error for sink in sinks] == [None] * 4
    assert_idle(engine)


def test_draining_answers_those_who_are_there_and_nobody_else(engine, ask):
    sinks = put_all(engine, [ask(seed=i) for i in range(8)])
    engine.step()
    engine.drain()
    with pytest.raises(CapacityError, match="stopped"):
        ask().put_to(engine)
    run_until(engine, lambda: not engine.has_work)
    assert [len(sink.deltas) for sink in sinks] == [8] * 8
    assert_idle(engine)


def test_a_request_that_could_never_fit_is_refused_at_once(model, ask):
    engine = build(model.engine.family, num_rows=64)
    with pytest.raises(InvalidRequest, match="KV cache holds 64"):
        ask(max_new_tokens=60).put_to(engine)
    assert not engine.has_work
    longest = 64 - engine.family.splice(*spliced(ask())).length
    sink = put_all(engine, [ask(max_new_tokens=longest)])[0]
    run_until(engine, lambda: not engine.has_work)
    assert len(sink.deltas) == longest
    assert_idle(engine)


def spliced(question: Question) -> tuple[Any, Any]:
    return question.request.messages, [item.tokens for item in question.encoded]


def test_an_answer_without_a_bound_ends_where_the_room_does(model, ask):
    engine = build(model.engine.family, num_rows=80)
    _, sink = ask(max_new_tokens=None).put_to(engine)
    run_until(engine, lambda: not engine.has_work)
    assert sink.deltas[-1].finish_reason == "length"
    assert sink.summary.usage.num_prompt_tokens + len(sink.deltas) == 80
    assert_idle(engine)


def test_the_second_question_computes_only_what_is_new(engine, ask):
    """Rows of a picture are found again; with a reducer that looks at the question, only what is before it."""
    first, second = ask("What is it?", num_images=2), ask("Where is it?", num_images=2)
    cached = []
    for question in (first, second, ask("Why?", num_images=2, reducer="fastv:layer=1"), ask("Who?", seed=50)):
        _, sink = question.put_to(engine)
        before = engine.stats.num_scheduled_tokens
        run_until(engine, lambda: not engine.has_work)
        usage = sink.summary.usage
        cached.append(usage.num_cached_tokens)
        computed = engine.stats.num_scheduled_tokens - before
        assert computed == usage.num_prompt_tokens - usage.num_cached_tokens + usage.num_completion_tokens - 1
    num_visual = 2 * 16
    assert cached[0] == 0
    assert cached[1] >= num_visual // 16 * 16
    assert cached[2:] == [0, 0]  # the template before the media is shorter than a block
    assert engine.prefix_cache.num_hits == sum(cached)
    assert_idle(engine)


def test_threads_that_wait_for_answers_run_the_engine_together(model, engine, ask):
    questions = [ask(seed=i, max_new_tokens=12) for i in range(5)]
    given: dict[int, list[int]] = {}
    loop = EngineLoop(engine)

    def answer(number: int) -> None:
        question = questions[number]
        events = list(loop.stream_sync(question.request, EncodedMedia(items=question.encoded)))
        given[number] = [token for event in events if isinstance(event, Delta) for token in event.token_ids]

    threads = [threading.Thread(target=answer, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [given[i] for i in range(5)] == [ids[0] for ids in alone(model, questions)]
    assert_idle(engine)


def test_closing_a_stream_of_events_cancels(engine, ask):
    question, loop = ask(max_new_tokens=100), EngineLoop(engine)
    events = loop.stream_sync(question.request, EncodedMedia(items=question.encoded))
    next(events)
    assert engine.stats.num_running == 1
    events.close()
    assert_idle(engine)


def test_a_closed_engine_leaves_no_threads(model, ask):
    def compilers() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("grammar")}

    before, engine = compilers(), build(model.engine.family)
    job, _ = ask(response_format={"type": "json_object"}, ignore_eos=False).put_to(engine)
    engine.abort(job)
    started = compilers() - before
    assert started
    engine.close()
    for thread in started:
        thread.join(5)
    assert not compilers() - before
