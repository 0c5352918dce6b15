"""What an engine makes of a request before it computes anything: its prompt, its reducer, its samplers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from mm.data.request import Request
from mm.data.tokens import EncodedMedia, ItemCount, Prompt
from mm.engine.sampling.sampler_factory import SamplerFactory
from mm.engine.sampling.vocabulary import Vocabulary
from mm.errors import InvalidRequest
from mm.models.family import CheckpointFamily
from mm.plugins.calls import BUILT, PluginCalls
from mm.plugins.reducer import Reducer
from mm.plugins.registry import name_of
from mm.plugins.spec import bind, parse_spec, reducer_spec

T = TypeVar("T")


class PromptInputs:
    """Prompts of requests. Safe to use from several threads.

    Args:
        calls: Calls the family and the reducers.
    """

    def __init__(self, family: CheckpointFamily, calls: PluginCalls) -> None:
        self._family, self._calls = family, calls
        self._samplers = SamplerFactory(family)

    def check_length(self, params: Request) -> None:
        """Refuse a request whose text alone is too long, before its media are encoded.

        Raises:
            ContextTooLong, InvalidRequest: It is, or the chat template does not take its messages.
        """
        limits = self._family.text_limits
        limits.check(params.messages)
        if not limits.are_far_from(params.messages):
            self._call_family(functools.partial(self._family.check_length, params.messages))

    def prompt_length(self, params: Request, items: Sequence[ItemCount]) -> int:
        """Tokens of the prompt of a request, given how many its items have.

        Raises:
            ContextTooLong, InvalidRequest: As `check_length`.
        """
        width = self._family.language.embed(torch.zeros(1, dtype=torch.int64)).shape[1]
        blank = [item.blank(width, getattr(self._family, "num_planes", 0)) for item in items]
        return self._call_family(functools.partial(self._family.splice, params.messages, blank)).length

    def token_ids(self, params: Request) -> list[int]:
        """Token ids of a request without media.

        Raises:
            ContextTooLong, InvalidRequest: As `check_length`.
        """
        return self._call_family(functools.partial(self._family.token_ids, params.messages))

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text that tokens stand for, control tokens included.

        Raises:
            InvalidRequest: There is no such token.
        """
        num_ids = len(self._family.tokenizer)
        if (wrong := max(token_ids, default=0)) >= num_ids:
            raise InvalidRequest(f"the token {wrong} does not exist; this model has {num_ids}", "tokens")
        return self._family.text_tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def reducer_of(self, media: EncodedMedia) -> Reducer:
        """The reducer of a request, with its weights where there is anything to reduce."""

        def build() -> Reducer:
            spec, family = reducer_spec(media.reducer), self._family
            return bind(spec, family.folder, str(family.language.device)).plugin if media.items else spec.plugin

        names = tuple(part.name for part in parse_spec(media.reducer))
        limit_s = self._calls.limits.reducer_timeout_s
        return self._calls.call("reducer", names, BUILT, build, timeout_s=limit_s)

    def splice(self, params: Request, media: EncodedMedia) -> Prompt:
        """The prompt of a request, with the visual tokens of its media in it.

        Raises:
            ContextTooLong, InvalidRequest, MediaError: As `CheckpointFamily.splice`.
        """
        return self._call_family(
            functools.partial(self._family.splice, params.messages, [item.tokens for item in media.items])
        )

    def _call_family(self, function: Callable[[], T]) -> T:
        name, limit_s = name_of(self._family), self._calls.limits.family_timeout_s
        return self._calls.call("family", (name,), "while it made the prompt", function, timeout_s=limit_s)

    @property
    def vocabulary(self) -> Vocabulary:
        return self._samplers.vocabulary

    def close(self) -> None:
        """Stop the threads that compile schemas."""
        self._samplers.close()
