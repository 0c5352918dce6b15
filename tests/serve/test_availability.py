"""How long calls wait for a stage that has no replica: new ones briefly, those that were begun until it recovers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serve.deployments import availability
from serve.deployments.availability import CURRENT_CALL, Pulse, Stage
from serve.runtime import StageMissing

NEW_S = 0.05


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch):
    monkeypatch.setattr(availability, "NEW_WAIT_S", NEW_S)


async def stage(num_replicas: int) -> Stage:
    made = Stage("encoder")
    await tell(made, num_replicas)
    return made


async def tell(made: Stage, num_replicas: int) -> None:
    made.report(num_replicas)
    await asyncio.sleep(0)


class Replica:
    """A call that ends when the test says so, with a flag for its cancellation."""

    def __init__(self) -> None:
        self.was_cancelled = False
        self.result: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def call(self, *, accept: bool = False) -> str:
        try:
            if accept:
                CURRENT_CALL.get().is_accepted = True
            return await self.result
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise


async def test_a_call_to_a_stage_with_replicas_gives_its_result_or_its_error():
    made, replica = await stage(1), Replica()
    replica.result.set_result("answer")
    assert await made.through(replica.call(), is_new=True) == "answer"
    failing = Replica()
    failing.result.set_exception(ValueError("its own"))
    with pytest.raises(ValueError, match="its own"):
        await made.through(failing.call(), is_new=True)


async def test_a_new_call_is_refused_where_nobody_is():
    made, replica = await stage(0), Replica()
    with pytest.raises(StageMissing, match=r"no encoder is running.*try again in \d+ s") as refused:
        await made.through(replica.call(), is_new=True)
    assert refused.value.retry_after_s >= 1
    assert replica.was_cancelled
    with pytest.raises(StageMissing):
        await made.wait_until_present(NEW_S)


async def test_a_new_call_that_came_just_before_the_loss_was_known_is_refused_too():
    made, replica = await stage(1), Replica()
    waiting = asyncio.ensure_future(made.through(replica.call(), is_new=True))
    await asyncio.sleep(0)
    await tell(made, 0)
    with pytest.raises(StageMissing):
        await waiting


@pytest.mark.parametrize("is_new", [True, False])
async def test_a_call_that_waited_before_the_loss_goes_on_when_a_replica_is_back(is_new):
    made, replica = await stage(1), Replica()
    waiting = asyncio.ensure_future(made.through(replica.call(), is_new=is_new))
    await asyncio.sleep(2 * NEW_S if is_new else 0)
    await tell(made, 0)
    await asyncio.sleep(2 * NEW_S)
    assert not waiting.done()
    await tell(made, 1)
    replica.result.set_result("answer")
    assert await waiting == "answer"


async def test_a_call_that_a_replica_works_on_outlives_that_replicas_place_in_the_list():
    """A replica that is scaled down is not listed any more, but finishes what it has."""
    made, replica = await stage(1), Replica()
    waiting = asyncio.ensure_future(made.through(replica.call(accept=True), is_new=True))
    await asyncio.sleep(0)
    await tell(made, 0)
    await asyncio.sleep(3 * NEW_S)
    assert not waiting.done()
    replica.result.set_result("answer")
    assert await waiting == "answer"


async def test_cancelling_cancels_the_call():
    made, replica = await stage(1), Replica()
    waiting = asyncio.ensure_future(made.through(replica.call(), is_new=True))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert replica.was_cancelled


async def test_retry_after_is_what_is_left_of_the_last_outage(monkeypatch):
    made = await stage(1)
    now = 1000.0
    monkeypatch.setattr(availability.time, "monotonic", lambda: now)

    async def refused_after(seconds: float) -> int:
        nonlocal now
        now += seconds
        with pytest.raises(StageMissing) as refused:
            await made.wait_until_present(0)
        return refused.value.retry_after_s

    await tell(made, 0)
    assert await refused_after(0) == availability.EXPECTED_OUTAGE_S
    now += 20
    await tell(made, 1)
    await tell(made, 0)
    assert [await refused_after(0), await refused_after(15), await refused_after(90)] == [20, 5, 1]


async def test_a_stage_is_silent_only_after_a_while_and_answers_about_it_at_once(monkeypatch):
    monkeypatch.setattr(availability, "PING_WAIT_S", 0.02)
    monkeypatch.setattr(availability, "PING_PERIOD_S", 0.0)
    monkeypatch.setattr(availability, "SILENT_S", 0.2)
    answers = asyncio.Event()

    async def ping() -> Any:
        await answers.wait()

    pulse = Pulse(ping)
    assert not await pulse.is_silent()
    while not await pulse.is_silent():
        await asyncio.sleep(0.01)
    answers.set()
    while await pulse.is_silent():
        await asyncio.sleep(0.01)
