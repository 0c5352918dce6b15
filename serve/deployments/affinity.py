"""Which replica should take a request, by what it holds and what waits there. Pure: it knows neither Ray nor HTTP.

Encoders: consistent hashing on the hash of the first media item, with bounded loads (Mirrokni, Thorup, Zadimoghaddam,
arXiv:1608.01350). An item has a home on the ring, whose feature cache then holds it. A request goes there unless that
encoder would have more than `BOUND` times the mean load, or `MOST_OVER_MEAN` times the mean number of requests, and
more than `SLACK` of them; then it goes to the next one on the ring that would not. Load counts pictures and frames that
wait; one that the encoder has answered for before counts `HIT_SHARE`.

Decoders: the one with the lowest score goes first. The score counts tokens that have to be computed before the first
token of the answer:

    score = waiting prompt tokens + IN_FLIGHT_TOKENS * requests under way - tokens of this prompt that it holds

Those whose cache is full, or in which requests wait, come after those with room. What is held is what the replica said
that it holds: the hashes of beginnings of prompts, with their numbers of tokens.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mm.data.media import Kind
from mm.media.hashing import framed_hash
from serve.routing_stats import RoutingStats

if TYPE_CHECKING:  # it imports torch, which `mm plan` does without
    from mm.data.request import Request

BOUND = 1.5
"""Load of an encoder over the mean load from which on requests spill over."""
MOST_OVER_MEAN = 2.0
"""Requests at an encoder over the mean number, likewise: many that are cached are little load, but a long queue."""
SLACK = 3.0
"""Load, and requests, that any encoder may have: while little waits, a home is worth more than an empty queue."""
NUM_POINTS = 100
"""Points of each replica on the ring."""
HIT_SHARE = 0.05
"""Load of an item that is cached, over that of one that is not."""
MAX_KNOWN = 8192
IN_FLIGHT_TOKENS = 16
FULL = 0.95
CLIP_COST = 8.0
"""Load of a clip whose number of frames nobody gave; a picture is 1."""


@dataclass
class Ticket:
    """A request that was given to a replica: its load stays there until it is done."""

    replica: str
    load: float


class Balancer:
    """The replicas of one deployment as one ingress sees them.

    `update` may be called from any thread, everything else on the event loop.
    """

    def __init__(self) -> None:
        self.stats = RoutingStats()
        self._published: dict[str, Mapping[str, Any]] = {}
        self._loads: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._answered: dict[str, dict[str, None]] = {}
        self._ring: list[tuple[int, str]] = []

    def update(self, published: Mapping[str, Mapping[str, Any]]) -> None:
        """Take note of the replicas that run, and of what each of them says of itself."""
        if published.keys() != self._published.keys():
            self._ring = sorted((_point(f"{name}:{i}"), name) for name in published for i in range(NUM_POINTS))
        self._published = dict(published)
        self._answered = {name: known for name, known in self._answered.items() if name in published}

    @property
    def names(self) -> list[str]:
        """The replicas that run."""
        return list(self._published)

    def load(self, name: str) -> float:
        """What this ingress gave the replica and is not done, or what the replica says, if others gave it more."""
        said = float(self._published.get(name, {}).get("load", 0.0))
        return max(self._loads.get(name, 0.0), said)

    def load_at(self, name: str, key: str, load: float) -> float:
        """What a request costs an encoder: little where it has answered for this item before."""
        return load * HIT_SHARE if key in self._answered.get(name, ()) else load

    def learn(self, name: str, key: str) -> None:
        """An encoder has answered for an item, so its cache has it; if it has lost it since, it will have it again."""
        known = self._answered.setdefault(name, {})
        known.pop(key, None)
        known[key] = None
        if len(known) > MAX_KNOWN:
            del known[next(iter(known))]

    def take(self, replica: str, load: float) -> Ticket:
        """Count a request's load until `done`."""
        ticket = Ticket(replica, load)
        self._add(ticket, 1)
        return ticket

    def move(self, ticket: Ticket, replica: str) -> None:
        """The request went to another replica than it was meant for."""
        self._add(ticket, -1)
        ticket.replica = replica
        self._add(ticket, 1)

    @contextlib.contextmanager
    def given(self, order: Sequence[str], load: float) -> Generator[Ticket | None]:
        """Count a request's load while the context lasts: at the first of `order`, and then where it went.

        Gives a ticket for `move`; None where no replica is known.
        """
        if not order:
            yield None
            return
        ticket = self.take(order[0], load)
        try:
            yield ticket
        finally:
            self.done(ticket)

    def done(self, ticket: Ticket) -> None:
        self._add(ticket, -1)

    def _add(self, ticket: Ticket, sign: int) -> None:
        name = ticket.replica
        self._counts[name] = self._counts.get(name, 0) + sign
        self._loads[name] = self._loads.get(name, 0.0) + sign * ticket.load
        if not self._counts[name]:
            del self._counts[name], self._loads[name]  # sums of shares are not exact

    def encoders(self, key: str, load: float) -> list[str]:
        """All encoders, best first, for a request whose first media item has this hash."""
        order = self.around(key)
        if not order:
            return []
        loads = {name: self.load(name) for name in order}
        bound = max(BOUND * (sum(loads.values()) + load) / len(order), SLACK, load)
        longest = max(MOST_OVER_MEAN * (sum(self._counts.values()) + 1) / len(order), SLACK)
        fitting = [
            name
            for name in order
            if loads[name] + self.load_at(name, key, load) <= bound and self._counts.get(name, 0) + 1 <= longest
        ]
        rest = sorted((name for name in order if name not in fitting), key=loads.__getitem__)
        chosen = (fitting or rest)[0]
        self._count(chosen == order[0], chosen != order[0], loads[chosen] > min(loads.values()))
        return fitting + rest

    def beginning_with(self, name: str, key: str) -> list[str]:
        """All encoders for items that one of them was chosen for, that one first, then in the order of the ring."""
        order = self.around(key)
        if not order:
            return []
        self._count(name == order[0], name != order[0], self.load(name) > min(map(self.load, order)))
        return [name, *(other for other in order if other != name)]

    def decoders(self, keys: Sequence[str]) -> list[str]:
        """All decoders, best first, for a prompt that begins with what these hashes stand for.

        Args:
            keys: See `beginnings`.
        """
        if not self._published:
            return []
        held = {name: _held(said, keys) for name, said in self._published.items()}
        wait = {
            name: said.get("num_waiting_tokens", 0) + IN_FLIGHT_TOKENS * self.load(name)
            for name, said in self._published.items()
        }
        full = {name: is_full(said) for name, said in self._published.items()}
        ties = {name: _point(f"{keys[:1]}{name}") for name in self._published}

        order = sorted(held, key=lambda name: (full[name], wait[name] - held[name], ties[name]))
        by_load = min(held, key=lambda name: (full[name], wait[name], ties[name]))
        self._count(held[order[0]] > 0, False, order[0] != by_load)
        return order

    def around(self, key: str) -> list[str]:
        """The replicas in the order in which they follow a key on the ring."""
        at, num = bisect.bisect(self._ring, (_point(key), "")), len(self._ring)
        order: dict[str, None] = {}
        for i in range(at, at + num):
            order[self._ring[i % num][1]] = None
            if len(order) == len(self._published):
                break
        return list(order)

    def _count(self, is_hit: bool, is_spill: bool, is_changed: bool) -> None:
        self.stats.num_decisions += 1
        self.stats.num_hits += is_hit
        self.stats.num_spills += is_spill
        self.stats.num_changed += is_changed


def is_full(said: Mapping[str, Any]) -> bool:
    """Whether a new request would have to wait at a decoder; one that has not said anything yet is not full."""
    return said.get("num_waiting", 0) > 0 or said.get("kv_usage", 0.0) > FULL


def _held(said: Mapping[str, Any], keys: Sequence[str]) -> int:
    """Tokens of the longest beginning that a decoder says it holds."""
    holds: Mapping[str, int] = said.get("holds", {})
    return max((holds.get(key, 0) for key in keys), default=0)


def _point(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def media_keys(request: Request) -> tuple[str, ...]:
    """The hash of every media item as it was sent, made once, at the ingress. Large files take tens of milliseconds."""
    return tuple(_media_key(item.kind, getattr(item, "source", None), request) for item in request.media)


def media_loads(request: Request) -> list[float]:
    """What each media item of a request costs an encoder: 1 for a picture, and for a clip its number of frames."""
    frames = request.vision.frames
    clip = float(frames.num_frames) if frames is not None and frames.num_frames else CLIP_COST
    return [clip if item.kind == "video" else 1.0 for item in request.media]


def media_load(request: Request) -> float:
    """What all of them cost."""
    return sum(media_loads(request))


def _media_key(kind: Kind, source: object, request: Request) -> str:
    """Two tenants never share what is cached, so they need not share a home either."""
    sent = source if isinstance(source, str | bytes) else repr(type(source))
    return framed_hash("sent", kind, request.cache_salt, sent)[:32]


@dataclass(frozen=True)
class Beginnings:
    """Hashes of the beginnings of a request's prompt.

    Attributes:
        wanted: After each media item and after each message: what a decoder may hold.
        kept: After each media item, and of the whole prompt: what a decoder holds when it has computed it.
    """

    wanted: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def beginnings(request: Request, media: Sequence[str], reducer: str) -> Beginnings:
    """Hashes of the beginnings of a request's prompt.

    Args:
        media: The hash of each media item.
        reducer: Canonical text; what it keeps is part of the prompt.
    """
    from mm.data.request import MediaPart

    digest = hashlib.blake2b(f"{request.cache_salt}|{reducer}|{request.vision}".encode(), digest_size=16)
    wanted, kept = list[str](), list[str]()
    for message in request.messages:
        digest.update(f"|{message.role}:".encode())
        for part in message.parts:
            if isinstance(part, MediaPart):
                digest.update(f"|{media[part.index]}".encode())
                kept.append(digest.hexdigest())
                wanted.append(kept[-1])
            else:
                digest.update(f"|{part!r}".encode())
        wanted.append(digest.hexdigest())
    return Beginnings(tuple(dict.fromkeys(wanted)), (*kept, digest.hexdigest()))


ORDER = "mm:"
"""What the session id of a call begins with that says which replicas should take it."""
MAX_ORDER = 16


def named(order: Sequence[str]) -> str:
    """The session id of a call that should go to the first of these replicas that takes it."""
    return ORDER + ",".join(order[:MAX_ORDER])


def order_of(session_id: str) -> list[str]:
    """The replicas that a call should go to, best first."""
    return session_id.removeprefix(ORDER).split(",") if session_id.startswith(ORDER) else []


BALANCERS: dict[str, Balancer] = {}
"""By the name of the deployment. Only an ingress has entries."""
