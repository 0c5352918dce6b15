"""A model for caption jobs that needs no weights, and a process that forks jobs.

A file's bytes decide what happens: `broken...` is damaged media, `fault...` makes the model raise, anything else gets
a caption that names its bytes.

`python -m tests.serve.jobs.fake` imports once (torch takes seconds), then forks one job per line of JSON on stdin and
answers with its process id; a line with a process id waits for that job and answers with its exit status.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from mm.data.outputs import Delta, Event, Summary, Timings, Usage
from mm.data.request import Request
from mm.data.tokens import Encoded
from mm.errors import MediaError
from mm.media import MediaBudget
from serve.jobs.caption import run_caption
from serve.jobs.job import CaptionJob

NUM_TOGETHER = 4
"""Items that a forked job answers at a time."""


@dataclasses.dataclass(frozen=True)
class FakeEncoded:
    """What `encode` hands to `answer`: nothing of it is looked at in between."""

    data: bytes


def caption_of(data: bytes) -> str:
    return f"caption of {hashlib.sha256(data).hexdigest()[:12]}"


@dataclasses.dataclass
class FakeCaptioner:
    """Attributes:
    log: A file that gets the caption of every answer begun, so that work can be counted over processes.
    num_steps: Steps that an answer takes.
    """

    log: Path | None = None
    delay_s: float = 0.0
    num_steps: int = 0
    num_encoded: int = 0
    num_answered: int = 0
    num_waiting: int = 0
    most_waiting: int = 0
    under_way: list[FakeAnswering] = dataclasses.field(default_factory=list)
    most_under_way: int = 0
    prompts: list[str] = dataclasses.field(default_factory=list)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def prepare_thread(self) -> None:
        pass

    def encode(self, request: Request, budget: MediaBudget) -> list[Encoded]:
        time.sleep(self.delay_s)
        (media,) = request.media
        if media.data.startswith(b"broken"):
            raise MediaError("undecodable", media.kind)
        with self.lock:
            self.num_encoded += 1
            self.num_waiting += 1
            self.most_waiting = max(self.most_waiting, self.num_waiting)
        return [FakeEncoded(media.data)]  # type: ignore[list-item]

    def answer(self, request: Request, encoded: list[FakeEncoded]) -> FakeAnswering:
        (item,) = encoded
        with self.lock:
            self.num_waiting -= 1
        self.num_answered += 1
        self.prompts.append(request.messages[0].parts[1].text)
        if self.log:
            with open(self.log, "a") as file:
                file.write(caption_of(item.data) + "\n")
        answering = FakeAnswering(self, item.data, self.num_steps)
        self.under_way.append(answering)
        self.most_under_way = max(self.most_under_way, len(self.under_way))
        return answering

    def step(self) -> bool:
        for answering in self.under_way:
            answering.num_left -= 1
        return bool(self.under_way)


@dataclasses.dataclass(eq=False)
class FakeAnswering:
    captioner: FakeCaptioner
    data: bytes
    num_left: int

    @property
    def is_done(self) -> bool:
        return self.num_left <= 0

    def events(self) -> Iterator[Event]:
        self.captioner.under_way.remove(self)
        if self.data.startswith(b"fault"):
            raise RuntimeError("secret /path/of/the/library")
        time.sleep(self.captioner.delay_s)
        yield Delta(choice=0, text=caption_of(self.data), token_ids=(1, 2), finish_reason="stop")
        usage = Usage(num_prompt_tokens=20, num_completion_tokens=2, num_image_tokens_in=16, num_image_tokens_kept=4)
        yield Summary(usage=usage, timings=Timings(encode_s=0.5, decode_s=0.25), reducer="uniform:keep_ratio=0.25")


def _fork(order: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        stderr = os.open(order["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stderr, 2)
        os.dup2(stderr, 1)
        job = CaptionJob(inputs=tuple(order["inputs"]), out=Path(order["out"]), num_together=NUM_TOGETHER)
        captioner = FakeCaptioner(log=Path(order["log"]), delay_s=order["delay_s"], num_steps=3)
        code = run_caption(job, build=lambda _: captioner)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        reply = os.waitpid(order, 0)[1] if isinstance(order, int) else _fork(order)
        sys.stdout.write(f"{reply}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
