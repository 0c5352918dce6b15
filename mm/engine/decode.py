"""Prefill one prompt and decode its answers.

One sequence at a time; the prompt's rows stay in the cache while its n answers are decoded one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mm.core.data import Delta, Prompt
from mm.engine.kv_cache import KVCache
from mm.engine.sampling import Sampler
from mm.engine.text import TextStream


class Language(Protocol):
    """What decoding asks of a language model."""

    device: torch.device

    def embed(self, token_ids: Tensor) -> Tensor: ...

    def forward(self, embeddings: Tensor, positions: Tensor, cache: KVCache) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Ending:
    """When an answer is over.

    Attributes:
        max_new_tokens: Length at which it is cut.
        eos_token_ids: Tokens that end it; they are counted but give no text.
        stop: Strings that end it.
    """

    max_new_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Progress:
    """Counts and clocks of a request under way; `decode` adds to it."""

    num_completion_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    token_ids: list[list[int]] = field(default_factory=list)


def decode(
    language: Language,
    tokenizer: Tokenizer,
    prompt: Prompt,
    cache: KVCache,
    samplers: Sequence[Sampler],
    ending: Ending,
    progress: Progress,
) -> Iterator[Delta]:
    """Every answer's deltas, one answer after the other; the last of each carries its finish reason.

    Args:
        cache: Empty, with room for the prompt and one answer.
        samplers: One per answer.
    """
    start = time.perf_counter()
    prompt_logits = language.forward(prompt.embeddings, prompt.positions, cache)
    progress.prefill_s = time.perf_counter() - start
    for sampler in samplers:
        cache.rewind(prompt.length)
        progress.token_ids.append([])
        yield from _answer(language, tokenizer, prompt, cache, sampler, ending, progress, prompt_logits)


def _answer(
    language: Language,
    tokenizer: Tokenizer,
    prompt: Prompt,
    cache: KVCache,
    sampler: Sampler,
    ending: Ending,
    progress: Progress,
    logits: Tensor,
) -> Iterator[Delta]:
    text = TextStream(tokenizer, ending.stop)
    for step in range(ending.max_new_tokens):
        start = time.perf_counter()
        if step:
            position = torch.full(
                (prompt.positions.shape[0], 1), prompt.next_position + step - 1, device=language.device
            )
            logits = language.forward(language.embed(torch.tensor([token])), position, cache)  # noqa: F821
        token = sampler.choose(logits, step)
        progress.num_completion_tokens += 1
        progress.token_ids[-1].append(token)
        progress.decode_s += time.perf_counter() - start
        ended = token in ending.eos_token_ids
        delta = partial(
            Delta,
            choice=sampler.choice,
            token_ids=(token,),
            num_prompt_tokens=prompt.length if progress.num_completion_tokens == 1 else None,
        )
        new = "" if ended else text.push(token)
        if ended or text.stopped or step + 1 == ending.max_new_tokens:
            yield delta(text=new + text.finish(), finish_reason="stop" if ended or text.stopped else "length")
            return
        yield delta(text=new)
