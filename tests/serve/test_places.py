"""Places of an engine: priority, order, weights, and whoever leaves while waiting."""

from __future__ import annotations

import asyncio
import random

import pytest

from serve.places import Places


class Guest:
    def __init__(self, places: Places, name: str, log: list[str], num_sequences: int = 1, priority: int = 0) -> None:
        self.is_inside, self.may_go = False, asyncio.Event()
        self._places, self._name, self._log = places, name, log
        self.num_sequences, self._priority = num_sequences, priority
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with self._places.taken(self.num_sequences, self._priority):
            self._log.append(self._name)
            self.is_inside = True
            await self.may_go.wait()
        self.is_inside = False

    async def leave(self) -> None:
        self.may_go.set()
        await self.task


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_lower_priority_is_first_and_then_arrival():
    places, log = Places(1), list[str]()
    first = Guest(places, "first", log)
    await settled()
    guests = [Guest(places, name, log, priority=p) for name, p in (("b", 5), ("c", 5), ("a", -1), ("d", 5))]
    await settled()
    assert log == ["first"]
    for guest in (first, guests[2], guests[0], guests[1], guests[3]):
        await guest.leave()
        await settled()
    assert log == ["first", "a", "b", "c", "d"]


async def test_a_large_request_waits_for_as_many_places_and_nobody_overtakes_it():
    places, log = Places(3), list[str]()
    small = [Guest(places, f"s{i}", log) for i in range(2)]
    await settled()
    large, late = Guest(places, "large", log, num_sequences=3), Guest(places, "late", log)
    await settled()
    assert log == ["s0", "s1"]
    await small[0].leave()
    assert log == ["s0", "s1"]
    await small[1].leave()
    await settled()
    assert log == ["s0", "s1", "large"]
    await large.leave()
    await settled()
    assert late.is_inside
    await late.leave()


async def test_more_than_there_are_takes_all():
    places, log = Places(2), list[str]()
    await Guest(places, "huge", log, num_sequences=9).leave()
    assert log == ["huge"]


async def test_one_that_stops_waiting_lets_those_behind_it_in():
    places, log = Places(2), list[str]()
    inside = Guest(places, "inside", log)
    await settled()
    large, behind = Guest(places, "large", log, num_sequences=2), Guest(places, "behind", log)
    await settled()
    assert not behind.is_inside
    large.task.cancel()
    await settled()
    assert behind.is_inside
    await inside.leave()
    await behind.leave()


@pytest.mark.parametrize("seed", range(20))
async def test_never_too_many_inside_and_no_place_is_lost(seed: int):
    """Guests come, go and give up at random moments, also in the very step in which they get their place."""
    rng, places, log, guests = random.Random(seed), Places(4), list[str](), list[Guest]()
    for i in range(300):
        action = rng.random()
        if action < 0.45:
            guests.append(Guest(places, str(i), log, rng.randint(1, 3), rng.choice((0, 0, 7))))
        elif guests and action < 0.75:
            guests.pop(rng.randrange(len(guests))).task.cancel()
        elif guests:
            guests.pop(rng.randrange(len(guests))).may_go.set()
        if rng.random() < 0.7:
            await asyncio.sleep(0)
        assert sum(guest.num_sequences for guest in guests if guest.is_inside) <= 4
    for guest in guests:
        guest.task.cancel()
    await settled()
    last = [Guest(places, "last", log) for _ in range(4)]
    await settled()
    assert all(guest.is_inside for guest in last)
    for guest in last:
        await guest.leave()
