"""From our sampling parameters to vLLM's. Text, stop strings and endings are ours; vLLM chooses the tokens.

Every value is passed on as it is, or refused by name: vLLM itself raises low temperatures and takes the seed -1 for
none.
Structured output is vLLM's with our grammar: both use llguidance, which reads the grammar's options in the schema.
"""

from __future__ import annotations

from typing import Any

from mm.data.sampling_params import SamplingParams, min_p_floor, sampling_options
from mm.engine.interface import USE_NATIVE
from mm.engine.sampling.resolved_params import ResolvedSamplingParams
from mm.errors import InvalidRequest
from mm.vllm.capabilities import LEAST_TEMPERATURE

SEEDS = 1 << 62


def vllm_sampling(params: ResolvedSamplingParams, choice: int, max_new_tokens: int) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams` for one choice, without those of structured output.

    vLLM's own endings are off: the tokens that end a text are given to it, and what follows from a token is decided
    by `SequenceOutput`.

    Raises:
        InvalidRequest: An option has a value that vLLM would change, or is one that it does not have.
    """
    if 0 < params.temperature < LEAST_TEMPERATURE:
        raise InvalidRequest(
            f"temperature was {params.temperature:g}; the engine vllm takes 0 and from {LEAST_TEMPERATURE:g} on, or "
            f"{USE_NATIVE}",
            "temperature",
        )
    min_p = 0.0
    for floor, value in params.floors:
        if floor is not min_p_floor:
            raise InvalidRequest(f"the engine vllm does not have {option_of(floor)}; {USE_NATIVE}", option_of(floor))
        min_p = value
    return {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": min_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
        "logit_bias": dict(params.logit_bias) or None,
        "seed": (params.seed + choice) % SEEDS,
        "min_tokens": params.min_tokens,
        "max_tokens": max_new_tokens,
        "stop_token_ids": sorted(params.ending_token_ids),
        "ignore_eos": True,
        "detokenize": False,
        "logprobs": params.num_logprobs,
    }


def option_of(floor: object) -> str:
    """The name of the option that a truncation belongs to."""
    found = sampling_options(SamplingParams).items()
    return next((name for name, declared in found if declared.floor is floor), "this truncation")
