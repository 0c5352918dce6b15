"""Rows of equal content, or on request of nearly equal pictures, which are asked about once."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mm.config import MediaLimits
from mm.media.hashing import framed_hash
from serve.jobs.batch.rows import Row
from serve.jobs.batch.sinks import Record

if TYPE_CHECKING:
    from serve.jobs.batch.near import Mark, Marks

NEAR_MARK, BITS_APART = "near_mark", "num_bits_apart"
"""Fields of a record where near pictures share answers: what it looks like, and how far it is from `same_as`."""
Answer = asyncio.Future[Record]


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a row is about.

    Attributes:
        name: Of all that its answers depend on beside the job's settings.
        question: Of what it asks by itself.
        mark: What its picture looks like, where that counts.
    """

    name: str
    question: str
    mark: Mark | None = None


@dataclass(kw_only=True)
class Asked:
    """The contents that were asked about, with their answers or those to come.

    Args:
        dedup: One of `DEDUP` of `serve.jobs.batch.job`.
        limits: Of pictures that are decoded for their mark.
    """

    dedup: str
    limits: MediaLimits
    _answers: dict[str, Answer] = field(default_factory=dict[str, Answer])
    _marks: dict[str, Marks] = field(default_factory=lambda: defaultdict[str, "Marks"](_marks))

    def remember(self, record: Record) -> None:
        """A record of an earlier run: its answer serves equal rows."""
        if self.dedup == "none" or not record.get("content_hash") or record.get("same_as") is not None:
            return
        answer: Answer = asyncio.get_running_loop().create_future()
        answer.set_result(record)
        self._answers.setdefault(record["content_hash"], answer)
        if self.dedup == "near" and record.get(NEAR_MARK):
            from serve.jobs.batch.near import Mark

            question, _, text = record[NEAR_MARK].partition(":")
            self._marks[question].add(Mark.parse(text), record["content_hash"])

    def content(self, row: Row) -> Content:
        """What a row is about. Its media have been loaded. Takes a while: call it in a thread."""
        vision = json.dumps(dict(row.vision), sort_keys=True)
        name = framed_hash("row", row.prompt or "", vision, *(medium.fingerprint for medium in row.media))
        mark = None
        if self.dedup == "near":
            from serve.jobs.batch.near import mark_of

            mark = mark_of(row, self.limits)
        return Content(name=name, question=framed_hash("question", row.prompt or "", vision)[:16], mark=mark)

    def facts(self, content: Content, bits_apart: int | None) -> dict[str, Any]:
        """The fields that a record has where near pictures share answers."""
        if self.dedup != "near":
            return {}
        mark = None if content.mark is None else f"{content.question}:{content.mark.text}"
        return {NEAR_MARK: mark, BITS_APART: bits_apart}

    def find(self, content: Content) -> tuple[Answer, int] | None:
        """The answer to an equal content, or to the nearest that is near, and how many bits differ."""
        if self.dedup == "none":
            return None
        if (answer := self._answers.get(content.name)) is not None:
            return answer, 0
        near = None if content.mark is None else self._marks[content.question].nearest(content.mark)
        if near is None or (answer := self._answers.get(near[0])) is None:
            return None
        return answer, near[1]

    def begin(self, content: Content) -> Answer:
        """A content is asked about now; the future has to get its record or an error."""
        answer: Answer = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # read, so that nothing is logged
        self._answers[content.name] = answer
        if content.mark is not None:
            self._marks[content.question].add(content.mark, content.name)
        return answer

    def failed(self, content: Content) -> None:
        """It has no answer: equal rows are asked about themselves."""
        self._answers.pop(content.name, None)


def _marks() -> Marks:
    from serve.jobs.batch.near import Marks

    return Marks()
