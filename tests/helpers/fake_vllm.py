"""A stand-in for the module `vllm`: what `mm.vllm.core` uses of it, computed by transformers without a cache.

It numbers prompts of embeddings 0, 1, 2, ... and takes positions of items with grids from transformers, as vLLM does.
"""

from __future__ import annotations

import enum
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from transformers import AutoModelForImageTextToText, AutoTokenizer

from mm.engine.sampling.vocabulary import Vocabulary


@dataclass
class EngineArgs:
    """Of vLLM's some 200 arguments, those that the tests give."""

    model: str = ""
    dtype: str = "auto"
    enable_prompt_embeds: bool = False
    enable_mm_embeds: bool = False
    limit_mm_per_prompt: dict[str, int] = field(default_factory=dict)
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    generation_config: str = "auto"
    scheduling_policy: str = "fcfs"
    structured_outputs_config: dict[str, str] = field(default_factory=dict)
    enforce_eager: bool = False
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    quantization: str | None = None


class RequestOutputKind(enum.Enum):
    CUMULATIVE, DELTA, FINAL_ONLY = 0, 1, 2


@dataclass
class StructuredOutputsParams:
    json: str | None = None


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    min_tokens: int = 0
    max_tokens: int | None = 16
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE


@dataclass
class Running:
    """A request that the stand-in holds."""

    name: str
    embeds: torch.Tensor
    positions: torch.Tensor
    sampling: SamplingParams
    priority: int
    ids: list[int] = field(default_factory=list)
    matcher: LLMatcher | None = None
    scheduled: float = 0.0


class LLMEngine:
    """Steps: every request gets one token. `fails_at` steps later, a step raises."""

    fails_after: int | None = None

    def __init__(self, args: EngineArgs, stat_loggers: list[Any]) -> None:
        if "cannot" in args.model:
            raise ValueError("Model architectures ['Unknown'] are not supported for now.")
        self.args, self.model = args, AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32)
        self.text, self.tokenizer = self.model.config.get_text_config(), AutoTokenizer.from_pretrained(args.model)
        self.stats = [make(None, 0) for make in stat_loggers]
        self.running: dict[str, Running] = {}
        self.aborted: list[str] = []
        self.prompts: deque[dict[str, Any]] = deque(maxlen=64)
        self.num_steps, self.is_shut = 0, False
        self.engine_core = SimpleNamespace(shutdown=lambda: setattr(self, "is_shut", True))
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(block_size=16, num_gpu_blocks=64))
        self.model_config = SimpleNamespace(hf_text_config=self.text, dtype=torch.float32, get_head_size=lambda: 12)

    @classmethod
    def from_engine_args(cls, args: EngineArgs, stat_loggers: list[Any]) -> LLMEngine:
        return cls(args, stat_loggers)

    def add_request(self, name: str, prompt: dict[str, Any], sampling: SamplingParams, priority: int = 0) -> str:
        if sampling.logit_bias and max(sampling.logit_bias) >= self.text.vocab_size - 1:
            raise ValueError("token_id(s) in logit_bias contain out-of-vocab token ids")
        self.prompts.append(prompt)
        embeds, positions = self._with_grids(prompt) if "multi_modal_data" in prompt else self._line(prompt)
        matcher = None
        if sampling.structured_outputs is not None:
            grammar = LLMatcher.grammar_from_json_schema(
                sampling.structured_outputs.json, defaults={"whitespace_flexible": True}
            )
            matcher = LLMatcher(self._library(), grammar)
        self.running[name] = Running(name, embeds, positions, sampling, priority, matcher=matcher)
        return name

    def _library(self) -> LLTokenizer:
        raw = self.tokenizer.backend_tokenizer
        return Vocabulary(raw, self.text.vocab_size, [self.tokenizer.eos_token_id]).library

    def _embed(self, ids: list[int]) -> torch.Tensor:
        return self.model.get_input_embeddings()(torch.tensor(ids)).detach()

    def _line(self, prompt: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        embeds = self._embed(prompt["prompt_token_ids"])
        if "prompt_embeds" in prompt:
            is_text = torch.tensor(prompt["prompt_is_token_ids"])
            embeds = torch.where(is_text.unsqueeze(1), embeds, prompt["prompt_embeds"])
        return embeds, torch.arange(len(embeds)).unsqueeze(0)

    def _with_grids(self, prompt: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        config, ids, counts = self.model.config, list[int](), {}
        grids = {kind: data[f"{kind}_grid_thw"] for kind, data in prompt["multi_modal_data"].items()}
        for token in prompt["prompt_token_ids"]:
            kind = {config.image_token_id: "image", config.video_token_id: "video"}.get(token)
            count = 1
            if kind is not None:
                at = counts[kind] = counts.get(kind, -1) + 1
                count = int(grids[kind][at].prod()) // config.vision_config.spatial_merge_size**2
            ids += [token] * count
        embeds, whole = self._embed(ids), torch.tensor(ids)
        for kind, data in prompt["multi_modal_data"].items():
            embeds[whole == getattr(config, f"{kind}_token_id")] = data[f"{kind}_embeds"]
        types = torch.zeros(1, len(ids), dtype=torch.int64)
        types[0, whole == config.image_token_id] = 1
        types[0, whole == config.video_token_id] = 2
        positions, _ = self.model.model.get_rope_index(
            whole.unsqueeze(0),
            mm_token_type_ids=types,
            image_grid_thw=grids.get("image"),
            video_grid_thw=grids.get("video"),
        )
        return embeds, positions[:, 0]

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names
        for name in names:
            self.running.pop(name, None)

    @torch.inference_mode()
    def step(self) -> list[Any]:
        self.num_steps += 1
        if LLMEngine.fails_after is not None and self.num_steps > LLMEngine.fails_after:
            raise RuntimeError("the device is gone")
        taken = sorted(self.running.values(), key=lambda one: one.priority)[: self.args.max_num_seqs]
        return [self._advance(one) for one in taken]

    def _advance(self, one: Running) -> Any:
        one.scheduled = one.scheduled or time.monotonic()
        embeds = torch.cat([one.embeds, self._embed(one.ids)]) if one.ids else one.embeds
        after = int(one.positions.max()) + 1 + torch.arange(len(one.ids))
        positions = torch.cat([one.positions, after.expand(len(one.positions), -1)], dim=1)
        shaped = positions if len(positions) == 1 else positions.unsqueeze(1)
        hidden = self.model.model.language_model(inputs_embeds=embeds.unsqueeze(0), position_ids=shaped)
        raw = self.model.lm_head(hidden.last_hidden_state[0, -1])
        token, row = self._sample(one, raw)
        one.ids.append(token)
        sampling, reason = one.sampling, None
        if token in (sampling.stop_token_ids or ()):
            reason = "stop"
        elif len(one.ids) >= sampling.max_tokens:
            reason = "length"
        if reason:
            self.running.pop(one.name)
        choice = SimpleNamespace(token_ids=[token], logprobs=row and [row], finish_reason=reason)
        metrics = SimpleNamespace(scheduled_ts=one.scheduled)
        return SimpleNamespace(
            request_id=one.name, outputs=[choice], finished=bool(reason), num_cached_tokens=0, metrics=metrics
        )

    def _sample(self, one: Running, raw: torch.Tensor) -> tuple[int, dict[int, Any] | None]:
        logits, sampling = raw.clone(), one.sampling
        for token, bias in (sampling.logit_bias or {}).items():
            logits[token] += bias
        if len(one.ids) < sampling.min_tokens:
            logits[sampling.stop_token_ids or []] = -torch.inf
        if one.matcher is not None:
            allowed = one.matcher.compute_bitmask()
            bits = torch.tensor(list(allowed), dtype=torch.uint8)
            mask = (bits.unsqueeze(1) >> torch.arange(8) & 1).flatten()[: len(logits)].bool()
            logits[~mask] = -torch.inf
        token = int(logits.argmax())
        if sampling.temperature:
            generator = torch.Generator().manual_seed(sampling.seed + len(one.ids))
            token = int(torch.multinomial((logits / sampling.temperature).softmax(-1), 1, generator=generator))
        if one.matcher is not None:
            one.matcher.consume_token(token)
        if sampling.logprobs is None:
            return token, None
        logprobs = raw.log_softmax(-1)
        order = logprobs.argsort(descending=True).tolist()
        wanted = dict.fromkeys([token, *order[: sampling.logprobs]])
        return token, {i: SimpleNamespace(logprob=float(logprobs[i]), rank=order.index(i) + 1) for i in wanted}


def install(monkeypatch: Any, device: str = "cpu") -> ModuleType:
    """Put the stand-in where `import vllm` finds it, for one test."""
    library = ModuleType("vllm")
    library.__version__ = "0.32.0"
    for one in (EngineArgs, LLMEngine, SamplingParams):
        setattr(library, one.__name__, one)
    sampling, platforms = ModuleType("vllm.sampling_params"), ModuleType("vllm.platforms")
    sampling.StructuredOutputsParams, sampling.RequestOutputKind = StructuredOutputsParams, RequestOutputKind
    platforms.current_platform = SimpleNamespace(device_type=device)
    for module in (library, sampling, platforms):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(LLMEngine, "fails_after", None)
    return library
