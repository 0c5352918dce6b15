"""The protocol of model families: the decoder side of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from mm.data.media import Kind
from mm.data.request import Message
from mm.data.tokens import Prompt, VisualTokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LanguageT_co = TypeVar("LanguageT_co", covariant=True)


class Family(Protocol[LanguageT_co]):
    """What one model family knows: weights of the decoder, tokenizer, template, positions and splice.

    The registered name is a checkpoint's `model_type`. A family is built with `folder`, `device` and `dtype`.
    `mm.models.family.CheckpointFamily` has all of it but the placeholders and the positions.

    Attributes:
        language: The decoder's layers, which the engine runs. Ours is a `mm.models.language.LanguageModel`.
        folder: The checkpoint, in which trained drafters are found.
        max_context_tokens: Positions of the model.
        eos_token_ids: Tokens that end a sequence.
        placeholder_ids: Tokens that stand for media in a prompt.
        kinds: Media that a prompt may hold.
        text_tokenizer: The Rust tokenizer, for incremental decoding.
        default_sampling: Sampling options of the checkpoint, which a request may replace. `temperature` and `top_p`
            are always there.
    """

    @property
    def language(self) -> LanguageT_co: ...

    @property
    def folder(self) -> Path: ...

    @property
    def max_context_tokens(self) -> int: ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    @property
    def placeholder_ids(self) -> frozenset[int]: ...

    @property
    def kinds(self) -> frozenset[Kind]: ...

    @property
    def text_tokenizer(self) -> Tokenizer: ...

    @property
    def default_sampling(self) -> Mapping[str, float]: ...

    def splice(self, messages: Sequence[Message], visual: Sequence[VisualTokens]) -> Prompt:
        """The prompt, in which each placeholder has become its item's kept tokens.

        Tokens keep the positions that they have in the unreduced prompt, and `next_position` is that of the unreduced
        prompt: the positions of text do not change when visual tokens are dropped.

        Raises:
            InvalidRequest: The template does not place each item once, in order.
            MediaError: An item of a kind that the checkpoint does not take.
        """
        ...
