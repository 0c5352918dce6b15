"""Counters of one ingress in Prometheus form: vLLM's names where the meaning is the same, `mm:` for the rest."""

from __future__ import annotations

from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from mm.data.outputs import Summary
from mm.data.request import Request
from mm.plugins.calls import StageStatus
from serve.api.engine_metrics import EngineMetrics
from serve.runtime import DecoderLoad, MediaHandle

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
STAGE_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 1.6)


class Metrics:
    """The metrics of one ingress."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._engines = EngineMetrics(model)
        self.registry.register(self._engines)
        self.running = self._gauge("vllm:num_requests_running", "Requests being answered by a decoder.")
        self.waiting = self._gauge("vllm:num_requests_waiting", "Requests waiting for a decoder.")
        self.in_flight = self._gauge(
            "mm:num_requests_in_flight", "Requests this ingress has accepted and not finished."
        )
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens, after visual-token reduction.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Generated tokens.")
        self.success = self._counter("vllm:request_success", "Choices answered, by reason.", "finished_reason")
        self.cache_queries = self._counter("vllm:mm_cache_queries", "Media items looked up in the encoder's cache.")
        self.cache_hits = self._counter("vllm:mm_cache_hits", "Media items found in the encoder's cache.")
        self.rejections = self._counter("vllm:admission_rejections", "Requests refused because too many are in flight.")
        self.ttft = self._histogram(
            "vllm:time_to_first_token_seconds", "From the request's arrival, media included.", SECONDS
        )
        self.e2e = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", SECONDS)
        self.tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Decode seconds per token after the first.", TOKEN_SECONDS
        )
        self.queue = self._histogram("vllm:request_queue_time_seconds", "Waiting for the decoder.", STAGE_SECONDS)
        self.prefill = self._histogram("vllm:request_prefill_time_seconds", "Prefill.", STAGE_SECONDS)
        self.decode = self._histogram("vllm:request_decode_time_seconds", "Decode, all choices.", STAGE_SECONDS)
        self.inference = self._histogram("vllm:request_inference_time_seconds", "Prefill and decode.", STAGE_SECONDS)
        self.request_prompt_tokens = self._histogram("vllm:request_prompt_tokens", "Prompt tokens.", TOKENS)
        self.request_generation_tokens = self._histogram("vllm:request_generation_tokens", "Generated tokens.", TOKENS)
        self.params_n = self._histogram("vllm:request_params_n", "Choices asked for.", (1, 2, 4, 8, 16))
        self.params_max_tokens = self._histogram("vllm:request_params_max_tokens", "max_tokens asked for.", TOKENS)
        self.stage = self._histogram(
            "mm:stage_seconds", "Seconds of one request in each stage.", STAGE_SECONDS, "stage"
        )
        self.visual_in = self._counter("mm:visual_tokens_in", "Visual tokens before reduction.", "kind", "reducer")
        self.visual_kept = self._counter("mm:visual_tokens_kept", "Visual tokens after reduction.", "kind", "reducer")
        self.reducer_faults = self._counter(
            "mm:reducer_faults", "Answers in which a reducer failed and all its tokens were kept.", "reducer"
        )
        self.plugin_off = self._gauge("mm:plugin_off", "1 for each plugin that is switched off.", "kind", "name")
        self.media_bytes = self._counter("mm:media_bytes", "Encoded media received.", "kind")
        self.failures = self._counter("mm:request_failures", "Requests answered with an error.", "status", "code")
        self.cancelled = self._counter("mm:requests_cancelled", "Requests whose client went away.")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ("model_name", *labels), registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, ("model_name", *labels), registry=self.registry, buckets=buckets)

    def requested(self, request: Request) -> None:
        self.params_n.labels(self._model).observe(request.sampling.n)
        if request.sampling.max_new_tokens is not None:
            self.params_max_tokens.labels(self._model).observe(request.sampling.max_new_tokens)

    def encoded(self, media: MediaHandle) -> None:
        self.cache_queries.labels(self._model).inc(media.num_items)
        self.cache_hits.labels(self._model).inc(media.num_cache_hits)
        for kind, num_bytes in media.media_bytes.items():
            self.media_bytes.labels(self._model, kind).inc(num_bytes)

    def finished(self, summary: Summary, reasons: list[str], elapsed_s: float) -> None:
        """Count an answered request."""
        model, usage, timings = self._model, summary.usage, summary.timings
        for reason in reasons:
            self.success.labels(model, reason).inc()
        self.prompt_tokens.labels(model).inc(usage.num_prompt_tokens)
        self.generation_tokens.labels(model).inc(usage.num_completion_tokens)
        self.request_prompt_tokens.labels(model).observe(usage.num_prompt_tokens)
        self.request_generation_tokens.labels(model).observe(usage.num_completion_tokens)
        self.e2e.labels(model).observe(elapsed_s)
        self.queue.labels(model).observe(timings.queue_s)
        self.prefill.labels(model).observe(timings.prefill_s)
        self.decode.labels(model).observe(timings.decode_s)
        self.inference.labels(model).observe(timings.prefill_s + timings.decode_s)
        if usage.num_completion_tokens > 1:
            self.tpot.labels(model).observe(timings.decode_s / (usage.num_completion_tokens - 1))
        for stage, seconds in asdict(timings).items():
            self.stage.labels(model, stage.removesuffix("_s")).observe(seconds)
        # The method alone: with its options a client could make as many series as it likes.
        reducer = "pipeline" if "+" in summary.reducer else summary.reducer.partition(":")[0]
        if summary.reducer_faults:
            self.reducer_faults.labels(model, reducer).inc()
        for kind, num_in, num_kept in (
            ("image", usage.num_image_tokens_in, usage.num_image_tokens_kept),
            ("video", usage.num_video_tokens_in, usage.num_video_tokens_kept),
        ):
            if num_in:
                self.visual_in.labels(model, kind, reducer).inc(num_in)
                self.visual_kept.labels(model, kind, reducer).inc(num_kept)

    def failed(self, status: int, code: str) -> None:
        self.failures.labels(self._model, str(status), code).inc()

    def exposition(self, load: DecoderLoad | None, status: StageStatus | None = None) -> bytes:
        """The text of `GET /metrics`; `load` and `status` are None when nobody reported them."""
        if status is not None:
            self.plugin_off.clear()
            for one in status.plugins_off:
                self.plugin_off.labels(self._model, one.kind, one.name).set(1)
        if load is not None:
            self.running.labels(self._model).set(load.num_running)
            self.waiting.labels(self._model).set(load.num_waiting)
            self._engines.update(load)
        return generate_latest(self.registry)
