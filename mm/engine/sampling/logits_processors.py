"""Logits processors: from a model's logits to the distribution that tokens are sampled from, for several rows at once.

The order is the field's: logit_bias, repetition penalty, frequency and presence penalties; tokens that are not allowed;
temperature, top_k, top_p (in Hugging Face's order: top_p counts what top_k left), and the floors that options declare,
such as min_p. Each row has its own parameters, and no row depends on its neighbours. A row therefore comes out the same
alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mm.data.arrays import FloatArray, IntArray, ints, to_tensor
from mm.data.sampling_params import Floor
from mm.engine.sampling.resolved_params import ResolvedSamplingParams

NUM_SUMMED = 256
"""Tokens whose probabilities are summed first. Most nuclei end among them."""
MIN_TEMPERATURE = 1e-30
"""Lower temperatures are raised to this one, which gives the same distribution: float32 cannot hold the quotients."""


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """The penalties of one row.

    Attributes:
        token_ids: (n,) int64, without repetition.
        counts: (n,) float32, how often each was generated.
    """

    token_ids: IntArray
    counts: FloatArray
    repetition: float
    frequency: float
    presence: float


def add_logit_bias(logits: Tensor, rows: Sequence[int], biases: Sequence[tuple[IntArray, FloatArray]]) -> None:
    """Add each (token ids, values) of `biases` to its row of `logits` (B, vocab), in place."""
    at = _indices(logits, rows, [token_ids for token_ids, _ in biases])
    logits[at] += to_tensor(np.concatenate([values for _, values in biases])).to(logits)


def apply_penalties(logits: Tensor, rows: Sequence[int], penalties: Sequence[Penalty]) -> None:
    """Apply each of `penalties` to its row of `logits` (B, vocab), in place.

    Repetition as in CTRL (arXiv:1909.05858, as Hugging Face has it), then frequency and presence as OpenAI has them.
    """
    at = _indices(logits, rows, [penalty.token_ids for penalty in penalties])
    lengths = [len(penalty.token_ids) for penalty in penalties]
    terms = np.array([(p.repetition, p.frequency, p.presence) for p in penalties], dtype=np.float32)
    repetition, frequency, presence = to_tensor(np.repeat(terms, lengths, axis=0)).to(logits).unbind(1)
    counts = to_tensor(np.concatenate([penalty.counts for penalty in penalties])).to(logits)
    values = logits[at]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[at] = values - frequency * counts - presence * (counts > 0)


def _indices(logits: Tensor, rows: Sequence[int], token_ids: Sequence[IntArray]) -> tuple[Tensor, Tensor]:
    """(row, column) indices of the tokens of several rows."""
    row = np.repeat(np.asarray(rows, dtype=np.int64), [len(ids) for ids in token_ids])
    return to_tensor(row, logits.device), to_tensor(np.concatenate(token_ids), logits.device)


def temper_and_truncate(logits: Tensor, params: Sequence[ResolvedSamplingParams]) -> Tensor:
    """Log-probabilities (B, vocab) float32 after temperature and truncation, -inf where a token cannot be sampled.

    Tokens as probable as the last one that stays are kept too, so the order of token ids never decides.

    Args:
        logits: (B, vocab) float32. Each row's largest is finite.
        params: (B,) with a temperature above 0.
    """
    divisors = _column([max(one.temperature, MIN_TEMPERATURE) for one in params], logits)
    # Less its maximum first: a tiny divisor then sends the others to -inf, and none to NaN.
    logprobs = ((logits - logits.amax(-1, keepdim=True)) / divisors).log_softmax(-1)
    cut = [i for i, one in enumerate(params) if one.truncates]
    if not cut:
        return logprobs
    whole = len(cut) == len(params)
    rows = logprobs if whole else logprobs[cut]
    rows = rows.masked_fill(rows < _floor(rows, [params[i] for i in cut]), -torch.inf).log_softmax(-1)
    if whole:
        return rows
    logprobs[cut] = rows
    return logprobs


def _floor(logprobs: Tensor, params: Sequence[ResolvedSamplingParams]) -> Tensor:
    """(B, 1): the log-probability of the least probable token that stays."""
    floor = torch.full_like(logprobs[:, :1], -torch.inf)
    declared: dict[Floor, list[tuple[int, float]]] = {}
    for i, one in enumerate(params):
        for function, value in one.floors:
            declared.setdefault(function, []).append((i, value))
    for function, uses in declared.items():
        rows = [i for i, _ in uses]
        least = function(logprobs[rows], _column([value for _, value in uses], logprobs))
        floor[rows] = torch.maximum(floor[rows], least)
    rows = [i for i, one in enumerate(params) if one.top_k > 0 or one.top_p < 1]
    if rows:
        least = _least_kept(_descending(logprobs[rows]), [params[i] for i in rows], NUM_SUMMED)
        floor[rows] = torch.maximum(floor[rows], least)
    return floor


def _descending(logprobs: Tensor) -> Tensor:
    """Each row's values, the largest first. numpy sorts 49k of them in 0.09 ms on a CPU core, torch in 2.8 ms."""
    if logprobs.device.type != "cpu":
        return logprobs.sort(descending=True).values
    return to_tensor(np.sort(-logprobs.numpy(), axis=-1)).neg_()


def _least_kept(ordered: Tensor, params: Sequence[ResolvedSamplingParams], num_summed: int) -> Tensor:
    """(B, 1): the least log-probability that top_k, and top_p within it, keep.

    It looks at `num_summed` tokens first. A row for which they are too few is computed again with all.
    """
    vocab = ordered.shape[1]
    first = ordered[:, :num_summed]
    top_k = torch.tensor([min(one.top_k, vocab) or vocab for one in params], device=ordered.device).unsqueeze(1)
    top_p = _column([one.top_p for one in params], ordered).double()
    kth = torch.where(top_k < vocab, ordered.gather(1, top_k - 1), -torch.inf)
    probs = first.double().exp()
    # What top_p counts: everything that top_k leaves, which is all of it in rows without top_k.
    mass = torch.where(top_k < vocab, (probs * (first >= kth)).sum(-1, keepdim=True), 1.0)
    # The most probable token stays, also where top_p is too small for a float32.
    inside = (probs.cumsum(-1) - probs < top_p * mass).sum(-1, keepdim=True).clamp(min=1)
    least = torch.where(top_p < 1, torch.maximum(first.gather(1, inside - 1), kth), kth)
    if num_summed < vocab:
        # What may go on after the tokens looked at: a nucleus, or tokens as probable as the k-th.
        more = (top_p < 1) & torch.where(top_k < vocab, first[:, -1:] >= kth, inside == num_summed)
        if unsure := ints(more.squeeze(1).nonzero().squeeze(1)):
            least[unsure] = _least_kept(ordered[unsure], [params[i] for i in unsure], vocab)
    return least


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
