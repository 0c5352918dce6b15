"""The requests that an engine holds: how they arrive, and every way in which they end."""

from __future__ import annotations

import itertools
import logging
import queue
import time

from mm.config import OnError
from mm.engine.scheduler import Scheduler
from mm.engine.sequence import EngineRequest, Sequence
from mm.engine.spec_decode.proposer import SpecDecoder
from mm.engine.summary import summarise
from mm.errors import DeadlineExceeded, EngineError, MmError, ReducerFault

log = logging.getLogger(__name__)


class RequestLifecycle:
    """Requests from arrival to end.

    `arrive` and the counts may be used from any thread, everything else only by the thread that runs a step.

    Args:
        on_error: What a reducer's fault does to its request, see `ReducerPolicy`.
    """

    def __init__(self, scheduler: Scheduler, spec_decoder: SpecDecoder, *, on_error: OnError) -> None:
        self._scheduler, self._spec_decoder = scheduler, spec_decoder
        self._on_error: OnError = on_error
        self._arrivals: queue.SimpleQueue[list[Sequence]] = queue.SimpleQueue()
        self._arrival_index = itertools.count()
        self._live: set[Sequence] = set()

    def arrive(self, seqs: list[Sequence]) -> None:
        """Hand over the sequences of a new request. One thread at a time."""
        for seq in seqs:
            seq.arrival_index = next(self._arrival_index)
        self._arrivals.put(seqs)

    @property
    def num_arrivals(self) -> int:
        """Requests that arrived since the last step."""
        return self._arrivals.qsize()

    @property
    def num_live(self) -> int:
        """Sequences that are waiting or running."""
        return len(self._live)

    @property
    def has_work(self) -> bool:
        return bool(self._live) or not self._arrivals.empty()

    def is_live(self, seq: Sequence) -> bool:
        return seq in self._live

    def update(self) -> None:
        """Take in what arrived, and end requests that were aborted or are past their deadline."""
        while not self._arrivals.empty():
            seqs = self._arrivals.get()
            self._live.update(seqs)
            self._scheduler.add(seqs[0])
        now = time.perf_counter()
        for seq in list(self._live):
            request = seq.request
            if seq not in self._live:
                continue  # it went with its sibling
            if request.aborted.is_set():
                self._release(request)
                _end(request)
            elif request.deadline is not None and now > request.deadline:
                self.fail(request, DeadlineExceeded("the request took longer than it may"))

    def finish(self, seq: Sequence, now: float) -> None:
        """End a sequence that has its finish reason, and its request with the last sequence."""
        request = seq.request
        self._drop(seq)
        request.num_unfinished -= 1
        if request.num_unfinished:
            return
        request.is_finished = True
        try:
            request.sink.put(summarise(request, now))
        except Exception as error:
            log.exception("a summary was not taken: request_id=%s", request.request_id)
            _end(request, EngineError(f"the summary could not be handed over: {type(error).__name__}"))
        else:
            _end(request)

    def fail(self, request: EngineRequest, error: BaseException) -> None:
        """End a request with an error."""
        if any(seq.request is request for seq in self._live):
            self._release(request)
            _end(request, error)

    def fail_all(self, error: BaseException) -> None:
        """End every request with an error."""
        for request in {seq.request for seq in self._live}:
            self.fail(request, error)

    def tolerate(self, request: EngineRequest, error: MmError) -> bool:
        """Whether the request goes on after a reducer's error. Otherwise the request fails with it."""
        if self._on_error == "fail" or not isinstance(error, ReducerFault):
            self.fail(request, error)
            return False
        if str(error) not in request.reducer_faults:
            log.warning("request_id=%s reducer_fault=%s", request.request_id, error, exc_info=error.__cause__)
            request.reducer_faults.append(str(error))
        return True

    def _release(self, request: EngineRequest) -> None:
        request.is_finished = True
        for seq in [seq for seq in self._live if seq.request is request]:
            self._drop(seq)

    def _drop(self, seq: Sequence) -> None:
        self._spec_decoder.close(seq)
        self._scheduler.remove(seq)
        self._live.discard(seq)


def _end(request: EngineRequest, error: BaseException | None = None) -> None:
    """End the request's events. A sink that fails affects nobody else."""
    try:
        request.sink.end(error)
    except Exception:
        log.exception("an end was not taken: request_id=%s", request.request_id)
