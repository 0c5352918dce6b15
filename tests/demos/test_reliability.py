"""The campaign judges what clients saw: its verdicts are tested on responses and outcomes that are made up."""

from __future__ import annotations

import importlib
import json
import pkgutil

import httpx
import pytest

from demos.bench import reliability
from demos.bench.reliability import checks
from demos.bench.reliability.__main__ import row, run
from demos.bench.reliability.attacks import judged
from demos.bench.reliability.checks import Settings, at_least, at_most, check
from demos.bench.reliability.kills import STREAM_END_S, kill_figures
from demos.bench.reliability.load import Outcome, classify

DELTA = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]}
FAILED = {"choices": [{"index": 0, "delta": {}, "finish_reason": "error"}]}
FINISHED = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
ERROR = {"error": {"message": "a part of the server is restarting", "code": "unavailable"}}


def sse(*events: object, done: bool = True) -> str:
    return "\n\n".join([*(f"data: {json.dumps(event)}" for event in events), *(["data: [DONE]"] if done else [])])


@pytest.mark.parametrize(
    ("status", "headers", "content", "is_stream", "end"),
    [
        (200, {}, json.dumps(FINISHED), False, "answered"),
        (200, {}, json.dumps(FAILED), False, "broken"),
        (503, {"retry-after": "5"}, "", False, "refused"),
        (429, {"retry-after": "1"}, "", True, "refused"),
        (503, {}, "", False, "broken"),
        (500, {}, "", True, "broken"),
        (200, {}, sse(DELTA, FINISHED), True, "answered"),
        (200, {}, sse(DELTA, FINISHED, {"choices": [], "usage": {}}), True, "answered"),
        (200, {}, sse(DELTA, FAILED, ERROR), True, "error"),
        (200, {}, sse(DELTA, FAILED, ERROR, done=False), True, "broken"),
        (200, {}, sse(DELTA, ERROR), True, "broken"),
        (200, {}, sse(DELTA, FAILED), True, "broken"),
        (200, {}, sse(DELTA), True, "broken"),
        (200, {}, "", True, "broken"),
    ],
)
def test_a_response_is_what_it_says_to_the_end(status, headers, content, is_stream, end):
    assert classify(status, headers, content, is_stream) == end


def outcome(end: str, *, is_stream: bool, ended: float = 20.0) -> Outcome:
    made = Outcome(is_stream=is_stream, has_picture=False, began=1.0, ended=ended)
    made.end = end  # type: ignore[assignment]
    return made


def missed(*outcomes: Outcome) -> set[str]:
    many = [outcome("answered", is_stream=i % 2 == 0) for i in range(40)]
    figures = list(kill_figures("Decoder", [10.0, 19.0], [*many, *outcomes]))
    return {figure.what.removeprefix("Decoder: ") for figure in figures if not figure.is_reached}


def test_a_campaign_without_losses_reaches_its_goals():
    assert missed(outcome("error", is_stream=True, ended=19.0 + STREAM_END_S)) == set()


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (outcome("hung", is_stream=False), "hung"),
        (outcome("refused", is_stream=False), "not answered"),
        (outcome("broken", is_stream=False), "not answered"),
        (outcome("broken", is_stream=True), "without a word"),
        (outcome("error", is_stream=True, ended=19.1 + STREAM_END_S), "longest from a kill"),
    ],
)
def test_each_loss_misses_its_goal(lost, words):
    assert any(words in what for what in missed(lost))


def test_a_check_that_raises_has_missed_its_goal(monkeypatch):
    monkeypatch.setattr(checks, "CHECKS", {})

    @check("R8")
    def broken(settings: Settings):
        yield at_most("slowest", 1.0, 2.0, "s")
        raise RuntimeError("the server\nended")

    figures = run(broken, Settings(is_release=False, seed=1))
    assert [figure.is_reached for figure in figures] == [True, False]
    assert "the server ended" in figures[1].value
    assert row("R8", figures[0]).split(" | ")[2:] == ["slowest", "1 s", "≤ 2 s", "reached |"]


def test_limits_are_part_of_what_is_allowed():
    assert at_most("", 2.0, 2.0).is_reached
    assert at_least("", 2.0, 2.0).is_reached
    assert not at_most("", float("inf"), 2.0).is_reached
    assert not at_least("", 1.9, 2.0).is_reached


def test_only_promises_are_checked():
    with pytest.raises(ValueError, match="R19"):
        check("R19")


@pytest.mark.parametrize(("answers", "wrong"), [((200, 400, 429), ""), ((200, 500), "server errors"), ((0,), "answer")])
def test_errors_of_the_server_and_silence_miss_the_goal(answers, wrong):
    figures = judged("fuzz", [httpx.Response(status) if status else None for status in answers])
    missed = [figure.what for figure in figures if not figure.is_reached]
    assert len(missed) == bool(wrong)
    assert all(wrong in what for what in missed)


def test_every_promise_has_a_check():
    for module in pkgutil.iter_modules(reliability.__path__):
        importlib.import_module(f"demos.bench.reliability.{module.name}")
    assert set(checks.CHECKS) == set(checks.PROMISES)
