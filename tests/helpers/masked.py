"""Reduction inside the decoder as a mask: transformers' eager attention over the whole sequence, and nothing dropped.

Plain and slow on purpose. It shares no code with the engine: full attention maps, one mask per layer, no cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText


@dataclass(kw_only=True)
class Seen:
    """What a rule may look at, at the border before `layer`.

    Attributes:
        before: (H, L, L) attention of the layer below.
        here: (H, L, L) attention that this layer would have with what it is given.
        visual: (V,) rows that are visual and still there.
        origins: (V,) which of all visual rows these are.
        first: (items,) first visual row of each item.
        behind: First row behind all media.
        num_rows: L.
    """

    layer: int
    before: Tensor
    here: Tensor
    visual: Tensor
    origins: Tensor
    first: tuple[int, ...]
    behind: int
    num_rows: int


Rule = Callable[[Seen], Tensor]
"""The visual rows that stay."""


class Masked:
    """The decoder of a checkpoint with eager attention, in float32."""

    def __init__(self, folder) -> None:
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
        )
        self.text = model.eval().model.language_model
        self.head = model.lm_head
        self._map: Tensor | None = None
        for layer in self.text.layers:
            layer.self_attn.register_forward_hook(self._keep_map)

    def _keep_map(self, module, args, output) -> None:
        self._map = output[1][0]

    def layer(self, index: int, hidden: Tensor, positions: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Output (L, D) and attention (H, L, L) of one layer; `seen` (L, L) says which rows each row sees."""
        rows = positions.unsqueeze(1) if positions.shape[0] > 1 else positions
        if positions.shape[0] == 1 and "mrope_section" in (getattr(self.text.config, "rope_parameters", None) or {}):
            rows = positions.expand(3, -1).unsqueeze(1)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
        output = self.text.layers[index](
            hidden[None], attention_mask=mask, position_embeddings=self.text.rotary_emb(hidden[None], rows)
        )
        assert self._map is not None
        return (output[0] if isinstance(output, tuple) else output)[0], self._map

    @torch.no_grad()
    def prompt_masks(self, prompt, rules: Mapping[int, Rule], first: tuple[int, ...]) -> list[Tensor]:
        """Per layer, (L,) bool: which rows of the prompt are there."""
        num_rows, hidden = prompt.length, prompt.embeddings
        alive = torch.ones(num_rows, dtype=torch.bool)
        before, masks = torch.empty(0), []
        behind = int(prompt.is_visual.nonzero()[-1]) + 1
        for index in range(len(self.text.layers)):
            if index in rules:
                _, here = self.layer(index, hidden, prompt.positions, causal(alive))
                visual = (alive & prompt.is_visual).nonzero()[:, 0]
                origins = torch.searchsorted(prompt.is_visual.nonzero()[:, 0], visual)
                stays = rules[index](
                    Seen(
                        layer=index,
                        before=before,
                        here=here,
                        visual=visual,
                        origins=origins,
                        first=first,
                        behind=behind,
                        num_rows=num_rows,
                    )
                )
                alive = alive & ~prompt.is_visual
                alive[stays] = True
            hidden, before = self.layer(index, hidden, prompt.positions, causal(alive))
            masks.append(alive)
        return masks

    @torch.no_grad()
    def logits(self, prompt, masks: list[Tensor], later: list[Tensor], tokens: list[int]) -> Tensor:
        """(T, vocab) at each of `tokens`.

        Args:
            masks: Per layer, the prompt's rows that the prompt's own rows see.
            later: Per layer, the prompt's rows that generated rows see.
        """
        ids = torch.tensor(tokens[:-1], dtype=torch.int64)
        hidden = torch.cat([prompt.embeddings, self.text.embed_tokens(ids)])
        behind = prompt.next_position + torch.arange(len(ids))
        positions = torch.cat([prompt.positions, behind.expand(prompt.positions.shape[0], -1)], dim=1)
        for index in range(len(self.text.layers)):
            seen = causal(torch.cat([masks[index], torch.ones(len(ids), dtype=torch.bool)]))
            seen[prompt.length :, : prompt.length] = later[index]
            hidden, _ = self.layer(index, hidden, positions, seen)
        return self.head(self.text.norm(hidden))[prompt.length - 1 :]


def causal(alive: Tensor) -> Tensor:
    """(L, L) bool: every row sees the earlier ones that are there, and itself."""
    size = alive.shape[0]
    return torch.ones(size, size, dtype=torch.bool).tril() & alive | torch.eye(size, dtype=torch.bool)
