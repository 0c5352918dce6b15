"""From a request's sampling parameters to the samplers of its sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from tokenizers import Tokenizer

from mm.data.arrays import ints
from mm.data.sampling_params import SamplingParams
from mm.data.tokens import Prompt
from mm.engine.sampling.resolved_params import ResolvedSamplingParams, resolve
from mm.engine.sampling.sampler import Sampler
from mm.engine.sampling.structured_output import GrammarCompiler
from mm.engine.sampling.vocabulary import Vocabulary
from mm.errors import InvalidRequest


class HasVocabulary(Protocol):
    """The size of a language model's head."""

    @property
    def vocab_size(self) -> int: ...


class SamplingFamily(Protocol):
    """The parts of a model family that sampling needs."""

    @property
    def text_tokenizer(self) -> Tokenizer: ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    @property
    def default_sampling(self) -> Mapping[str, float]: ...

    @property
    def language(self) -> HasVocabulary: ...


class SamplerFactory:
    """Makes samplers. One per model; safe to use from several threads."""

    def __init__(self, family: SamplingFamily) -> None:
        self._defaults, self._eos_token_ids = family.default_sampling, family.eos_token_ids
        self.vocabulary = Vocabulary(family.text_tokenizer, family.language.vocab_size, family.eos_token_ids)
        self._grammars = GrammarCompiler(self.vocabulary)

    def make(self, sampling: SamplingParams, prompt: Prompt) -> list[Sampler]:
        """One sampler per sequence. It may wait for a schema to be compiled, so call it outside of the event loop.

        Raises:
            InvalidRequest: A token id is not in the vocabulary, or the schema cannot be used.
            CapacityError: Other schemas are being compiled.
        """
        self._check_ids("logit_bias", [token_id for token_id, _ in sampling.logit_bias])
        self._check_ids("stop_token_ids", sampling.stop_token_ids)
        params = self.resolve(sampling)
        form = sampling.response_format
        text = ints(prompt.token_ids[~prompt.is_visual]) if params.repetition_penalty != 1 else []
        return [
            Sampler(params, choice, prompt_token_ids=text, matcher=form and self._grammars.matcher(form))
            for choice in range(sampling.n)
        ]

    def close(self) -> None:
        """End the threads that compile schemas."""
        self._grammars.close()

    def resolve(self, sampling: SamplingParams) -> ResolvedSamplingParams:
        """The parameters with the model's own defaults where the request has none."""
        return resolve(sampling, self._defaults, self._eos_token_ids)

    def _check_ids(self, name: str, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if token_id >= self.vocabulary.size:
                size = self.vocabulary.size
                raise InvalidRequest(
                    f"{name} names the token {token_id}; this model's vocabulary has the ids 0 to {size - 1}", name
                )
