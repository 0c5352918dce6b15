"""Sampling parameters with every default filled in."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from mm.data.sampling_params import Floor, SamplingParams, sampling_options


@dataclass(frozen=True, kw_only=True)
class ResolvedSamplingParams:
    """The parameters that the sampler reads. The defaults sample greedily and change no logit.

    Attributes:
        temperature: 0 is greedy.
        top_k, top_p: 0 and 1 keep every token.
        floors: Truncations that a function declares, such as min_p, with the value of each.
        presence_penalty, frequency_penalty, repetition_penalty: 0, 0 and 1 change nothing.
        logit_bias: (token id, value) pairs.
        seed: Key of the noise.
        min_tokens: Before this many tokens, none of `ending_token_ids` is sampled.
        ending_token_ids: Tokens that end the text.
        num_logprobs: How many of the most probable tokens are returned with each sampled one. None returns no
            log-probabilities at all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    floors: tuple[tuple[Floor, float], ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    min_tokens: int = 0
    ending_token_ids: frozenset[int] = frozenset()
    num_logprobs: int | None = None

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or bool(self.floors)


def resolve(
    sampling: SamplingParams, defaults: Mapping[str, float], eos_token_ids: frozenset[int]
) -> ResolvedSamplingParams:
    """Fill in the values that a request does not give.

    Args:
        defaults: The checkpoint's own values, by option name.
        eos_token_ids: The checkpoint's tokens that end a text.
    """
    values = {one.name: getattr(sampling, one.name) for one in dataclasses.fields(sampling)}
    options = sampling_options(type(sampling))
    for name, declared in options.items():
        if values[name] is None and declared.off is not None:
            values[name] = defaults.get(name, declared.off)
    values["top_k"] = max(int(values["top_k"]), 0)
    values["seed"] = new_seed() if sampling.seed is None else sampling.seed
    same = {one.name for one in dataclasses.fields(ResolvedSamplingParams)} & values.keys()
    return ResolvedSamplingParams(
        **{name: values[name] for name in same},
        floors=tuple(
            (declared.floor, float(values[name]))
            for name, declared in options.items()
            if declared.floor is not None and values[name] != declared.off
        ),
        ending_token_ids=frozenset(sampling.stop_token_ids)
        | (eos_token_ids if not sampling.ignore_eos else frozenset[int]()),
        num_logprobs=sampling.top_logprobs if sampling.logprobs else None,
    )


def new_seed() -> int:
    """A random seed for a request without one."""
    return secrets.randbits(63)
