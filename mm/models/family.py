"""What model families share: a checkpoint's decoder half, its template, and the splice of tokens into a prompt.

A family adds which tokens stand for media, and where an item's tokens lie among the rotary positions. It does not know
how pixels become tokens.
"""

from __future__ import annotations

import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoProcessor

from mm.data.media import Kind
from mm.data.request import MediaPart, Message
from mm.data.sampling_params import SamplingParams, sampling_options
from mm.data.tokens import Prompt, VisualTokens
from mm.errors import InvalidRequest, MediaError
from mm.models.chat import ChatTemplate
from mm.models.language import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where one item's kept tokens lie, counted from the item's first position.

    Attributes:
        offsets: (P, N) int64, or (1, N) where all rows are equal.
        advance: How far behind the item's first position the text goes on, whatever was dropped.
        token_ids: (N,) ids of an item that brings text of its own, with placeholders where its kept tokens stand; None
            where all rows are tokens.
    """

    offsets: Tensor
    advance: int
    token_ids: Tensor | None = None


class CheckpointFamily(ABC):
    """Decoder side of a checkpoint: language model, tokenizer, template and splice.

    Args:
        folder: Checkpoint in Hugging Face format.
        device, dtype: Where and in what the language model lives.
    """

    num_position_rows: ClassVar[int] = 1
    """Rows of a prompt's positions: 3 for M-RoPE, also where they are equal."""

    def __init__(self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        self.tokenizer, template = self.load_tokenizer(folder)
        self.language = LanguageModel(folder, self.config, device, dtype)
        self.folder = folder
        self._template = ChatTemplate(self.tokenizer, template)
        self._placeholders = dict(self.placeholders())
        self._generation = _generation_config(folder)
        self.max_context_tokens: int = self.language.config.max_position_embeddings
        self.eos_token_ids = self._eos_token_ids()

    def load_tokenizer(self, folder: Path) -> tuple[Any, str | None]:
        """The tokenizer and the chat template, None for the tokenizer's own."""
        processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        return processor.tokenizer, getattr(processor, "chat_template", None)

    @abstractmethod
    def placeholders(self) -> Mapping[int, Kind]:
        """Token id to the kind of item that it stands for; one such token in a rendered template is one item."""

    @abstractmethod
    def place(self, tokens: VisualTokens) -> Placed:
        """Where an item's kept tokens lie."""

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The Rust tokenizer, for incremental decoding."""
        return self.tokenizer.backend_tokenizer

    @property
    def placeholder_ids(self) -> frozenset[int]:
        """Tokens that stand for media in a prompt."""
        return frozenset(self._placeholders)

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset(self._placeholders.values())

    @property
    def default_sampling(self) -> dict[str, float]:
        """Sampling options from the checkpoint's generation_config.json. `temperature` and `top_p` are always there."""
        options = sampling_options(SamplingParams)
        known = [name for name, declared in options.items() if declared.off is not None]
        named = {name: float(self._generation[name]) for name in known if self._generation.get(name) is not None}
        if self._generation.get("do_sample") is False:
            return named | {"temperature": 0.0, "top_p": 1.0}
        return {"temperature": 1.0, "top_p": 1.0} | named

    def _eos_token_ids(self) -> frozenset[int]:
        found = self._generation.get("eos_token_id", self.language.config.eos_token_id)
        return frozenset(found if isinstance(found, list | tuple) else [] if found is None else [found])

    def splice(self, messages: Sequence[Message], visual: Sequence[VisualTokens]) -> Prompt:
        """The prompt's rows: text embeddings, with each placeholder replaced by its item's kept tokens.

        Rows keep the positions they have in the unreduced prompt: text behind an image does not move when tokens go.

        Raises:
            InvalidRequest: The template does not place each item once, in order.
            MediaError: The checkpoint does not take an item's kind.
        """
        for tokens in visual:
            if tokens.kind not in self.kinds:
                raise MediaError("not_supported", tokens.kind)
        ids = self._template.token_ids(messages)
        self._check_placeholders(ids, [part.kind for m in messages for part in m.parts if isinstance(part, MediaPart)])
        return splice(
            ids, frozenset(self._placeholders), visual, self.language.embed, self.place, self.num_position_rows
        )

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
    """Rows of `ids` with each placeholder replaced by the next item's kept tokens, at their unreduced positions.

    Args:
        ids: Token ids with one placeholder per item, in order.
        embed: (L,) ids to (L, D) embeddings; decides device and dtype of the prompt.
        place: Where an item's tokens lie.
    """
    items = iter(visual)
    media = torch.tensor(sorted(placeholders))
    runs: list[tuple[Tensor, Tensor]] = []
    positions: list[Tensor] = []
    next_position = 0
    for is_item, run in itertools.groupby(ids, key=placeholders.__contains__):
        for group in [[token] for token in run] if is_item else [list(run)]:
            tokens = next(items) if is_item else None
            placed = _text(len(group)) if tokens is None else place(tokens)
            runs.append(_rows(torch.tensor(group), tokens, placed, media, embed))
            positions.append(placed.offsets.cpu().expand(num_position_rows, -1) + next_position)
            next_position += placed.advance
    embeddings = torch.cat([rows for _, rows in runs])
    token_ids = torch.cat([run_ids for run_ids, _ in runs])
    return Prompt(
        token_ids=token_ids.to(embeddings.device),
        embeddings=embeddings,
        positions=torch.cat(positions, dim=1).to(embeddings.device),
        next_position=next_position,
        is_visual=torch.isin(token_ids, media).to(embeddings.device),
    )


def _rows(
    group: Tensor, tokens: VisualTokens | None, placed: Placed, media: Tensor, embed: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Ids (N,) and embeddings (N, D) of a run of text, or of an item's kept tokens and its own text."""
    if tokens is None:
        return group, embed(group)
    if placed.token_ids is None:
        like = embed(group)
        return group.expand(tokens.num_tokens), tokens.embeddings.to(like.device, like.dtype)
    rows = embed(placed.token_ids)
    is_media = torch.isin(placed.token_ids, media).unsqueeze(1).to(rows.device)
    return placed.token_ids, rows.masked_scatter(is_media, tokens.embeddings.to(rows.device, rows.dtype))


def in_sequence(tokens: VisualTokens) -> Placed:
    """One position per token of the unreduced item, in reading order."""
    return Placed(offsets=tokens.indices.unsqueeze(0), advance=tokens.num_tokens_in)


def among_text(item_ids: Sequence[int], placeholder: int, tokens: VisualTokens) -> Placed:
    """As `in_sequence`, for an item that brings text of its own, which stays whatever is dropped.

    Args:
        item_ids: The unreduced item: its text, and `placeholder` once per token, in reading order.
    """
    ids = torch.tensor(item_ids)
    cells = torch.nonzero(ids == placeholder).flatten()
    if len(cells) != tokens.num_tokens_in:
        raise AssertionError(f"{len(cells)} places for an item of {tokens.num_tokens_in} tokens")
    stays = ids != placeholder
    stays[cells[tokens.indices.cpu()]] = True
    return Placed(offsets=torch.nonzero(stays).T, advance=len(ids), token_ids=ids[stays])


def _text(num_tokens: int) -> Placed:
    return Placed(offsets=torch.arange(num_tokens).unsqueeze(0), advance=num_tokens)


def _generation_config(folder: Path) -> dict[str, Any]:
    """What generation_config.json says itself; transformers' defaults are not the checkpoint's wish."""
    path = folder / "generation_config.json"
    return json.loads(path.read_text()) if path.is_file() else {}
