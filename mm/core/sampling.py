"""What a request may ask of its answer: how tokens are chosen, when to stop, what form it has to have.

Checked here, once, for every way in. What depends on the model (is a token id in its vocabulary, can its tokenizer
carry out a schema) is checked where the model is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from mm.core.errors import InvalidRequest

MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 1000
MAX_STOP_TOKEN_IDS = 128
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 32
MAX_MULTIPLE = 100_000
"""Of all `multipleOf` in a schema together. An automaton has a state per remainder: a million of them take 350 MB."""


@dataclass(frozen=True, kw_only=True)
class ResponseFormat:
    """The form that an answer has to have.

    Attributes:
        kind: "json_object" is any JSON object; "json_schema" is what `schema` describes.
        schema: The JSON schema, as JSON. Strict or not, it is enforced.
    """

    kind: Literal["json_object", "json_schema"]
    schema: str | None = None

    @classmethod
    def parse(cls, value: Any, param: str = "response_format") -> ResponseFormat | None:
        """What OpenAI's `response_format` object means; plain text is None.

        Raises:
            InvalidRequest: Names the part that cannot be used.
        """
        if value is None or isinstance(value, ResponseFormat):
            return value
        kind = value.get("type") if isinstance(value, Mapping) else None
        if kind not in ("text", "json_object", "json_schema"):
            raise InvalidRequest(
                f"{param} has to be an object whose type is text, json_object or json_schema; it was {_shown(value)}",
                param if kind is None else f"{param}.type",
            )
        allowed = {"type", "json_schema"} if kind == "json_schema" else {"type"}
        _only(value, allowed, param)
        if kind == "json_schema":
            return cls(kind="json_schema", schema=_schema(value.get("json_schema"), f"{param}.json_schema"))
        return cls(kind="json_object") if kind == "json_object" else None


def _schema(value: Any, param: str) -> str:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{param} has to be an object with name and schema; it was {_shown(value)}", param)
    _only(value, {"name", "description", "schema", "strict"}, param)
    name, strict, schema = value.get("name"), value.get("strict"), value.get("schema")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise InvalidRequest(
            f"{param}.name was {_shown(name)}; it has to be 1 to 64 letters, digits, _ or -", f"{param}.name"
        )
    if not isinstance(strict, bool | None):
        raise InvalidRequest(f"{param}.strict was {_shown(strict)}; it has to be true or false", f"{param}.strict")
    if not isinstance(schema, Mapping):
        raise InvalidRequest(
            f"{param}.schema was {_shown(schema)}; it has to be a JSON schema object", f"{param}.schema"
        )
    return _schema_text(schema, f"{param}.schema")


def _schema_text(schema: Mapping[str, Any], param: str) -> str:
    """The schema as JSON, once it is known to be small enough."""
    too_large = InvalidRequest(f"{param} takes more than the limit of {MAX_SCHEMA_BYTES} bytes", param)
    level: list[Any] = [schema]
    num_values, multiples = 1, []
    for _ in range(MAX_SCHEMA_DEPTH):
        multiples += [v["multipleOf"] for v in level if isinstance(v, Mapping) and _is_number(v.get("multipleOf"))]
        level = [child for value in level for child in _children(value)]
        num_values += len(level)
        if num_values > MAX_SCHEMA_BYTES:  # each takes a byte at least
            raise too_large
    if level:
        raise InvalidRequest(f"{param} is nested deeper than the limit of {MAX_SCHEMA_DEPTH} levels", param)
    if _common_multiple(multiples) > MAX_MULTIPLE:
        message = f"{param} has multipleOf whose least common multiple takes more than {MAX_MULTIPLE} steps"
        raise InvalidRequest(message, param)
    try:
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        size = len(text.encode())
    except (TypeError, ValueError):
        raise InvalidRequest(f"{param} holds what is no JSON", param) from None
    if size > MAX_SCHEMA_BYTES:
        raise too_large
    return text


def _common_multiple(values: Sequence[float]) -> int:
    """The least common multiple, counted in the last decimal place that any of the values has."""
    parts = [Decimal(v if isinstance(v, int) else repr(v)) for v in values if v]
    exponents = [exponent for part in parts if isinstance(exponent := part.as_tuple().exponent, int)]
    places = max(0, -min(exponents, default=0))
    if max((part.adjusted() for part in parts), default=0) + places > 30:
        return 10**30
    return math.lcm(*(abs(int(part.scaleb(places))) for part in parts))


def _children(value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list | tuple) else ()


def _only(value: Mapping[str, Any], allowed: set[str], param: str) -> None:
    unknown = sorted(str(name) for name, given in value.items() if name not in allowed and given is not None)
    if unknown:
        name = unknown[0][:100]
        raise InvalidRequest(
            f"{param}.{name} is unknown; allowed: {', '.join(sorted(allowed))}", f"{param}.{name}", "unknown_parameter"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _check(name: str, value: Any, allowed: str, holds: Callable[[Any], bool]) -> None:
    if value is not None and not (_is_number(value) and holds(value)):
        raise InvalidRequest(f"{name} was {_shown(value)}; it has to be {allowed}", name)


def _check_whole(name: str, value: Any, allowed: str, holds: Callable[[Any], bool]) -> None:
    _check(name, value, f"a whole number, {allowed}", lambda x: isinstance(x, int) and holds(x))


@dataclass(frozen=True, kw_only=True)
class Sampling:
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
                raise InvalidRequest(f"{name} was {_shown(getattr(self, name))}; it has to be true or false", name)
        _check_whole("n", self.n, "at least 1", lambda x: x >= 1)
        _check_whole("seed", self.seed, "of any size", lambda x: True)
        top = f"from 0 to {MAX_TOP_LOGPROBS}"
        _check_whole("top_logprobs", self.top_logprobs, top, lambda x: 0 <= x <= MAX_TOP_LOGPROBS)
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
        _check("temperature", self.temperature, "from 0 to 2", lambda x: 0 <= x <= 2)
        _check("top_p", self.top_p, "above 0 and at most 1", lambda x: 0 < x <= 1)
        _check_whole("top_k", self.top_k, "at least 1, or 0 or -1 for all tokens", lambda x: x >= -1)
        _check("min_p", self.min_p, "from 0 to 1", lambda x: 0 <= x <= 1)
        _check("presence_penalty", self.presence_penalty, "from -2 to 2", lambda x: -2 <= x <= 2)
        _check("frequency_penalty", self.frequency_penalty, "from -2 to 2", lambda x: -2 <= x <= 2)
        _check("repetition_penalty", self.repetition_penalty, "from 0.01 to 100", lambda x: 0.01 <= x <= 100)

    def _check_ending(self) -> None:
        _check_whole("max_new_tokens", self.max_new_tokens, "at least 1", lambda x: x >= 1)
        _check_whole("min_tokens", self.min_tokens, "at least 0", lambda x: x >= 0)
        if self.max_new_tokens is not None and self.min_tokens > self.max_new_tokens:
            limit = f"the {self.max_new_tokens} tokens that the answer may have"
            raise InvalidRequest(f"min_tokens was {self.min_tokens}; it cannot exceed {limit}", "min_tokens")
        if self.ignore_eos and self.response_format is not None:
            raise InvalidRequest("ignore_eos cannot go with a response_format, which has an end", "ignore_eos")


def _strings(stop: Any) -> tuple[str, ...]:
    """`stop` as a caller may give it: nothing, one string or several."""
    strings = (stop,) if isinstance(stop, str) else stop or ()
    if not isinstance(strings, Sequence) or not all(isinstance(text, str) for text in strings):
        raise InvalidRequest(f"stop was {_shown(stop)}; it has to be a string or a list of strings", "stop")
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop has {len(strings)} strings; the limit is {MAX_STOP_STRINGS}", "stop")
    if any(not text or len(text) > MAX_STOP_CHARS for text in strings):
        raise InvalidRequest(f"stop holds an empty string, or one of more than {MAX_STOP_CHARS} characters", "stop")
    return tuple(strings)


def _ids(ids: Any) -> tuple[int, ...]:
    name = "stop_token_ids"
    ids = () if ids is None else ids
    if not isinstance(ids, Sequence) or not all(_is_id(token_id) for token_id in ids):
        raise InvalidRequest(f"{name} was {_shown(ids)}; it has to be a list of token ids", name)
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(f"{name} has {len(ids)} ids; the limit is {MAX_STOP_TOKEN_IDS}", name)
    return tuple(ids)


def _biases(bias: Any) -> tuple[tuple[int, float], ...]:
    """`logit_bias` from a mapping, whose keys JSON makes strings, or from pairs."""
    name = "logit_bias"
    if not isinstance(bias, Mapping | tuple | None):
        raise InvalidRequest(f"{name} was {_shown(bias)}; it has to map token ids to numbers", name)
    pairs = list(bias.items()) if isinstance(bias, Mapping) else list(bias or ())
    if len(pairs) > MAX_BIASES:
        raise InvalidRequest(f"{name} has {len(pairs)} entries; the limit is {MAX_BIASES}", name)
    found: dict[Any, float] = {}
    for key, value in pairs:
        digits = isinstance(key, str) and re.fullmatch(r"[0-9]{1,10}", key)
        token_id = int(key) if digits else key
        if not _is_id(token_id):
            raise InvalidRequest(f"{name} has the key {_shown(key)}; keys are token ids", name)
        if token_id in found:
            raise InvalidRequest(f"{name} names the token {token_id} twice", name)
        if not (_is_number(value) and -100 <= value <= 100):
            raise InvalidRequest(f"{name}[{token_id}] was {_shown(value)}; it has to be from -100 to 100", name)
        found[token_id] = float(value)
    return tuple(found.items())


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
