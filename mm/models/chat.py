"""Messages to token ids through a checkpoint's own chat template.

Only the template may write control tokens. What a request brings is text, whatever it spells, in however many parts,
and whatever the template does with it: nobody can forge a placeholder or a turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from mm.data.request import ROLES, MediaPart, Message, TextLimits, TextPart, text_too_long
from mm.errors import InvalidRequest, PluginFault, shown
from mm.models.locate import NO_TEMPLATE
from mm.models.prompt_tokenizer import PIECE_CHARS, PromptTokenizer, control_tokens
from mm.models.renderer import RENDERER, RenderedTooLong, TemplateRefused
from mm.models.tool_text import written_out
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
        if template is None and not cast(Any, tokenizer).chat_template:
            raise ValueError(f"it {NO_TEMPLATE}")
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
        self._source, self._knows_tools = source, "tools" in source
        self._num_ids = len(tokenizer)
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
        return TextLimits(max_context_tokens=self._max_tokens, max_chars=max_chars, num_token_ids=self._num_ids)

    def token_ids(self, messages: Sequence[Message], expand: Callable[[str], str] | None = None) -> list[int]:
        """Ids of the conversation up to the start of the assistant's turn, with one placeholder per medium.

        Args:
            expand: Applied to the rendered template, in which no text of the request can look like a control token.

        Raises:
            ContextTooLong: It has more tokens than the model has positions.
            InvalidRequest: The template refuses the conversation, or it holds what is no text.
        """
        if messages and messages[0].is_prompt:
            return self._prompt_ids(messages[0])
        texts = self._checked(messages)
        messages = messages if self._knows_tools else written_out(messages)
        taken = self._taken | high_characters(texts)
        marks = Marks(self._alphabet, taken)
        rendered = self._render(messages, marks, taken)
        if len(rendered) > sum(map(len, texts)) + PIECE_CHARS:  # the template itself wrote much
            self.tokenizer.check_text(rendered, self._max_tokens)
        add_special = not (self._bos and rendered.startswith(self._bos))
        prompt = marks.unmark(self.tokenizer.control(rendered if expand is None else expand(rendered)))
        return self.tokenizer.ids(prompt, add_special_tokens=add_special)

    def _prompt_ids(self, message: Message) -> list[int]:
        """Ids of a whole prompt, to which no template is applied."""
        if message.token_ids:
            if (wrong := max(message.token_ids)) >= self._num_ids:
                raise InvalidRequest(f"the token {wrong} does not exist; this model has {self._num_ids}", "prompt")
            return list(message.token_ids)
        text = "".join(part.text for part in message.parts if isinstance(part, TextPart))
        if not text:
            raise InvalidRequest("the prompt is empty", "prompt")
        self.tokenizer.check_text(text, self._max_tokens)
        add_special = not (self._bos and text.startswith(self._bos))
        return self.tokenizer.ids(self.tokenizer.control(text), add_special_tokens=add_special)

    def _checked(self, messages: Sequence[Message]) -> list[str]:
        """The texts of the messages, which are not too long and valid."""
        texts = [part.text for message in messages for part in message.parts if isinstance(part, TextPart)]
        num_parts = max(len(messages), len(texts))
        texts += [text for message in messages for text in (message.fields, message.context) if text]
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
        context: dict[str, Any] = json.loads((messages[0].context if messages else "") or "{}")
        limits, options = self.limits, {"documents": None, "add_generation_prompt": True}
        try:
            return RENDERER.render(
                self._source,
                [_for_template(message) for message in messages],
                options | self._special,
                alphabet=self._alphabet,
                taken=taken,
                max_chars=limits.max_chars,
                tools=context.get("tools"),
                variables=context.get("options") or {},
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
    return {"role": message.role, "content": content, **json.loads(message.fields or "{}")}
