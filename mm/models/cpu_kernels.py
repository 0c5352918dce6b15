# pyright: basic
# Numba types these functions when it compiles them; annotations would not be true and strict checks cannot pass.
"""CPU kernels of a decoder layer's small operations, compiled by Numba.

torch computes a norm in six calls and a gated activation in three, each of which reads and writes the whole tensor. For
the few rows of a decoding step, calls and passes cost more than the arithmetic. These loops do each in one pass. Sums
are float32. A row's result does not depend on the other rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic as _intrinsic

intrinsic: Any = _intrinsic
"""Its functions take a typing context that their callers do not pass, which type checkers cannot know."""

Kernel = Callable[..., None]

INLINED = {"fastmath": True, "inline": "always", "error_model": "numpy"}


@intrinsic
def _power_of_two(typing_context: Any, exponent: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        biased = builder.add(args[0], ir.Constant(word, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(word, 23)), ir.FloatType())

    return types.float32(types.int32), codegen


@numba.njit(**INLINED)
def exp(x):
    """e^x of float32 x <= 0 to 1e-7, in a form that becomes vector code. The library's is called once per number.

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


def compile_kernel(function: Kernel, name: str, *, parallel: bool = False) -> Kernel:
    """Compile on first use for each dtype, and keep the result on disk where a folder can be written."""
    assert isinstance(function, FunctionType)
    copy = FunctionType(function.__code__, function.__globals__, name, None, function.__closure__)
    copy.__qualname__ = name  # names the copy on disk
    options = {"fastmath": True, "nogil": True, "error_model": "numpy", "parallel": parallel}
    try:
        return numba.njit(cache=True, **options)(copy)
    except RuntimeError:  # no folder that we may write to
        return numba.njit(**options)(copy)


def _rms_norm(hidden, weight, epsilon, output):
    """x / sqrt(mean(x^2) + epsilon) * weight of each row (T, D)."""
    width = hidden.shape[1]
    for row in range(hidden.shape[0]):
        total = np.float32(0)
        for d in range(width):
            total += hidden[row, d] * hidden[row, d]
        factor = np.float32(1) / math.sqrt(total / np.float32(width) + np.float32(epsilon))
        for d in range(width):
            output[row, d] = hidden[row, d] * factor * weight[d]


def _gated_silu(gate_up, output):
    """silu(gate) * up of rows (T, 2 * I) that hold both, where silu(x) = x / (1 + e^-x)."""
    width = output.shape[1]
    for row in range(output.shape[0]):
        for d in range(width):
            gate = gate_up[row, d]
            small = exp(-abs(gate))
            sigmoid = (np.float32(1) if gate >= 0 else small) / (np.float32(1) + small)
            output[row, d] = gate * sigmoid * gate_up[row, width + d]


def _quantize(rows, bits, levels, values, scales):
    """Whole numbers from -levels to levels and the scale of each row (T, D). `bits` are the rows' bits as int32.

    The bits of positive numbers are ordered as the numbers are, and infinity and NaN lie above them.
    """
    width = rows.shape[1]
    for row in range(rows.shape[0]):
        most, largest = np.int32(0), np.float32(0)
        for d in range(width):
            most = max(most, bits[row, d] & np.int32(0x7FFFFFFF))
            largest = max(largest, abs(rows[row, d]))
        if most >= np.int32(0x7F800000):
            values[row] = 0
            scales[row, 0] = np.nan
            continue
        factor = np.float32(levels) / largest if most > 0 else np.float32(0)
        for d in range(width):
            values[row, d] = np.int8(np.rint(rows[row, d] * factor))
        scales[row, 0] = largest / np.float32(levels)


rms_norm: Kernel = compile_kernel(_rms_norm, "rms_norm")
gated_silu: Kernel = compile_kernel(_gated_silu, "gated_silu")
quantize: Kernel = compile_kernel(_quantize, "quantize")
