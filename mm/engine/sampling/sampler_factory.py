"""From what a request asks to the samplers of its answers: defaults, checks against the vocabulary, grammars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mm.data.sampling_params import SamplingParams
from mm.data.tokens import Prompt
from mm.engine.sampling.sampler import ResolvedSamplingParams, Sampler, new_seed
from mm.engine.sampling.structured_output import GrammarCompiler
from mm.engine.sampling.vocabulary import Vocabulary
from mm.errors import InvalidRequest


class SamplerFactory:
    """Makes samplers for one model. One per model, safe to use from several threads.

    Args:
        family: Gives `text_tokenizer`, `eos_token_ids`, `default_sampling` and `language.vocab_size`.
    """

    def __init__(self, family: Any) -> None:
        self._family = family
        self.vocabulary = Vocabulary(family.text_tokenizer, family.language.vocab_size, family.eos_token_ids)
        self._grammars = GrammarCompiler(self.vocabulary)

    def make(self, sampling: SamplingParams, prompt: Prompt) -> list[Sampler]:
        """One sampler per answer. May wait for a schema to be compiled: not for the event loop.

        Raises:
            InvalidRequest: A token id is not in the vocabulary, or the schema cannot be used.
            CapacityError: Other schemas are being compiled.
        """
        self._check_ids("logit_bias", [token_id for token_id, _ in sampling.logit_bias])
        self._check_ids("stop_token_ids", sampling.stop_token_ids)
        rule = self.rule(sampling)
        form = sampling.response_format
        seen = prompt.token_ids[~prompt.is_visual].tolist() if rule.repetition_penalty != 1 else ()
        return [
            Sampler(rule, choice, prompt_token_ids=seen, matcher=form and self._grammars.matcher(form))
            for choice in range(sampling.n)
        ]

    def close(self) -> None:
        self._grammars.close()

    def rule(self, sampling: SamplingParams) -> ResolvedSamplingParams:
        """The rule with the model's own defaults where the request says nothing."""
        given = {name: self._or_default(sampling, name, plain) for name, plain in PLAIN.items()}
        eos = frozenset() if sampling.ignore_eos else self._family.eos_token_ids
        return ResolvedSamplingParams(
            temperature=given["temperature"],
            top_k=max(int(given["top_k"]), 0),
            top_p=given["top_p"],
            min_p=given["min_p"],
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=given["repetition_penalty"],
            logit_bias=sampling.logit_bias,
            seed=new_seed() if sampling.seed is None else sampling.seed,
            min_tokens=sampling.min_tokens,
            ending_token_ids=eos | frozenset(sampling.stop_token_ids),
            num_logprobs=sampling.top_logprobs if sampling.logprobs else None,
        )

    def _or_default(self, sampling: SamplingParams, name: str, plain: float) -> float:
        value = getattr(sampling, name)
        return self._family.default_sampling.get(name, plain) if value is None else value

    def _check_ids(self, name: str, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if token_id >= self.vocabulary.size:
                size = self.vocabulary.size
                raise InvalidRequest(
                    f"{name} names the token {token_id}; this model's vocabulary has the ids 0 to {size - 1}", name
                )


PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
"""What holds when neither the request nor the model says anything."""
