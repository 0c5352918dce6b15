"""What steps cost, measured before the first request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mm.engine.kv_cache.blocks import KVCache
from mm.engine.model_input import Chunk
from mm.engine.spec_decode.cost_model import MAX_WARM_TOKENS, CostModel
from mm.plugins.drafter import DraftTarget


class Forward(Protocol):
    """A model runner, as far as calibration needs it."""

    cache: KVCache

    def forward(self, chunks: Sequence[Chunk]) -> Tensor: ...


def calibrate(
    costs: CostModel, target: DraftTarget, runner: Forward, max_tokens: int, clock: Callable[[], float]
) -> None:
    """Measure what steps cost, with meaningless tokens.

    Args:
        max_tokens: Tokens of the largest step.
    """
    cache = runner.cache
    num_free = cache.num_free_blocks // cache.shape.num_layers * cache.shape.block_size

    def run(num_tokens: int) -> float:
        seq_index = cache.allocate()
        chunk = Chunk(
            seq_index=seq_index,
            embeddings=target.embed(torch.zeros(num_tokens, dtype=torch.int64)),
            positions=torch.arange(num_tokens, device=target.device).unsqueeze(0),
            num_logits=num_tokens,
            token_ids=torch.zeros(num_tokens, dtype=torch.int64),
        )
        start = clock()
        int(runner.forward([chunk]).argmax())
        seconds = clock() - start
        cache.free(seq_index)
        return seconds

    costs.calibrate(run, min(max_tokens, MAX_WARM_TOKENS, num_free))
