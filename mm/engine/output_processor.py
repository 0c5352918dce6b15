"""One answer's way from chosen tokens to deltas: text, log-probabilities, and when it is over."""

from __future__ import annotations

from mm.data.outputs import Delta
from mm.data.sampling_params import SamplingParams
from mm.engine.sampling.detokenizer import IncrementalDetokenizer
from mm.engine.sampling.sampler import SampledToken, Sampler
from mm.engine.sampling.vocabulary import Vocabulary


class SequenceOutput:
    """One answer under way. It stays with the answer through preemption.

    Args:
        sampler: This answer's; the output tells it of every token.
        sampling: What the request asks.
        max_new_tokens: Length at which the answer is cut.
    """

    def __init__(self, vocabulary: Vocabulary, sampler: Sampler, sampling: SamplingParams, max_new_tokens: int) -> None:
        self._vocabulary, self._sampler = vocabulary, sampler
        self._max_new_tokens = max_new_tokens
        self._text = IncrementalDetokenizer(vocabulary.tokenizer, sampling.stop, min_tokens=sampling.min_tokens)
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None

    @property
    def position(self) -> int:
        """Of the next token: what `choose` is given."""
        return len(self.token_ids)

    @property
    def num_left(self) -> int:
        """Tokens that the answer may still have."""
        return self._max_new_tokens - len(self.token_ids)

    def push(self, chosen: SampledToken, num_prompt_tokens: int | None = None, *, is_drafted: bool = False) -> Delta:
        """Add a token. After the delta that carries a finish reason the answer is over.

        Args:
            num_prompt_tokens: Told with a request's first delta.
            is_drafted: Whether a drafter had said it before.
        """
        token_id = chosen.token_id
        self._sampler.observe(token_id)
        self.token_ids.append(token_id)
        ended = self._sampler.ends(token_id)
        text = "" if ended else self._text.push(token_id)
        if ended or self._text.stopped or self._sampler.is_complete:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self._max_new_tokens:
            self.finish_reason = "length"
        return Delta(
            choice=self._sampler.choice,
            text=text if self.finish_reason is None else text + self._text.finish(),
            token_ids=(token_id,),
            finish_reason=self.finish_reason,
            num_prompt_tokens=num_prompt_tokens,
            num_drafted=int(is_drafted and self.finish_reason is None),
            logprobs=()
            if chosen.logprob is None
            else (self._vocabulary.logprob(token_id, chosen.logprob, chosen.top),),
        )
