"""Which part of a decoder's weights each member of a tensor-parallel group holds, and how it reads that part.

As in Megatron-LM (Shoeybi et al., arXiv:1909.08053, section 3): query, key, value, gate and up projections are split by
outputs, whole heads each, and the projections after them by inputs. Embedding and head are split by rows of the
vocabulary. Norms are held by all. Where there are fewer key/value heads than members, several hold the same one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from mm.errors import InvalidOption
from mm.models.arithmetic import Arithmetic
from mm.models.checkpoint import BadCheckpoint, few, read_slices, tensor_shapes
from mm.models.decoder_source import HEAD, TextModel, text_key
from mm.models.layers import FUSED

SPLIT_LAYERS = FUSED | {"Qwen3DecoderLayer"}
"""Layers whose linear layers are those below, and whose other weights every member needs."""
QUERIES, KEYS = frozenset({"q_proj", "o_proj"}), frozenset({"k_proj", "v_proj"})
INNER = frozenset({"gate_proj", "up_proj", "down_proj"})
BY_INPUTS = frozenset({"o_proj", "down_proj"})
"""Their outputs are summed over the members. Their biases are held by all, and added once, to the sum."""


def refuse(size: int, what: str) -> InvalidOption:
    """The error of a model that cannot be split."""
    return InvalidOption("model", "tensor_parallel", f"was {size}, but {what}")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A member's part of a decoder.

    Attributes:
        rank, size: The member, of how many.
        num_heads, num_kv_heads, head_dim: Of the whole decoder.
        inner: Width of the whole gated MLP.
    """

    rank: int
    size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inner: int

    @classmethod
    def of(cls, config: PretrainedConfig, arithmetic: Arithmetic, rank: int, size: int) -> Shard:
        """The part of a decoder with this configuration.

        Raises:
            InvalidOption: It cannot be split into so many parts.
        """
        text: Any = config.get_text_config()  # pyright: ignore[reportUnknownMemberType]
        if arithmetic.is_recurrent:
            raise refuse(size, "this decoder has recurrent layers, which cannot be split; leave the option out")
        if arithmetic.shares_keys or len({*arithmetic.kv_shapes}) > 1:
            raise refuse(size, "the layers of this decoder have different or shared keys; leave the option out")
        (kv_heads, width), heads, inner = arithmetic.kv_shape, text.num_attention_heads, text.intermediate_size
        fitting = [n for n in range(1, heads + 1) if not heads % n and not inner % n and _fits(kv_heads, n)]
        if size not in fitting:
            known = ", ".join(str(n) for n in fitting)
            what = f"this decoder has {heads} heads, {kv_heads} key/value heads and an MLP of {inner}"
            raise refuse(size, f"{what}, which can be split into {known} equal parts")
        return cls(rank=rank, size=size, num_heads=heads, num_kv_heads=kv_heads, head_dim=width, inner=inner)

    @property
    def own_kv_heads(self) -> int:
        """Key/value heads of a member."""
        return max(1, self.num_kv_heads // self.size)

    @property
    def copies(self) -> int:
        """Members that hold the same key/value heads."""
        return max(1, self.size // self.num_kv_heads)

    def rows(self, num_rows: int) -> slice:
        """Rows of the vocabulary. The last members may have fewer, or none."""
        width = self.num_own_rows(num_rows)
        return slice(min(self.rank * width, num_rows), min((self.rank + 1) * width, num_rows))

    def num_own_rows(self, num_rows: int) -> int:
        """Rows of the vocabulary that a member holds, filled up with zeros."""
        return -(-num_rows // self.size)

    def part(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """What of a tensor, by its name in the decoder, this member holds."""
        whole = tuple(slice(0, size) for size in shape)
        *_, owner, kind = ("", *name.split("."))
        if name == HEAD or owner == "embed_tokens":
            return self.rows(shape[0]), *whole[1:]
        if owner in QUERIES:
            found = _equal(self.num_heads, self.rank, self.size, self.head_dim)
        elif owner in KEYS:
            first = self.rank // self.copies * self.own_kv_heads
            found = slice(first * self.head_dim, (first + self.own_kv_heads) * self.head_dim)
        elif owner in INNER:
            found = _equal(self.inner, self.rank, self.size)
        else:
            return whole
        if owner in BY_INPUTS:
            return (whole[0], found) if kind == "weight" else whole
        return found, *whole[1:]


def _fits(kv_heads: int, size: int) -> bool:
    return not kv_heads % size or not size % kv_heads


def _modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(cast("Iterable[tuple[str, nn.Module]]", module.named_modules()))


def _equal(count: int, rank: int, size: int, width: int = 1) -> slice:
    each = count // size * width
    return slice(rank * each, (rank + 1) * each)


class ShardedText(TextModel):
    """A text model of which one member's part is read and built.

    Attributes:
        vocab_size: Rows of the whole head.
    """

    def __init__(self, folder: Path, config: PretrainedConfig, shard: Shard) -> None:
        super().__init__(folder, config)
        self._shard = shard
        self._shapes = tensor_shapes(folder, text_key)
        self._check(self.build_whole())
        embedding = [name for name in self._shapes if name.endswith("embed_tokens.weight")]
        self.vocab_size = self._shapes[HEAD if HEAD in self._shapes else embedding[0]][0]

    def _check(self, module: nn.Module) -> None:
        """Refuse what cannot be split, and tensors of other shapes than the configuration says."""
        expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        found = {name: shape for name, shape in self._shapes.items() if name != HEAD}
        if wrong := sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name]):
            raise BadCheckpoint(str(self._folder), f"has other shapes than its config.json says: {few(wrong)}")
        layers = cast("Mapping[str, nn.Module]", dict(cast(Any, module).layers.named_children()))
        for layer in layers.values():
            kind = type(layer).__name__
            names = {name.rsplit(".", 1)[-1] for name, one in _modules(layer) if isinstance(one, nn.Linear)}
            if kind not in SPLIT_LAYERS or names ^ {*QUERIES, *KEYS, *INNER}:
                known = ", ".join(sorted(SPLIT_LAYERS))
                raise refuse(self._shard.size, f"this decoder has layers of the kind {kind}; split can be: {known}")

    def decoder_tensors(self) -> tuple[dict[str, Tensor], Tensor | None]:
        parts = {name: self._shard.part(name, shape) for name, shape in self._shapes.items()}
        tensors = read_slices(self._folder, text_key, parts)
        for name in tensors:
            if name == HEAD or name.endswith("embed_tokens.weight"):
                missing = self._shard.num_own_rows(self._shapes[name][0]) - tensors[name].shape[0]
                tensors[name] = nn.functional.pad(tensors[name], (0, 0, 0, missing)) if missing else tensors[name]
        return tensors, tensors.pop(HEAD, None)

    def build_decoder(self) -> nn.Module:
        module = super().build_decoder()
        for name, child in _modules(module):
            if isinstance(child, nn.Linear):
                self._shrink(child, f"{name}.")
                child.out_features, child.in_features = child.weight.shape
            elif isinstance(child, nn.Embedding) and name == "embed_tokens":
                rows = self._shard.num_own_rows(child.num_embeddings)
                child.weight = nn.Parameter(torch.empty(rows, child.embedding_dim, device="meta"), requires_grad=False)
                child.num_embeddings, child.padding_idx = rows, None
        return module

    def _shrink(self, module: nn.Module, prefix: str) -> None:
        """Give the parameters of a module, which have no memory yet, the shapes of this member's part."""
        for name, parameter in list(module.named_parameters(recurse=False)):
            part = self._shard.part(prefix + name, tuple(parameter.shape))
            shape = [one.stop - one.start for one in part]
            setattr(module, name, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))
