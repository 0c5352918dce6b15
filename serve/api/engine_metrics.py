"""The statistics of all decoders in Prometheus form, summed.

Every engine counts from its start. When an engine is replaced, its last known counts stay in the sums and those of the
new one are added, so that no sum ever falls. What an engine counted after it was last read is lost with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mm.engine.stats import EngineStats, Histogram
from serve.routing_stats import RoutingStats
from serve.runtime import DecoderLoad, TransferStats

Figure = Callable[[EngineStats], float]

GAUGES: tuple[tuple[str, str, Figure], ...] = (
    ("mm:num_tokens_waiting", "Tokens of waiting sequences that are not computed yet.", lambda s: s.num_waiting_tokens),
    ("mm:kv_cache_used_bytes", "KV blocks that requests hold.", lambda s: s.kv_used_bytes - s.kv_idle_bytes),
    ("mm:kv_cache_prefix_bytes", "KV blocks that the prefix cache holds.", lambda s: s.kv_prefix_bytes),
    ("mm:kv_cache_total_bytes", "Size of the KV caches.", lambda s: s.kv_total_bytes),
    ("mm:kv_transfers_unconfirmed", "Prompts that decoders have not taken over yet.", lambda s: s.num_parked),
)
COUNTERS: tuple[tuple[str, str, Figure], ...] = (
    ("vllm:num_preemptions", "Answers that gave up their KV blocks for a while.", lambda s: s.num_preemptions),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda s: s.prefix_queries),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda s: s.prefix_hits),
    ("mm:engine_steps", "Passes through a decoder.", lambda s: s.num_steps),
    ("mm:engine_step_seconds", "Seconds in steps.", lambda s: s.step_s),
    ("mm:engine_model_seconds", "Seconds in the model's part of steps.", lambda s: s.model_s),
    ("mm:kv_transfer_requests", "Requests that prefill replicas handed over.", lambda s: s.num_handed_over),
    ("mm:kv_sent_bytes", "Keys, values and states that prefill replicas sent.", lambda s: s.kv_sent_bytes),
    ("mm:kv_received_bytes", "Keys, values and states that decoders took over.", lambda s: s.kv_received_bytes),
    ("mm:kv_saved_bytes", "What more would have been sent without reducers.", lambda s: s.kv_saved_bytes),
    ("vllm:spec_decode_num_drafts", "Drafts verified.", lambda s: s.spec_decode.num_drafts),
    ("vllm:spec_decode_num_draft_tokens", "Drafted tokens verified.", lambda s: s.spec_decode.num_draft_tokens),
    ("vllm:spec_decode_num_accepted_tokens", "Drafted tokens accepted.", lambda s: s.spec_decode.num_accepted_tokens),
    ("mm:spec_decode_target_steps", "Times a step gave a sequence tokens.", lambda s: s.spec_decode.num_target_steps),
    ("mm:spec_decode_emitted_tokens", "Tokens of these.", lambda s: s.spec_decode.num_emitted_tokens),
    ("mm:spec_decode_faults", "Calls of a drafter that failed.", lambda s: s.spec_decode.num_faults),
    ("mm:spec_decode_draft_seconds", "Seconds in drafters.", lambda s: s.spec_decode.draft_s),
    ("mm:spec_decode_verify_seconds", "Seconds in steps with drafts.", lambda s: s.spec_decode.verify_s),
)
ROUTING: tuple[tuple[str, str, Callable[[RoutingStats], float]], ...] = (
    ("mm:routing_decisions", "Calls of this ingress that were routed by content.", lambda s: s.num_decisions),
    ("mm:routing_hits", "Those to the home of their media, or to a decoder that held some.", lambda s: s.num_hits),
    ("mm:routing_spillovers", "Those that a long queue kept from the home of their media.", lambda s: s.num_spills),
    ("mm:routing_changed", "Those that would have gone elsewhere by load alone.", lambda s: s.num_changed),
    ("mm:routing_shared", "Requests whose media were shared out to several encoders.", lambda s: s.num_shared),
)
HISTOGRAMS: tuple[tuple[str, str, Callable[[EngineStats], Histogram]], ...] = (
    ("vllm:iteration_tokens_total", "Tokens of a step, those of prompts included.", lambda s: s.step_tokens),
    ("vllm:inter_token_latency_seconds", "Between two tokens of an answer.", lambda s: s.inter_token_s),
)


class EngineMetrics(Collector):
    """Gauges of the engines that answered last, counts of all that ever did."""

    def __init__(self, model: str) -> None:
        self._labels = [model]
        self._known: dict[str, EngineStats] = {}
        self._present: tuple[EngineStats, ...] = ()
        self._routing: Mapping[str, RoutingStats] = {}
        self._transfers: Mapping[str, TransferStats] = {}

    def update(self, load: DecoderLoad) -> None:
        self._present, self._routing, self._transfers = load.engines, load.routing, load.transfers
        self._known |= {stats.engine_id: stats for stats in load.engines}

    def collect(self) -> Iterator[Metric]:
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the KV caches that requests hold, 0 to 1.", self._usage)
        for name, text, figure in GAUGES:
            yield self._gauge(name, text, sum(map(figure, self._present)))
        for name, text, figure in COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric(self._labels, sum(map(figure, self._known.values())))
            yield counter
        yield self._accepted()
        yield from self._routed()
        yield from self._transferred()
        yield self._gauge(
            "mm:spec_decode_mean_acceptance_length",
            "Tokens per step with a draft, the bonus token included.",
            self._length,
        )
        for name, text, figure in HISTOGRAMS:
            histogram = HistogramMetricFamily(name, text, labels=["model_name"])
            if self._known:
                histogram.add_metric(self._labels, *_summed([figure(stats) for stats in self._known.values()]))
            yield histogram

    def _routed(self) -> Iterator[Metric]:
        for name, text, count in ROUTING:
            counter = CounterMetricFamily(name, text, labels=["model_name", "stage"])
            for stage, stats in self._routing.items():
                counter.add_metric([*self._labels, stage], count(stats))
            yield counter

    def _transferred(self) -> Iterator[Metric]:
        """By transport. Those that may be used, and no others, have a gauge."""
        labels = ["model_name", "transport"]
        gauge = GaugeMetricFamily("mm:kv_transport", "1 for each transport between prefill and decode.", labels=labels)
        counter = CounterMetricFamily("mm:kv_transfer_bytes", "What moved, as this ingress saw it.", labels=labels)
        for transport, stats in self._transfers.items():
            gauge.add_metric([*self._labels, transport], 1)
            counter.add_metric([*self._labels, transport], stats.num_bytes)
        yield from (gauge, counter)

    def _accepted(self) -> Metric:
        name = "vllm:spec_decode_num_accepted_tokens_per_pos"
        counter = CounterMetricFamily(name, "Drafted tokens accepted, by depth.", labels=["model_name", "position"])
        counts = [stats.spec_decode.num_accepted_per_position for stats in self._known.values()]
        for position, column in enumerate(itertools.zip_longest(*counts, fillvalue=0)):
            counter.add_metric([*self._labels, str(position)], sum(column))
        return counter

    @property
    def _length(self) -> float:
        drafts = sum(stats.spec_decode.num_drafts for stats in self._known.values())
        return 1 + sum(stats.spec_decode.num_accepted_tokens for stats in self._known.values()) / max(1, drafts)

    @property
    def _usage(self) -> float:
        total = sum(stats.kv_total_bytes for stats in self._present)
        return sum(stats.kv_used_bytes - stats.kv_idle_bytes for stats in self._present) / max(1, total)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(name, text, labels=["model_name"])
        gauge.add_metric(self._labels, value)
        return gauge


def _summed(histograms: Sequence[Histogram]) -> tuple[list[tuple[str, float]], float]:
    """Buckets as Prometheus counts them, each with all below it, and the sum of the values."""
    counts = [sum(column) for column in zip(*(one.counts for one in histograms), strict=True)]
    bounds = [str(float(bound)) for bound in histograms[0].bounds]
    buckets = list(zip([*bounds, "+Inf"], map(float, itertools.accumulate(counts)), strict=True))
    return buckets, sum(one.total for one in histograms)
