"""Structured output: which tokens a JSON schema allows next, by llguidance.

Schemas are compiled in threads of their own, under a deadline, with limits on what the library may build. The cost per
token is bounded too: a grammar that becomes too complex while it runs ends its own sequence with an error.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any

import numpy as np

from mm.data.arrays import BoolArray
from mm.data.response_format import ResponseFormat
from mm.engine.sampling.schema_check import Schema, SchemaCheck, relaxed
from mm.engine.sampling.vocabulary import Vocabulary
from mm.errors import CapacityError, EngineError, InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher

COMPILE_DEADLINE_S = 5.0
NUM_COMPILERS = 2
NUM_CACHED = 32
MAX_REASON_CHARS = 300
WHITESPACE = r"( |\n[ \t]{0,20})?"
"""Between JSON's tokens: a blank, or a new line with its indentation. A model could write unlimited blanks forever."""


class GrammarMatcher:
    """The place of one sequence in its grammar.

    Args:
        matcher: The library's matcher. It belongs to this object alone.
        schema_check: What the grammar does not enforce; None where it enforces all.
        schema: JSON text of what the grammar was made of, its options included, for an engine that compiles it itself.
    """

    def __init__(self, matcher: LLMatcher, schema_check: SchemaCheck | None = None, schema: str = "") -> None:
        self._matcher, self._schema_check, self.schema = matcher, schema_check, schema

    def copy(self) -> GrammarMatcher:
        """A matcher at the same place, for another sequence."""
        return GrammarMatcher(self._matcher.deep_copy(), self._schema_check, self.schema)

    def check(self, text: str) -> None:
        """Check a complete answer against what the grammar does not enforce.

        Raises:
            SchemaNotFulfilled: Names what it breaks.
        """
        if self._schema_check is not None:
            self._schema_check.check(text)

    def consume(self, token_id: int) -> None:
        """Advance by one token. After a token that is not allowed, the next `allowed` raises."""
        self._matcher.consume_token(token_id)

    @property
    def is_broken(self) -> bool:
        """Whether a token was consumed that the grammar does not allow, or it became too complex."""
        return self._matcher.is_error()

    @property
    def is_stopped(self) -> bool:
        """Whether the text is complete and nothing but an ending can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self, vocab: int) -> BoolArray:
        """(vocab,) bool: the tokens that may come next, endings only where the text is complete.

        Raises:
            EngineError: The grammar became too complex, or was given a token that it does not allow.
        """
        mask = np.zeros(-(-vocab // 32), dtype=np.uint32)
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise EngineError(f"the grammar cannot go on: {_reason(self._matcher.get_error())}")
        return np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab].astype(bool)


class GrammarCompiler:
    """Matchers for the response formats of one model's requests. Safe to use from several threads.

    Args:
        deadline_s: Longest wait for a schema that has not been compiled before.
    """

    def __init__(self, vocabulary: Vocabulary, *, deadline_s: float = COMPILE_DEADLINE_S) -> None:
        self._vocabulary, self._deadline_s = vocabulary, deadline_s
        self._pool = ThreadPoolExecutor(NUM_COMPILERS, thread_name_prefix="grammar")
        self._compiled: OrderedDict[ResponseFormat, GrammarMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, form: ResponseFormat) -> GrammarMatcher:
        """A matcher at the start of `form`. It waits for the compiler, so call it outside of the event loop.

        Raises:
            InvalidRequest: The schema is not valid, not supported, or too complex.
            CapacityError: Other schemas are being compiled.
        """
        with self._lock:
            found = self._compiled.get(form)
            if found is not None:
                self._compiled.move_to_end(form)
        if found is None:
            found = self._wait(self._pool.submit(self._compile, form))
            with self._lock:
                self._compiled[form] = found
                while len(self._compiled) > NUM_CACHED:
                    self._compiled.popitem(last=False)
        return found.copy()

    def _wait(self, compiling: Future[GrammarMatcher]) -> GrammarMatcher:
        try:
            return compiling.result(self._deadline_s)
        except FutureTimeout:
            if compiling.cancel():
                raise CapacityError("other schemas are being compiled; try again shortly") from None
            limit = f"the limit of {self._deadline_s:g} seconds"
            raise InvalidRequest(f"the schema takes longer to compile than {limit}; simplify it", PARAM) from None
        finally:
            del compiling  # else an error would hold itself through its traceback, and with it the request

    def _compile(self, form: ResponseFormat) -> GrammarMatcher:
        return compile_matcher(form, self._vocabulary)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


PARAM = "response_format.json_schema.schema"
OPTIONS: Any = {
    "whitespace_pattern": WHITESPACE,
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
    "coerce_one_of": False,
}
"""They override a schema's own "x-guidance", which could ask for text that is not JSON or not of the schema."""
MAX_LEXER_STATES = 50_000
"""Each takes 1 to 2 kB."""


def compile_matcher(form: ResponseFormat, vocabulary: Vocabulary) -> GrammarMatcher:
    """A matcher at the start of `form`, ready for the first token.

    Raises:
        InvalidRequest: With the library's reason.
    """
    schema: Schema = json.loads(form.schema) if form.schema is not None else {"type": "object"}
    grammar, is_checked = relaxed(schema)
    try:
        matcher = _library_matcher(grammar, vocabulary)
    except _OneOfOverlaps:
        grammar, is_checked = relaxed(schema, one_of_as_any=True)
        matcher = _library_matcher(grammar, vocabulary)
    try:
        begins = GrammarMatcher(matcher).allowed(vocabulary.size).any()
    except EngineError:
        begins = False
    if not begins:
        raise InvalidRequest("the schema cannot be used: no answer fulfils it, or it is too complex", PARAM)
    text = json.dumps({**grammar, "x-guidance": OPTIONS})
    return GrammarMatcher(matcher, SchemaCheck(schema) if is_checked else None, text)


ONE_OF_SIGNS = ("coerce_one_of", "circular references with sibling keys")
"""In the library's reason: it compares the alternatives of a `oneOf`, and cannot where they refer to themselves."""


class _OneOfOverlaps(Exception):
    """The library cannot tell that at most one alternative of a `oneOf` fits."""


def _library_matcher(schema: Schema, vocabulary: Vocabulary) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    # Verbose errors quote many lines of the parser's state.
    limits = LLParserLimits(verbose_errors=False, max_lexer_states=MAX_LEXER_STATES)
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=OPTIONS)
        matcher = LLMatcher(vocabulary.library, grammar, log_level=0, limits=limits)
        reason = matcher.get_error() if matcher.is_error() else ""
    except ValueError as error:
        reason, matcher = str(error), None
    if "oneOf" in json.dumps(schema) and any(sign in reason for sign in ONE_OF_SIGNS):
        raise _OneOfOverlaps
    if matcher is None or reason:
        raise InvalidRequest(f"the schema cannot be used: {_reason(reason)}", PARAM)
    return matcher


def _reason(text: str) -> str:
    """The library's reason on one line."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_REASON_CHARS else f"{line[: MAX_REASON_CHARS - 3]}..."
