"""When a job steps its engine: with full batches, and without waiting for an encoder that is held up."""

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from mm.batch import generate_batch
from mm.data.outputs import Event
from mm.data.request import Request
from mm.data.tokens import EncodedMedia
from mm.engine.loop import OutputQueue
from mm.errors import InvalidRequest

LENGTH = 5


class CountingLoop:
    """An engine whose requests each end after LENGTH steps. It notes how many were in each step."""

    def __init__(self, after_step: Callable[[int], None] = lambda count: None) -> None:
        self.left: dict[int, int] = {}
        self.queues: list[OutputQueue] = []
        self.sizes: list[int] = []
        self.after_step = after_step

    def submit(self, request: Request, media: EncodedMedia) -> SimpleNamespace:
        self.queues.append(OutputQueue())
        self.left[len(self.queues) - 1] = LENGTH
        return SimpleNamespace(queue=self.queues[-1])

    def step(self) -> bool:
        self.sizes.append(len(self.left))
        for at in list(self.left):
            self.left[at] -= 1
            if not self.left[at]:
                del self.left[at]
                self.queues[at].end()
        self.after_step(len(self.sizes))
        return True

    def abort(self, submitted: SimpleNamespace) -> None:
        raise AssertionError("nothing has to be aborted")


def run(loop: CountingLoop, encode: Callable[[object], object], count: int, full: int) -> dict[int, list[Event]]:
    return dict(generate_batch(iter(range(count)), encode, loop, full=full))


def slowly(_request: object) -> EncodedMedia:
    time.sleep(0.01)
    return EncodedMedia()


@pytest.mark.parametrize(("count", "full"), [(6, 6), (6, 64), (12, 4)])
def test_engine_waits_for_full_batches_while_pictures_are_encoded(count, full):
    loop = CountingLoop()
    assert sorted(run(loop, slowly, count, full)) == list(range(count))
    assert sum(loop.sizes) == count * LENGTH
    assert loop.sizes[0] == min(count, full)
    assert len(loop.sizes) <= -(-count // full) * LENGTH + full


def test_engine_goes_on_without_a_request_that_takes_much_longer_than_the_others():
    others_have_ended = threading.Event()

    def encode(request: object) -> EncodedMedia:
        if request == 3:
            assert others_have_ended.wait(30), "the engine waited for the slow request"
        return EncodedMedia()

    def after_step(_steps: int) -> None:
        if len(loop.queues) == 3 and not loop.left:
            others_have_ended.set()

    loop = CountingLoop(after_step)
    assert sorted(run(loop, encode, 4, 8)) == [0, 1, 2, 3]


def test_error_of_a_request_is_its_result():
    def encode(request: object) -> EncodedMedia:
        if request == 1:
            raise InvalidRequest("no", "prompt")
        return EncodedMedia()

    outcomes = run(CountingLoop(), encode, 3, 2)
    assert isinstance(outcomes[1], InvalidRequest)
    assert outcomes[0] == outcomes[2] == []
