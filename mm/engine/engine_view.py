"""What the native engine says of itself: its figures, and what others ask of an engine in `mm.engine.interface`."""

from __future__ import annotations

from dataclasses import replace

from mm.data.request import TextLimits
from mm.engine.engine_stats import collect_stats
from mm.engine.interface import NATIVE, EngineCapabilities
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.kv_cache.prefix_cache import PrefixCache
from mm.engine.lifecycle import RequestLifecycle
from mm.engine.scheduler import Scheduler
from mm.engine.spec_decode.proposer import SpecDecoder
from mm.engine.stats import Counters, EngineStats
from mm.engine.tensor_parallel.gang import Gang
from mm.models.family import CheckpointFamily


class EngineView:
    """The part of `LLMEngine` that only reads."""

    engine_id: str
    family: CheckpointFamily
    cache: KVCache
    prefix_cache: PrefixCache
    spec_decoder: SpecDecoder
    _counters: Counters
    _scheduler: Scheduler
    _lifecycle: RequestLifecycle
    _gang: Gang | None

    @property
    def capabilities(self) -> EngineCapabilities:
        """What this engine can do. Members of a gang keep the keys and values of their heads to themselves."""
        return NATIVE if self._gang is None else replace(NATIVE, hands_over=False)

    @property
    def problems(self) -> tuple[str, ...]:
        """A fault of a step ends its requests, and the engine goes on. Without a member of its gang it cannot."""
        return () if self._gang is None or not self._gang.failure else (self._gang.failure,)

    @property
    def text_limits(self) -> TextLimits:
        """How long the text of a conversation may be."""
        return self.family.text_limits

    @property
    def held_prefixes(self) -> dict[str, int]:
        """Tokens of the beginnings of prompts that the prefix cache holds, by their senders' names for them."""
        return self.prefix_cache.held_names

    @property
    def prefills_ahead(self) -> bool:
        """Whether a prompt may be computed before its media are complete, for a later request to find."""
        return self.prefix_cache.enabled

    @property
    def has_work(self) -> bool:
        """Whether a request is left."""
        return self._lifecycle.has_work

    @property
    def stats(self) -> EngineStats:
        """What the engine holds now and has done so far. May be read from any thread."""
        parts = (self._counters, self._scheduler, self.cache, self.prefix_cache, self.spec_decoder.stats)
        return collect_stats(self.engine_id, *parts, num_arrivals=self._lifecycle.num_arrivals)
