"""One request's journey in one process."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from mm.data.outputs import Event
from mm.data.request import Request
from mm.data.tokens import Encoded, EncodedMedia
from mm.encode.parts import EncodeParts
from mm.encode.pipeline import encode
from mm.engine.engine import LLMEngine
from mm.engine.loop import OutputQueue
from mm.engine.sequence import EngineRequest
from mm.errors import MmError
from mm.plugins.spec import build_reducer


def answer(
    request: Request, encoded: Sequence[Encoded], engine: LLMEngine, *, reducer: str = "none"
) -> Generator[Event]:
    """Deltas of every choice, then one `Summary`. Closing the generator frees everything at once.

    Args:
        reducer: How the tokens were reduced, and are to be reduced inside the decoder.

    Raises:
        ContextTooLong, InvalidRequest, MediaError: Before the first event.
    """
    feed = OutputQueue()
    job = engine.submit(request, encoded, feed, build_reducer(reducer), reducer)
    yield from engine.events(job, feed)


def generate(request: Request, parts: EncodeParts, engine: LLMEngine) -> Generator[Event]:
    """The whole journey in one process."""
    encoded = encode(request, parts)
    yield from answer(request, encoded.items, engine, reducer=encoded.reducer)


def generate_batch(
    requests: Iterable[Request], parts: EncodeParts, engine: LLMEngine, *, ahead: int = 32
) -> Iterator[tuple[int, list[Event] | MmError]]:
    """Many requests: their number in the sequence with all their events or what was wrong, in order of completion.

    Media are encoded in a thread of their own while earlier requests are decoded.

    Args:
        ahead: Requests that are encoded or in the engine at a time; bounds the memory of an endless sequence.
    """
    numbered = enumerate(requests)
    encoding: dict[Future[EncodedMedia], tuple[int, Request]] = {}
    running: dict[int, tuple[EngineRequest, OutputQueue, list[Event]]] = {}

    with ThreadPoolExecutor(1, thread_name_prefix="encode") as pool:
        try:
            while True:
                room = ahead - len(encoding) - len(running)
                for number, request in itertools.islice(numbered, room):
                    encoding[pool.submit(encode, request, parts)] = number, request
                if not encoding and not running:
                    return
                if not running:
                    wait(encoding, return_when=FIRST_COMPLETED)
                for done in [future for future in encoding if future.done()]:
                    number, request = encoding.pop(done)
                    try:
                        encoded = done.result()
                        feed, spec = OutputQueue(), encoded.reducer
                        running[number] = (
                            engine.submit(request, encoded.items, feed, build_reducer(spec), spec),
                            feed,
                            [],
                        )
                    except MmError as error:
                        yield number, error
                engine.step()
                for number, (_, feed, events) in list(running.items()):
                    if (outcome := _drained(feed, events)) is not None:
                        del running[number]
                        yield number, outcome
        finally:
            for future in encoding:
                future.cancel()
            for job, _, _ in running.values():
                engine.cancel(job)


def _drained(feed: OutputQueue, events: list[Event]) -> list[Event] | MmError | None:
    """Move what is there to `events`; the outcome once it is over."""
    while (item := feed.take()) is not None:
        event, error = item
        if event is not None:
            events.append(event)
        elif error is None:
            return events
        elif isinstance(error, MmError):
            return error
        else:
            raise error
    return None
