"""What a request may ask of its answer: how tokens are chosen, when to stop, what form it has to have.

The values are checked here, once, for every way in. What depends on the model (is a token id in its vocabulary, can its
tokenizer carry out a schema) is checked where the model is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mm.data.checks import check_integer, check_number, is_number, shown
from mm.data.response_format import ResponseFormat
from mm.errors import InvalidRequest

MAX_STOP_STRINGS = 4


MAX_STOP_CHARS = 1000


MAX_STOP_TOKEN_IDS = 128


MAX_BIASES = 1024


MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen, and when to stop. None takes the model's own default.

    Attributes:
        max_new_tokens: Upper bound of generated tokens; None means what is left of the context.
        temperature: 0 is greedy.
        top_p: Nucleus mass in (0, 1].
        top_k: Only this many most probable tokens; 0 or -1 is all.
        min_p: Only tokens at least this many times as probable as the most probable one.
        presence_penalty: Taken from the logits of tokens that the answer holds.
        frequency_penalty: The same, once per occurrence.
        repetition_penalty: Divides positive logits, multiplies negative ones, of tokens in the prompt's text and in
            the answer; above 1 discourages.
        logit_bias: (token id, -100 to 100) pairs, added to the logits. A mapping is taken too.
        seed: Noise is keyed by (seed, choice, position), so equal requests give equal answers. None draws one.
        stop: Strings that end the answer; they are not part of it.
        stop_token_ids: Tokens that end the answer as the end-of-text token does; they give no text.
        min_tokens: Nothing ends the answer before it has this many tokens, except that a `response_format` is complete.
        n: Number of answers.
        ignore_eos: Go on to `max_new_tokens` whatever the model says; load generators count on it.
        logprobs: Say each token's log-probability: of the model's own law, before anything above changes it.
        top_logprobs: Say as much of this many most probable tokens at each place; needs `logprobs`.
        response_format: The form of the answer; an object as OpenAI has it is taken too.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    n: int = 1
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    response_format: ResponseFormat | None = None

    def __post_init__(self) -> None:
        self._normalise()
        self._check_law()
        self._check_ending()
        for name in ("ignore_eos", "logprobs"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequest(f"{name} was {shown(getattr(self, name))}; it has to be true or false", name)
        check_integer("n", self.n, "at least 1", lambda x: x >= 1)
        check_integer("seed", self.seed, "of any size", lambda x: True)
        top = f"from 0 to {MAX_TOP_LOGPROBS}"
        check_integer("top_logprobs", self.top_logprobs, top, lambda x: 0 <= x <= MAX_TOP_LOGPROBS)
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", "top_logprobs")

    def _normalise(self) -> None:
        """The forms that callers have at hand, as tuples; None where there is a plain default, as that default."""
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        put("stop", _strings(self.stop))
        put("stop_token_ids", _ids(self.stop_token_ids))
        put("logit_bias", _biases(self.logit_bias))
        put("response_format", ResponseFormat.parse(self.response_format))
        plain = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0, "n": 1, "top_logprobs": 0}
        plain |= {"ignore_eos": False, "logprobs": False}
        for name, default in plain.items():
            if getattr(self, name) is None:
                put(name, default)

    def _check_law(self) -> None:
        check_number("temperature", self.temperature, "from 0 to 2", lambda x: 0 <= x <= 2)
        check_number("top_p", self.top_p, "above 0 and at most 1", lambda x: 0 < x <= 1)
        check_integer("top_k", self.top_k, "at least 1, or 0 or -1 for all tokens", lambda x: x >= -1)
        check_number("min_p", self.min_p, "from 0 to 1", lambda x: 0 <= x <= 1)
        check_number("presence_penalty", self.presence_penalty, "from -2 to 2", lambda x: -2 <= x <= 2)
        check_number("frequency_penalty", self.frequency_penalty, "from -2 to 2", lambda x: -2 <= x <= 2)
        check_number("repetition_penalty", self.repetition_penalty, "from 0.01 to 100", lambda x: 0.01 <= x <= 100)

    def _check_ending(self) -> None:
        check_integer("max_new_tokens", self.max_new_tokens, "at least 1", lambda x: x >= 1)
        check_integer("min_tokens", self.min_tokens, "at least 0", lambda x: x >= 0)
        if self.max_new_tokens is not None and self.min_tokens > self.max_new_tokens:
            limit = f"the {self.max_new_tokens} tokens that the answer may have"
            raise InvalidRequest(f"min_tokens was {self.min_tokens}; it cannot exceed {limit}", "min_tokens")
        if self.ignore_eos and self.response_format is not None:
            raise InvalidRequest("ignore_eos cannot go with a response_format, which has an end", "ignore_eos")


def _strings(stop: Any) -> tuple[str, ...]:
    """`stop` as a caller may give it: nothing, one string or several."""
    strings = (stop,) if isinstance(stop, str) else stop or ()
    if not isinstance(strings, Sequence) or not all(isinstance(text, str) for text in strings):
        raise InvalidRequest(f"stop was {shown(stop)}; it has to be a string or a list of strings", "stop")
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop has {len(strings)} strings; the limit is {MAX_STOP_STRINGS}", "stop")
    if any(not text or len(text) > MAX_STOP_CHARS for text in strings):
        raise InvalidRequest(f"stop holds an empty string, or one of more than {MAX_STOP_CHARS} characters", "stop")
    return tuple(strings)


def _ids(ids: Any) -> tuple[int, ...]:
    name = "stop_token_ids"
    ids = () if ids is None else ids
    if not isinstance(ids, Sequence) or not all(_is_id(token_id) for token_id in ids):
        raise InvalidRequest(f"{name} was {shown(ids)}; it has to be a list of token ids", name)
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(f"{name} has {len(ids)} ids; the limit is {MAX_STOP_TOKEN_IDS}", name)
    return tuple(ids)


def _biases(bias: Any) -> tuple[tuple[int, float], ...]:
    """`logit_bias` from a mapping, whose keys JSON makes strings, or from pairs."""
    name = "logit_bias"
    if not isinstance(bias, Mapping | tuple | None):
        raise InvalidRequest(f"{name} was {shown(bias)}; it has to map token ids to numbers", name)
    pairs = list(bias.items()) if isinstance(bias, Mapping) else list(bias or ())
    if len(pairs) > MAX_BIASES:
        raise InvalidRequest(f"{name} has {len(pairs)} entries; the limit is {MAX_BIASES}", name)
    found: dict[Any, float] = {}
    for key, value in pairs:
        digits = isinstance(key, str) and re.fullmatch(r"[0-9]{1,10}", key)
        token_id = int(key) if digits else key
        if not _is_id(token_id):
            raise InvalidRequest(f"{name} has the key {shown(key)}; keys are token ids", name)
        if token_id in found:
            raise InvalidRequest(f"{name} names the token {token_id} twice", name)
        if not (is_number(value) and -100 <= value <= 100):
            raise InvalidRequest(f"{name}[{token_id}] was {shown(value)}; it has to be from -100 to 100", name)
        found[token_id] = float(value)
    return tuple(found.items())


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
