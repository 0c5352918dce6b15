"""The state of sampling one sequence: its parameters, its generated tokens, its grammar.

    samplers = factory.make(request.sampling, prompt)      # one per sequence; see mm.engine.sampling.sampler_factory
    sampled = sample(logits, samplers, positions)          # changes nothing; see mm.engine.sampling.sample
    sampler.observe(token_id)                              # each token that becomes part of the text, in order

A preempted sequence keeps its sampler. A new sampler that observed the same tokens is equal to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mm.data.arrays import FloatArray, IntArray
from mm.engine.sampling.logits_processors import Penalty
from mm.engine.sampling.resolved_params import ResolvedSamplingParams
from mm.engine.sampling.structured_output import GrammarMatcher


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A sampled token.

    Attributes:
        logprob: Its log-probability from the raw logits. None where none was asked for.
        top: (token id, log-probability) of the most probable tokens from the raw logits, the most probable first.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Sampling state of one sequence.

    Args:
        params: The request's sampling parameters.
        choice: Index of the sequence among the request's n.
        prompt_token_ids: The prompt's text, for the repetition penalty, without visual placeholders.
        matcher: The sequence's place in its grammar. It belongs to this sampler alone.
    """

    def __init__(
        self,
        params: ResolvedSamplingParams,
        choice: int = 0,
        *,
        prompt_token_ids: Iterable[int] = (),
        matcher: GrammarMatcher | None = None,
    ) -> None:
        self.params, self.choice, self.matcher = params, choice, matcher
        # Greedy over raw logits. What min_tokens adds ends by itself, so it is looked at per position.
        self._is_greedy = not (
            params.temperature
            or params.logit_bias
            or params.has_penalties
            or matcher
            or params.num_logprobs is not None
        )
        self._min_tokens = params.min_tokens if params.ending_token_ids else 0
        self._logit_bias = _columns(params.logit_bias)
        counted = prompt_token_ids if params.repetition_penalty != 1 else ()
        self._counts = _TokenCounts(counted) if params.has_penalties else None

    def observe(self, token_id: int) -> None:
        """Note a token that has become part of the text."""
        if self._counts is not None:
            self._counts.add(token_id)
        if self.matcher is not None:
            self.matcher.consume(token_id)

    def ends(self, token_id: int) -> bool:
        """Whether this token ends the text."""
        return token_id in self.params.ending_token_ids

    @property
    def is_complete(self) -> bool:
        """Whether the grammar allows nothing more, so that the text ends without another token."""
        return self.matcher is not None and self.matcher.is_stopped

    def is_greedy(self, position: int) -> bool:
        """Whether the token at this position is the argmax of the raw logits."""
        return self._is_greedy and position >= self._min_tokens

    def forbids_ending(self, position: int) -> bool:
        """Whether min_tokens forbids every ending at this position."""
        return position < self._min_tokens

    @property
    def logit_bias(self) -> tuple[IntArray, FloatArray] | None:
        """(n,) token ids and (n,) values. None where there are none."""
        return self._logit_bias

    @property
    def penalty(self) -> Penalty | None:
        """The penalties of the tokens so far. None where there are none."""
        if self._counts is None or not self._counts.num_tokens:
            return None
        params = self.params
        token_ids, counts = self._counts.columns
        return Penalty(
            token_ids=token_ids,
            counts=counts,
            repetition=params.repetition_penalty,
            frequency=params.frequency_penalty,
            presence=params.presence_penalty,
        )

    def key(self, position: int) -> tuple[int, int, int]:
        """(seed, choice, position): everything that the noise depends on."""
        return self.params.seed, self.choice, position


class _TokenCounts:
    """Distinct tokens and how often each was generated, growing in place."""

    def __init__(self, prompt_token_ids: Iterable[int]) -> None:
        distinct = sorted(set(prompt_token_ids))
        self._index = {token_id: i for i, token_id in enumerate(distinct)}
        self._token_ids = np.array(distinct, dtype=np.int64)
        self._counts = np.zeros(len(distinct), dtype=np.float32)

    @property
    def num_tokens(self) -> int:
        return len(self._index)

    @property
    def columns(self) -> tuple[IntArray, FloatArray]:
        return self._token_ids[: self.num_tokens], self._counts[: self.num_tokens]

    def add(self, token_id: int) -> None:
        index = self._index.setdefault(token_id, self.num_tokens)
        if index == len(self._token_ids):
            room = len(self._token_ids) + 64
            self._token_ids = np.concatenate([self._token_ids, np.zeros(room, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room, dtype=np.float32)])
        self._token_ids[index] = token_id
        self._counts[index] += 1


def _columns(pairs: Sequence[tuple[int, float]]) -> tuple[IntArray, FloatArray] | None:
    if not pairs:
        return None
    token_ids, values = zip(*pairs, strict=True)
    return np.array(token_ids, dtype=np.int64), np.array(values, dtype=np.float32)
