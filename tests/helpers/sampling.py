"""The distribution and the noise of one token, by the steps that `sample` takes for a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from mm.engine.sampling.logits_processors import temper_and_truncate
from mm.engine.sampling.noise import gumbel, keys_of
from mm.engine.sampling.sample import process_logits
from mm.engine.sampling.sampler import Sampler


def sampling_logprobs(logits: Tensor, sampler: Sampler, position: int) -> Tensor:
    """Log-probabilities (vocab,) from which the token at `position` is sampled; one-hot for greedy sampling."""
    rows = logits.unsqueeze(0).to(torch.float32, copy=True)
    assert not process_logits(rows, [sampler], [position])
    if sampler.params.temperature:
        return temper_and_truncate(rows, [sampler.params])[0]
    return torch.full_like(rows[0], -torch.inf).index_fill_(0, rows.argmax(-1), 0.0)


def noise(sampler: Sampler, position: int, vocab: int) -> Tensor:
    """Gumbel noise (vocab,): the token at `position` is argmax(logprobs + noise)."""
    return gumbel(keys_of([sampler.key(position)], torch.device("cpu")), torch.arange(vocab))[0]
