"""A language model of which every member of a group holds a part (Shoeybi et al., arXiv:1909.08053, section 3).

Hidden states are whole on every member. Each computes its own heads and its own part of the MLP, and two sums per layer
make the hidden states whole again. All members call the same operations in the same order. Rank 0 has the results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from mm.models.arithmetic import Arithmetic
from mm.models.attention import Attention, AttentionMetadata, Rotary
from mm.models.collectives import Collectives
from mm.models.language import LanguageModel
from mm.models.layers import FUSED, FusedLayer, Layer, ModuleLayer
from mm.models.linear import PackedLinear, bias_of
from mm.models.probe import is_converted, names_in_pass
from mm.models.shards import BY_INPUTS, Shard, ShardedText, refuse
from mm.plugins.weights import ReducerWeights


class Leader(Protocol):
    """Rank 0's way to say what all members do next."""

    def operation(self, name: str, arguments: Mapping[str, object]) -> AbstractContextManager[None]:
        """Tell the other members to call an operation. In the context rank 0 calls it too, and nothing else."""
        ...


class ShardedLanguageModel(LanguageModel):
    """One member's part of a decoder.

    Args:
        folder, config, device, dtype: As for `LanguageModel`.
        group: The members.
        leader: On rank 0. The other members call what they are told.

    Raises:
        InvalidOption: The decoder cannot be split into so many parts.
    """

    def __init__(
        self,
        folder: Path,
        config: PretrainedConfig,
        device: str,
        dtype: torch.dtype,
        group: Collectives,
        leader: Leader | None = None,
    ) -> None:
        self.group, self._leader = group, leader
        self.shard, source = split(folder, config, group.rank, group.size)
        self._vocab_size = source.vocab_size
        super().__init__(folder, config, device, dtype, source)

    def _arithmetic(self, folder: Path, config: PretrainedConfig) -> Arithmetic:
        found = super()._arithmetic(folder, config)
        return replace(found, kv_shapes=((self.shard.own_kv_heads, self.shard.head_dim),) * len(found.kv_shapes))

    def _built(self, layers: nn.ModuleList) -> list[Layer]:
        return [self._built_layer(layer, i) for i, layer in enumerate(layers)]

    def _built_layer(self, module: nn.Module, number: int) -> Layer:
        index, window = self.arithmetic.cache_indices[number], self.arithmetic.windows[number]
        if type(module).__name__ in FUSED:
            return ShardedFusedLayer(module, index, self.shard.head_dim, window, self.group)
        _sum_outputs(module, self.group)
        return ModuleLayer(module, number, index, window)

    def with_layers(self, weights: ReducerWeights) -> LanguageModel:
        raise refuse(self.group.size, "this reducer brings layers of its own for the decoder; use another one")

    @property
    def num_layer_bytes(self) -> int:
        """Memory of the layers' weights of this member, before they are repacked."""
        storages = [weight.untyped_storage() for weight in self.model.layers.parameters()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @property
    def can_be_recorded(self) -> bool:
        return False

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def head_weight(self) -> Tensor:
        """(vocab, D). On rank 0 it is put together at each call."""
        with self._told("gather_head"):
            return self.gather_head()

    def gather_head(self) -> Tensor:
        """`head_weight`, as all members call it."""
        assert isinstance(self._head_weight, Tensor)
        return self.group.gather(self._head_weight, 0)[: self.vocab_size]

    def quantize(self) -> None:
        raise refuse(self.group.size, "weights of 8 bits cannot be split; leave out quantize or this option")

    def compile(self) -> None:
        raise refuse(self.group.size, "torch.compile does not see the sums of the members; leave out compile")

    def prepack(self) -> None:
        with self._told("prepack"):
            super().prepack()

    # ── operations of all members ─────────────────────────────────────────────────────────────────────────────────────

    def _told(self, name: str, **arguments: object) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if self._leader is None else self._leader.operation(name, arguments)

    @torch.inference_mode()
    def embed(self, token_ids: Tensor) -> Tensor:
        """As `LanguageModel.embed`. Every member adds the rows that it has."""
        with self._told("embed", token_ids=token_ids):
            ids = token_ids.to(self.device) - self.shard.rank * self._embedding_rows
            is_own = (ids >= 0) & (ids < self._embedding_rows)
            rows = self._embedding(ids.clamp(0, self._embedding_rows - 1))
            return self.as_input(self.group.all_reduce(rows * is_own.unsqueeze(1)))

    @property
    def _embedding_rows(self) -> int:
        return self.model.get_input_embeddings().num_embeddings

    @contextlib.contextmanager
    def running(
        self, start: int, stop: int, hidden: Tensor, metadata: AttentionMetadata, rotary: Rotary
    ) -> Generator[None]:
        """In the context all members run the layers start..stop. Rank 0 gives the first one's input."""
        size = {"num_tokens": hidden.shape[0], "rotary_width": rotary[0].shape[-1]}
        with self._told("run", start=start, stop=stop, metadata=metadata, **size):
            self.group.broadcast(hidden, *rotary)
            yield

    def run(
        self,
        attention: Attention,
        *,
        start: int,
        stop: int,
        metadata: AttentionMetadata,
        num_tokens: int,
        rotary_width: int,
    ) -> None:
        """What members do where rank 0 is in `running`."""
        hidden, rotary = self._received(num_tokens, rotary_width)
        for index in range(start, stop):
            hidden = self.layer(index, hidden, metadata, rotary, attention)

    def _received(self, num_tokens: int, rotary_width: int) -> tuple[Tensor, Rotary]:
        """A layer's input and its rotary embedding, of rank 0."""
        hidden = torch.empty(num_tokens, self._width, dtype=self.dtype, device=self.device)
        cos, sin = torch.empty(2, num_tokens, rotary_width, device=self.device)
        hidden, cos, sin = self.group.broadcast(hidden, cos, sin)
        return hidden, (cos, sin)

    @property
    def _width(self) -> int:
        return self.model.get_input_embeddings().embedding_dim

    def logits(self, hidden: Tensor) -> Tensor:
        """As `LanguageModel.logits`, on rank 0. Every member computes its part of the vocabulary."""
        with self._told("finish", num_tokens=hidden.shape[0]):
            self.group.broadcast(hidden)
            return self._joined_logits(hidden)

    def finish(self, *, num_tokens: int) -> None:
        """What members do where rank 0 is in `logits`."""
        hidden = torch.empty(num_tokens, self._width, dtype=self.dtype, device=self.device)
        self._joined_logits(*self.group.broadcast(hidden))

    def _joined_logits(self, hidden: Tensor) -> Tensor:
        parts = self.group.gather(self._logits(self._norm(hidden)), 1)
        return self.arithmetic.finish(parts[:, : self.vocab_size])

    def queries(self, index: int, hidden: Tensor, rotary: Rotary) -> Tensor:
        """As `LanguageModel.queries`: of the heads of all members."""
        return self._projected("queries", index, hidden, rotary)

    def keys(self, index: int, hidden: Tensor, rotary: Rotary) -> Tensor:
        """As `LanguageModel.keys`: of the heads of all members."""
        return self._projected("keys", index, hidden, rotary)

    def _projected(self, which: str, index: int, hidden: Tensor, rotary: Rotary) -> Tensor:
        size = {"num_tokens": hidden.shape[0], "rotary_width": rotary[0].shape[-1]}
        with self._told("project", which=which, index=index, **size):
            self.group.broadcast(hidden, *rotary)
            return self._heads(which, index, hidden, rotary)

    def project(self, *, which: str, index: int, num_tokens: int, rotary_width: int) -> None:
        """What members do where rank 0 is in `queries` or `keys`."""
        self._heads(which, index, *self._received(num_tokens, rotary_width))

    def _heads(self, which: str, index: int, hidden: Tensor, rotary: Rotary) -> Tensor:
        own = getattr(super(), which)(index, hidden, rotary)
        return self.group.gather(own, 1, self.shard.copies if which == "keys" else 1)


def split(folder: Path, config: PretrainedConfig, rank: int, size: int) -> tuple[Shard, ShardedText]:
    """A member's part of a decoder, and what reads it. Nothing but headers is read here.

    Raises:
        InvalidOption: The decoder cannot be split into so many parts.
        BadCheckpoint: It has tensors of other shapes than its configuration says.
    """
    if is_converted(config):
        raise refuse(size, "this checkpoint's layers are put together at load; leave the option out")
    text = config.get_text_config()  # pyright: ignore[reportUnknownMemberType]
    shard = Shard.of(config, Arithmetic.of(folder, text, names_in_pass(config)), rank, size)
    return shard, ShardedText(folder, text, shard)


class RowParallelLinear(PackedLinear):
    """x W^T + b, where every member has some of the columns of W and x, and the whole bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None, group: Collectives) -> None:
        super().__init__(weight)
        self._whole_bias, self._group = bias, group

    def add_to(self, hidden: Tensor, inputs: Tensor) -> Tensor:
        """hidden + x W^T + b, (T, out), the same on every member. `hidden` stays as it is."""
        total = self._group.all_reduce(self(inputs)).add_(hidden)
        return total if self._whole_bias is None else total.add_(self._whole_bias)


class ShardedFusedLayer(FusedLayer):
    """A fused layer with one member's heads and part of the MLP."""

    def __init__(self, module: nn.Module, index: int, head_dim: int, window: int | None, group: Collectives) -> None:
        super().__init__(module, index, head_dim, window)
        self._out = _row_parallel(self._out, group)
        self._down = _row_parallel(self._down, group)


def _row_parallel(linear: Any, group: Collectives) -> RowParallelLinear:
    return RowParallelLinear(linear.weight, linear.bias, group)


class _SummedLinear(nn.Module):
    """The same as `RowParallelLinear` inside a layer of transformers."""

    def __init__(self, linear: nn.Linear, group: Collectives) -> None:
        super().__init__()
        self.linear, self.bias = linear, bias_of(linear)
        linear.register_parameter("bias", None)
        self._group = group

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        total = self._group.all_reduce(self.linear(inputs).contiguous())
        return total if self.bias is None else total.add_(self.bias)


def _sum_outputs(module: nn.Module, group: Collectives) -> None:
    for name, child in list(module.named_children()):
        if name in BY_INPUTS and isinstance(child, nn.Linear):
            setattr(module, name, _SummedLinear(child, group))
        else:
            _sum_outputs(child, group)
