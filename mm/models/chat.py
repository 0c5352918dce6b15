"""Messages to token ids through a checkpoint's own chat template.

Only the template may write control tokens. What a request brings is text, whatever it spells, in however many parts,
and whatever the template does with it: nobody can forge a placeholder or a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from mm.data.request import ROLES, MediaPart, Message, TextLimits, TextPart, text_too_long
from mm.errors import InvalidRequest, PluginFault, shown
from mm.models.prompt_tokenizer import PIECE_CHARS, PromptTokenizer, control_tokens
from mm.models.renderer import RENDERER, RenderedTooLong, TemplateRefused
from mm.models.user_text import Marks, closed_under_case, high_characters

MAX_REASON_CHARS = 300


class ChatTemplate:
    """Renders and tokenises conversations. Safe to use from several threads.

    Args:
        tokenizer: The checkpoint's tokenizer.
        template: Jinja source; None takes the tokenizer's own.
        max_tokens: Positions of the model. Longer conversations are refused.
        placeholders: Ids of the tokens that stand for media. They are control tokens, whatever the tokenizer says.

    Raises:
        ValueError: There is no template, it is not valid, or the tokenizer cannot be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        *,
        max_tokens: int,
        placeholders: Iterable[int] = (),
    ) -> None:
        source = tokenizer.get_chat_template(template)  # pyright: ignore[reportUnknownMemberType]
        control = control_tokens(tokenizer, source)
        for i in placeholders:
            if not (text := cast("str | None", tokenizer.convert_ids_to_tokens(i))):
                raise ValueError(f"its tokenizer has no token {i}, which stands for media")
            control[text] = i
        self.tokenizer = PromptTokenizer(tokenizer, control)
        self._alphabet = closed_under_case(set[str]().union(*control))
        self._special: dict[str, Any] = tokenizer.special_tokens_map
        self._taken = high_characters([source, *control])
        self._bos = str(tokenizer.bos_token or "")
        self._max_tokens = max_tokens
        self._source = source
        try:
            RENDERER.compile(source)
        except (TemplateRefused, PluginFault) as error:
            raise ValueError(f"its chat template cannot be compiled: {error}") from error
        try:
            self.token_ids([Message(role="user", parts=(TextPart(text="Hello"),))])
        except InvalidRequest:
            pass  # it may want other messages
        except PluginFault as error:
            raise ValueError(f"its chat template cannot be used: {error}") from error

    @property
    def limits(self) -> TextLimits:
        """How long the text of a conversation may be."""
        max_chars = self.tokenizer.max_chars(self._max_tokens)
        return TextLimits(max_context_tokens=self._max_tokens, max_chars=max_chars)

    def token_ids(self, messages: Sequence[Message], expand: Callable[[str], str] | None = None) -> list[int]:
        """Ids of the conversation up to the start of the assistant's turn, with one placeholder per medium.

        Args:
            expand: Applied to the rendered template, in which no text of the request can look like a control token.

        Raises:
            ContextTooLong: It has more tokens than the model has positions.
            InvalidRequest: The template refuses the conversation, or it holds what is no text.
        """
        texts = self._checked(messages)
        taken = self._taken | high_characters(texts)
        marks = Marks(self._alphabet, taken)
        rendered = self._render(messages, marks, taken)
        if len(rendered) > sum(map(len, texts)) + PIECE_CHARS:  # the template itself wrote much
            self.tokenizer.check_text(rendered, self._max_tokens)
        add_special = not (self._bos and rendered.startswith(self._bos))
        prompt = marks.unmark(self.tokenizer.control(rendered if expand is None else expand(rendered)))
        return self.tokenizer.ids(prompt, add_special_tokens=add_special)

    def _checked(self, messages: Sequence[Message]) -> list[str]:
        """The texts of the messages, which are not too long and valid."""
        texts = [part.text for message in messages for part in message.parts if isinstance(part, TextPart)]
        num_parts = max(len(messages), len(texts))
        if num_parts > self._max_tokens:
            raise InvalidRequest(
                f"there are {num_parts} messages or text parts; the limit is {self._max_tokens}, the tokens of this "
                "model's context",
                "messages",
                "context_length_exceeded",
            )
        self.limits.check(messages)
        self.tokenizer.check_text("".join(texts), self._max_tokens)
        return texts

    def _render(self, messages: Sequence[Message], marks: Marks, taken: frozenset[str]) -> str:
        limits, options = self.limits, {"tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return RENDERER.render(
                self._source,
                [_for_template(message) for message in messages],
                options | self._special,
                alphabet=self._alphabet,
                taken=taken,
                max_chars=limits.max_chars,
            )
        except TemplateRefused as error:
            reason = marks.unmark(str(error))[:MAX_REASON_CHARS]
            raise InvalidRequest(f"the model's chat template refuses these messages: {reason}", "messages") from error
        except RenderedTooLong as error:
            raise text_too_long(error.num_chars, limits.max_chars, limits.max_context_tokens) from error


def _for_template(message: Message) -> dict[str, object]:
    """A message as templates read it. Roles are ours, all other text is the request's."""
    if message.role not in ROLES:
        raise InvalidRequest(f"the role {shown(message.role)} is unknown; allowed: {', '.join(ROLES)}", "messages")
    content: list[dict[str, str]] = []
    for part in message.parts:
        if isinstance(part, MediaPart):
            content.append({"type": part.kind})
        else:
            content.append({"type": "text", "text": part.text})
    return {"role": message.role, "content": content}
