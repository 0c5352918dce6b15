"""Token ids to text that can be sent: no half characters, and nothing that may still become a stop string."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

NUM_WINDOW_TOKENS = 8
"""Tokens that are decoded again with each new one, at least."""
REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class TokenDecoding:
    """How a tokenizer makes text of tokens, as far as later tokens may change earlier text.

    Attributes:
        tokenizer: The Rust tokenizer of the model.
        special: Ids that add no text.
        bytes: Ids that stand for one byte. A run of them is text only once it has ended: if any part of it is no
            character, all of it becomes U+FFFD.
        margin: Characters at the end of the text that later tokens may change. None where that is unknown.
    """

    tokenizer: Tokenizer
    special: frozenset[int]
    bytes: frozenset[int]
    margin: int | None
    _adds_text: dict[int, bool] = field(default_factory=dict[int, bool], repr=False)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenDecoding:
        steps = list(_steps(json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}))
        names = [step.get("type") for step in steps]
        special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        single = frozenset[int]()
        if "ByteFallback" in names:
            single = frozenset(i for token, i in tokenizer.get_vocab().items() if _BYTE.fullmatch(token))
        return cls(tokenizer, special, single - special, _margin(steps))

    def adds_text(self, token_id: int) -> bool:
        """Whether a token is one that the tokenizer has, and not special."""
        found = self._adds_text.get(token_id)
        if found is None:
            found = token_id not in self.special and self.tokenizer.id_to_token(token_id) is not None
            self._adds_text[token_id] = found
        return found

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _steps(decoder: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """The decoder's parts, in order."""
    if decoder.get("type") == "Sequence":
        for part in decoder["decoders"]:
            yield from _steps(part)
    elif decoder:
        yield decoder


def _margin(steps: Sequence[dict[str, Any]]) -> int | None:
    """What replacements in joined text can reach: each may begin where the one before it ends."""
    margin, is_joined = 0, False
    for step in steps:
        is_joined = is_joined or step["type"] in ("Fuse", "ByteLevel")
        if step["type"] == "CTC":
            return None
        if step["type"] == "Replace" and is_joined:
            pattern = step["pattern"].get("String")
            if pattern is None:
                return None
            margin += len(pattern) - 1
    return margin


class IncrementalDetokenizer:
    """The text of one sequence, token by token. All pieces together are the tokenizer's own text of all tokens.

    Args:
        decoding: Of the model.
        stop: Strings that end the text. They are never sent.
        min_tokens: A stop string that is complete before there are this many tokens is sent like other text.
    """

    def __init__(self, decoding: TokenDecoding, stop: Sequence[str] = (), *, min_tokens: int = 0) -> None:
        self._decoding = decoding
        self._stop = [text for text in stop if text]
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._window: list[int] = []  # the last tokens, of which those that add text are decoded together
        self._num_final = 0  # characters of the window's text that are part of `_text`
        self._text = ""
        self._num_sent = 0
        self._num_passed = 0  # stop strings that begin before are text
        self.stopped = False

    @property
    def text(self) -> str:
        """All text so far, also what is held back."""
        return self._text

    def push(self, token_id: int) -> str:
        """The text that can be sent now. `stopped` becomes true when a stop string is complete."""
        self._num_tokens += 1
        self._decode(token_id)
        if self._cut_at_stop():
            return self._send(len(self._text))
        return self._send(len(self._text) - self._held()) if self._decoding.margin is not None else ""

    def finish(self) -> str:
        """The text that was held back, once no more tokens follow. A character cut in half becomes U+FFFD.

        `stopped` becomes true when a stop string is in it.
        """
        if self.stopped:
            return ""
        self._text += self._decoding.text(self._window)[self._num_final :]
        self._window = []
        self._cut_at_stop()
        return self._send(len(self._text))

    def _cut_at_stop(self) -> bool:
        """End the text before the first stop string that counts."""
        if not self._stop:
            return False
        while (cut := self._first_stop()) is not None and self._num_tokens < self._min_tokens:
            self._num_passed = cut + 1
        if cut is not None:
            self.stopped = True
            self._text = self._text[:cut]
        return self.stopped

    def _decode(self, token_id: int) -> None:
        """Add a token's text to `_text`, as far as later tokens cannot change it."""
        decoding = self._decoding
        if not decoding.adds_text(token_id):
            return
        self._window.append(token_id)
        if token_id in decoding.bytes:
            return
        text = decoding.text(self._window)
        if decoding.margin is None:
            if self._stop:
                self._text, self._num_final = text, len(text)
            return
        end = len(text) - max(decoding.margin, text.endswith(REPLACEMENT))
        if end > self._num_final:
            self._text += text[self._num_final : end]
            self._num_final = end
        if len(self._window) >= 2 * NUM_WINDOW_TOKENS + decoding.margin:
            self._shorten(text)

    def _shorten(self, text: str) -> None:
        """Forget tokens at the start of the window that the text at its end does not depend on.

        A tokenizer may treat the first token in its own way, and a token may be half of a character. Where the shorter
        window gives other text, it is made less short.
        """
        margin = self._decoding.margin or 0
        num_open = len(text) - self._num_final
        for start in range(len(self._window) - NUM_WINDOW_TOKENS - margin, 0, -1):
            tail = self._decoding.text(self._window[start:])
            if len(tail) > num_open + margin and text.endswith(tail):
                self._window = self._window[start:]
                self._num_final = len(tail) - num_open
                return

    def _first_stop(self) -> int | None:
        """Where the earliest stop string begins. Text already sent holds no start of one: it was held back."""
        start = max(self._num_sent, self._num_passed)
        found = [at for stop in self._stop if (at := self._text.find(stop, start)) >= 0]
        return min(found, default=None)

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        if not self._stop:
            return 0
        longest = max(len(stop) for stop in self._stop) - 1
        tail = self._text[self._num_sent :][-longest:] if longest else ""
        starts = (len(tail) - i for i in range(len(tail)) if any(stop.startswith(tail[i:]) for stop in self._stop))
        return next(starts, 0)

    def _send(self, end: int) -> str:
        new = self._text[self._num_sent : end]
        self._num_sent = max(self._num_sent, end)
        return new
