"""The books of a run: every request, every token, every GPU and every busy second is accounted for, or it is no result.

A published sweep of a peer promised 4.5 times what its GPUs could do, through a fault in its accounting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mm.errors import EngineError
from serve.planning.events import Device

TOLERANCE = 1e-6


class BadBooks(EngineError):
    """A simulation lost or invented something. It is a fault of ours, and its figures are not shown."""


@dataclass(frozen=True, kw_only=True)
class StageUse:
    """How busy the devices of one stage were.

    Attributes:
        kind: Of its GPUs; empty for the front end.
        num_devices: GPUs, or the one processor of the front end.
        busy_s, work_s: Device seconds spent, and work of the computations that ended.
        lanes_s: Device seconds that there were.
    """

    role: str
    kind: str
    num_devices: int
    busy_s: float
    work_s: float
    lanes_s: float

    @classmethod
    def of(cls, role: str, kind: str, devices: Sequence[Device], duration_s: float) -> StageUse:
        each = {id(device): device for device in devices}.values()
        return cls(
            role=role,
            kind=kind,
            num_devices=len(devices),
            busy_s=sum(device.busy_s for device in each),
            work_s=sum(device.work_s for device in each),
            lanes_s=duration_s * sum(device.lanes for device in each),
        )

    @property
    def utilisation(self) -> float:
        return self.busy_s / self.lanes_s if self.lanes_s else 0.0


@dataclass(frozen=True, kw_only=True)
class Books:
    """What a run counted, by counters that do not know each other."""

    num_requests: int
    num_arrived: int
    num_refused: int
    num_finished: int
    num_in_flight: int
    num_answered: int
    num_first_tokens: int
    num_last_tokens: int
    pieces_in: int
    pieces_out: int
    sequences_in: int
    sequences_out: int
    output_tokens_wanted: int
    output_tokens_made: int
    prompt_tokens_wanted: int
    prompt_tokens_made: int
    gpus_of_layout: int
    gpus_of_run: int
    devices: int | None
    stages: tuple[StageUse, ...]


def check_books(books: Books) -> None:
    """Compare what went in with what came out.

    Raises:
        BadBooks: Names what does not agree.
    """
    _equal("requests that arrived", books.num_requests, books.num_arrived)
    _equal("requests that ended", books.num_arrived, books.num_finished + books.num_refused)
    _equal("requests in flight at the end", 0, books.num_in_flight)
    _equal("requests that were not refused", books.num_finished, books.num_answered)
    _equal("requests with a first token", books.num_finished, books.num_first_tokens)
    _equal("requests with a last token", books.num_finished, books.num_last_tokens)
    _equal("pieces of work that were finished", books.pieces_in, books.pieces_out)
    _equal("sequences that were finished", books.sequences_in, books.sequences_out)
    _equal("output tokens", books.output_tokens_wanted, books.output_tokens_made)
    _equal("prompt tokens", books.prompt_tokens_wanted, books.prompt_tokens_made)
    _equal("GPUs", books.gpus_of_layout, books.gpus_of_run)
    _equal("GPUs of all stages", books.gpus_of_run, sum(one.num_devices for one in books.stages if one.kind))
    if books.devices is not None:
        _equal("devices", books.gpus_of_run, books.devices)
    for stage in books.stages if books.devices is not None else ():
        _close(f"busy seconds of {stage.role}", stage.work_s, stage.busy_s)
        if stage.busy_s > stage.lanes_s * (1 + TOLERANCE) + TOLERANCE:
            raise BadBooks(f"{stage.role} was busy for {stage.busy_s:g} s of the {stage.lanes_s:g} s that it had")


def _equal(what: str, wanted: int, found: int) -> None:
    if wanted != found:
        raise BadBooks(f"the simulation's books are wrong: {what}: {found}, and it has to be {wanted}")


def _close(what: str, wanted: float, found: float) -> None:
    if not math.isclose(wanted, found, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
        raise BadBooks(f"the simulation's books are wrong: {what}: {found:g}, and the work was {wanted:g}")
