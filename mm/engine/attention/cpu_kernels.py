# pyright: basic
# Numba types these functions when it compiles them; annotations would not be true and strict checks cannot pass.
"""CPU kernels over the paged KV cache, compiled by Numba.

torch has no CPU kernel that reads block tables, and gathering the blocks for it copies the whole cache once per token.
These loops read each key and value once, in its block. Sums are float32.

Measured on one core (AVX-512, 320 tokens of 2 heads of 64, 4 query heads) against torch's batched products on a copy
that was gathered before: bfloat16 11 against 43 us for one sequence and 168 against 209 us for 32, float32 9 against 22
and 168 against 310.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types

from mm.models.cpu_kernels import INLINED, Kernel, compile_kernel, exp, intrinsic


@intrinsic
def _load(typing_context: Any, number: Any) -> Any:
    """An element of the cache as float32. bfloat16 comes as the uint16 of its bits."""

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


def _write_kv(qkv, cos, sin, keys, values, table, lengths, seq_indices, query_starts, query_lens):
    """Rotate the queries and keys of all chunks in place, and write keys and values into the blocks."""
    width, num_kv, size = cos.shape[1], keys.shape[2], keys.shape[1]
    num_heads, dim = qkv.shape[1] - 2 * num_kv, qkv.shape[2]
    half = width // 2
    for chunk in range(seq_indices.shape[0]):
        seq_index, start, count = seq_indices[chunk], query_starts[chunk], query_lens[chunk]
        base = lengths[seq_index] - count
        for i in range(count):
            token = start + i
            if width:
                for head in range(num_heads + num_kv):
                    for d in range(half):
                        one, other = qkv[token, head, d], qkv[token, head, d + half]
                        a, b = _load(one), _load(other)
                        qkv[token, head, d] = _store(a * cos[token, d] - b * sin[token, d], one)
                        qkv[token, head, d + half] = _store(b * cos[token, d + half] + a * sin[token, d + half], other)
            block, offset = table[seq_index, (base + i) // size], (base + i) % size
            for head in range(num_kv):
                for d in range(dim):
                    keys[block, offset, head, d] = qkv[token, num_heads + head, d]
                    values[block, offset, head, d] = qkv[token, num_heads + num_kv + head, d]


@numba.njit(**INLINED)
def _score(query, keys, block, head, start, count, scores, dim):
    """Products of all queries with the first `count` keys of a block, four keys at a time."""
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


@numba.njit(**INLINED)
def _add_weighted(weights, values, block, head, start, count, sums, dim):
    """Add the weighted first `count` values of a block to `sums`, four values at a time."""
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


@numba.njit(**INLINED)
def _depth(masks, chunk, token):
    """How many tokens of its chunk come before a token: in a draft tree, its ancestors."""
    if masks.shape[0] == 0:
        return token
    depth = -1
    for other in range(token + 1):
        depth += masks[chunk, token, other]
    return depth


@numba.njit(**INLINED)
def _mask(scores, i, begin, length, base, masks, chunk, token, window):
    """Hide what row `i` does not see: later tokens, other branches of a draft tree, tokens older than the window."""
    for t in range(base, length):
        seen = t - base <= token if masks.shape[0] == 0 else masks[chunk, token, t - base]
        if not seen:
            scores[i, t] = np.float32(-1e30)
    if window > 0:
        oldest = _depth(masks, chunk, token) - window + 1
        for t in range(begin, min(base, base + oldest)):
            scores[i, t] = np.float32(-1e30)
        for t in range(base, length):
            if _depth(masks, chunk, t - base) < oldest:
                scores[i, t] = np.float32(-1e30)


@numba.njit(**INLINED)
def _bound(scores, i, begin, length, softcap):
    """Bound the scores of row `i`, where there is a bound."""
    if softcap > 0:
        for t in range(begin, length):
            scores[i, t] = softcap * math.tanh(scores[i, t] / softcap)


@numba.njit(**INLINED)
def _softmax(scores, i, begin, length):
    """Turn scores begin..length of row `i` into weights."""
    most = np.float32(-1e30)
    for t in range(begin, length):
        most = max(most, scores[i, t])
    total = np.float32(0)
    for t in range(begin, length):
        weight = exp(scores[i, t] - most)
        scores[i, t] = weight
        total += weight
    for t in range(begin, length):
        scores[i, t] /= total


def _attend_for(dim: int, size: int) -> Kernel:
    """Attention of small chunks for one head width and block size: as constants they make loops into vector code.

    Numbers only may come from here: with a compiled function in the closure, no process finds the copy on disk again.
    """

    def attend(
        qkv, variant, keys, values, table, lengths, seq_indices, query_starts, query_lens, masks, max_query_len, output
    ):
        (scale, window, softcap), num_kv = variant, keys.shape[2]
        group = (qkv.shape[1] - 2 * num_kv) // num_kv
        for work in numba.prange(seq_indices.shape[0] * num_kv):
            chunk, head = work // num_kv, work % num_kv
            seq_index, first, count = seq_indices[chunk], query_starts[chunk], query_lens[chunk]
            if 0 < count <= max_query_len:
                length = lengths[seq_index]
                base = length - count
                num_parts = (length + size - 1) // size
                first_part = max(0, base - window + 1) // size if window > 0 else 0
                begin = first_part * size
                query = np.empty((count * group, dim), np.float32)
                for i in range(count * group):
                    for d in range(dim):
                        query[i, d] = _load(qkv[first + i // group, head * group + i % group, d]) * scale
                scores = np.empty((count * group, num_parts * size), np.float32)
                for part in range(first_part, num_parts):
                    start = part * size
                    _score(query, keys, table[seq_index, part], head, start, min(size, length - start), scores, dim)
                for i in range(count * group):
                    _bound(scores, i, begin, length, softcap)
                    _mask(scores, i, begin, length, base, masks, chunk, i // group, window)
                    _softmax(scores, i, begin, length)
                    for d in range(dim):
                        query[i, d] = 0  # from here on the sums
                for part in range(first_part, num_parts):
                    start = part * size
                    count_here = min(size, length - start)
                    _add_weighted(scores, values, table[seq_index, part], head, start, count_here, query, dim)
                for i in range(count * group):
                    for d in range(dim):
                        output[first + i // group, head * group + i % group, d] = _store(query[i, d], qkv[0, 0, 0])

    return attend


@functools.cache
def attend_kernel(dim: int, size: int, parallel: bool) -> Kernel:
    """Attention of small chunks, compiled for a head width and a block size."""
    name = f"attend_{dim}_{size}_parallel" if parallel else f"attend_{dim}_{size}"
    return compile_kernel(_attend_for(dim, size), name, parallel=parallel)


write_kv: Kernel = compile_kernel(_write_kv, "write_kv")


def set_num_threads(count: int) -> None:
    """Let parallel kernels use `count` threads, or as many as Numba was started with."""
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
