"""Attention on a CPU: compiled loops for decoding tokens and draft trees, torch's products for long chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mm.data.arrays import BoolArray, IntArray
from mm.engine.attention.cpu_kernels import Kernel, attend_kernel, set_num_threads, write_kv
from mm.engine.attention.gather import prefill_attend, split_qkv
from mm.engine.kv_cache.blocks import KVCache
from mm.models.attention import PLAIN, AttentionMetadata, AttentionVariant, Rotary

MAX_QUERY_LEN = 16
"""Chunks of up to this many tokens go to the compiled loops, longer ones to torch."""

PARALLEL_TOKENS = 4096
"""Cached tokens of a step from which one layer's work is shared between threads. One thread takes about 100 us."""

NO_MASKS = np.zeros((0, 0, 0), dtype=np.bool_)
NO_ROTARY = np.zeros((0, 0), dtype=np.float32)


class CpuAttention:
    """The CPU backend, for float32 and bfloat16."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self._keys, self._values = _view(cache.keys), _view(cache.values)
        self._compile()

    def _compile(self) -> None:
        """Compile the kernels now, so that the first request does not wait for it."""
        shape = self.cache.shape
        qkv = torch.empty((1, 3 * shape.num_heads, shape.head_dim), dtype=shape.dtype)
        nothing = AttentionMetadata.of([], [])
        for rotary in ((torch.ones(1, shape.head_dim), torch.zeros(1, shape.head_dim)), None):
            self.attend(0, qkv, nothing, rotary)

    def attend(
        self,
        layer: int,
        qkv: Tensor,
        metadata: AttentionMetadata,
        rotary: Rotary | None,
        variant: AttentionVariant = PLAIN,
    ) -> Tensor:
        cache, step = self.cache, _step_state(metadata, rotary)
        output = torch.empty((qkv.shape[0], qkv.shape[1] - 2 * cache.shape.num_heads, qkv.shape[2]), dtype=qkv.dtype)
        states, table, lengths = _view(qkv), cache.block_tables[layer], cache.lengths[layer]
        chunks = metadata.seq_indices, metadata.query_starts, metadata.query_lens
        write_kv(states, step.cos, step.sin, self._keys, self._values, table, lengths, *chunks)
        scale = cache.shape.head_dim**-0.5 if variant.scale is None else variant.scale
        self._kernel(lengths, metadata)(
            states,
            (np.float32(scale), variant.window or 0, np.float32(variant.softcap or 0)),
            self._keys,
            self._values,
            table,
            lengths,
            *chunks,
            step.masks,
            MAX_QUERY_LEN,
            _view(output),
        )
        if step.long_chunks:
            query, key, value = split_qkv(qkv, cache.shape.num_heads)
            for chunk in step.long_chunks:
                prefill_attend(cache, layer, query, key, value, metadata, chunk, output, variant)
        return output

    def _kernel(self, lengths: IntArray, metadata: AttentionMetadata) -> Kernel:
        """The parallel kernel where there is enough work to pay for joining the threads at its end."""
        shape, num_threads = self.cache.shape, torch.get_num_threads()
        num_seqs = len(metadata.seq_indices)
        if num_threads == 1 or (int(lengths[metadata.seq_indices].sum()) < PARALLEL_TOKENS and num_seqs):
            return attend_kernel(shape.head_dim, shape.block_size, False)
        set_num_threads(num_threads)
        return attend_kernel(shape.head_dim, shape.block_size, True)


@dataclass(frozen=True, kw_only=True)
class _StepState:
    """What all layers of a step share.

    Attributes:
        rotary: What `cos` and `sin` are views of.
        masks: See `_masks`.
        long_chunks: Chunks that torch's products compute.
    """

    rotary: Rotary | None
    cos: NDArray[Any]
    sin: NDArray[Any]
    masks: BoolArray
    long_chunks: list[int]


def _step_state(metadata: AttentionMetadata, rotary: Rotary | None) -> _StepState:
    """Made by the first layer of a step, and kept in its metadata."""
    state = metadata.backend_state
    if not isinstance(state, _StepState) or state.rotary is not rotary:
        cos, sin = (NO_ROTARY, NO_ROTARY) if rotary is None else (_view(rotary[0]), _view(rotary[1]))
        long_chunks = np.flatnonzero(metadata.query_lens > MAX_QUERY_LEN).tolist()
        state = _StepState(rotary=rotary, cos=cos, sin=sin, masks=_masks(metadata), long_chunks=long_chunks)
        metadata.backend_state = state
    return state


def _view(tensor: Tensor) -> NDArray[Any]:
    """The same memory as a NumPy array. NumPy has no bfloat16, so uint16 holds its bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _masks(metadata: AttentionMetadata) -> BoolArray:
    """(C, n, n) bool of the small chunks, or an empty array when all are causal."""
    if not metadata.masks:
        return NO_MASKS
    small = np.minimum(metadata.query_lens, MAX_QUERY_LEN)
    masks = np.zeros((len(small), int(small.max()), int(small.max())), dtype=np.bool_)
    masks[:] = np.tril(np.ones(masks.shape[1:], dtype=np.bool_))
    for chunk, mask in metadata.masks.items():
        count = mask.shape[0]
        if count <= MAX_QUERY_LEN:
            masks[chunk, :count, :count] = mask.cpu().numpy()
    return masks
