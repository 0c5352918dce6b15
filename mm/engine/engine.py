"""The engine: it takes requests whose media are encoded, and computes all of them together, step by step.

`submit` and `abort` may be called from any thread. `step` computes one step; `mm.engine.loop` calls it again and again.
A lock lets one thread at a time run a step, so cache and scheduler have one owner.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable

from mm.config import OnError, PluginLimits, SpeculationLimits
from mm.data.request import Request
from mm.data.tokens import EncodedMedia
from mm.engine.adapted_decoders import AdaptedDecoders
from mm.engine.admission import AdmissionControl
from mm.engine.attention.base import build_attention
from mm.engine.attention.cuda_graphs import build_graphs
from mm.engine.engine_view import EngineView
from mm.engine.input_processor import InputProcessor
from mm.engine.kv_cache.build import build_caches
from mm.engine.kv_transfer.messages import ReceivedKV
from mm.engine.lifecycle import RequestLifecycle
from mm.engine.model_runner import ModelRunner
from mm.engine.output_processor import OutputProcessor
from mm.engine.scheduler import Scheduler, SchedulerConfig, SchedulerOutput
from mm.engine.sequence import EngineRequest, OutputSink
from mm.engine.spec_decode.drafter_instance import target_of
from mm.engine.spec_decode.proposer import SpecDecoder
from mm.engine.stats import Counters
from mm.engine.tensor_parallel.gang import Gang, GangError, check_gang
from mm.errors import EngineError, MmError
from mm.models.family import CheckpointFamily
from mm.plugins.calls import PluginCalls
from mm.plugins.reducer import Reducer

log = logging.getLogger(__name__)


class LLMEngine(EngineView):
    """One model's decoder with its KV cache.

    Args:
        family: The decoder side of a checkpoint: language model, chat template, splice.
        config: Bounds of the waiting queue and of a step.
        kv_bytes: Size of the KV cache.
        prefix_caching: Whether prompts may start with blocks that earlier requests left.
        speculation: What may be drafted; None drafts nothing.
        cuda_graphs: Whether decode steps are recorded where the device can replay them.
        on_error: What a reducer's fault does to its request, see `ReducerPolicy`.
        plugins: How long plugins may take.
        gang: The members of a tensor-parallel decoder, of which the family's language model is rank 0.
    """

    def __init__(
        self,
        family: CheckpointFamily,
        *,
        config: SchedulerConfig,
        kv_bytes: int,
        prefix_caching: bool = True,
        speculation: SpeculationLimits | None = None,
        cuda_graphs: bool = True,
        on_error: OnError = "fail",
        plugins: PluginLimits | None = None,
        gang: Gang | None = None,
    ) -> None:
        self.engine_id, self.calls = uuid.uuid4().hex, PluginCalls(plugins)
        self.family, self.config = family, config
        spec = family.language.kv_cache_spec
        cuda_graphs = cuda_graphs and family.language.can_be_recorded
        max_num_seqs = config.max_num_seqs + cuda_graphs
        self._gang, sizes = gang, (spec, kv_bytes, max_num_seqs)
        self.cache, self.prefix_cache = build_caches(*sizes, prefix_caching=prefix_caching, gang=gang)
        self._build_parts(speculation or SpeculationLimits(), prefix_caching, cuda_graphs, on_error)
        self._lock, self._arrival_lock, self.wake = threading.Lock(), threading.Lock(), threading.Event()

    def _build_parts(
        self, speculation: SpeculationLimits, prefix_caching: bool, cuda_graphs: bool, on_error: OnError
    ) -> None:
        """Scheduler, model runner, drafters, and what stands between them and a request."""
        family, config, cache = self.family, self.config, self.cache
        attention = build_attention(cache)
        self._counters = Counters()
        self._scheduler = Scheduler(cache, self.prefix_cache, config)
        self._admission = AdmissionControl(config, self._scheduler, self._counters)
        graphs, width = None, cache.shape.num_blocks(family.max_context_tokens)
        if cuda_graphs:
            graphs = build_graphs(family.language, attention, max_num_seqs=config.max_num_seqs, max_num_blocks=width)
        runner = ModelRunner(family.language, attention, graphs, self.calls)
        self._decoders = AdaptedDecoders(family.language, runner, attention, self.calls)
        self.spec_decoder = SpecDecoder(
            target_of(family), cache.shape.block_size, speculation, calls=self.calls, has_prefix_cache=prefix_caching
        )
        self.spec_decoder.calibrate(runner, config.max_num_batched_tokens)
        self._lifecycle = RequestLifecycle(self._scheduler, self.spec_decoder, on_error=on_error)
        self.inputs = InputProcessor(family, cache, self.spec_decoder, self._decoders, self.calls, on_error=on_error)
        self._outputs = OutputProcessor(
            cache, self.prefix_cache, self._scheduler, self.spec_decoder, self._lifecycle, self._counters, self.calls
        )

    def submit(
        self, params: Request, media: EncodedMedia | ReceivedKV, sink: OutputSink, reducer: Reducer | None = None
    ) -> EngineRequest:
        """Accept a request; its events go to `sink`. May wait for a schema to be compiled: not for the event loop.

        Args:
            media: The encoded media and how they are to be reduced inside the decoder, or what another engine computed.
            reducer: Used in place of `media.reducer`, for a reducer that has no text form.

        Raises:
            ContextTooLong, InvalidRequest, MediaError: It cannot be served as asked.
            CapacityError: Too many requests wait already, or the engine is draining.
            GangError: A member of a tensor-parallel decoder has ended.
        """
        check_gang(self._gang, media, sink)
        self._admission.check(self._lifecycle.num_arrivals)
        seqs = self.inputs.process(params, media, sink, reducer)
        with self._arrival_lock:
            self._admission.check(self._lifecycle.num_arrivals)  # again: others may have arrived meanwhile
            self._lifecycle.arrive(seqs)
        self.wake.set()
        return seqs[0].request

    def abort(self, request: EngineRequest, *, wait: bool = False) -> None:
        """End a request. What it holds is freed at once when no step is running, and before the next step otherwise.

        Args:
            wait: Wait for a step that is running. For callers that run the engine themselves: it may be the last step.
        """
        self._lifecycle.abort(request)
        self.wake.set()
        if not request.is_finished and self._lock.acquire(blocking=wait):
            try:
                self._lifecycle.update()
            finally:
                self._lock.release()

    def drain(self) -> None:
        """Refuse new requests. Those that were accepted are completed."""
        self._admission.is_draining = True

    def close(self) -> None:
        """Stop the threads that compile schemas, and the other members of a tensor-parallel decoder."""
        self.inputs.close()
        if self._gang is not None:
            self._gang.close()

    def fail_all(self, error: MmError) -> None:
        """End all requests with an error."""
        with self._lock:
            self._lifecycle.fail_all(error)

    def step(self) -> bool:
        """Compute one step. Returns whether there was anything to do."""
        with self._lock:
            return self._step()

    def step_unless(self, condition: Callable[[], bool]) -> None:
        """Compute one step, unless another thread's step has made `condition` true while this one waited for it."""
        with self._lock:
            if not condition():
                self._step()

    def _step(self) -> bool:
        start = time.perf_counter()
        self._lifecycle.update()
        self._outputs.begin_received()
        if num_seqs := min(self._lifecycle.num_live, self.config.max_num_seqs):
            decoding = [seq for seq in self._scheduler.running if seq.is_decoding]
            self.spec_decoder.propose(decoding, self.config.max_num_batched_tokens, num_seqs)
        scheduled = self._scheduler.schedule()
        if not (num_tokens := scheduled.num_scheduled_tokens):
            return False
        for runner, part in self._decoders.parts(scheduled):
            try:
                self._execute(runner, part)
            except GangError as error:
                self._lifecycle.fail_all(error)
            except Exception as error:
                log.exception("a step failed: num_tokens=%d", part.num_scheduled_tokens)
                failure = EngineError(f"a step of the decoder failed: {type(error).__name__}")
                for seq in part.seqs:
                    self._lifecycle.fail(seq.request, failure)
        self._counters.record_step(num_tokens, time.perf_counter() - start)
        return True

    def _execute(self, runner: ModelRunner, scheduled: SchedulerOutput) -> None:
        began, has_prefill, num_seqs = self.spec_decoder.clock(), scheduled.has_prefill, len(scheduled.seqs)
        self.spec_decoder.start_sequences(scheduled.seqs)
        output = runner.execute(scheduled)
        results = self._outputs.process(output)
        if not has_prefill:
            num_draft_tokens = scheduled.num_scheduled_tokens - num_seqs
            self.spec_decoder.record_step(num_seqs, num_draft_tokens, self.spec_decoder.clock() - began)
        self.spec_decoder.observe(results, output.logits)
