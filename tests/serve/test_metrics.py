"""Names that dashboards read, and that the numbers behind them are the request's."""

from __future__ import annotations

from mm.core.data import Request, Sampling, Summary, Timings, Usage
from serve.api.metrics import Metrics
from serve.runtime import Features, Load

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
    "vllm:request_params_n_bucket",
    "mm:visual_tokens_in_total",
    "mm:visual_tokens_kept_total",
    "mm:stage_seconds_bucket",
    "mm:num_requests_in_flight",
)


def test_a_finished_request_shows_under_every_name() -> None:
    metrics = Metrics("tiny")
    metrics.in_flight.labels("tiny").inc()
    metrics.requested(Request(request_id="x", messages=(), sampling=Sampling(n=2, max_new_tokens=9)))
    metrics.encoded(Features(encoded=None, reducer="none", num_items=3, num_cache_hits=1))
    usage = Usage(num_prompt_tokens=40, num_completion_tokens=11, num_image_tokens_in=100, num_image_tokens_kept=25)
    timings = Timings(load_s=0.1, encode_s=0.2, prefill_s=0.3, decode_s=1.0)
    metrics.ttft.labels("tiny").observe(0.5)
    metrics.finished(Summary(usage=usage, timings=timings, reducer="divprune:keep_ratio=0.3"), ["stop", "length"], 2.0)
    text = metrics.exposition(Load(num_running=2, num_waiting=5)).decode()
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
