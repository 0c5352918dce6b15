"""Metrics have the names that dashboards read and the numbers of the requests."""

from __future__ import annotations

from mm.data.outputs import Summary, Timings, Usage
from mm.data.request import Request
from mm.data.sampling_params import SamplingParams
from mm.engine.stats import STEP_TOKENS, Histogram
from serve.api.metrics import Metrics
from serve.deployments.messages import TransferredMedia
from serve.runtime import DecoderLoad
from tests.helpers.scripted import stats_of

NAMES = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:mm_cache_queries_total",
    "vllm:mm_cache_hits_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:request_queue_time_seconds_bucket",
    "vllm:request_prefill_time_seconds_bucket",
    "vllm:request_decode_time_seconds_bucket",
    "vllm:request_inference_time_seconds_bucket",
    "vllm:request_params_n_bucket",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:iteration_tokens_total_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "mm:num_tokens_waiting",
    "mm:visual_tokens_in_total",
    "mm:visual_tokens_kept_total",
    "mm:stage_seconds_bucket",
    "mm:num_requests_in_flight",
)


def test_a_finished_request_shows_under_every_name() -> None:
    metrics = Metrics("tiny")
    metrics.in_flight.labels("tiny").inc()
    metrics.requested(Request(request_id="x", messages=(), sampling=SamplingParams(n=2, max_new_tokens=9)))
    metrics.encoded(TransferredMedia(reducer="none", num_items=3, num_cache_hits=1))
    usage = Usage(num_prompt_tokens=40, num_completion_tokens=11, num_image_tokens_in=100, num_image_tokens_kept=25)
    timings = Timings(load_s=0.1, encode_s=0.2, prefill_s=0.3, decode_s=1.0)
    metrics.ttft.labels("tiny").observe(0.5)
    metrics.finished(Summary(usage=usage, timings=timings, reducer="divprune:keep_ratio=0.3"), ["stop", "length"], 2.0)
    text = metrics.exposition(DecoderLoad(num_running=2, num_waiting=5, engines=(stats_of(),))).decode()
    for name in NAMES:
        assert f"\n{name}{{" in text, name

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, {"model_name": "tiny"} | labels)

    assert value("vllm:num_requests_waiting") == 5
    assert value("vllm:generation_tokens_total") == 11
    assert value("vllm:mm_cache_hits_total") == 1
    assert value("vllm:request_success_total", finished_reason="length") == 1
    assert value("mm:visual_tokens_kept_total", kind="image", reducer="divprune") == 25
    assert value("mm:stage_seconds_sum", stage="encode") == 0.2
    assert value("vllm:request_time_per_output_token_seconds_sum") == 0.1


def test_a_silent_decoder_does_not_break_the_page() -> None:
    assert b"vllm:num_requests_running" in Metrics("tiny").exposition(None)


def test_figures_of_several_engines_are_summed_and_counts_never_go_down() -> None:
    metrics = Metrics("tiny")

    def shown(*engines) -> dict[str, float | None]:
        metrics.exposition(DecoderLoad(num_running=0, num_waiting=0, engines=engines))
        names = ("vllm:num_preemptions_total", "vllm:kv_cache_usage_perc", "vllm:iteration_tokens_total_sum")
        return {name: metrics.registry.get_sample_value(name, {"model_name": "tiny"}) for name in names}

    def engine(engine_id: str, num_preemptions: int, *rows: int, used: int = 0, idle: int = 0):
        step_tokens = Histogram(STEP_TOKENS)
        for count in rows:
            step_tokens.observe(count)
        return stats_of(
            engine_id=engine_id,
            num_preemptions=num_preemptions,
            step_tokens=step_tokens,
            kv_used_bytes=used,
            kv_idle_bytes=idle,
            kv_total_bytes=100,
        )

    both = shown(engine("a", 3, 5, used=50, idle=10), engine("b", 4, 7, 8, used=20))
    assert list(both.values()) == [7, 0.3, 20]
    restarted = shown(engine("a", 3, 5), engine("c", 1, 2))
    assert list(restarted.values()) == [8, 0.0, 22]
    assert list(shown(engine("a", 5, 5, 5), engine("c", 1, 2)).values()) == [10, 0.0, 27]


def test_buckets_hold_all_that_is_below_them() -> None:
    metrics, step_tokens = Metrics("tiny"), Histogram(STEP_TOKENS)
    for count in (1, 2, 3, 64, 9999):
        step_tokens.observe(count)
    metrics.exposition(DecoderLoad(num_running=0, num_waiting=0, engines=(stats_of(step_tokens=step_tokens),)))

    def below(bound: str) -> float | None:
        labels = {"model_name": "tiny", "le": bound}
        return metrics.registry.get_sample_value("vllm:iteration_tokens_total_bucket", labels)

    assert [below(bound) for bound in ("1.0", "2.0", "4.0", "64.0", "8192.0", "+Inf")] == [1, 2, 3, 4, 4, 5]
    labels = {"model_name": "tiny"}
    assert metrics.registry.get_sample_value("vllm:iteration_tokens_total_count", labels) == 5
