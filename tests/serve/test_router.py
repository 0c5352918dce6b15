"""Which decoder is offered a request, and what decoders tell for it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from mm.errors import InvalidOption
from serve.config import ServeConfig

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


@dataclass(frozen=True)
class Replica:
    name: str
    routing_stats: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def replica_id(self) -> Any:
        return SimpleNamespace(unique_id=self.name)


FREE = Replica("free", {"kv_usage": 0.2, "num_waiting": 0, "num_waiting_tokens": 0})
NEW = Replica("new")
LINE = Replica("line", {"kv_usage": 0.2, "num_waiting": 3, "num_waiting_tokens": 900})
SHORT_LINE = Replica("short line", {"kv_usage": 0.2, "num_waiting": 1, "num_waiting_tokens": 40})
FULL_CACHE = Replica("full cache", {"kv_usage": 0.96, "num_waiting": 0, "num_waiting_tokens": 0})


def ranks(*replicas: Replica, session_id: str | None = None) -> list[set[str]]:
    from serve.deployments.router import LeastLoadedRouter

    call: Any = None if session_id is None else SimpleNamespace(metadata=SimpleNamespace(session_id=session_id))
    chosen = asyncio.run(LeastLoadedRouter.choose_replicas(None, list(replicas), call))  # type: ignore[arg-type]
    return [{replica.name for replica in rank} for rank in chosen]  # type: ignore[attr-defined]


def test_those_with_room_come_first():
    assert ranks(LINE, FREE, FULL_CACHE) == [{"free"}, {"line", "full cache"}]
    assert ranks(NEW, LINE) == [{"new"}, {"line"}]


def test_when_all_are_full_the_shortest_lines_are_offered():
    assert ranks(LINE, SHORT_LINE, FULL_CACHE) == [{"short line", "full cache"}]


def test_of_many_with_room_two_are_offered_and_each_gets_its_turn():
    many = [Replica(f"{i}", {"kv_usage": 0.1}) for i in range(5)]
    seen = [ranks(*many)[0] for _ in range(200)]
    assert all(len(rank) == 2 for rank in seen)
    assert set().union(*seen) == {f"{i}" for i in range(5)}


def test_a_call_goes_to_the_replicas_that_it_names_in_their_order():
    assert ranks(FREE, LINE, NEW, session_id="mm:line,gone,free") == [{"line"}, {"free"}, {"new"}]
    assert ranks(FREE, LINE, session_id="mm:line,free") == [{"line"}, {"free"}]
    assert ranks(FREE, LINE, session_id="of a client") == [{"free"}, {"line"}]
    assert ranks(FREE, LINE, session_id="mm:gone") == [{"free", "line"}]


def test_nobody_is_offered_where_nobody_is():
    assert ranks() == []


def test_a_full_cache_or_a_line_is_full():
    from serve.deployments.affinity import is_full

    assert [is_full(replica.routing_stats) for replica in (FREE, NEW, LINE, FULL_CACHE)] == [False, False, True, True]


def test_decoders_are_fixed_or_between_bounds():
    from serve.deployments.application import _replicas

    assert _replicas(ServeConfig(num_decoders=3)) == {"num_replicas": 3}
    bounds = _replicas(ServeConfig(num_decoders=2, max_decoders=5))["autoscaling_config"]
    assert (bounds.min_replicas, bounds.max_replicas, bounds.target_ongoing_requests) == (2, 5, 64)
    with pytest.raises(InvalidOption, match="at least num_decoders, 2"):
        ServeConfig(num_decoders=2, max_decoders=1)
