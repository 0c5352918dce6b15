"""vLLM itself: started from our settings, asked for steps, read as plain data. The only module that imports `vllm`."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol, cast

import torch

from mm.engine.sampling.sampler import SampledToken
from mm.errors import EngineError, InvalidOption, InvalidRequest
from mm.vllm.inputs import Choice

log = logging.getLogger(__name__)

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that a script need not guard its main module
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # its threads are ours
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""What vLLM's environment is where nobody set it otherwise."""

TESTED = ("0.32",)
"""Versions that the tests passed with."""


@dataclass(frozen=True, kw_only=True)
class CoreOutput:
    """What a step gave one choice.

    Attributes:
        name: Of vLLM's request.
        tokens: The new ones.
        is_finished: vLLM computes no more of it.
        reason: Why: "stop", "length", "abort" or "error". Empty while it goes on.
        num_cached_tokens: Of its prompt, those that the prefix cache held.
        scheduled_time: When it was first computed, on the clock of `time.perf_counter`; None where vLLM does not say.
    """

    name: str
    tokens: tuple[SampledToken, ...]
    is_finished: bool = False
    reason: str = ""
    num_cached_tokens: int = 0
    scheduled_time: float | None = None


@dataclass
class CoreStats:
    """What vLLM says of itself; all counts begin at its start.

    Attributes:
        kv_usage: Share of the KV cache that is in use, 0 to 1.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    prefix_queries: int = 0
    prefix_hits: int = 0
    num_preemptions: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_prompt_tokens: int = 0

    def for_vllm(self, config: object, index: int = 0) -> CoreStats:
        """What vLLM calls to get a logger."""
        return self

    def record(self, scheduler_stats: object, iteration_stats: object, *_: object, **__: object) -> None:
        """What vLLM calls after each step, see its `StatLoggerBase`."""
        scheduler, iteration = cast(Any, scheduler_stats), cast(Any, iteration_stats)
        if scheduler is not None:
            self.num_running = scheduler.num_running_reqs
            self.num_waiting = scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
            self.kv_usage = scheduler.kv_cache_usage
            self.prefix_queries += scheduler.prefix_cache_stats.queries
            self.prefix_hits += scheduler.prefix_cache_stats.hits
            if (drafts := scheduler.spec_decoding_stats) is not None:
                self.num_drafts += drafts.num_drafts
                self.num_draft_tokens += drafts.num_draft_tokens
                self.num_accepted_tokens += drafts.num_accepted_tokens
        if iteration is not None:
            self.num_preemptions += iteration.num_preempted_reqs
            self.num_prompt_tokens += iteration.num_prompt_tokens

    def log_engine_initialized(self) -> None:
        """Part of vLLM's interface."""

    def log(self) -> None:
        """Part of vLLM's interface."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """Part of vLLM's interface."""


class Core(Protocol):
    """What `VllmEngine` needs of vLLM. One thread at a time uses it."""

    stats: CoreStats
    kv_bytes: int
    block_size: int
    token_bytes: int

    def add(self, choice: Choice, priority: int) -> str:
        """Hand a choice to vLLM. Returns its name there.

        Raises:
            InvalidRequest: vLLM refuses it.
        """
        ...

    def abort(self, names: Sequence[str]) -> None: ...

    def step(self) -> list[CoreOutput]:
        """Compute one step."""
        ...

    def close(self) -> None: ...


@dataclass(kw_only=True)
class VllmCore:
    """A running vLLM engine.

    Attributes:
        library: The module.
        engine: Its `LLMEngine`.
        kv_bytes: Size of its KV cache.
        block_size: Tokens of a block of it.
        token_bytes: Bytes of a token in it.
    """

    library: Any
    engine: Any
    stats: CoreStats
    kv_bytes: int = 0
    block_size: int = 16
    token_bytes: int = 0
    _count: int = field(default=0, init=False)

    @classmethod
    def start(cls, arguments: Mapping[str, Any], device: str, grammars: Callable[[], object]) -> VllmCore:
        """Start vLLM.

        Args:
            arguments: Of its `EngineArgs`.
            device: Kind of device that it is to run on, such as "cpu".
            grammars: Makes llguidance's tokenizer of the model.

        Raises:
            InvalidOption: It is not installed, does not have an argument, or was built for another kind of device.
            EngineError: It cannot load or run the model.
        """
        library, stats = cast(Any, load_vllm()), CoreStats()
        platform: Any = importlib.import_module("vllm.platforms").current_platform
        built_for: str = platform.device_type
        if built_for != device:
            what = f"was {device!r}, and the vLLM that is installed runs on {built_for!r}; choose that device"
            raise InvalidOption("model", "device", what)
        if not (version := str(library.__version__)).startswith(TESTED):
            log.warning("vLLM %s is installed; the tests passed with %s", version, ", ".join(TESTED))
        known = {one.name for one in dataclasses.fields(library.EngineArgs)}
        if unknown := sorted(arguments.keys() - known):
            raise InvalidOption("model", "engine_args", f"holds {unknown[0]!r}, which vLLM's engine does not have")
        if device == "cpu":
            platform.simple_compile_backend = "eager"  # else the first log-probability waits 20 s for a compiler
        _take_tokenizer(str(arguments["model"]), grammars)
        set_num_threads: Any = torch.set_num_threads
        try:
            config: Any = library.EngineArgs(**arguments)
            engine: Any = library.LLMEngine.from_engine_args(config, stat_loggers=[stats.for_vllm])
        except Exception as error:
            log.exception("vLLM did not start")
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            raise EngineError(f"vLLM cannot serve this model with these settings: {reason}") from error
        finally:
            torch.set_num_threads = set_num_threads  # vLLM puts a function there that does nothing
        found = cls(library=library, engine=engine, stats=stats)
        found._measure()
        return found

    def _measure(self) -> None:
        """Read the sizes of the KV cache."""
        cache, model = self.engine.vllm_config.cache_config, self.engine.model_config
        self.block_size = cache.block_size
        text: Any = model.hf_text_config
        width = text.num_key_value_heads * (getattr(text, "head_dim", None) or model.get_head_size())
        self.token_bytes = 2 * width * text.num_hidden_layers * model.dtype.itemsize
        self.kv_bytes = (cache.num_gpu_blocks or 0) * cache.block_size * self.token_bytes

    def add(self, choice: Choice, priority: int) -> str:
        from_library, extra = self.library, dict[str, Any]()
        if choice.schema:
            params: Any = importlib.import_module("vllm.sampling_params").StructuredOutputsParams
            extra["structured_outputs"] = params(json=choice.schema)
        kind: Any = importlib.import_module("vllm.sampling_params").RequestOutputKind
        self._count += 1
        name = f"{choice.request.request_id}-{self._count}"
        try:
            sampling = from_library.SamplingParams(**choice.sampling, **extra, output_kind=kind.DELTA)
            self.engine.add_request(name, choice.prompt, sampling, priority=priority)
        except ValueError as error:  # what vLLM raises for requests that it refuses
            raise InvalidRequest(f"vLLM refuses the request: {' '.join(str(error).split())[:300]}") from error
        return name

    def abort(self, names: Sequence[str]) -> None:
        self.engine.abort_request(list(names))

    def step(self) -> list[CoreOutput]:
        return [output_of(one) for one in self.engine.step()]

    def close(self) -> None:
        """End its processes and free what it holds."""
        self.engine.engine_core.shutdown()


def output_of(request_output: object) -> CoreOutput:
    """A `RequestOutput` of vLLM as plain data."""
    found = cast(Any, request_output)
    choice, metrics = found.outputs[0], found.metrics
    scheduled: float = getattr(metrics, "scheduled_ts", 0.0) or 0.0
    rows: Sequence[Any] = choice.logprobs or [None] * len(choice.token_ids)
    return CoreOutput(
        name=found.request_id,
        tokens=tuple(_sampled(token_id, row) for token_id, row in zip(choice.token_ids, rows, strict=True)),
        is_finished=bool(found.finished),
        reason=choice.finish_reason or "",
        num_cached_tokens=found.num_cached_tokens or 0,
        scheduled_time=scheduled or None,
    )


def _sampled(token_id: int, row: Mapping[int, Any] | None) -> SampledToken:
    """A token with its log-probabilities. vLLM's rows hold the most probable tokens and the sampled one."""
    if row is None:
        return SampledToken(token_id)
    top = sorted(((one.rank, other, one.logprob) for other, one in row.items()), key=lambda entry: entry[0])
    return SampledToken(token_id, row[token_id].logprob, tuple((other, value) for _, other, value in top))


def _take_tokenizer(model: str, grammars: Callable[[], object]) -> None:
    """Let vLLM's grammars use our tokenizer of the model, where they run in this process.

    Its own fails for a model whose head has an output per token and no more: with prompt embeddings, vLLM adds a token
    to the tokenizer and goes on counting those of before.
    """
    TOKENIZERS[model] = grammars
    try:
        backend: Any = importlib.import_module("vllm.v1.structured_output.backend_guidance").GuidanceBackend
    except ImportError:
        return
    own: Any = getattr(backend, "_build_ll_tokenizer", None)
    if own is None or getattr(own, "is_ours", False):
        return

    def build(tokenizer: Any, vocab_size: int) -> Any:
        make = TOKENIZERS.get(str(tokenizer.name_or_path))
        return own(tokenizer, vocab_size) if make is None else make()

    build.is_ours = True  # pyright: ignore[reportFunctionMemberAccess]
    backend._build_ll_tokenizer = staticmethod(build)


TOKENIZERS: dict[str, Callable[[], object]] = {}
"""By the folder of the model."""


def load_vllm() -> ModuleType:
    """The module `vllm`, in an environment of ours.

    Raises:
        InvalidOption: It is not installed.
    """
    if "vllm" not in sys.modules and importlib.util.find_spec("vllm") is None:
        what = "was 'vllm', which is not installed; docs/engines.md says how to install it, or take native"
        raise InvalidOption("model", "engine", what)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    library = importlib.import_module("vllm")
    _let_it_look_around()
    return library


def _let_it_look_around() -> None:
    """Keep vLLM on a CPU without Triton from failing at llvmlite, which Numba brings.

    It looks for kernels in the `__dict__` of every object of every module. llvmlite's library object makes a C function
    of any name that it is asked for, that one too.
    """
    if "llvmlite" in sys.modules:
        table: Any = getattr(importlib.import_module("llvmlite.binding.ffi").lib, "_fntab", None)
        if isinstance(table, dict):
            table.setdefault("__dict__", {})  # pyright: ignore[reportUnknownMemberType]
