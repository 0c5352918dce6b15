"""What a stream has given so far, and the request that asks another decoder for the rest."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from mm.data.outputs import Delta, Event
from mm.data.request import Emitted, Request
from mm.engine.sampling.resolved_params import new_seed


def reproducible(request: Request) -> Request:
    """The request with a seed, so that another decoder samples as the first one did."""
    if request.sampling.seed is not None:
        return request
    return replace(request, sampling=replace(request.sampling, seed=new_seed()))


class Progress:
    """What the client of one stream has got.

    Args:
        request: With a seed; see `reproducible`.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self._began = time.monotonic()
        self._tokens: list[list[int]] = [[] for _ in range(request.sampling.n)]
        self._finished: set[int] = set()
        self._knows_length = False

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self._tokens))

    def rest(self) -> Request:
        """The request for what is missing, with the time that is left.

        Where only the summary is missing, the last token of a choice is asked for again.
        """
        left = self.request.timeout_s
        if left is not None:
            left = max(0.0, left - (time.monotonic() - self._began))
        if not self.num_tokens:
            return replace(self.request, timeout_s=left)
        emitted = [
            Emitted(token_ids=tuple(tokens), is_finished=choice in self._finished)
            for choice, tokens in enumerate(self._tokens)
        ]
        if all(one.is_finished for one in emitted):
            emitted[-1] = Emitted(token_ids=emitted[-1].token_ids[:-1])
        return replace(self.request, timeout_s=left, emitted=tuple(emitted))

    def take(self, events: Sequence[Event]) -> list[Event]:
        """Note the events of a decoder; those of them that the client has not got yet."""
        return [event for event in map(self._taken, events) if event is not None]

    def _taken(self, event: Event) -> Event | None:
        if not isinstance(event, Delta):
            return event
        if event.choice in self._finished:
            return None
        self._tokens[event.choice] += event.token_ids
        if event.finish_reason is not None:
            self._finished.add(event.choice)
        if event.num_prompt_tokens is not None and self._knows_length:
            event = replace(event, num_prompt_tokens=None)
        self._knows_length = True
        return event
