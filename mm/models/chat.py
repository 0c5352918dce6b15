"""Messages to token ids through a checkpoint's own chat template.

Only the template may write control tokens. User text that spells a special token is tokenised as plain characters, so
nobody can forge a placeholder or a turn.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mm.data.request import MediaPart, Message
from mm.errors import InvalidRequest


class ChatTemplate:
    """Renders and tokenises conversations.

    Args:
        tokenizer: The checkpoint's tokenizer.
        template: Jinja source; None takes the tokenizer's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        self._tokenizer, self._template = tokenizer, template
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        ordered = sorted((re.escape(text) for text in special), key=len, reverse=True)
        self._special = re.compile("|".join(ordered)) if ordered else None

    def token_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the conversation up to the start of the assistant's turn, with one placeholder per medium.

        Raises:
            InvalidRequest: The template refuses the conversation.
        """
        nonce, escaped = f"\ue000{secrets.token_hex(16)}", list[str]()
        conversation = [self._plain(message, nonce, escaped) for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(  # pyright: ignore[reportUnknownMemberType]
                cast("list[dict[str, str]]", conversation),
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except (TemplateError, ValueError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", "messages") from error
        return self._tokenize(str(text), nonce, escaped)

    def _plain(self, message: Message, nonce: str, escaped: list[str]) -> dict[str, object]:
        """A message as the template reads it. Text that spells special tokens moves to `escaped`; marks replace it."""

        def mark(match: re.Match[str]) -> str:
            escaped.append(match.group())
            return f"{nonce}:{len(escaped) - 1};"

        content: list[dict[str, str]] = []
        for part in message.parts:
            if isinstance(part, MediaPart):
                content.append({"type": part.kind})
            else:
                content.append(
                    {"type": "text", "text": self._special.sub(mark, part.text) if self._special else part.text}
                )
        return {"role": message.role, "content": content}

    def _tokenize(self, text: str, nonce: str, escaped: list[str]) -> list[int]:
        bos = str(self._tokenizer.bos_token or "")
        add_special = not (bos and text.startswith(bos))
        if not escaped:
            return self._ids(text, add_special_tokens=add_special)
        ids = self._ids("", add_special_tokens=True) if add_special else []
        for i, piece in enumerate(re.split(rf"{nonce}:(\d+);", text)):
            if i % 2:
                ids += self._ids(escaped[int(piece)], add_special_tokens=False, split_special_tokens=True)
            elif piece:
                ids += self._ids(piece, add_special_tokens=False)
        return ids

    def _ids(self, text: str, **options: bool) -> list[int]:
        return tokenize(self._tokenizer, text, **options)


class _Encoding(Protocol):
    input_ids: list[int]


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> list[int]:
    """Token ids of a text. The options are those of the tokenizer's call."""
    encode = cast("Callable[..., _Encoding]", tokenizer)
    return encode(text, **options).input_ids
