"""Messages to token ids through a checkpoint's own chat template.

The template is the only thing that may place control tokens. Text that a user wrote is never read as one: where it
spells a special token, that stretch is tokenised as plain characters, so nobody can forge a placeholder or a turn.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence

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
        """Ids of the conversation with the start of the assistant's turn, media as one placeholder each.

        Raises:
            InvalidRequest: The template refuses the conversation.
        """
        nonce, escaped = f"\ue000{secrets.token_hex(16)}", []
        conversation = [self._plain(message, nonce, escaped) for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                conversation, chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, ValueError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", "messages") from error
        return self._tokenize(str(text), nonce, escaped)

    def _plain(self, message: Message, nonce: str, escaped: list[str]) -> dict:
        """The template's view of a message; special spellings move to `escaped`, numbered marks take their place."""

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
            return self._tokenizer(text, add_special_tokens=add_special).input_ids
        ids = list(self._tokenizer("", add_special_tokens=True).input_ids) if add_special else []
        for i, piece in enumerate(re.split(rf"{nonce}:(\d+);", text)):
            if i % 2:
                ids += self._tokenizer(
                    escaped[int(piece)], add_special_tokens=False, split_special_tokens=True
                ).input_ids
            elif piece:
                ids += self._tokenizer(piece, add_special_tokens=False).input_ids
        return ids
