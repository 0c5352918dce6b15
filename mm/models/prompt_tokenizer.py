"""Rendered prompts to token ids, in one pass, with control tokens only where a template wrote them.

The tokenizer here is a copy of the checkpoint's in which every control token is spelled with a secret. A template's
control tokens get that spelling; text cannot have it. So text never is a control token, everything else is tokenised as
the checkpoint does it, and no setting of a tokenizer that threads share is ever changed.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mm.data.request import text_too_long
from mm.errors import ContextTooLong, InvalidRequest

PIECE_CHARS = 64 * 1024
"""Longer texts are counted in pieces before they are tokenised."""
CUT_TOKENS = 128
"""Tokens that a text may have less than its pieces, for each cut: what a cut separates could be a single token."""
MOST_COMPOSED = 4
"""Characters that Unicode's composition makes one, at most."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def control_tokens(tokenizer: PreTrainedTokenizerBase, template: str = "") -> dict[str, int]:
    """Spelling to id of the tokens that only a chat template may write.

    These are the special tokens, and other added tokens that the template spells, such as `<tool_response>`. Blank ones
    such as a line break are text.
    """
    added = {token.content: (i, token.special) for i, token in tokenizer.added_tokens_decoder.items()}
    special = {*tokenizer.all_special_tokens, *(getattr(tokenizer, "chat_control_tokens", None) or ())}
    found = {text: i for text, (i, is_special) in added.items() if is_special or text in special or text in template}
    for text in special - found.keys():
        found[text] = cast(int, tokenizer.convert_tokens_to_ids(text))
    return {text: i for text, i in found.items() if text.strip()}


class PromptTokenizer:
    """Tokenises rendered prompts. Safe to use from several threads.

    Args:
        tokenizer: The checkpoint's tokenizer.
        control: Spelling to id of its control tokens.

    Attributes:
        longest_token: Characters of the longest token.

    Raises:
        ValueError: The tokenizer is of a kind whose control tokens cannot be kept apart from text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: Mapping[str, int]) -> None:
        nonce = secrets.token_hex(16)
        self._secrets = {text: f"{nonce}{i:08x}" for i, text in enumerate(control)}
        original = cast(PreTrainedTokenizerFast, tokenizer).backend_tokenizer
        self._control = _pattern(original, control)
        self.longest_token = max(map(len, original.get_vocab()), default=1)
        self._tokenizer = _renamed(original, self._secrets)
        wrong = [text for text, i in control.items() if self._tokenizer.token_to_id(self._secrets[text]) != i]
        if wrong:
            raise ValueError(f"its control token {wrong[0]!r} cannot be kept apart from text")

    def control(self, rendered: str) -> str:
        """A prompt with the secret in place of each control token; for a prompt that holds no text of a request."""
        return self._control.sub(lambda match: self._secrets[match.group()], rendered)

    def ids(self, prompt: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a prompt, in which control tokens are those of `control`.

        Args:
            add_special_tokens: Add what the tokenizer adds to every text, such as a first token.

        """
        # A batch, unlike a single text, is tokenised without Python's global lock.
        return self._tokenizer.encode_batch_fast([prompt], add_special_tokens=add_special_tokens)[0].ids

    def text_ids(self, text: str, max_tokens: int) -> list[int]:
        """Token ids of text in which nothing is a control token.

        Raises:
            InvalidRequest: As `check_text`.
        """
        self.check_text(text, max_tokens)
        ids = self.ids(text)
        if len(ids) > max_tokens:
            raise ContextTooLong(len(ids), 1, max_tokens)
        return ids

    def check_text(self, text: str, max_tokens: int) -> None:
        """Refuse a text that has more tokens than a prompt may have, without tokenising all of it.

        A text that passes may still have somewhat more.

        Raises:
            ContextTooLong, InvalidRequest: It has more, or it holds what is no character.
        """
        num_chars = len(text)
        if num_chars > self.max_chars(max_tokens):
            raise text_too_long(num_chars, self.max_chars(max_tokens), max_tokens)
        if not text.isascii() and (found := _SURROGATE.search(text)):
            raise InvalidRequest(f"the text holds {found.group()!r}, which is no character of Unicode", "messages")
        if num_chars <= PIECE_CHARS:
            return
        num_tokens = 0
        for start in range(0, num_chars, PIECE_CHARS):
            num_tokens += len(self.ids(text[start : start + PIECE_CHARS])) - CUT_TOKENS
            if num_tokens > max_tokens:
                raise ContextTooLong(f"at least {num_tokens}", 1, max_tokens)

    def max_chars(self, max_tokens: int) -> int:
        """Characters that a text of so many tokens can have, where it has no run of characters that are all unknown."""
        return max_tokens * self.longest_token * MOST_COMPOSED


def _pattern(tokenizer: Tokenizer, control: Iterable[str]) -> re.Pattern[str]:
    """Matches control tokens as the tokenizer does: the longest first, and some only as whole words."""
    whole = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.single_word}
    longest_first = sorted(control, key=len, reverse=True)
    patterns = [rf"(?<!\w){re.escape(text)}(?!\w)" if text in whole else re.escape(text) for text in longest_first]
    return re.compile("|".join(patterns) or "(?!)")


def _renamed(tokenizer: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    """A copy of the tokenizer with other spellings of some tokens, which keep their ids.

    Raises:
        ValueError: The tokenizer cannot be copied.
    """
    try:
        content: dict[str, Any] = json.loads(tokenizer.to_str())
    except Exception as error:  # the library raises nothing more special
        raise ValueError("it has parts that cannot be written to tokenizer.json") from error
    for token in content["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "normalized": False}
    _rename_in_model(content["model"], names)
    copy = Tokenizer.from_str(json.dumps(content))
    added = {token["content"] for token in content["added_tokens"]}
    missing = [name for name in names.values() if name not in added]
    copy.add_special_tokens(  # pyright: ignore[reportUnknownMemberType]
        [AddedToken(name, normalized=False, special=True) for name in missing]
    )
    copy.no_truncation()
    copy.no_padding()
    return copy


def _rename_in_model(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename tokens in the vocabulary, so that the model itself cannot make them of text either."""
    vocab: Any = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(token, token): i for token, i in cast("dict[str, int]", vocab).items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in cast("list[tuple[str, float]]", vocab)]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [
            [left, right] for left, right in pairs if names.keys().isdisjoint((left, right, left + right))
        ]
