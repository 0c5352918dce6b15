"""Routing by content, with simulated replicas: hits, spill-over, and what is published decides."""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict, deque
from dataclasses import dataclass, field, replace

import pytest

from mm.data.media import MediaSource
from mm.data.request import MediaPart, Message, Request, TextPart
from serve.deployments.affinity import (
    IN_FLIGHT_TOKENS,
    MAX_ORDER,
    Balancer,
    Ticket,
    beginnings,
    media_keys,
    media_load,
    named,
    order_of,
)

NAMES = ("a", "b", "c", "d")


def balancer(*names: str) -> Balancer:
    made = Balancer()
    made.update({name: {} for name in names or NAMES})
    return made


@dataclass
class Encoder:
    """One server with a queue and a cache: what is in it takes a twentieth of the time."""

    capacity: int
    cache: OrderedDict[str, None] = field(default_factory=OrderedDict)
    queue: deque[tuple[str, Ticket]] = field(default_factory=deque)
    num_hits: int = 0
    is_busy: bool = False

    def seconds(self, key: str) -> float:
        is_hit = key in self.cache
        self.num_hits += is_hit
        self.cache[key] = None
        self.cache.move_to_end(key)
        if len(self.cache) > self.capacity:
            self.cache.popitem(last=False)
        return 0.05 if is_hit else 1.0


def simulate(keys: list[str], *, by_content: bool, per_s: float, capacity: int = 80) -> tuple[float, float]:
    """Requests that arrive at random at four encoders. The share of hits, and the
    longest queue to which a request was added over the mean one."""
    rng, routing = random.Random(1), balancer()
    encoders = {name: Encoder(capacity) for name in NAMES}
    events: list[tuple[float, int, str]] = []
    now, worst = 0.0, 0.0
    for i in range(len(keys)):
        now += rng.expovariate(per_s)
        heapq.heappush(events, (now, i, ""))
    while events:
        now, i, name = heapq.heappop(events)
        if name:  # this encoder is done with its first
            key, ticket = encoders[name].queue.popleft()
            routing.done(ticket)
            routing.learn(name, key)
            encoders[name].is_busy = False
        else:
            name = routing.encoders(keys[i], 1.0)[0] if by_content else rng.choice(NAMES)
            encoders[name].queue.append((keys[i], routing.take(name, routing.load_at(name, keys[i], 1.0))))
            queues = [len(one.queue) for one in encoders.values()]
            if sum(queues) >= 8:
                worst = max(worst, len(encoders[name].queue) / (sum(queues) / len(queues)))
        encoder = encoders[name]
        if encoder.queue and not encoder.is_busy:
            encoder.is_busy = True
            heapq.heappush(events, (now + encoder.seconds(encoder.queue[0][0]), i, name))
    return sum(one.num_hits for one in encoders.values()) / len(keys), worst


def repeated(num_media: int = 200, per_new: int = 5) -> list[str]:
    """Four of five requests repeat a medium that was there before."""
    rng, keys = random.Random(2), list[str]()
    for i in range(num_media):
        keys.append(f"{i}")
        keys += [f"{rng.randrange(i + 1)}" for _ in range(per_new - 1)]
    return keys


@pytest.mark.parametrize("per_s", [3.0, 6.0])
def test_repeated_media_hit_as_if_there_were_one_encoder(per_s):
    keys = repeated()
    ideal = 1 - len(set(keys)) / len(keys)
    by_content, _ = simulate(keys, by_content=True, per_s=per_s)
    at_random, _ = simulate(keys, by_content=False, per_s=per_s)
    assert ideal == pytest.approx(0.8)
    assert by_content >= 0.9 * ideal
    assert at_random < 0.75 * ideal


@pytest.mark.parametrize("per_s", [3.0, 6.0, 60.0])
def test_a_hot_item_fills_no_queue_beyond_twice_the_mean(per_s):
    rng = random.Random(3)
    keys = ["hot" if rng.random() < 0.6 else f"{rng.randrange(200)}" for _ in range(1500)]
    _, worst = simulate(keys, by_content=True, per_s=per_s)
    assert worst <= 2.0 + 1e-9


def test_a_burst_of_one_item_is_spread_and_counted():
    routing = balancer()
    taken = [routing.take(routing.encoders("hot", 1.0)[0], 1.0) for _ in range(64)]
    loads = sorted(routing.load(name) for name in NAMES)
    assert sum(loads) == 64
    assert loads[-1] <= 1.5 * 16 + 1
    stats = routing.stats
    assert stats.num_decisions == stats.num_hits + stats.num_spills == 64
    assert stats.num_spills >= 64 - 25
    for ticket in taken:
        routing.done(ticket)
    assert [routing.load(name) for name in NAMES] == [0.0] * 4


def test_a_replica_that_leaves_moves_its_own_items_only():
    before, after = balancer(), balancer("a", "b", "c")
    keys = [f"{i}" for i in range(400)]
    homes = {key: before.encoders(key, 1.0)[0] for key in keys}
    counts = [list(homes.values()).count(name) for name in NAMES]
    assert min(counts) > 50
    for key, home in homes.items():
        if home != "d":
            assert after.encoders(key, 1.0)[0] == home
    assert before.encoders("1", 1.0) == balancer(*reversed(NAMES)).encoders("1", 1.0)  # another ingress agrees


def test_load_that_others_gave_is_seen_too():
    routing = balancer()
    home = routing.encoders("x", 1.0)[0]
    routing.update({name: {"load": 20.0 if name == home else 1.0} for name in NAMES})
    assert routing.encoders("x", 1.0)[0] != home
    assert routing.stats.num_spills == 1


def test_a_call_that_went_elsewhere_counts_there():
    routing = balancer()
    with routing.given(["a", "b"], 2.0) as ticket:
        assert ticket is not None
        routing.move(ticket, "b")
        assert (routing.load("a"), routing.load("b")) == (0.0, 2.0)
    assert routing.load("b") == 0.0


def test_a_decoder_that_holds_the_beginning_comes_first_until_others_are_sooner():
    routing = Balancer()
    plain = {"num_waiting": 0, "num_waiting_tokens": 0, "kv_usage": 0.1}
    routing.update({"a": plain, "b": plain | {"holds": {"k1": 300, "k2": 500}}, "c": plain | {"holds": {"k1": 300}}})
    assert routing.decoders(["k1", "k2"]) == ["b", "c", "a"]
    assert routing.stats.num_hits == 1
    for _ in range(200 // IN_FLIGHT_TOKENS + 1):
        routing.take("b", 1.0)
    assert routing.decoders(["k1", "k2"])[0] == "c"
    full = {"holds": {"k1": 300}, "num_waiting": 1}
    routing.update({"a": plain, "b": plain, "c": plain | full})
    assert routing.decoders(["k1"])[0] == "a"
    assert routing.decoders(["k1"])[-1] == "c"
    assert Balancer().decoders(["k1"]) == []


def test_prefixes_go_to_the_decoder_that_has_them():
    """Conversations of several turns over three decoders: every later turn finds the one before."""
    rng, routing = random.Random(4), Balancer()
    holds: dict[str, dict[str, int]] = {name: {} for name in ("a", "b", "c")}
    hits = 0
    turns = [(conversation, turn) for turn in range(5) for conversation in range(40)]
    for conversation, turn in turns:
        routing.update({name: {"holds": held} for name, held in holds.items()})
        wanted = [f"{conversation}/{i}" for i in range(turn + 1)]
        name = routing.decoders(wanted)[0]
        hits += turn > 0 and f"{conversation}/{turn - 1}" in holds[name]
        holds[name][f"{conversation}/{turn}"] = 100 * (turn + 1) + rng.randrange(50)
    assert hits >= 0.9 * 40 * 4
    assert min(map(len, holds.values())) > 20  # new conversations are spread


def asked(*messages: Message, num_media: int = 1, **fields) -> Request:
    media = tuple(MediaSource(kind="image", source=f"picture {i}".encode()) for i in range(num_media))
    return Request(request_id="r", messages=messages, media=media, **fields)


def said(role: str, *parts: MediaPart | TextPart) -> Message:
    return Message(role=role, parts=parts)  # type: ignore[arg-type]


PICTURE, WHAT = MediaPart(index=0, kind="image"), TextPart(text="What is it?")


def test_the_next_turn_begins_with_what_the_one_before_left():
    first = asked(said("user", PICTURE, WHAT))
    keys = media_keys(first)
    kept = beginnings(first, keys, "none").kept
    assert len(kept) == 2
    second = asked(*first.messages, said("assistant", TextPart(text="A dog.")), said("user", TextPart(text="And?")))
    assert set(kept) <= set(beginnings(second, keys, "none").wanted)
    other_question = asked(said("user", PICTURE, TextPart(text="Why?")))
    shared = set(beginnings(other_question, keys, "none").wanted) & set(kept)
    assert shared == {kept[0]}  # the picture alone


@pytest.mark.parametrize("change", ["tenant", "reducer", "picture", "role"])
def test_what_differs_shares_no_beginning(change):
    first = asked(said("user", PICTURE, WHAT))
    kept = beginnings(first, media_keys(first), "none").kept
    other = asked(said("system" if change == "role" else "user", PICTURE, WHAT))
    other = replace(other, cache_salt="t") if change == "tenant" else other
    keys = ("other",) if change == "picture" else media_keys(first)
    reducer = "divprune:keep_ratio=0.5" if change == "reducer" else "none"
    assert not set(kept) & set(beginnings(other, keys, reducer).wanted)


def test_keys_and_loads_follow_from_what_was_sent():
    two = asked(said("user", PICTURE, MediaPart(index=1, kind="image")), num_media=2)
    assert len(set(media_keys(two))) == 2
    assert media_keys(two) == media_keys(replace(two, request_id="s"))
    assert set(media_keys(two)).isdisjoint(media_keys(replace(two, cache_salt="t")))
    clip = replace(two, media=(MediaSource(kind="video", source=b"a"),))
    assert (media_load(two), media_load(clip)) == (2.0, 8.0)


def test_a_call_names_its_replicas():
    names = [f"{i}" for i in range(40)]
    assert order_of(named(names)) == names[:MAX_ORDER]
    assert order_of("a client's own session") == []
