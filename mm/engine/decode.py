"""Prefill one prompt and decode its answers.

One sequence at a time; the prompt's rows stay in the cache while its n answers are decoded one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mm.core.data import Delta, Prompt
from mm.core.errors import EngineError
from mm.engine.kv_cache import KVCache
from mm.engine.output import Output
from mm.engine.sampling import Sampler, choose


class Language(Protocol):
    """What decoding asks of a language model."""

    device: torch.device

    def embed(self, token_ids: Tensor) -> Tensor: ...

    def forward(self, embeddings: Tensor, positions: Tensor, cache: KVCache) -> Tensor: ...


@dataclass(kw_only=True)
class Progress:
    """Counts and clocks of a request under way; `decode` adds to it."""

    num_completion_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    token_ids: list[list[int]] = field(default_factory=list)


def decode(
    language: Language,
    prompt: Prompt,
    cache: KVCache,
    samplers: Sequence[Sampler],
    outputs: Sequence[Output],
    progress: Progress,
) -> Iterator[Delta]:
    """Every answer's deltas, one answer after the other; the last of each carries its finish reason.

    Args:
        cache: Empty, with room for the prompt and one answer.
        samplers, outputs: One of each per answer.
    """
    start = time.perf_counter()
    prompt_logits = language.forward(prompt.embeddings, prompt.positions, cache)
    progress.prefill_s = time.perf_counter() - start
    for sampler, output in zip(samplers, outputs, strict=True):
        cache.rewind(prompt.length)
        yield from _answer(language, prompt, cache, sampler, output, progress, prompt_logits)


def _answer(
    language: Language,
    prompt: Prompt,
    cache: KVCache,
    sampler: Sampler,
    output: Output,
    progress: Progress,
    logits: Tensor,
) -> Iterator[Delta]:
    progress.token_ids.append(output.token_ids)
    while output.finish_reason is None:
        start = time.perf_counter()
        step = output.position
        if step:
            position = torch.full(
                (prompt.positions.shape[0], 1), prompt.next_position + step - 1, device=language.device
            )
            token = torch.tensor(output.token_ids[-1:])
            logits = language.forward(language.embed(token), position, cache)
        (chosen,) = choose(logits.unsqueeze(0), [sampler], [step])
        if isinstance(chosen, EngineError):
            raise chosen
        progress.num_completion_tokens += 1
        progress.decode_s += time.perf_counter() - start
        yield output.push(chosen, prompt.length if progress.num_completion_tokens == 1 else None)
