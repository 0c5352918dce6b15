"""Decoder layers on packed rows: transformers' own, or the same arithmetic in fewer calls where we know the layer.

A step of a small or heavily batched model on a CPU spends its time in calls, not in products. `FusedLayer` computes
what Llama's, Mistral's and Qwen2's layers do with one product for queries, keys and values, one for gate and up, and
rotation, cache write and attention in one kernel. Any other layer runs as transformers wrote it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mm.models.attention import Attention, AttentionMetadata, Rotary, rotate
from mm.models.linear import PackedProduct, pack_linears

FUSED = frozenset(
    {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen2VLDecoderLayer", "Qwen2_5_VLDecoderLayer"}
)
"""Layers that are: RMS norm, attention with optional biases on q, k, v, residual, RMS norm, gated MLP, residual."""


class Layer(Protocol):
    """One decoder layer over packed rows."""

    def __call__(self, hidden: Tensor, batch: AttentionMetadata, rotary: Rotary, attention: Attention) -> Tensor:
        """(R, D) to (R, D)."""
        ...

    def queries(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Rotated queries (R, H, d) of the layer's input."""
        ...

    def keys(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Rotated keys (R, H_kv, d) of the layer's input; nothing is stored."""
        ...

    def compile(self) -> None:
        """Put the work beside attention through torch.compile."""
        ...

    def pack(self) -> None:
        """Lay weights out as they are multiplied fastest; the module's own are used no more."""
        ...


def build_layer(module: nn.Module, index: int, head_dim: int) -> Layer:
    """The fused form where the module is known to have one."""
    if type(module).__name__ in FUSED:
        return FusedLayer(module, index, head_dim)
    return ModuleLayer(module, head_dim)


class ModuleLayer:
    """transformers' layer, called as it is; our attention function does the rest."""

    def __init__(self, module: nn.Module, head_dim: int) -> None:
        self._module: Any = module
        self._head_dim = head_dim

    def __call__(self, hidden: Tensor, batch: AttentionMetadata, rotary: Rotary, attention: Attention) -> Tensor:
        cos_sin = tuple(part.to(hidden.dtype).unsqueeze(0) for part in rotary)
        return self._module(
            hidden.unsqueeze(0),
            attention_mask=None,
            position_embeddings=cos_sin,
            mm_batch=batch,
            mm_attention=attention,
        ).squeeze(0)

    def compile(self) -> None:
        """Does nothing: our attention stands in the middle of the module."""

    def pack(self) -> None:
        pack_linears(self._module)

    def queries(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        return self._rotated("q", hidden, rotary)

    def keys(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        return self._rotated("k", hidden, rotary)

    def _rotated(self, which: str, hidden: Tensor, rotary: Rotary) -> Tensor:
        inner = self._module.self_attn
        project, norm = getattr(inner, f"{which}_proj"), getattr(inner, f"{which}_norm", nn.Identity())
        heads = project(self._module.input_layernorm(hidden)).unflatten(-1, (-1, self._head_dim))
        return rotate(norm(heads), *rotary)


class FusedLayer:
    """The same in nine calls. The module's weights become views of the joined ones, so none is held twice."""

    def __init__(self, module: Any, index: int, head_dim: int) -> None:
        self._index, self._head_dim = index, head_dim
        inner, mlp = module.self_attn, module.mlp
        self._num_queries = inner.q_proj.out_features
        self._qkv = _join(inner.q_proj, inner.k_proj, inner.v_proj)
        self._gate_up = _join(mlp.gate_proj, mlp.up_proj)
        self._out, self._down = PackedProduct(inner.o_proj.weight), PackedProduct(mlp.down_proj.weight)
        self._activation = mlp.act_fn
        self._norms = [
            (norm.weight, norm.variance_epsilon) for norm in (module.input_layernorm, module.post_attention_layernorm)
        ]

    def __call__(self, hidden: Tensor, batch: AttentionMetadata, rotary: Rotary, attention: Attention) -> Tensor:
        seen = attention.attend(self._index, self._before(hidden), batch, rotary)
        return self._after(hidden, seen)

    def _before(self, hidden: Tensor) -> Tensor:
        """(R, D) to queries, keys and values (R, H + 2 * H_kv, d)."""
        return self._qkv(self._norm(hidden, 0)).unflatten(-1, (-1, self._head_dim))

    def _after(self, hidden: Tensor, seen: Tensor) -> Tensor:
        hidden = self._out.added_to(hidden, seen.flatten(1))
        gate, up = self._gate_up(self._norm(hidden, 1)).chunk(2, dim=-1)
        return self._down.added_to(hidden, self._activation(gate).mul_(up))

    def pack(self) -> None:
        for product in (self._qkv, self._gate_up, self._out, self._down):
            product.pack()

    def compile(self) -> None:
        self._before = torch.compile(self._before, dynamic=True)
        self._after = torch.compile(self._after, dynamic=True)

    def queries(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        return self._rotated(slice(0, self._num_queries), hidden, rotary)

    def keys(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        middle = (self._num_queries + self._qkv.num_outputs) // 2
        return self._rotated(slice(self._num_queries, middle), hidden, rotary)

    def _rotated(self, part: slice, hidden: Tensor, rotary: Rotary) -> Tensor:
        heads = self._qkv.part(self._norm(hidden, 0), part)
        return rotate(heads.unflatten(-1, (-1, self._head_dim)), *rotary)

    def _norm(self, hidden: Tensor, which: int) -> Tensor:
        weight, epsilon = self._norms[which]
        return nn.functional.rms_norm(hidden, (hidden.shape[-1],), weight, epsilon)


def _join(*parts: nn.Linear) -> PackedProduct:
    """With their weights and biases one below the other; the parts keep views."""
    weight = torch.cat([part.weight.data for part in parts])
    bias = None if parts[0].bias is None else torch.cat([part.bias.data for part in parts])
    at = 0
    for part in parts:
        stop = at + part.out_features
        part.weight = nn.Parameter(weight[at:stop], requires_grad=False)
        if bias is not None:
            part.bias = nn.Parameter(bias[at:stop], requires_grad=False)
        at = stop
    return PackedProduct(weight, bias)
