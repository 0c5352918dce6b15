"""The output of one sequence: sampled tokens become text, log-probabilities and deltas, until it is finished."""

from __future__ import annotations

from mm.data.outputs import Delta
from mm.data.sampling_params import SamplingParams
from mm.engine.sampling.detokenizer import IncrementalDetokenizer
from mm.engine.sampling.sampler import SampledToken, Sampler
from mm.engine.sampling.vocabulary import Vocabulary


class SequenceOutput:
    """Output of one sequence. It stays with the sequence through preemption.

    Args:
        sampler: The sequence's own; it observes every token.
        sampling: What the request asks.
        max_new_tokens: Length at which the output is cut.
    """

    def __init__(self, vocabulary: Vocabulary, sampler: Sampler, sampling: SamplingParams, max_new_tokens: int) -> None:
        self._vocabulary, self._sampler = vocabulary, sampler
        self._max_new_tokens = max_new_tokens
        self._text = IncrementalDetokenizer(vocabulary.decoding, sampling.stop, min_tokens=sampling.min_tokens)
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None

    @property
    def seed(self) -> int:
        """Of the sampler's noise."""
        return self._sampler.params.seed

    @property
    def position(self) -> int:
        """Index of the next token in the output; the sampler's noise is keyed by it."""
        return len(self.token_ids)

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens that the output may still have."""
        return self._max_new_tokens - len(self.token_ids)

    def append(self, sampled: SampledToken, num_prompt_tokens: int | None = None, *, is_drafted: bool = False) -> Delta:
        """Add a token and return what it makes visible. The delta that carries a finish reason is the last one.

        Args:
            num_prompt_tokens: Reported with the first delta of a request.
            is_drafted: Whether a drafter had proposed this token.

        Raises:
            SchemaNotFulfilled: The output is complete and not of the request's schema.
        """
        token_id = sampled.token_id
        self._sampler.observe(token_id)
        self.token_ids.append(token_id)
        is_ending = self._sampler.ends(token_id)
        text = "" if is_ending else self._text.push(token_id)
        if is_ending or self._text.stopped or self._sampler.is_complete:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self._max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self._text.finish()
            if self._text.stopped:
                self.finish_reason = "stop"
        if self.finish_reason == "stop" and self._sampler.matcher is not None:
            self._sampler.matcher.check(self._text.text)
        return Delta(
            choice=self._sampler.choice,
            text=text,
            token_ids=(token_id,),
            finish_reason=self.finish_reason,
            num_prompt_tokens=num_prompt_tokens,
            num_drafted=int(is_drafted and self.finish_reason is None),
            logprobs=()
            if sampled.logprob is None
            else (self._vocabulary.logprob(token_id, sampled.logprob, sampled.top),),
        )
