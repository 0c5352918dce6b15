"""A sequence of its own through the decoder, for tests that look at logits."""

from __future__ import annotations

import torch
from torch import Tensor

from mm.data.tokens import Prompt
from mm.engine.attention.base import build_attention
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.model_input import Chunk
from mm.engine.model_runner import ModelRunner


class Alone:
    """One sequence with a cache to itself."""

    def __init__(self, language, num_rows: int) -> None:
        self.language = language
        shape = language.kv_cache_spec
        self.cache = KVCache(shape, num_blocks=shape.num_layers * shape.num_blocks(num_rows), max_num_seqs=1)
        self._runner = ModelRunner(language, build_attention(self.cache))
        self._seq_index = self.cache.allocate()

    def feed(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """(n, D) rows at (P, n) positions; the logits (vocab,) behind the last one."""
        return self._runner.forward([Chunk(seq_index=self._seq_index, embeddings=embeddings, positions=positions)])[0]

    def feed_prompt(self, prompt: Prompt) -> Tensor:
        """The logits (vocab,) behind a prompt, with its mask and planes."""
        chunk = Chunk(
            seq_index=self._seq_index,
            embeddings=prompt.embeddings,
            positions=prompt.positions,
            token_ids=prompt.token_ids,
            mask=prompt.mask,
            mask_in_windows=prompt.mask_in_windows,
            layer_planes=prompt.layer_planes,
            visual=prompt.is_visual.nonzero().squeeze(1),
        )
        return self._runner.forward([chunk])[0]

    def feed_token(self, token: int, position: int) -> Tensor:
        return self.feed(self.language.embed(torch.tensor([token])), torch.tensor([[position]]))


def logits_along(language, prompt: Prompt, tokens: list[int], shift: int = 0) -> list[Tensor]:
    """Logits at each of `tokens`, fed one by one behind the prompt."""
    alone = Alone(language, prompt.length + len(tokens))
    steps = [alone.feed(prompt.embeddings, prompt.positions + shift)]
    for i, token in enumerate(tokens[:-1]):
        steps.append(alone.feed_token(token, prompt.next_position + i + shift))
    return steps
