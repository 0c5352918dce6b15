"""Any checkpoint that transformers has an image-text-to-text model for, with its own processor, positions and masks.

Nothing here names an architecture. What stands for an item in the prompt comes from the processor with the item, what
the positions and masks are is asked of the model's class, and a self-test at load compares with the model's own pass.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mm.data.arrays import ints
from mm.data.media import Kind
from mm.data.request import MediaPart, Message, TextPart
from mm.data.tokens import Prompt, VisualTokens
from mm.errors import InvalidRequest, MediaError
from mm.models.family import CheckpointFamily, Placed, in_sequence
from mm.models.folder import BadCheckpoint
from mm.models.language import LanguageModel
from mm.models.media_processor import MediaProcessor
from mm.models.probe import WholeModel, accepted


class TransformersFamily(CheckpointFamily):
    """The decoder side of a checkpoint, driven by what transformers' class for it offers.

    Attributes:
        whole: transformers' model, whose decoder is the engine's.
        processor: The checkpoint's processor.
    """

    whole: WholeModel
    processor: MediaProcessor

    def load_tokenizer(self, folder: Path) -> tuple[PreTrainedTokenizerBase, str | None]:
        self.processor = MediaProcessor(folder)
        return self.processor.tokenizer, self.processor.template

    def load_language(self, folder: Path, device: str, dtype: torch.dtype) -> LanguageModel:
        self.whole = WholeModel(folder, self.config)
        language = self.language_class(folder, self.config, device, dtype, self.whole)
        if self.whole.rope_index is not None:
            self.num_position_rows = 3
        self._mask_config = copy.deepcopy(self.config)
        text: Any = self._mask_config.get_text_config()  # pyright: ignore[reportUnknownMemberType]
        text._attn_implementation = "eager"  # the one for which masks are always written out
        if getattr(text, "sliding_window", None):
            text.sliding_window = text.max_position_embeddings + 1  # windows are the engine's
        return language

    def placeholders(self) -> Mapping[int, Kind]:
        both: tuple[Kind, ...] = ("image", "video")
        kinds = cast("list[Kind]", [kind for kind in both if kind in self.processor.samples])
        found: dict[int, Kind] = {}
        for kind in kinds:
            token: int | None = getattr(self.config, f"{kind}_token_id", None)
            if token is not None:
                found[token] = kind
        if "image" in kinds and "image" not in found.values():
            raise BadCheckpoint(str(self.folder), "config.json names no image_token_id")
        if found:  # control tokens that get vectors from the encoder
            found |= dict.fromkeys(getattr(self.config, "visual_indicator_token_ids", ()), kinds[0])
        else:
            reasons = "; ".join(f"{kind}: {why}" for kind, why in self.processor.refused.items())
            raise BadCheckpoint(str(self.folder), f"has a processor that takes no media ({reasons})")
        return found

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset(self.processor.samples)

    @property
    def num_planes(self) -> int:
        """Layers after which the decoder adds planes to visual tokens."""
        return self.whole.num_planes

    def mark_ids(self) -> Set[int]:
        found: list[Any] = [self.tokenizer.convert_tokens_to_ids(mark) for mark in self.processor.marks]
        return {token for token in found if isinstance(token, int) and token != self.tokenizer.unk_token_id}

    def place(self, tokens: VisualTokens) -> Placed:
        return in_sequence(tokens)

    def splice(self, messages: Sequence[Message], visual: Sequence[VisualTokens]) -> Prompt:
        for tokens in visual:
            if tokens.kind not in self.kinds:
                raise MediaError("not_supported", tokens.kind)
        ids = torch.tensor(self._ids(messages, visual))
        is_visual = torch.isin(ids, torch.tensor(sorted(self._placeholders)))
        counts = [tokens.num_tokens_in for tokens in visual]
        if int(is_visual.sum()) != sum(counts):
            raise InvalidRequest(
                f"this model's processor writes {int(is_visual.sum())} placeholders for media of {sum(counts)} tokens",
                "messages",
            )
        positions, next_position = self._positions(ids, visual)
        keep = ~is_visual
        at = cast("tuple[Tensor, ...]", torch.nonzero(is_visual).flatten().split(counts))  # pyright: ignore[reportUnknownMemberType]
        for tokens, where in zip(visual, at, strict=True):
            keep[where[tokens.indices.cpu()]] = True
        positions, next_position = self._placed(positions, next_position, visual, at)
        mask, in_windows = self._mask(ids)
        prompt = self._prompt(ids[keep], positions[:, keep], next_position, visual, mask, keep)
        return replace(prompt, mask_in_windows=in_windows)

    def _prompt(
        self,
        ids: Tensor,
        positions: Tensor,
        next_position: int,
        visual: Sequence[VisualTokens],
        mask: Tensor | None,
        keep: Tensor,
    ) -> Prompt:
        embeddings = self.language.embed(ids)
        device = embeddings.device
        is_visual = torch.isin(ids, torch.tensor(sorted(self._placeholders))).to(device)
        if visual:
            rows = torch.cat([tokens.embeddings.to(device, embeddings.dtype) for tokens in visual])
            embeddings = embeddings.masked_scatter(is_visual.unsqueeze(1), self.language.as_input(rows))
        planes = [tokens.layer_planes for tokens in visual if tokens.layer_planes is not None]
        num_planes = self.whole.num_planes
        if [len(plane) for plane in planes] != ([num_planes] * len(visual) if num_planes else []):
            raise InvalidRequest(
                f"this decoder takes {num_planes} further planes of every visual token, and the encoder sent "
                f"{[len(plane) for plane in planes] or 'none'}; use the encoder of the same checkpoint",
                "messages",
            )
        return Prompt(
            token_ids=ids.to(device),
            embeddings=embeddings,
            positions=positions.to(device),
            next_position=next_position,
            is_visual=is_visual,
            layer_planes=torch.cat(planes, dim=1).to(device, embeddings.dtype) if planes else None,
            mask=None if mask is None else mask[keep][:, keep].to(device),
        )

    def _ids(self, messages: Sequence[Message], visual: Sequence[VisualTokens]) -> list[int]:
        """Ids of the unreduced prompt."""
        sent = [part.kind for message in messages for part in message.parts if isinstance(part, MediaPart)]
        texts: list[tuple[Kind, str]] = [(tokens.kind, _text_of(tokens)) for tokens in visual]

        def expand(rendered: str) -> str:
            expanded, placed = self.processor.expand(rendered, texts)
            if placed != sent:
                raise InvalidRequest(
                    f"this model's chat template places {placed or 'no media'} where the messages hold {sent}; "
                    "send media in user messages, in an order that the template keeps",
                    "messages",
                )
            return expanded

        return self._token_ids(messages, expand)

    def _positions(self, ids: Tensor, visual: Sequence[VisualTokens]) -> tuple[Tensor, int]:
        """(P, L) positions of the unreduced prompt, and the one of the first generated token."""
        rope = self.whole.rope_index
        if rope is None or not visual:
            return torch.arange(len(ids)).expand(self.num_position_rows, -1), len(ids)
        names = dict.fromkeys(name for tokens in visual for name in tokens.layout)
        layout = {name: torch.cat([t.layout[name].cpu() for t in visual if name in t.layout]) for name in names}
        types = self.processor.token_types(ints(ids)).unsqueeze(0)
        positions, delta = rope(**accepted(rope, {"input_ids": ids.unsqueeze(0), "mm_token_type_ids": types, **layout}))
        return positions[:, 0], len(ids) + int(delta.flatten()[0])

    def _placed(
        self, positions: Tensor, next_position: int, visual: Sequence[VisualTokens], at: Sequence[Tensor]
    ) -> tuple[Tensor, int]:
        """The positions where reducers want tokens elsewhere than their grid says.

        Raises:
            InvalidRequest: The model's positions or the item's own text leave no room for that.
        """
        positions = positions.clone()
        for tokens, where in zip(visual, at, strict=True):
            placement = tokens.placement
            if placement is None:
                continue
            if positions.shape[0] > 1 or int(where[-1] - where[0]) + 1 != len(where):
                raise InvalidRequest(
                    "this model places visual tokens in time, height and width, or among text, and the reducer places "
                    "them itself; name another",
                    "vision.reducer",
                )
            first = int(positions[0, where[0]])
            positions[0, where[tokens.indices.cpu()]] = first + placement.offsets.cpu()
            shift = placement.advance - len(where)
            positions[0, int(where[-1]) + 1 :] += shift
            next_position += shift
        return positions, next_position

    def _mask(self, ids: Tensor) -> tuple[Tensor | None, bool]:
        """(L, L) bool of the unreduced prompt, where some tokens attend to later ones, else None.

        And whether that is so in layers with a window only.
        """
        masks = self.whole.masks
        if masks is None:
            return None, False
        length = len(ids)
        types = self.processor.prefix_types(ints(ids)).unsqueeze(0)
        arguments = {
            "config": self._mask_config,
            "inputs_embeds": torch.empty(1, length, 1),
            "attention_mask": torch.ones(1, length, dtype=torch.int64),
            "past_key_values": None,
            "position_ids": torch.arange(length).unsqueeze(0),
            "token_type_ids": types,
            "mm_token_type_ids": types,
            "is_first_iteration": True,
        }
        found: Any = masks(**accepted(masks, arguments))
        by_kind = cast("dict[str, Tensor]", found if isinstance(found, dict) else {"full_attention": found})
        allowed = {kind: mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0 for kind, mask in by_kind.items()}
        windowed = allowed.pop("sliding_attention", None)
        full = next(iter(allowed.values())) if allowed else windowed
        assert full is not None
        causal = torch.ones_like(full).tril()
        if not torch.equal(full, causal):
            return full, False
        return (None, False) if windowed is None or torch.equal(windowed, causal) else (windowed, True)

    def type_ids(self, ids: Sequence[int]) -> dict[str, Tensor]:
        return {
            "mm_token_type_ids": self.processor.token_types(ids),
            "token_type_ids": self.processor.prefix_types(ids),
        }

    def trial(self) -> tuple[list[VisualTokens], list[Message]]:
        """A picture of random tokens between two texts."""
        item = self.processor.samples.get("image")
        text = TextPart(text="What is it? 1, 2, 3")
        if item is None:
            return super().trial()
        ids = self.item_ids(item.text)
        own = torch.tensor([token for token in ids if token in self._placeholders])
        count = len(own)
        width = self.language.config.hidden_size
        generator = torch.Generator().manual_seed(0)
        scale = float(self.language.embed(torch.arange(min(64, self.language.vocab_size))).float().std())
        rows = torch.randn(count, width, generator=generator) * scale
        for token in getattr(self.config, "visual_indicator_token_ids", ()):  # one vector wherever it stands
            rows[own == token] = rows[own == token][:1]
        tokens = VisualTokens.full(rows.to(self.language.dtype), (1, 1, count), "image")
        planes = torch.randn(self.whole.num_planes, count, width, generator=generator) * scale
        tokens = replace(
            tokens,
            text=item.text,
            layout=item.layout,
            layer_planes=planes.to(self.language.dtype) if len(planes) else None,
        )
        return [tokens], [Message(role="user", parts=(MediaPart(index=0, kind="image"), text))]


def _text_of(tokens: VisualTokens) -> str:
    if tokens.text is None:
        raise InvalidRequest(
            "these visual tokens come from an encoder that does not say what text stands for them; use the encoder of "
            "the model's own checkpoint",
            "messages",
        )
    return tokens.text
