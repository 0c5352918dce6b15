"""Decoder layers over packed tokens: transformers' own, or the same arithmetic in fewer calls for known layers.

A decoding step of a small or heavily batched model on a CPU spends its time in calls, not in products. `FusedLayer`
computes the layers of Llama, Mistral and Qwen2 with one product for queries, keys and values, one for gate and up, and
one kernel for rotation, cache write and attention. Any other layer runs as transformers wrote it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from mm.models.arithmetic import Arithmetic
from mm.models.attention import (
    PLAIN,
    RECORDER,
    Attention,
    AttentionInputs,
    AttentionMetadata,
    AttentionVariant,
    Rotary,
    UnknownAttention,
    rotate,
)
from mm.models.linear import PackedLinear, bias_of, prepack_linears
from mm.models.pages import release_pages
from mm.models.quantized import Int8Linear, quantize_linears, quantized
from mm.models.row_ops import build_gated, build_norm, has_kernels

FUSED = frozenset(
    {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen2VLDecoderLayer", "Qwen2_5_VLDecoderLayer"}
)
"""Layers that are: RMS norm, attention, residual, RMS norm, gated MLP, residual, with or without biases."""


class DecoderLayers(Protocol):
    """A language model as the engine drives it: layer by layer, over the packed tokens of a step."""

    @property
    def num_layers(self) -> int: ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """(T,) ids to (T, D) embeddings."""
        ...

    @property
    def reads_ids(self) -> bool: ...

    def layer_inputs(self, token_ids: Tensor, embeddings: Tensor) -> Tensor | None:
        """(T, layers, d) for (T,) ids and (T, D) embeddings, where layers read ids."""
        ...

    def rotary(self, positions: Tensor) -> Rotary:
        """cos and sin of positions (P, T)."""
        ...

    def running(
        self, start: int, stop: int, hidden: Tensor, metadata: AttentionMetadata, rotary: Rotary
    ) -> AbstractContextManager[None]:
        """The context in which the layers start..stop run: nothing else is asked of the model meanwhile."""
        ...

    def layer(
        self, index: int, hidden: Tensor, metadata: AttentionMetadata, rotary: Rotary, attention: Attention
    ) -> Tensor:
        """(T, D) to (T, D). The layer's keys and values are written to the cache."""
        ...

    def queries(self, index: int, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Rotated queries (T, H, d) of a layer's input."""
        ...

    def keys(self, index: int, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Rotated keys (T, H_kv, d) of a layer's input."""
        ...

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm (T, D)."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, vocab) of the last layer's output (T, D)."""
        ...


class Layer(Protocol):
    """One decoder layer over packed tokens."""

    def __call__(self, hidden: Tensor, metadata: AttentionMetadata, rotary: Rotary, attention: Attention) -> Tensor:
        """(T, D) to (T, D)."""
        ...

    def queries(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Rotated queries (T, H, d) of the layer's input."""
        ...

    def keys(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Rotated keys (T, H_kv, d) of the layer's input. Nothing is written to the cache."""
        ...

    def compile(self) -> None:
        """Put the work before and after attention through torch.compile."""
        ...

    def prepack(self) -> None:
        """Repack weights into oneDNN's blocked format and free the originals."""
        ...

    def quantize(self) -> None:
        """Keep the weights of linear layers in 8 bits and free the originals."""
        ...


def build_layer(module: nn.Module, number: int, facts: Arithmetic) -> Layer:
    """The fused form where the module is known to have one.

    Args:
        number: The layer's place in the decoder.
    """
    index, window = facts.cache_indices[number], facts.windows[number]
    if type(module).__name__ in FUSED:
        return FusedLayer(module, index, facts.kv_shapes[number][1], window)
    shape = None if facts.kv_shapes[number] == facts.kv_shape else facts.kv_shape
    return ModuleLayer(module, number, index, window, shape)


class ModuleLayer:
    """transformers' layer, called as it is. Our attention function does the rest."""

    def __init__(
        self,
        module: nn.Module,
        number: int,
        index: int,
        window: int | None = None,
        shape: tuple[int, int] | None = None,
    ) -> None:
        self._module, self._number, self._index, self._window = module, number, index, window
        self._shape = shape
        names = inspect.signature(module.forward).parameters
        self._shares, self._has_input = "shared_kv_states" in names, "per_layer_input" in names

    def __call__(self, hidden: Tensor, metadata: AttentionMetadata, rotary: Rotary, attention: Attention) -> Tensor:
        if self._window is not None:
            metadata = metadata.in_windows
        options: dict[str, object] = {"shared_kv_states": metadata.shared} if self._shares else {}
        if self._has_input and metadata.layer_inputs is not None:
            options["per_layer_input"] = metadata.layer_inputs[:, self._number].unsqueeze(0)
        cos_sin = tuple(part.to(hidden.dtype).unsqueeze(0) for part in rotary)
        outputs: Tensor | tuple[Tensor, ...] = self._module(
            hidden.unsqueeze(0),
            attention_mask=None,
            position_embeddings=cos_sin,
            mm_metadata=metadata,
            mm_attention=attention,
            mm_layer=self._index,
            mm_window=self._window,
            mm_shape=self._shape,
            **options,
        )
        return (outputs[0] if isinstance(outputs, tuple) else outputs).squeeze(0)

    def compile(self) -> None:
        """Does nothing: our attention is called in the middle of the module."""

    def prepack(self) -> None:
        prepack_linears(self._module)

    def quantize(self) -> None:
        quantize_linears(self._module)

    def queries(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        return self._recorded(hidden, rotary).queries

    def keys(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        return self._recorded(hidden, rotary).keys

    def _recorded(self, hidden: Tensor, rotary: Rotary) -> AttentionInputs:
        """What the module itself gives to attention, whatever norms and rotations come before."""
        try:
            self(hidden, AttentionMetadata.of([], []), rotary, RECORDER)
        except AttentionInputs as found:
            return found
        raise UnknownAttention(["an interface of its own"])


class _SelfAttention(Protocol):
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear


class _Mlp(Protocol):
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: Callable[[Tensor], Tensor]


class _RmsNorm(Protocol):
    weight: Tensor
    variance_epsilon: float


class _LlamaLayer(Protocol):
    """The parts of transformers' layer that `FusedLayer` takes over."""

    self_attn: _SelfAttention
    mlp: _Mlp
    input_layernorm: _RmsNorm
    post_attention_layernorm: _RmsNorm


class FusedLayer:
    """The same in eight calls. The module's weights become views of the joined ones, so none is held twice."""

    def __init__(self, module: nn.Module, index: int, head_dim: int, window: int | None = None) -> None:
        self._index, self._head_dim = index, head_dim
        self._variant = PLAIN if window is None else AttentionVariant(window=window)
        layer = cast(_LlamaLayer, module)
        inner, mlp = layer.self_attn, layer.mlp
        self._num_queries = inner.q_proj.out_features
        self._qkv: PackedLinear | Int8Linear = _join(inner.q_proj, inner.k_proj, inner.v_proj)
        self._gate_up: PackedLinear | Int8Linear = _join(mlp.gate_proj, mlp.up_proj)
        self._out: PackedLinear | Int8Linear = PackedLinear(inner.o_proj.weight, bias_of(inner.o_proj))
        self._down: PackedLinear | Int8Linear = PackedLinear(mlp.down_proj.weight, bias_of(mlp.down_proj))
        self._activation = mlp.act_fn
        self._norm_parts = [
            (norm.weight.detach(), norm.variance_epsilon)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        self._build_row_ops(on_cpu_kernels=has_kernels(inner.o_proj.weight))
        self._before, self._after = self._before_attention, self._after_attention

    def _build_row_ops(self, *, on_cpu_kernels: bool) -> None:
        self._norms = [build_norm(*parts, on_cpu_kernels=on_cpu_kernels) for parts in self._norm_parts]
        self._gated = build_gated(self._activation, on_cpu_kernels=on_cpu_kernels)

    def __call__(self, hidden: Tensor, metadata: AttentionMetadata, rotary: Rotary, attention: Attention) -> Tensor:
        attended = attention.attend(self._index, self._before(hidden), metadata, rotary, self._variant)
        return self._after(hidden, attended)

    def _before_attention(self, hidden: Tensor) -> Tensor:
        """(T, D) to queries, keys and values (T, H + 2 * H_kv, d)."""
        return _heads(self._qkv(self._norms[0](hidden)), self._head_dim)

    def _after_attention(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = self._out.add_to(hidden, attended.flatten(1))
        return self._down.add_to(hidden, self._gated(self._gate_up(self._norms[1](hidden))))

    def prepack(self) -> None:
        for linear in (self._qkv, self._gate_up, self._out, self._down):
            linear.prepack()

    def quantize(self) -> None:
        self._qkv, self._gate_up = quantized(self._qkv), quantized(self._gate_up)
        self._out, self._down = quantized(self._out), quantized(self._down)

    def compile(self) -> None:
        self._build_row_ops(on_cpu_kernels=False)  # torch.compile cannot look into them
        self._before = torch.compile(self._before_attention, dynamic=True)
        self._after = torch.compile(self._after_attention, dynamic=True)

    def queries(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        return self._rotated(slice(0, self._num_queries), hidden, rotary)

    def keys(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        middle = (self._num_queries + self._qkv.num_outputs) // 2
        return self._rotated(slice(self._num_queries, middle), hidden, rotary)

    def _rotated(self, part: slice, hidden: Tensor, rotary: Rotary) -> Tensor:
        projected = self._qkv.part(self._norms[0](hidden), part)
        return rotate(_heads(projected, self._head_dim), *rotary)


def _heads(projected: Tensor, head_dim: int) -> Tensor:
    """(T, H * d) to (T, H, d)."""
    return cast(Tensor, projected.unflatten(-1, (-1, head_dim)))


def _join(*parts: nn.Linear) -> PackedLinear:
    """One layer with the outputs of all parts. The parts keep views of its weight and bias."""
    weight = torch.cat([part.weight.data for part in parts])
    biases = [bias_of(part) for part in parts]
    bias = None if biases[0] is None else torch.cat([part.bias.data for part in parts])
    at = 0
    for part in parts:
        release_pages(part.weight.data)
        stop = at + part.out_features
        part.weight = nn.Parameter(weight[at:stop], requires_grad=False)
        if bias is not None:
            part.bias = nn.Parameter(bias[at:stop], requires_grad=False)
        at = stop
    return PackedLinear(weight, bias)
