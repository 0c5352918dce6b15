"""Reads an engine's parts into one `EngineStats`."""

from __future__ import annotations

from mm.engine.kv_cache.blocks import KVCache
from mm.engine.kv_cache.prefix_cache import PrefixCache
from mm.engine.scheduler import Scheduler
from mm.engine.spec_decode.metrics import SpecDecodeStats
from mm.engine.stats import Counters, EngineStats


def collect_stats(
    engine_id: str,
    counters: Counters,
    scheduler: Scheduler,
    cache: KVCache,
    prefix_cache: PrefixCache,
    spec_decode: SpecDecodeStats,
    *,
    num_arrivals: int,
) -> EngineStats:
    """A copy of what an engine holds and has counted. May be called from any thread.

    Args:
        num_arrivals: Requests that are not in the scheduler's queue yet.
    """
    return EngineStats(
        engine_id=engine_id,
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting) + num_arrivals,
        num_waiting_tokens=sum(seq.num_uncomputed_tokens for seq in list(scheduler.waiting)),
        kv_used_bytes=cache.num_used_bytes,
        kv_total_bytes=cache.num_blocks * cache.shape.block_bytes,
        kv_prefix_bytes=prefix_cache.num_bytes,
        kv_idle_bytes=prefix_cache.num_idle_bytes,
        num_preemptions=scheduler.num_preemptions,
        prefix_queries=prefix_cache.num_queries,
        prefix_hits=prefix_cache.num_hits,
        num_steps=counters.num_steps,
        num_scheduled_tokens=counters.num_scheduled_tokens,
        step_s=counters.step_s,
        model_s=counters.model_s,
        step_tokens=counters.step_tokens.copy(),
        inter_token_s=counters.inter_token_s.copy(),
        num_parked=len(scheduler.parked),
        num_handed_over=counters.num_handed_over,
        num_received=counters.num_received,
        kv_sent_bytes=counters.kv_sent_bytes,
        kv_received_bytes=counters.kv_received_bytes,
        kv_saved_bytes=counters.kv_saved_bytes,
        spec_decode=spec_decode.copy(),
    )
