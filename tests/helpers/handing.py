"""Two engines, of which the first computes prompts and the second goes on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mm.data.outputs import Event
from mm.data.request import Request
from mm.data.tokens import EncodedMedia
from mm.engine.engine import LLMEngine
from mm.engine.kv_transfer.messages import HandOff, KVPiece, ReceivedKV
from mm.engine.sequence import EngineRequest
from tests.helpers.engines import Question, Recorder, run_until


class Taker(Recorder):
    """Takes what a request hands over."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[KVPiece] = []
        self.state: HandOff | None = None

    def put_piece(self, piece: KVPiece) -> None:
        assert self.state is None, "keys and values came after the rest"
        self.pieces.append(piece)

    def hand_over(self, state: HandOff) -> None:
        assert self.state is None, "handed over twice"
        self.state = state

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)


def continued(request: Request, state: HandOff) -> Request:
    """The request for the engine that goes on."""
    return replace(request, sampling=replace(request.sampling, seed=state.seed), emitted=state.emitted)


def prefilled(engine: LLMEngine, asked: Question) -> tuple[EngineRequest, Taker]:
    """A request that is parked, or has ended."""
    sink = Taker()
    media = EncodedMedia(items=tuple(asked.encoded), reducer="as tested")
    request = engine.submit(asked.request, media, sink, asked.reducer)
    run_until(engine, lambda: bool(sink.state or sink.num_ends))
    if sink.error is not None:
        raise sink.error
    return request, sink


def received_by(engine: LLMEngine, asked: Question, sink: Taker, **changes: Any) -> Recorder:
    """Put to an engine what another one handed over.

    Args:
        changes: Of the request, against what it should be.
    """
    assert sink.state is not None
    feed = Recorder()
    media = EncodedMedia(items=tuple(asked.encoded), reducer="as tested")
    received = ReceivedKV(media=media, pieces=sink.pieces, state=sink.state)
    engine.submit(replace(continued(asked.request, sink.state), **changes), received, feed, asked.reducer)
    return feed


def answer(first: LLMEngine, then: LLMEngine, asked: Question) -> list[Event]:
    """All events of a request that begins at one engine and ends at the other, which nothing else uses."""
    request, sink = prefilled(first, asked)
    if sink.num_ends:
        return sink.events
    feed = received_by(then, asked, sink)
    run_until(then, lambda: bool(feed.num_ends))
    if feed.error is not None:
        raise feed.error
    first.abort(request, wait=True)
    return [*sink.events, *feed.events]
