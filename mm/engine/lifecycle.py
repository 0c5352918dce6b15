"""The requests that an engine holds: how they arrive, and every way in which they end."""

from __future__ import annotations

import itertools
import logging
import math
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

    `arrive`, `abort` and the counts may be used from any thread, everything else only by the thread that runs a step.

    Args:
        on_error: What a reducer's fault does to its request, see `ReducerPolicy`.
    """

    def __init__(self, scheduler: Scheduler, spec_decoder: SpecDecoder, *, on_error: OnError) -> None:
        self._scheduler, self._spec_decoder = scheduler, spec_decoder
        self._on_error: OnError = on_error
        self._arrivals: queue.SimpleQueue[list[Sequence]] = queue.SimpleQueue()
        self._aborts: queue.SimpleQueue[EngineRequest] = queue.SimpleQueue()
        self._arrival_index = itertools.count()
        self._live: dict[EngineRequest, set[Sequence]] = {}
        self._num_live = 0
        self._first_deadline = math.inf  # no request's deadline is earlier

    def arrive(self, seqs: list[Sequence]) -> None:
        """Hand over the sequences of a new request. One thread at a time."""
        for seq in seqs:
            seq.arrival_index = next(self._arrival_index)
        self._arrivals.put(seqs)

    def abort(self, request: EngineRequest) -> None:
        """Let the next `update` end a request that has arrived, if it has not ended. From any thread."""
        if not request.is_finished:
            self._aborts.put(request)

    @property
    def num_arrivals(self) -> int:
        """Requests that arrived since the last step."""
        return self._arrivals.qsize()

    @property
    def num_live(self) -> int:
        """Sequences that are waiting or running."""
        return self._num_live

    @property
    def has_work(self) -> bool:
        return bool(self._live) or not self._arrivals.empty()

    def is_live(self, seq: Sequence) -> bool:
        return seq in self._live.get(seq.request, ())

    def update(self) -> None:
        """Take in what arrived, and end requests that were aborted or are past their deadline.

        The time it takes does not depend on how many requests are waiting.
        """
        aborted = list[EngineRequest]()
        while not self._aborts.empty():  # before the arrivals: what was aborted has then arrived
            aborted.append(self._aborts.get())
        while not self._arrivals.empty():
            seqs = self._arrivals.get()
            request = seqs[0].request
            self._live[request] = set(seqs)
            self._num_live += len(seqs)
            self._first_deadline = min(self._first_deadline, _deadline(request))
            later = {sibling for seq in seqs for sibling in seq.siblings}
            for seq in seqs:
                if seq not in later:
                    self._scheduler.add(seq)
        for request in aborted:
            if request in self._live:
                self._release(request)
                _end(request)
        if (now := time.perf_counter()) > self._first_deadline:
            for request in [request for request in self._live if now > _deadline(request)]:
                self.fail(request, DeadlineExceeded("the request took longer than it may"))
            self._first_deadline = min(map(_deadline, self._live), default=math.inf)

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
        if request in self._live:
            self._release(request)
            _end(request, error)

    def fail_all(self, error: BaseException) -> None:
        """End every request with an error."""
        for request in list(self._live):
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
        for seq in list(self._live[request]):
            self._drop(seq)

    def _drop(self, seq: Sequence) -> None:
        self._spec_decoder.close(seq)
        self._scheduler.remove(seq)
        seqs = self._live[seq.request]
        seqs.remove(seq)
        self._num_live -= 1
        if not seqs:
            del self._live[seq.request]


def _deadline(request: EngineRequest) -> float:
    return math.inf if request.deadline is None else request.deadline


def _end(request: EngineRequest, error: BaseException | None = None) -> None:
    """End the request's events. A sink that fails affects nobody else."""
    try:
        request.sink.end(error)
    except Exception:
        log.exception("an end was not taken: request_id=%s", request.request_id)
