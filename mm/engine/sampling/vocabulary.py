"""What single token ids stand for: bytes, readable text, and llguidance's tokenizer for grammars."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from mm.data.outputs import TokenLogprob
from mm.engine.sampling.detokenizer import TokenDecoding

if TYPE_CHECKING:
    from llguidance import LLTokenizer


class Vocabulary:
    """The tokens of one model. Safe to use from several threads.

    Args:
        tokenizer: The Rust tokenizer of the model.
        size: Outputs of the model's head, which may be more than the tokenizer has tokens.
        eos_token_ids: Tokens that end a text.

    Attributes:
        decoding: How the tokens become text.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, eos_token_ids: Iterable[int] = ()) -> None:
        self.tokenizer, self.size = tokenizer, size
        self.eos_token_ids = tuple(sorted(eos_token_ids))
        self._num_known = tokenizer.get_vocab_size(with_added_tokens=True)
        self.decoding = TokenDecoding.of(tokenizer)
        self._library: LLTokenizer | ValueError | None = None
        self._lock = threading.Lock()

    @property
    def library(self) -> LLTokenizer:
        """llguidance's tokenizer. It is made on first use, which takes a second for a large vocabulary.

        Raises:
            ValueError: It does not know tokenizers of this kind.
        """
        with self._lock:
            if self._library is None:
                try:
                    self._library = self._build()
                except ValueError:
                    self._library = ValueError("this model's tokenizer is of a kind that grammars do not know")
            if isinstance(self._library, ValueError):
                raise self._library
            return self._library

    def _build(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        plain = Tokenizer.from_str(self.tokenizer.to_str())
        plain.no_padding()
        plain.no_truncation()
        return LLTokenizer(plain.to_str(), n_vocab=self.size, eos_token=list(self.eos_token_ids) or None)

    def bytes_of(self, token_id: int) -> bytes | None:
        """What the token adds to a text. None for control tokens and for outputs of the head without a token."""
        if token_id in self.decoding.special or token_id >= self._num_known:
            return None
        try:
            return self.library.decode_bytes([token_id])
        except ValueError:
            first = self.decoding.text([token_id])  # tokenizers may treat the first token in their own way
            return self.decoding.text([token_id, token_id])[len(first) :].encode()

    def text_of(self, token_id: int) -> str:
        """The token as readable text: control tokens by name, incomplete characters as escaped bytes."""
        given = self.bytes_of(token_id)
        if given is not None:
            return given.decode("utf-8", "backslashreplace")
        return self.tokenizer.id_to_token(token_id) or f"<{token_id}>"

    def logprob(self, token_id: int, logprob: float, top: tuple[tuple[int, float], ...] = ()) -> TokenLogprob:
        """A token's log-probability, with the token's text and bytes."""
        return TokenLogprob(
            token_id=token_id,
            token=self.text_of(token_id),
            utf8=self.bytes_of(token_id),
            logprob=logprob,
            top=tuple(self.logprob(other, value) for other, value in top),
        )
