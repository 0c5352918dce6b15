"""The next token of each sequence of a batch, from logits.

Sampling uses Gumbel noise: the token is argmax(logprobs + noise), where the noise is a function of (seed, choice,
position). A text therefore depends on its seed, and not on the batch or on speculative decoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mm.data.arrays import BoolArray, float_rows, floats, int_rows, ints, to_tensor
from mm.data.sampling_params import MAX_TOP_LOGPROBS
from mm.engine.sampling.logits_processors import add_logit_bias, apply_penalties, temper_and_truncate
from mm.engine.sampling.noise import gumbel, keys_of
from mm.engine.sampling.sampler import SampledToken, Sampler
from mm.errors import EngineError

NUM_CACHED_LOGITS = 2**16
"""Rows of together this many logits, in float32 and float64, fit a core's second-level cache."""


@torch.inference_mode()
def sample(logits: Tensor, samplers: Sequence[Sampler], positions: Sequence[int]) -> list[SampledToken | EngineError]:
    """Each row's next token, or the error of a row that has none. No row depends on another; nothing is changed.

    Args:
        logits: (B, vocab), any float dtype and device.
        samplers: (B,).
        positions: (B,) how many tokens each text already has.
    """
    processed = [i for i, sampler in enumerate(samplers) if not sampler.is_greedy(positions[i])]
    if not processed:
        return greedy(logits)
    plain = sorted(set(range(len(samplers))) - set(processed))
    found: dict[int, SampledToken | EngineError] = {}
    if plain:
        found |= zip(plain, greedy(logits[plain]), strict=True)
    # Some rows at a time on a CPU, so that they stay in its caches.
    step = len(processed) if logits.is_cuda else max(1, NUM_CACHED_LOGITS // logits.shape[1])
    for start in range(0, len(processed), step):
        rows = processed[start : start + step]
        part = _sample(logits[rows].float(), [samplers[i] for i in rows], [positions[i] for i in rows])
        found |= zip(rows, part, strict=True)
    return [found[i] for i in range(len(samplers))]


@torch.inference_mode()
def greedy(logits: Tensor) -> list[SampledToken | EngineError]:
    """The largest logit of each row, the first of equals. One kernel and one copy to the host."""
    if logits.is_cuda:
        values, token_ids = logits.max(-1)
        top, ids = float_rows(torch.stack([values.double(), token_ids.double()]))
    else:  # numpy's argmax is 5 to 10 times faster than torch's on a CPU
        rows = logits.float().numpy()
        indices = rows.argmax(-1)
        top, ids = rows[np.arange(len(rows)), indices].tolist(), indices.tolist()
    return [SampledToken(int(i)) if _is_finite(value) else _not_finite() for value, i in zip(top, ids, strict=True)]


def _sample(logits: Tensor, samplers: Sequence[Sampler], positions: Sequence[int]) -> list[SampledToken | EngineError]:
    """As `sample`, with every logits processor. `logits` (B, vocab) float32 are overwritten."""
    errors = _check_finite(logits)
    wanted = [i for i, sampler in enumerate(samplers) if sampler.params.num_logprobs is not None]
    raw = _RawLogprobs(rows=wanted, logprobs=logits[wanted].log_softmax(-1)) if wanted else None
    errors |= process_logits(logits, samplers, positions)
    drawn = [i for i, sampler in enumerate(samplers) if sampler.params.temperature and i not in errors]
    token_ids = logits.argmax(-1)
    if drawn:
        logprobs = temper_and_truncate(logits[drawn], [samplers[i].params for i in drawn])
        token_ids[drawn] = _draw(logprobs, [samplers[i].key(positions[i]) for i in drawn])
    ids = ints(token_ids)
    found = raw.tokens(token_ids, [sampler.params.num_logprobs for sampler in samplers]) if raw else {}
    return [errors[i] if i in errors else found.get(i) or SampledToken(ids[i]) for i in range(len(samplers))]


def _draw(logprobs: Tensor, keys: Sequence[tuple[int, int, int]]) -> Tensor:
    """(B,) token ids: argmax(logprobs + noise). Where few tokens are left, only their noise is computed."""
    row_keys = keys_of(keys, logprobs.device)
    possible = logprobs > -torch.inf
    if possible.sum() * 4 > logprobs.numel():
        return (logprobs + gumbel(row_keys, torch.arange(logprobs.shape[1], device=logprobs.device))).argmax(-1)
    rows, columns = possible.nonzero(as_tuple=True)
    scores = torch.full(logprobs.shape, -torch.inf, dtype=torch.float64, device=logprobs.device)
    scores[rows, columns] = logprobs[rows, columns] + gumbel(row_keys[rows, 0], columns)
    return scores.argmax(-1)


def process_logits(logits: Tensor, samplers: Sequence[Sampler], positions: Sequence[int]) -> dict[int, EngineError]:
    """Apply logit biases, penalties and forbidden tokens to `logits` (B, vocab) float32, in place.

    Returns:
        Row to its error, for rows in which no token is allowed.
    """
    biased = {i: bias for i, sampler in enumerate(samplers) if (bias := sampler.logit_bias)}
    if biased:
        add_logit_bias(logits, list(biased), list(biased.values()))
    penalised = {i: penalty for i, sampler in enumerate(samplers) if (penalty := sampler.penalty)}
    if penalised:
        apply_penalties(logits, list(penalised), list(penalised.values()))
    return _forbid(logits, samplers, positions)


def _forbid(logits: Tensor, samplers: Sequence[Sampler], positions: Sequence[int]) -> dict[int, EngineError]:
    """Set to -inf what a grammar excludes, and endings before min_tokens."""
    errors: dict[int, EngineError] = {}
    forbidden: dict[int, BoolArray] = {}
    for i, (sampler, position) in enumerate(zip(samplers, positions, strict=True)):
        endings = [t for t in sampler.params.ending_token_ids if t < logits.shape[1]]
        if sampler.matcher is not None:
            try:
                allowed = sampler.matcher.allowed(logits.shape[1])
            except EngineError as error:
                errors[i] = error
                continue
            forbidden[i] = ~allowed
            if sampler.forbids_ending(position):
                allowed[endings] = False
                # Where the grammar allows nothing but an ending, it takes precedence over min_tokens.
                forbidden[i] = ~allowed if allowed.any() else forbidden[i]
        elif sampler.forbids_ending(position):
            logits[i, endings] = -torch.inf
    if forbidden:
        rows = list(forbidden)
        mask = to_tensor(np.stack(list(forbidden.values())), logits.device)
        logits[rows] = logits[rows].masked_fill(mask, -torch.inf)
    for i, top in _tops(logits, samplers):
        if i not in errors and top == -torch.inf:
            errors[i] = EngineError("the model gives no probability to any token that this answer may go on with")
    return errors


def _tops(logits: Tensor, samplers: Sequence[Sampler]) -> Iterable[tuple[int, float]]:
    """The largest logit of the rows that may have lost it."""
    rows = [i for i, sampler in enumerate(samplers) if sampler.matcher is not None or sampler.params.min_tokens]
    return zip(rows, floats(logits[rows].amax(-1)), strict=True) if rows else ()


def _check_finite(logits: Tensor) -> dict[int, EngineError]:
    """Errors of the rows whose largest value is not finite. NaN anywhere in a row is its largest value."""
    return {i: _not_finite() for i, top in enumerate(floats(logits.amax(-1))) if not _is_finite(top)}


def _is_finite(value: float) -> bool:
    return -torch.inf < value < torch.inf


def _not_finite() -> EngineError:
    return EngineError("the model's logits are not finite numbers")


@dataclass(frozen=True, kw_only=True)
class _RawLogprobs:
    """Log-probabilities from the raw logits.

    Attributes:
        rows: The rows of the batch that asked for them.
        logprobs: (len(rows), vocab).
    """

    rows: list[int]
    logprobs: Tensor

    def tokens(self, token_ids: Tensor, nums: Sequence[int | None]) -> dict[int, SampledToken]:
        """Row to its sampled token with log-probabilities.

        Args:
            token_ids: (B,) sampled tokens of the whole batch.
            nums: (B,) how many of the most probable tokens each row asked for.
        """
        sampled = token_ids[self.rows].unsqueeze(1)
        logprobs = floats(self.logprobs.gather(1, sampled).squeeze(1))
        wanted = [nums[i] or 0 for i in self.rows]
        tops = self._tops() if any(wanted) else [()] * len(self.rows)
        ids = ints(sampled.squeeze(1))
        parts = zip(self.rows, ids, logprobs, tops, wanted, strict=True)
        return {i: SampledToken(token_id, logprob, tuple(top[:num])) for i, token_id, logprob, top, num in parts}

    def _tops(self) -> list[list[tuple[int, float]]]:
        """Always as many as anyone may ask for: which of several equals is included must not depend on other rows."""
        values, ids = self.logprobs.topk(min(MAX_TOP_LOGPROBS, self.logprobs.shape[1]))
        pairs = [zip(i, v, strict=True) for i, v in zip(int_rows(ids), float_rows(values), strict=True)]
        return [sorted(row, key=lambda pair: (-pair[1], pair[0])) for row in pairs]
