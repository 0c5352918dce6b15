"""Decoder layers that keep a state of fixed size of each sequence, in place of keys and values of every token.

Such are the gated delta net layers of Qwen3.5 (arXiv:2412.06464) and the short convolutions of LFM2. They run as
transformers wrote them, chunk after chunk, with the state that the chunk before left. A state is never changed in
place, so a copy of it for another sequence or for a prefix cache is a reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import Cache, LinearAttentionLayer

from mm.models.attention import Attention, AttentionMetadata, Rotary, UnknownAttention
from mm.models.linear import prepack_linears
from mm.models.quantized import quantize_linears


def keeps_state(kind: str) -> bool:
    """Whether layers of a kind, as `layer_types` of a configuration names it, keep a state and no keys and values."""
    classes: dict[str, object] = cast(Any, cache_utils).DYNAMIC_LAYER_TYPE_MAPPING
    return classes.get(kind) is LinearAttentionLayer


@dataclass(frozen=True, eq=False)
class LayerState:
    """The state of one layer for B sequences.

    Attributes:
        conv: (B, channels, kernel): the last inputs of the convolution.
        recurrent: (B, ...): what the recurrence carries on. None in layers that only convolve.
    """

    conv: Tensor
    recurrent: Tensor | None

    @property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (self.conv, self.recurrent) if part is not None)

    @classmethod
    def joined(cls, states: Sequence[LayerState]) -> LayerState:
        """One state of all sequences, in memory of its own."""
        recurrent = [one.recurrent for one in states if one.recurrent is not None]
        return cls(torch.cat([one.conv for one in states]), torch.cat(recurrent) if recurrent else None)

    def of(self, row: int) -> LayerState:
        """The state of one of the sequences, in memory of its own."""
        own = slice(row, row + 1)
        return LayerState(self.conv[own].clone(), None if self.recurrent is None else self.recurrent[own].clone())


class States(Protocol):
    """Where the states of all sequences are."""

    def get(self, layer: int, seq_index: int) -> LayerState | None:
        """The state after a sequence's tokens so far; None before its first one."""
        ...

    def put(self, layer: int, seq_index: int, state: LayerState) -> None:
        """The state after a chunk more."""
        ...

    def note(self, layer: int, seq_index: int, replay: Callable[[int], LayerState]) -> None:
        """How to compute the state again after only the first so many tokens of the chunk."""
        ...


class _Cache(Protocol):
    states: States


class _Backend(Protocol):
    cache: _Cache


class RecurrentLayer:
    """transformers' layer, with the states of the sequences of a step.

    Args:
        index: The layer's place in the decoder.
    """

    def __init__(self, module: nn.Module, index: int) -> None:
        self._module, self._index = module, index

    def __call__(self, hidden: Tensor, metadata: AttentionMetadata, rotary: Rotary, attention: Attention) -> Tensor:
        states = cast(_Backend, attention).cache.states
        chunks: list[tuple[int, int, int]] = list(
            zip(
                metadata.seq_indices.tolist(),
                metadata.query_starts.tolist(),
                metadata.query_lens.tolist(),
                strict=True,
            )
        )
        output = torch.empty_like(hidden)
        single = [(seq, start, state) for seq, start, n in chunks if n == 1 and (state := states.get(self._index, seq))]
        if len(single) > 1:
            rows = torch.tensor([start for _, start, _ in single], device=hidden.device)
            given, after = self._run(hidden[rows].unsqueeze(1), LayerState.joined([state for _, _, state in single]))
            output[rows] = given.squeeze(1)
            for i, (seq, _, _) in enumerate(single):
                states.put(self._index, seq, after.of(i))
            together = {start for _, start, _ in single}
            chunks = [chunk for chunk in chunks if chunk[1] not in together]
        for seq, start, count in chunks:
            if count:
                output[start : start + count] = self._chunk(hidden[start : start + count], seq, states)
        return output

    def _chunk(self, hidden: Tensor, seq_index: int, states: States) -> Tensor:
        """(n, D) to (n, D): the next tokens of one sequence."""
        before = states.get(self._index, seq_index)
        given, after = self._run(hidden.unsqueeze(0), before)
        states.put(self._index, seq_index, after)
        states.note(self._index, seq_index, lambda count: self._run(hidden[:count].unsqueeze(0), before)[1])
        return given.squeeze(0)

    def _run(self, hidden: Tensor, before: LayerState | None) -> tuple[Tensor, LayerState]:
        """(B, n, D) and the states of B sequences to the layer's output and their states afterwards."""
        layer = _as_cache(before)
        others: list[Any] = [None] * self._index
        nothing = hidden.new_empty(0)  # positions do not matter here
        outputs: Tensor | tuple[Tensor, ...] = self._module(
            hidden,
            attention_mask=None,
            position_embeddings=(nothing, nothing),
            past_key_values=Cache(layers=[*others, layer]),
        )
        conv, recurrent = layer.conv_states[0], layer.recurrent_states[0]
        assert conv is not None
        return (outputs[0] if isinstance(outputs, tuple) else outputs), LayerState(conv, recurrent)

    def compile(self) -> None:
        """Does nothing: a layer's state has no fixed place."""

    def prepack(self) -> None:
        prepack_linears(self._module)

    def quantize(self) -> None:
        quantize_linears(self._module)

    def queries(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        raise UnknownAttention(["a state in place of queries"])

    def keys(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        raise UnknownAttention(["a state in place of keys"])


def _as_cache(state: LayerState | None) -> LinearAttentionLayer:
    """What transformers' layer reads its state from and writes it to, in memory of its own."""
    layer = LinearAttentionLayer()
    if state is not None:
        layer.dtype, layer.device = state.conv.dtype, state.conv.device
        layer.conv_states[0], layer.conv_kernel_size[0] = state.conv.clone(), state.conv.shape[-1]
        layer.is_conv_states_initialized[0] = layer.has_previous_state[0] = True
        if state.recurrent is not None:
            layer.recurrent_states[0], layer.is_recurrent_states_initialized[0] = state.recurrent.clone(), True
    return layer
