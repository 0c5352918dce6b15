"""Token ids to text that can be sent: no half characters, and nothing that may still become a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class IncrementalDetokenizer:
    """The text of one sequence, token by token.

    Args:
        tokenizer: The Rust tokenizer of the model.
        stop: Strings that end the text. They are never sent.
        min_tokens: A stop string that is complete before there are this many tokens is sent like other text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, min_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=[], skip_special_tokens=True)
        self._stop = [text for text in stop if text]
        self._min_tokens = min_tokens
        self._ids: list[int] = []
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
        self._ids.append(token_id)
        self._text += self._stream.step(self._tokenizer, token_id) or ""
        while (cut := self._first_stop()) is not None and len(self._ids) < self._min_tokens:
            self._num_passed = cut + 1
        if cut is not None:
            self.stopped = True
            self._text = self._text[:cut]
            return self._send(len(self._text))
        return self._send(len(self._text) - self._held())

    def finish(self) -> str:
        """The text that was held back, once no more tokens follow. A character cut in half becomes U+FFFD."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if whole.startswith(self._text):
            self._text = whole
        return self._send(len(self._text))

    def _first_stop(self) -> int | None:
        """Where the earliest stop string begins. Text already sent holds no start of one: it was held back."""
        start = max(self._num_sent, self._num_passed)
        found = [at for stop in self._stop if (at := self._text.find(stop, start)) >= 0]
        return min(found, default=None)

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        tail = self._text[self._num_sent :][-longest:] if longest else ""
        starts = (len(tail) - i for i in range(len(tail)) if any(stop.startswith(tail[i:]) for stop in self._stop))
        return next(starts, 0)

    def _send(self, end: int) -> str:
        new = self._text[self._num_sent : end]
        self._num_sent = max(self._num_sent, end)
        return new
