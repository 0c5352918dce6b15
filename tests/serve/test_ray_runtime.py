"""What the ingress asks of replicas, with handles that only count: nothing is started twice, and nothing is lost."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from mm.data.media import MediaSource
from mm.data.outputs import Delta, Summary, Timings, Usage
from mm.data.request import Emitted, MediaPart, Message, Request, TextLimits, TextPart
from mm.data.sampling_params import SamplingParams
from mm.errors import CapacityError, EngineError, InvalidRequest
from serve.runtime import StageMissing, Unavailable

with warnings.catch_warnings():  # Ray's own, while it is imported
    warnings.simplefilter("ignore")
    from ray.exceptions import ActorDiedError

    from serve.deployments import calls, decoding
    from serve.deployments.messages import TransferredMedia
    from serve.deployments.ray_runtime import RayRuntime

LIMITS = TextLimits(max_context_tokens=100, max_chars=1000, num_token_ids=500)


class Answer:
    """One call: the results before its end, and the error at its end."""

    def __init__(self, results: list[Any], error: Exception | None = None) -> None:
        self.results, self.error, self.is_cancelled = results, error, False

    def __await__(self) -> Any:
        yield from ()
        if self.error is not None:
            raise self.error
        return self.results[0]

    async def __aiter__(self) -> AsyncIterator[Any]:
        for result in self.results:
            yield result
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        self.is_cancelled = True


class Method:
    """A method of a deployment. Each call gets the next answer, and the last one again and again."""

    def __init__(self, *answers: Answer) -> None:
        self.answers, self.calls = list(answers), list[tuple[Any, ...]]()

    def options(self, **_: Any) -> Method:
        return self

    def remote(self, *arguments: Any) -> Answer:
        self.calls.append(arguments)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def deployment(**methods: Method) -> Any:
    handle = SimpleNamespace(deployment_name="a stage", **methods)
    handle.options = lambda **_: handle
    return handle


@pytest.fixture
async def make(monkeypatch):
    monkeypatch.setattr(calls, "PAUSE_S", 0.0)

    def made(**methods: Method) -> RayRuntime:
        media = TransferredMedia(inline=[], reducer="none", num_items=1)
        encoder = deployment(encode=Method(Answer([media])), encode_inline=Method(Answer([media])))
        decoder = deployment(**{"text_limits": Method(Answer([LIMITS]))} | methods)
        runtime = RayRuntime(encoder, decoder, "none")
        for stage in (runtime._encoders.stage, runtime._decoders.stage):
            stage._set_present(True)
        return runtime

    return made


def request(text: str = "What?", has_picture: bool = False) -> Request:
    parts = (MediaPart(index=0, kind="image"),) if has_picture else ()
    media = (MediaSource(kind="image", source=b"a picture"),) if has_picture else ()
    return Request(request_id="r", messages=(Message(role="user", parts=(*parts, TextPart(text=text))),), media=media)


MEDIA = TransferredMedia(inline=[], reducer="none")


async def streamed(runtime: RayRuntime) -> list[Any]:
    return [batch async for batch in runtime.stream(request(), MEDIA)]


def texts(batches: list[list[Delta]]) -> list[str]:
    return [delta.text for batch in batches for delta in batch]


async def test_a_stream_is_started_once(make) -> None:
    stream = Method(Answer([deltas(1), deltas(2)]))
    assert texts(await streamed(make(stream=stream))) == ["1", "2"]
    assert len(stream.calls) == 1


async def test_a_stream_whose_decoder_is_lost_before_its_first_token_is_started_again_once(make) -> None:
    lost, whole = Answer([], ActorDiedError()), Answer([deltas(1), deltas(2)])
    stream = Method(lost, whole)
    assert texts(await streamed(make(stream=stream))) == ["1", "2"]
    assert len(stream.calls) == 2
    assert lost.is_cancelled


def deltas(*token_ids: int, choice: int = 0, finish_reason: str | None = None) -> list[Delta]:
    """One for each token; the last one may end its choice."""
    return [
        Delta(
            choice=choice,
            text=str(token_id),
            token_ids=(token_id,),
            finish_reason=finish_reason if i + 1 == len(token_ids) else None,
            num_prompt_tokens=7 if i == 0 else None,
        )
        for i, token_id in enumerate(token_ids)
    ]


SUMMARY = Summary(usage=Usage(num_prompt_tokens=7, num_completion_tokens=3), timings=Timings())
SAMPLED = SamplingParams(temperature=1.0, max_new_tokens=3)


async def test_a_stream_that_has_begun_goes_on_behind_what_it_gave(make) -> None:
    lost = Answer([deltas(1), deltas(2)], ActorDiedError())
    whole = Answer([[*deltas(3, finish_reason="length"), SUMMARY]])
    stream = Method(lost, whole)
    asked = replace(request(has_picture=True), sampling=SAMPLED, timeout_s=50.0)
    events = [event async for batch in make(stream=stream).stream(asked, MEDIA) for event in batch]
    assert [getattr(event, "text", None) for event in events] == ["1", "2", "3", None]
    assert [event.num_prompt_tokens for event in events[:3]] == [7, None, None]
    (first, _), (second, _) = stream.calls
    assert (first.emitted, second.emitted) == ((), (Emitted(token_ids=(1, 2)),))
    assert first.sampling.seed is not None
    assert second.sampling == first.sampling
    assert second.media == ()
    assert 49 < second.timeout_s <= first.timeout_s <= 50
    assert lost.is_cancelled


async def test_each_choice_goes_on_behind_its_own_and_finished_ones_stay_so(make) -> None:
    first = [*deltas(1, 2, finish_reason="stop"), *deltas(5, choice=1)]
    stream = Method(Answer([first], ActorDiedError()), Answer([[*deltas(6, choice=1, finish_reason="stop"), SUMMARY]]))
    asked = replace(request(), sampling=replace(SAMPLED, n=2))
    events = [event async for batch in make(stream=stream).stream(asked, MEDIA) for event in batch]
    assert [event.text for event in events[:-1]] == ["1", "2", "5", "6"]
    assert stream.calls[1][0].emitted == (Emitted(token_ids=(1, 2), is_finished=True), Emitted(token_ids=(5,)))


async def test_a_lost_summary_costs_the_last_token_again_which_nobody_sees_twice(make) -> None:
    ended = deltas(1, 2, finish_reason="stop")
    stream = Method(Answer([ended], ActorDiedError()), Answer([[ended[1], SUMMARY]]))
    events = [event async for batch in make(stream=stream).stream(request(), MEDIA) for event in batch]
    assert events == [*ended, SUMMARY]
    assert stream.calls[1][0].emitted == (Emitted(token_ids=(1,)),)


async def test_a_stream_whose_other_decoder_is_full_asks_again(make, monkeypatch) -> None:
    monkeypatch.setattr(decoding, "RESUME_S", 0.0)
    full = Answer([], CapacityError("busy"))
    answers = [
        Answer([deltas(1)], ActorDiedError()),
        *[full] * 9,
        Answer([[*deltas(2, finish_reason="stop"), SUMMARY]]),
    ]
    stream = Method(*answers)
    events = [event async for batch in make(stream=stream).stream(request(), MEDIA) for event in batch]
    assert [event.text for event in events[:-1]] == ["1", "2"]
    assert len(stream.calls) == 11


async def test_a_new_stream_that_a_full_decoder_refuses_is_refused(make) -> None:
    stream = Method(Answer([], CapacityError("busy")))
    with pytest.raises(CapacityError, match="busy"):
        await streamed(make(stream=stream))
    assert len(stream.calls) == 1


async def test_a_stream_that_ends_every_decoder_ends_too(make, monkeypatch) -> None:
    monkeypatch.setattr(decoding, "RESUME_S", 0.0)
    stream = Method(Answer([deltas(1)], ActorDiedError()), Answer([], ActorDiedError()))
    events = make(stream=stream).stream(request(), MEDIA)
    assert await anext(events) == deltas(1)
    with pytest.raises(Unavailable):
        await anext(events)
    assert len(stream.calls) == 1 + calls.MAX_TRIES
    slow = Method(Answer([deltas(1)], ActorDiedError()))  # each gives one token before it ends
    with pytest.raises(Unavailable):
        await streamed(make(stream=slow))
    assert len(slow.calls) == 1 + decoding.MAX_STREAM_LOSSES


async def test_a_stream_that_fails_by_its_own_fault_is_not_repeated(make) -> None:
    stream = Method(Answer([deltas(1)], EngineError("the decoder failed")))
    with pytest.raises(EngineError):
        await streamed(make(stream=stream))
    assert len(stream.calls) == 1


async def test_a_request_that_ends_every_decoder_ends_too(make) -> None:
    complete = Method(Answer([], ActorDiedError()))
    with pytest.raises(Unavailable):
        await make(complete=complete).complete(request(), MEDIA)
    assert len(complete.calls) == calls.MAX_TRIES


async def test_leaving_a_stream_cancels_its_call(make) -> None:
    call = Answer([deltas(1), deltas(2), deltas(3)])
    events = make(stream=Method(call)).stream(request(), MEDIA)
    assert texts([await anext(events)]) == ["1"]
    await events.aclose()
    assert call.is_cancelled


async def test_media_never_travel_to_the_decoder(make) -> None:
    complete = Method(Answer([["a"]]))
    await make(complete=complete).complete(request(has_picture=True), MEDIA)
    ((sent, _),) = complete.calls
    assert sent.media == ()
    assert sent.messages == request(has_picture=True).messages


@pytest.mark.parametrize(
    ("text", "has_picture", "num_checks"), [("What?", True, 0), ("w " * 100, True, 1), ("w " * 100, False, 0)]
)
async def test_a_long_text_beside_media_is_checked_by_a_decoder(make, text, has_picture, num_checks) -> None:
    check = Method(Answer([None]))
    await make(check_length=check).admit(request(text, has_picture))
    assert [sent.media for (sent,) in check.calls] == [()] * num_checks


async def test_a_text_of_too_many_characters_reaches_no_decoder(make) -> None:
    check = Method(Answer([None]))
    with pytest.raises(InvalidRequest, match="1001 characters"):
        await make(check_length=check).admit(request("w" * 1001, has_picture=True))
    assert not check.calls


async def test_a_stage_without_replicas_is_not_asked_again(make) -> None:
    tries = []

    async def attempt(loss: Unavailable | None) -> None:
        tries.append(loss)
        raise StageMissing("decoder", 5)

    with pytest.raises(StageMissing):
        await calls.retried(attempt)
    assert tries == [None]
