"""What model families share: the decoder of a checkpoint, its chat template, and the splice of visual tokens.

A family adds which tokens stand for media, and the rotary positions of an item's tokens. It does not know how pixels
become tokens.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoProcessor, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mm.config import TextAfterClip
from mm.data.media import Kind
from mm.data.request import MediaPart, Message, TextLimits, TextPart
from mm.data.sampling_params import SamplingParams, sampling_options
from mm.data.tokens import Prompt, VisualTokens
from mm.errors import ContextTooLong, InvalidRequest, MediaError
from mm.models.chat import ChatTemplate
from mm.models.checkpoint import check_depths
from mm.models.folder import REPLACE, BadCheckpoint, read_json
from mm.models.language import LanguageModel
from mm.models.pretrained import from_folder, model_config
from mm.models.probe import WholeModel, is_converted, refuse_quantized
from mm.models.renderer import RENDERER

GENERATION = "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class Placed:
    """The rotary positions of one item's kept tokens, counted from the item's first position.

    Attributes:
        offsets: (P, N) int64, or (1, N) where all P rows are equal.
        advance: Position of the text after the item. It does not depend on what was dropped.
        token_ids: (N,) ids of an item with text of its own, with a placeholder for each kept visual token. None where
            all N tokens are visual.
    """

    offsets: Tensor
    advance: int
    token_ids: Tensor | None = None


class _Processor(Protocol):
    tokenizer: PreTrainedTokenizerBase


class CheckpointFamily(ABC):
    """The decoder side of a checkpoint: language model, tokenizer, chat template and splice.

    Args:
        folder: Checkpoint in Hugging Face format.
        device, dtype: Of the language model.
        chat_template: Jinja source that is used in place of the checkpoint's own.
        load: Used in place of `load_language`.
    """

    language_class: type[LanguageModel] = LanguageModel  # another one where the engine holds the weights itself
    num_position_rows: int = 1
    """Rows of a prompt's positions: 1, or 3 for M-RoPE."""
    text_after_clip: TextAfterClip = "highest"
    """Where text goes on after a clip's positions in time: behind the highest, or behind its grid's longer side."""

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        chat_template: str | None = None,
        load: Callable[[Path, str, torch.dtype], LanguageModel] | None = None,
    ) -> None:
        RENDERER.start()
        self.config = model_config(folder)
        refuse_quantized(folder)
        check_depths(folder)
        self.tokenizer, template = self.load_tokenizer(folder)
        self.language = (load or self.load_language)(folder, device, dtype)
        self.folder = folder
        self.max_context_tokens: int = self.language.arithmetic.max_positions
        self._placeholders = dict(self.placeholders())
        self._check_token_ids(folder)
        try:
            self._template = ChatTemplate(
                self.tokenizer,
                chat_template or template,
                max_tokens=self.max_context_tokens,
                placeholders=self._placeholders.keys() | self.mark_ids(),
            )
        except ValueError as error:
            raise BadCheckpoint(str(folder), f"cannot be given prompts: {error}") from error
        self._generation = _generation_config(folder)
        self.eos_token_ids = self._eos_token_ids()

    def load_tokenizer(self, folder: Path) -> tuple[PreTrainedTokenizerBase, str | None]:
        """The tokenizer and the chat template. Without a template, the tokenizer's own is used."""
        processor = cast("_Processor", from_folder(AutoProcessor, folder))
        return processor.tokenizer, getattr(processor, "chat_template", None)

    def load_language(self, folder: Path, device: str, dtype: torch.dtype) -> LanguageModel:
        """The decoder."""
        source = WholeModel(folder, self.config) if is_converted(self.config) else None
        return self.language_class(folder, self.config, device, dtype, source)

    def mark_ids(self) -> Set[int]:
        """Further tokens that only a template may write, whatever the tokenizer says."""
        return frozenset()

    def trial(self) -> tuple[list[VisualTokens], list[Message]]:
        """A short conversation for a self-test, and random visual tokens of its media if the family can make some."""
        return [], [Message(role="user", parts=(TextPart(text="What is it? 1, 2, 3"),))]

    def type_ids(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """What transformers' model gets for each token of a prompt beside its id, by name, each (L,)."""
        return {}

    @abstractmethod
    def placeholders(self) -> Mapping[int, Kind]:
        """Token id to the kind of item that it stands for. Each such token in a rendered template is one item."""

    @abstractmethod
    def place(self, tokens: VisualTokens) -> Placed:
        """The positions of an item's kept tokens."""

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The Rust tokenizer, for incremental decoding."""
        return cast(PreTrainedTokenizerFast, self.tokenizer).backend_tokenizer

    @property
    def placeholder_ids(self) -> frozenset[int]:
        """Ids of the tokens that stand for media in a prompt."""
        return frozenset(self._placeholders)

    @property
    def kinds(self) -> frozenset[Kind]:
        """Kinds of media that the checkpoint takes."""
        return frozenset(self._placeholders.values())

    @property
    def text_limits(self) -> TextLimits:
        """How long the text of a conversation may be."""
        return self._template.limits

    @property
    def default_sampling(self) -> dict[str, float]:
        """Sampling options in generation_config.json, by name. `temperature` and `top_p` are always included."""
        options = sampling_options(SamplingParams)
        known = [name for name, declared in options.items() if declared.off is not None]
        named = {name: float(self._generation[name]) for name in known if self._generation.get(name) is not None}
        if self._generation.get("do_sample") is False:
            return named | {"temperature": 0.0, "top_p": 1.0}
        return {"temperature": 1.0, "top_p": 1.0} | named

    def _check_token_ids(self, folder: Path) -> None:
        size = len(self.tokenizer)
        for token_id, kind in self._placeholders.items():
            if not 0 <= token_id < size:
                what = f"config.json: {kind}_token_id is {token_id}, but the tokenizer has {size} tokens; {REPLACE}"
                raise BadCheckpoint(str(folder), what)

    def _eos_token_ids(self) -> frozenset[int]:
        """Those of generation_config.json. Without them, those of config.json and the tokenizer's end of a turn."""
        named = [self._generation.get("eos_token_id")]
        if named == [None]:
            configs: list[Any] = [self.config, self.language.config]
            named = [getattr(config, "eos_token_id", None) for config in configs] + [self.tokenizer.eos_token_id]
        lists = [[found] if isinstance(found, int) else found or [] for found in named]
        return frozenset(token for found in lists for token in found)

    def splice(self, messages: Sequence[Message], visual: Sequence[VisualTokens]) -> Prompt:
        """The prompt: embedded text, with each placeholder replaced by its item's kept tokens.

        Tokens keep the positions that they have in the unreduced prompt. So the text after an image does not move when
        visual tokens are dropped.

        Raises:
            ContextTooLong: The text alone has more tokens than the model has positions.
            InvalidRequest: The chat template does not render each item once and in order.
            MediaError: The checkpoint does not take this kind of media.
        """
        for tokens in visual:
            if tokens.kind not in self.kinds:
                raise MediaError("not_supported", tokens.kind)
            if tokens.placement is not None and self.num_position_rows > 1:
                raise InvalidRequest(
                    "this model places visual tokens in time, height and width, and the reducer places them itself; "
                    "name another",
                    "vision.reducer",
                )
        ids = self._token_ids(messages)  # refuses what is too long before anything is embedded
        self._check_placeholders(ids, [part.kind for m in messages for part in m.parts if isinstance(part, MediaPart)])
        if self.language.arithmetic.input_scale != 1.0:
            visual = [replace(tokens, embeddings=self.language.as_input(tokens.embeddings)) for tokens in visual]
        return splice(
            ids, frozenset(self._placeholders), visual, self.language.embed, self.place, self.num_position_rows
        )

    def check_length(self, messages: Sequence[Message]) -> None:
        """Refuse a conversation whose text alone is too long, before its media are encoded.

        Raises:
            ContextTooLong, InvalidRequest: As `splice`.
        """
        self._token_ids(messages)

    def _token_ids(self, messages: Sequence[Message], expand: Callable[[str], str] | None = None) -> list[int]:
        ids = self._template.token_ids(messages, expand)
        if messages and messages[0].is_prompt and any(i in self._placeholders or i in self.mark_ids() for i in ids):
            what = "the prompt holds a token that stands for media; send media in the messages of a chat request"
            raise InvalidRequest(what, "prompt")
        num_text_tokens = sum(token not in self._placeholders for token in ids)
        if num_text_tokens >= self.max_context_tokens:
            raise ContextTooLong(num_text_tokens, 1, self.max_context_tokens)
        return ids

    def token_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation without media, or of a whole prompt.

        Raises:
            ContextTooLong, InvalidRequest: As `splice`.
        """
        return self._token_ids(messages)

    def item_ids(self, text: str) -> list[int]:
        """Token ids of text that an item brings with it, in which control tokens are meant as such."""
        return self._template.tokenizer.ids(self._template.tokenizer.control(text))

    def _check_placeholders(self, ids: Sequence[int], sent: Sequence[Kind]) -> None:
        placed = [self._placeholders[token] for token in ids if token in self._placeholders]
        if placed != list(sent):
            raise InvalidRequest(
                f"this model's chat template places {placed or 'no media'} where the messages hold {list(sent)}; "
                "send media in user messages, in an order that the template keeps",
                "messages",
            )


def splice(
    ids: Sequence[int],
    placeholders: frozenset[int],
    visual: Sequence[VisualTokens],
    embed: Callable[[Tensor], Tensor],
    place: Callable[[VisualTokens], Placed],
    num_position_rows: int = 1,
) -> Prompt:
    """The prompt of `ids` with each placeholder replaced by the next item's kept tokens.

    Args:
        ids: Token ids with one placeholder per item, in order.
        placeholders: Ids of the placeholders.
        visual: The items.
        embed: (L,) ids to (L, D) embeddings. The prompt gets their device and dtype.
        place: The positions of an item's tokens.
        num_position_rows: P, rows of the prompt's positions.
    """
    items = iter(visual)
    media = torch.tensor(sorted(placeholders))
    runs: list[tuple[Tensor, Tensor]] = []
    positions: list[Tensor] = []
    next_position = 0
    for is_item, run in itertools.groupby(ids, key=placeholders.__contains__):
        for group in [[token] for token in run] if is_item else [list(run)]:
            tokens = next(items) if is_item else None
            placed = _text(len(group)) if tokens is None else _placed(tokens, place)
            runs.append(_embedded(torch.tensor(group), tokens, placed, media, embed))
            positions.append(placed.offsets.cpu().expand(num_position_rows, -1) + next_position)
            next_position += placed.advance
    embeddings = torch.cat([embedded for _, embedded in runs])
    token_ids = torch.cat([run_ids for run_ids, _ in runs])
    return Prompt(
        token_ids=token_ids.to(embeddings.device),
        embeddings=embeddings,
        positions=torch.cat(positions, dim=1).to(embeddings.device),
        next_position=next_position,
        is_visual=torch.isin(token_ids, media).to(embeddings.device),
    )


def _embedded(
    group: Tensor, tokens: VisualTokens | None, placed: Placed, media: Tensor, embed: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Ids (N,) and embeddings (N, D) of a run of text, or of an item: its kept tokens and its own text."""
    if tokens is None:
        return group, embed(group)
    if placed.token_ids is None:
        like = embed(group)
        return group.expand(tokens.num_tokens), tokens.embeddings.to(like.device, like.dtype)
    embedded = embed(placed.token_ids)
    is_media = torch.isin(placed.token_ids, media).unsqueeze(1).to(embedded.device)
    visual = tokens.embeddings.to(embedded.device, embedded.dtype)
    return placed.token_ids, embedded.masked_scatter(is_media, visual)


def _placed(tokens: VisualTokens, place: Callable[[VisualTokens], Placed]) -> Placed:
    """Where the reducer wants the tokens, or else where the family places them."""
    if tokens.placement is None:
        return place(tokens)
    return Placed(offsets=tokens.placement.offsets.unsqueeze(0), advance=tokens.placement.advance)


def in_sequence(tokens: VisualTokens) -> Placed:
    """One position per token of the unreduced item, in reading order."""
    return Placed(offsets=tokens.indices.unsqueeze(0), advance=tokens.num_tokens_in)


def among_text(item_ids: Sequence[int], placeholder: int, tokens: VisualTokens) -> Placed:
    """As `in_sequence`, for an item with text of its own. The text is kept whatever is dropped.

    Args:
        item_ids: The unreduced item: its text, and `placeholder` once per visual token, in reading order.
        placeholder: Id of the placeholder.
    """
    ids = torch.tensor(item_ids)
    cells = torch.nonzero(ids == placeholder).flatten()
    if len(cells) != tokens.num_tokens_in:
        raise AssertionError(f"{len(cells)} placeholders for an item of {tokens.num_tokens_in} tokens")
    stays = ids != placeholder
    stays[cells[tokens.indices.cpu()]] = True
    return Placed(offsets=torch.nonzero(stays).T, advance=len(ids), token_ids=ids[stays])


def _text(num_tokens: int) -> Placed:
    return Placed(offsets=torch.arange(num_tokens).unsqueeze(0), advance=num_tokens)


def _generation_config(folder: Path) -> dict[str, Any]:
    """The values in generation_config.json, without the defaults that transformers would add."""
    if not (folder / GENERATION).exists():
        return {}
    found = read_json(folder, GENERATION)
    eos = found.get("eos_token_id")
    ids = cast("list[object]", eos) if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise BadCheckpoint(str(folder), f"{GENERATION}: eos_token_id is {eos!r}, not one token id or a list of them")
    for name in sampling_options(SamplingParams):
        value: object = found.get(name)
        if isinstance(value, str | list | dict):
            raise BadCheckpoint(str(folder), f"{GENERATION}: {name} is {value!r}, not a number; {REPLACE}")
    return found
