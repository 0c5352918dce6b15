"""Engines to be driven step by step, and what comes out of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mm.data.outputs import Delta, Event, Summary
from mm.data.request import Request
from mm.data.tokens import Encoded, EncodedMedia
from mm.engine.engine import LLMEngine
from mm.engine.scheduler import SchedulerConfig
from mm.engine.sequence import EngineRequest
from mm.plugins.cache_view import CacheView
from mm.plugins.reducer import Reducer, Stage
from mm.plugins.spec import build_reducer


class Recorder:
    """A sink that keeps everything and checks the order: deltas, a summary last, the end once."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.error: BaseException | None = None
        self.num_ends = 0

    def put(self, event: Event) -> None:
        assert not self.num_ends, "an event came after the end"
        assert self.summary is None, "an event came after the summary"
        self.events.append(event)

    def end(self, error: BaseException | None = None) -> None:
        self.num_ends += 1
        self.error = error

    @property
    def deltas(self) -> list[Delta]:
        return [event for event in self.events if isinstance(event, Delta)]

    @property
    def summary(self) -> Summary | None:
        last = self.events[-1] if self.events else None
        return last if isinstance(last, Summary) else None

    def token_ids(self) -> dict[int, list[int]]:
        """By choice."""
        found: dict[int, list[int]] = {}
        for delta in self.deltas:
            found.setdefault(delta.choice, []).extend(delta.token_ids)
        return found


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request whose media are encoded, and the reducer that acts inside the decoder on the way."""

    request: Request
    encoded: Sequence[Encoded] = ()
    reducer: Reducer = field(default_factory=lambda: build_reducer("none"))

    def put_to(self, engine: LLMEngine) -> tuple[EngineRequest, Recorder]:
        sink = Recorder()
        media = EncodedMedia(items=tuple(self.encoded), reducer="as tested")
        return engine.submit(self.request, media, sink, self.reducer), sink


def build(family: Any, *, num_rows: int = 4096, sharing: bool = True, **limits: Any) -> LLMEngine:
    """An engine whose cache holds `num_rows` rows in every layer."""
    shape = family.language.kv_cache_spec
    kv_bytes = shape.num_blocks(num_rows) * shape.num_layers * shape.block_bytes
    return LLMEngine(family, config=SchedulerConfig(**limits), kv_bytes=kv_bytes, prefix_caching=sharing)


def run_until(engine: LLMEngine, done: Callable[[], bool], most_steps: int = 20_000) -> int:
    """Step until `done()`; how many steps that took."""
    for i in range(most_steps):
        if done():
            return i
        engine.step()
    raise AssertionError(f"not done after {most_steps} steps: {engine.stats}")


def answer_alone(engine: LLMEngine, question: Question) -> dict[int, list[int]]:
    """Token ids by choice of a question that has the engine to itself."""
    _, sink = question.put_to(engine)
    run_until(engine, lambda: bool(sink.num_ends))
    if sink.error is not None:
        raise sink.error
    return sink.token_ids()


def assert_idle(engine: LLMEngine) -> None:
    """Nothing is held but by the prefix cache, and what that holds adds up."""
    assert not engine.has_work
    stats = engine.stats
    assert (stats.num_running, stats.num_waiting, stats.num_waiting_tokens) == (0, 0, 0)
    assert engine.cache.num_free_seqs == engine.config.max_num_seqs
    engine.cache.check(engine.prefix_cache.held)
    assert stats.kv_used_bytes == stats.kv_idle_bytes
    assert stats.kv_usage == 0
    engine.prefix_cache.clear()
    engine.cache.check()
    assert engine.cache.num_used_bytes == 0


class KeepEverySecond:
    """Evicts every second visual row of the layers from `layer` on, once the prompt is in."""

    acts_at, needs, query_aware, count = (Stage.IN_DECODE,), frozenset(), False, "fixed"

    def __init__(self, layer: int = 1) -> None:
        self._layer = layer

    def prefill_done(self, view: CacheView) -> Mapping[int, torch.Tensor]:
        kept = {}
        for layer in range(self._layer, len(view.lengths)):
            stays = torch.ones(view.lengths[layer], dtype=torch.bool)
            stays[view.visual[layer][1::2]] = False
            kept[layer] = stays.nonzero().squeeze(1)
        return kept
