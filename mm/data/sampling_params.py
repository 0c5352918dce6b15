"""Sampling parameters: how the next token is chosen, when generation stops, and which form the answer has.

Each option is declared here once: its default, range, help and, for a truncation, its effect on the logits. Checks, the
fields of the HTTP API, the defaults from a checkpoint's generation_config.json and the sampler are derived from that.
What depends on the model (whether a token id is in its vocabulary, whether a schema can be compiled) is checked by
`mm.engine.sampling`.

To add a truncation such as top-n-sigma, declare one field in `SamplingParams`:

    top_n_sigma: float | None = option(
        None, range=Range(low=0, high=100), off=0.0, floor=top_n_sigma_floor, help="Keeps the tokens within ..."
    )
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from mm.data.checks import Range, is_number
from mm.data.response_format import ResponseFormat
from mm.errors import InvalidRequest, shown
from mm.settings import KEY, Bounds

MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 1000
MAX_STOP_TOKEN_IDS = 128
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20

Floor = Callable[[Tensor, Tensor], Tensor]
"""From log-probabilities (B, vocab) after temperature, and the option's values (B, 1), to the least log-probability
(B, 1) that stays. It has to keep each row's largest."""


@dataclass(frozen=True, kw_only=True)
class SamplingOption:
    """The declaration of one field of `SamplingParams`.

    Attributes:
        help: What the option does, in one sentence.
        range: Allowed numbers; None where the field is not a number.
        off: The value that changes nothing. An option that has one may be left at None, which takes the value in the
            checkpoint's generation_config.json, or else this one.
        floor: For an option that truncates the distribution: which tokens stay.
    """

    help: str
    range: Range | None = None
    off: float | None = None
    floor: Floor | None = None


def option(
    default: Any, *, help: str, range: Range | None = None, off: float | None = None, floor: Floor | None = None
) -> Any:
    """A dataclass field that carries its declaration, for this module and for `mm.settings`, which HTTP reads."""
    declared = SamplingOption(help=help, range=range, off=off, floor=floor)
    allowed = range or Range()
    bounds = Bounds(
        help=help,
        min=None if allowed.excludes_low else allowed.low,
        above=allowed.low if allowed.excludes_low else None,
        max=allowed.high,
    )
    return field(default=default, metadata={"option": declared, KEY: bounds})


@functools.cache
def sampling_options(params: type[SamplingParams]) -> dict[str, SamplingOption]:
    """Name to declaration of every option of a class, in the order of its fields."""
    return {f.name: f.metadata["option"] for f in dataclasses.fields(params) if "option" in f.metadata}


def min_p_floor(logprobs: Tensor, min_p: Tensor) -> Tensor:
    """Tokens below `min_p` times the largest probability go (arXiv:2407.01082)."""
    return logprobs.amax(-1, keepdim=True) + min_p.log()


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen, when generation stops, and which form the answer has. All fields are optional.

    Options that have a value in the checkpoint's generation_config.json take it where they are None: temperature,
    top_p, top_k, min_p and repetition_penalty.

    Raises:
        InvalidRequest: Names the option that is out of range.
    """

    max_new_tokens: int | None = option(
        None, range=Range(low=1, is_whole=True), help="Most tokens to generate; None is what the context has left."
    )
    temperature: float | None = option(None, range=Range(low=0, high=2), off=1.0, help="0 is greedy.")
    top_p: float | None = option(
        None,
        range=Range(low=0, high=1, excludes_low=True),
        off=1.0,
        help="Keeps the most probable tokens that together have this probability.",
    )
    top_k: int | None = option(
        None,
        range=Range(low=-1, is_whole=True, text="at least 1, or 0 or -1 for all tokens"),
        off=0,
        help="Keeps this many of the most probable tokens; 0 or -1 keeps all.",
    )
    min_p: float | None = option(
        None,
        range=Range(low=0, high=1),
        off=0.0,
        floor=min_p_floor,
        help="Keeps tokens at least this many times as probable as the most probable one.",
    )
    presence_penalty: float = option(
        0.0, range=Range(low=-2, high=2), help="Subtracted from the logits of tokens that were generated before."
    )
    frequency_penalty: float = option(
        0.0, range=Range(low=-2, high=2), help="Subtracted from a token's logit once per time that it was generated."
    )
    repetition_penalty: float | None = option(
        None,
        range=Range(low=0.01, high=100),
        off=1.0,
        help="Divides positive and multiplies negative logits of tokens in the prompt's text and the generated text.",
    )
    logit_bias: tuple[tuple[int, float], ...] = option(
        (), help="(token id, -100 to 100) pairs, or such a mapping; each value is added to the token's logit."
    )
    seed: int | None = option(
        None,
        range=Range(is_whole=True),
        help="Equal requests with an equal seed give equal answers; None draws a seed.",
    )
    stop: tuple[str, ...] = option((), help="Strings that end the answer; they are not part of it.")
    stop_token_ids: tuple[int, ...] = option((), help="Tokens that end the answer; they add no text.")
    min_tokens: int = option(
        0,
        range=Range(low=0, is_whole=True),
        help="Nothing but a complete response_format ends the answer before it has this many tokens.",
    )
    n: int = option(1, range=Range(low=1, is_whole=True), help="Number of answers.")
    ignore_eos: bool = option(False, help="Generate max_new_tokens tokens, whatever the model says.")
    logprobs: bool = option(
        False,
        help="Return each token's log-probability from the raw logits, before penalties, temperature and truncation.",
    )
    top_logprobs: int = option(
        0,
        range=Range(low=0, high=MAX_TOP_LOGPROBS, is_whole=True),
        help="Return the log-probabilities of this many most probable tokens at each position; needs logprobs.",
    )
    response_format: ResponseFormat | None = option(None, help="The answer's form, such as a JSON schema.")

    def __post_init__(self) -> None:
        self._normalise()
        for name, declared in sampling_options(type(self)).items():
            if declared.range is not None:
                declared.range.check(name, getattr(self, name))
        for name in ("ignore_eos", "logprobs"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequest(f"{name} was {shown(getattr(self, name))}; it has to be true or false", name)
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", "top_logprobs")
        if self.max_new_tokens is not None and self.min_tokens > self.max_new_tokens:
            limit = f"the {self.max_new_tokens} tokens that the answer may have"
            raise InvalidRequest(f"min_tokens was {self.min_tokens}; it cannot exceed {limit}", "min_tokens")
        if self.ignore_eos and self.response_format is not None:
            raise InvalidRequest("ignore_eos cannot go with a response_format, which has an end", "ignore_eos")

    def _normalise(self) -> None:
        """Turn the forms that callers have at hand into tuples, and None into the field's default."""
        put = functools.partial(object.__setattr__, self)
        put("stop", _strings(self.stop))
        put("stop_token_ids", _token_ids(self.stop_token_ids))
        put("logit_bias", _biases(self.logit_bias))
        put("response_format", ResponseFormat.parse(self.response_format))
        for one in dataclasses.fields(self):
            if getattr(self, one.name) is None:
                put(one.name, one.default)


def _strings(stop: object) -> tuple[str, ...]:
    """`stop` as a caller may give it: nothing, one string or several."""
    strings = (stop,) if isinstance(stop, str) else stop or ()
    if not isinstance(strings, Sequence):
        raise InvalidRequest(f"stop was {shown(stop)}; it has to be a string or a list of strings", "stop")
    found = tuple(text for text in cast("Sequence[object]", strings) if isinstance(text, str))
    if len(found) < len(cast("Sequence[object]", strings)):
        raise InvalidRequest(f"stop was {shown(stop)}; it has to be a string or a list of strings", "stop")
    if len(found) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop has {len(found)} strings; the limit is {MAX_STOP_STRINGS}", "stop")
    if any(not text or len(text) > MAX_STOP_CHARS for text in found):
        raise InvalidRequest(f"stop holds an empty string, or one of more than {MAX_STOP_CHARS} characters", "stop")
    return found


def _token_ids(ids: object) -> tuple[int, ...]:
    name = "stop_token_ids"
    given = cast("Sequence[object] | None", ids if isinstance(ids, Sequence) or ids is None else None) or ()
    found = tuple(token_id for token_id in given if _is_token_id(token_id))
    if not isinstance(ids, Sequence | None) or len(found) < len(given):
        raise InvalidRequest(f"{name} was {shown(cast(object, ids))}; it has to be a list of token ids", name)
    if len(found) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(f"{name} has {len(found)} ids; the limit is {MAX_STOP_TOKEN_IDS}", name)
    return cast("tuple[int, ...]", found)


def _biases(bias: object) -> tuple[tuple[int, float], ...]:
    """`logit_bias` from a mapping, whose keys are strings in JSON, or from pairs."""
    name = "logit_bias"
    if not isinstance(bias, Mapping | tuple | None):
        raise InvalidRequest(f"{name} was {shown(bias)}; it has to map token ids to numbers", name)
    given = cast("Mapping[object, object] | tuple[tuple[object, object], ...] | None", bias)
    pairs = list(given.items()) if isinstance(given, Mapping) else list(given or ())
    if len(pairs) > MAX_BIASES:
        raise InvalidRequest(f"{name} has {len(pairs)} entries; the limit is {MAX_BIASES}", name)
    found: dict[int, float] = {}
    for key, value in pairs:
        token_id = int(key) if isinstance(key, str) and re.fullmatch(r"[0-9]{1,10}", key) else key
        if not isinstance(token_id, int) or not _is_token_id(token_id):
            raise InvalidRequest(f"{name} has the key {shown(key)}; keys are token ids", name)
        if token_id in found:
            raise InvalidRequest(f"{name} names the token {token_id} twice", name)
        if not (is_number(value) and -100 <= value <= 100):
            raise InvalidRequest(f"{name}[{token_id}] was {shown(value)}; it has to be from -100 to 100", name)
        found[token_id] = float(value)
    return tuple(found.items())


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
