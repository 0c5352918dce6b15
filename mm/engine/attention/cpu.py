"""Attention over the block cache on a CPU, compiled by Numba.

torch has no CPU kernel that reads block tables; gathering the blocks for it would copy the whole cache once per token.
These loops read each key and value once, where it lies. Sums are float32. Chunks of many rows are matrix products and
go to torch.

Measured on one core (AVX-512, 320 rows of 2 heads of 64, 4 query heads) against torch's batched products on a copy that
was gathered before: bfloat16 11 against 43 us for one sequence and 168 against 209 us for 32, float32 9 against 22 and
168 against 310.
"""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic as _intrinsic
from torch import Tensor

from mm.engine.attention.gather import prompt_attend, split
from mm.engine.kv_cache.blocks import KVCache
from mm.models.attention import AttentionMetadata, Rotary

FEW_ROWS = 16
"""Chunks up to this size are read by the loops here, larger ones are multiplied by torch."""

PARALLEL_ROWS = 4096
"""Cached rows from which a pass over one layer is shared between threads; about 100 us of one."""

intrinsic: Any = _intrinsic
"""Its functions take a typing context that their callers do not pass, which type checkers cannot know."""

NO_MASKS = np.zeros((0, 0, 0), dtype=np.bool_)
NO_ROTARY = np.zeros((0, 0), dtype=np.float32)


@intrinsic
def _load(typing_context: Any, number: Any) -> Any:
    """An element of the cache as float32; bfloat16 comes as the uint16 of its bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0] == types.float32:
            return args[0]
        wide = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(number), codegen


@intrinsic
def _store(typing_context: Any, number: Any, like: Any) -> Any:
    """A float32 as an element of the kind of `like`: to the nearest, ties to even, as torch rounds."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[1] == types.float32:
            return args[0]
        word = ir.IntType(32)
        bits = builder.bitcast(args[0], word)
        odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF)))
        return builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), ir.IntType(16))

    return like(types.float32, like), codegen


def _put(rows, cos, sin, keys, values, table, lengths, slots, firsts, counts):
    """Rotate the queries and keys of all chunks in place, and write keys and values into the blocks."""
    width, num_kv, size = cos.shape[1], keys.shape[2], keys.shape[1]
    num_heads, dim = rows.shape[1] - 2 * num_kv, rows.shape[2]
    half = width // 2
    for chunk in range(slots.shape[0]):
        slot, first, count = slots[chunk], firsts[chunk], counts[chunk]
        base = lengths[slot] - count
        for i in range(count):
            row = first + i
            if width:
                for head in range(num_heads + num_kv):
                    for d in range(half):
                        one, other = rows[row, head, d], rows[row, head, d + half]
                        a, b = _load(one), _load(other)
                        rows[row, head, d] = _store(a * cos[row, d] - b * sin[row, d], one)
                        rows[row, head, d + half] = _store(b * cos[row, d + half] + a * sin[row, d + half], other)
            block, place = table[slot, (base + i) // size], (base + i) % size
            for head in range(num_kv):
                for d in range(dim):
                    keys[block, place, head, d] = rows[row, num_heads + head, d]
                    values[block, place, head, d] = rows[row, num_heads + num_kv + head, d]


@intrinsic
def _power_of_two(typing_context: Any, exponent: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        biased = builder.add(args[0], ir.Constant(word, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(word, 23)), ir.FloatType())

    return types.float32(types.int32), codegen


@numba.njit(fastmath=True, inline="always", error_model="numpy")
def _exp(x):
    """e^x of float32 x <= 0 to 1e-7, in a form that becomes vector code; the library's is called once per number.

    Powers of two times a polynomial on [-ln 2 / 2, ln 2 / 2] (coefficients: Cephes, expf).
    """
    x = max(x, np.float32(-87))
    whole = np.int32(x * np.float32(1.4426950408889634) - np.float32(0.5))
    rest = x - np.float32(whole) * np.float32(0.693147180559945)
    series = np.float32(1.9875691500e-4) * rest + np.float32(1.3981999507e-3)
    series = series * rest + np.float32(8.3334519073e-3)
    series = series * rest + np.float32(4.1665795894e-2)
    series = series * rest + np.float32(1.6666665459e-1)
    series = series * rest + np.float32(5.0000001201e-1)
    return (series * rest * rest + rest + np.float32(1)) * _power_of_two(whole)


def _attend_for(dim: int, size: int) -> Any:
    """Attention of small chunks, for one head width and block size: as constants they make loops into vector code."""

    @numba.njit(fastmath=True, inline="always", error_model="numpy")
    def score(query, keys, block, head, start, count, scores):
        """Products of all queries with the first `count` keys of a block; four keys at a time."""
        for four in range(count // 4):
            p = 4 * four
            for i in range(query.shape[0]):
                a, b, c, e = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
                for d in range(dim):
                    q = query[i, d]
                    a += q * _load(keys[block, p, head, d])
                    b += q * _load(keys[block, p + 1, head, d])
                    c += q * _load(keys[block, p + 2, head, d])
                    e += q * _load(keys[block, p + 3, head, d])
                scores[i, start + p], scores[i, start + p + 1] = a, b
                scores[i, start + p + 2], scores[i, start + p + 3] = c, e
        for p in range(count // 4 * 4, count):
            for i in range(query.shape[0]):
                a = np.float32(0)
                for d in range(dim):
                    a += query[i, d] * _load(keys[block, p, head, d])
                scores[i, start + p] = a

    @numba.njit(fastmath=True, inline="always", error_model="numpy")
    def add(weights, values, block, head, start, count, sums):
        """Weighted values of the first `count` rows of a block; four rows at a time."""
        for four in range(count // 4):
            p = 4 * four
            for i in range(sums.shape[0]):
                a, b = weights[i, start + p], weights[i, start + p + 1]
                c, e = weights[i, start + p + 2], weights[i, start + p + 3]
                for d in range(dim):
                    sums[i, d] += (
                        a * _load(values[block, p, head, d])
                        + b * _load(values[block, p + 1, head, d])
                        + c * _load(values[block, p + 2, head, d])
                        + e * _load(values[block, p + 3, head, d])
                    )
        for p in range(count // 4 * 4, count):
            for i in range(sums.shape[0]):
                a = weights[i, start + p]
                for d in range(dim):
                    sums[i, d] += a * _load(values[block, p, head, d])

    def attend(rows, scale, keys, values, table, lengths, slots, firsts, counts, masks, few, output):
        num_kv = keys.shape[2]
        group = (rows.shape[1] - 2 * num_kv) // num_kv
        for work in numba.prange(slots.shape[0] * num_kv):
            chunk, head = work // num_kv, work % num_kv
            slot, first, count = slots[chunk], firsts[chunk], counts[chunk]
            if 0 < count <= few:
                length = lengths[slot]
                base = length - count
                num_parts = (length + size - 1) // size
                query = np.empty((count * group, dim), np.float32)
                for i in range(count * group):
                    for d in range(dim):
                        query[i, d] = _load(rows[first + i // group, head * group + i % group, d]) * scale
                scores = np.empty((count * group, num_parts * size), np.float32)
                for part in range(num_parts):
                    start = part * size
                    score(query, keys, table[slot, part], head, start, min(size, length - start), scores)
                for i in range(count * group):
                    row = i // group
                    for t in range(base, length):
                        seen = t - base <= row if masks.shape[0] == 0 else masks[chunk, row, t - base]
                        if not seen:
                            scores[i, t] = np.float32(-1e30)
                    most = np.float32(-1e30)
                    for t in range(length):
                        most = max(most, scores[i, t])
                    total = np.float32(0)
                    for t in range(length):
                        weight = _exp(scores[i, t] - most)
                        scores[i, t] = weight
                        total += weight
                    for t in range(length):
                        scores[i, t] /= total
                    for d in range(dim):
                        query[i, d] = 0
                for part in range(num_parts):
                    start = part * size
                    add(scores, values, table[slot, part], head, start, min(size, length - start), query)
                for i in range(count * group):
                    for d in range(dim):
                        output[first + i // group, head * group + i % group, d] = _store(query[i, d], rows[0, 0, 0])

    return attend


def _compile(function: Any, name: str, **options: Any) -> Any:
    """Compiled on first use for each dtype, and kept on disk where there is a place for it."""
    copy = FunctionType(function.__code__, function.__globals__, name, None, function.__closure__)
    copy.__qualname__ = name  # by which the copies on disk are told apart
    options = {"fastmath": True, "nogil": True, "error_model": "numpy"} | options
    try:
        return numba.njit(cache=True, **options)(copy)
    except RuntimeError:  # no folder that we may write to
        return numba.njit(**options)(copy)


@functools.cache
def _kernel(dim: int, size: int, parallel: bool) -> Any:
    name = f"attend_{dim}_{size}_parallel" if parallel else f"attend_{dim}_{size}"
    return _compile(_attend_for(dim, size), name, parallel=parallel)


put = _compile(_put, "put")


def _view(tensor: Tensor) -> np.ndarray:
    """The same memory as NumPy sees it; NumPy has no bfloat16, so its bits stand in."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class CpuAttention:
    """Numba's loops for decoding rows and draft trees, torch's products for prompts."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self._keys, self._values = _view(cache.keys), _view(cache.values)
        self._scale = np.float32(cache.shape.head_dim**-0.5)
        self._compile()

    def _compile(self) -> None:
        """Now, and not while the first request waits."""
        shape = self.cache.shape
        rows = torch.empty((1, 3 * shape.num_heads, shape.head_dim), dtype=shape.dtype)
        nothing = AttentionMetadata.of([], [])
        for rotary in ((torch.ones(1, shape.head_dim), torch.zeros(1, shape.head_dim)), None):
            self.attend(0, rows, nothing, rotary)

    def attend(self, layer: int, rows: Tensor, batch: AttentionMetadata, rotary: Rotary | None) -> Tensor:
        cache = self.cache
        output = torch.empty(
            (rows.shape[0], rows.shape[1] - 2 * cache.shape.num_heads, rows.shape[2]), dtype=rows.dtype
        )
        cos, sin = (NO_ROTARY, NO_ROTARY) if rotary is None else (rotary[0].numpy(), rotary[1].numpy())
        states, table, lengths = _view(rows), cache.block_tables[layer], cache.lengths[layer]
        chunks = batch.slots, batch.firsts, batch.counts
        put(states, cos, sin, self._keys, self._values, table, lengths, *chunks)
        self._attend(lengths, batch)(
            states,
            self._scale,
            self._keys,
            self._values,
            table,
            lengths,
            *chunks,
            _masks(batch),
            FEW_ROWS,
            _view(output),
        )
        if (batch.counts > FEW_ROWS).any():
            query, key, value = split(rows, cache.shape.num_heads)
            for chunk in np.flatnonzero(batch.counts > FEW_ROWS).tolist():
                prompt_attend(cache, layer, query, key, value, batch, chunk, output)
        return output

    def _attend(self, lengths: np.ndarray, batch: AttentionMetadata) -> Any:
        """On several threads where the work is worth their meeting at its end."""
        num_threads = torch.get_num_threads()
        if num_threads == 1 or (int(lengths[batch.slots].sum()) < PARALLEL_ROWS and len(batch.slots)):
            return _kernel(self.cache.shape.head_dim, self.cache.shape.block_size, False)
        numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        return _kernel(self.cache.shape.head_dim, self.cache.shape.block_size, True)


def _masks(batch: AttentionMetadata) -> np.ndarray:
    """(C, n, n) bool of the small chunks, or an empty array when all are causal."""
    if not batch.masks:
        return NO_MASKS
    small = np.minimum(batch.counts, FEW_ROWS)
    masks = np.zeros((len(small), int(small.max()), int(small.max())), dtype=np.bool_)
    masks[:] = np.tril(np.ones(masks.shape[1:], dtype=np.bool_))
    for chunk, mask in batch.masks.items():
        count = mask.shape[0]
        if count <= FEW_ROWS:
            masks[chunk, :count, :count] = mask.cpu().numpy()
    return masks
