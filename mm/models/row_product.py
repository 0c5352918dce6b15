# pyright: basic
# Numba types these functions when it compiles them; annotations would not be true and strict checks cannot pass.
"""One row times a weight in oneDNN's blocked format, compiled by Numba.

oneDNN multiplies several rows at the machine's limit, but one row at half of the rate at which the weight can be read
(`python -m demos.bench.products`). A decoding step at batch 1 is little else. This kernel reads oneDNN's own memory, so
the weight is held once. It adds up in oneDNN's order.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numpy.typing import NDArray
from torch import Tensor

from mm.models.cpu_kernels import compile_kernel, intrinsic

BLOCK = 64
"""Outputs whose weights lie together: for each input in turn, the weights of BLOCK outputs."""
SUMMED = 512
"""So many inputs are summed up from zero, and then added to the sum of those before."""
PARALLEL_WEIGHTS = 1 << 20
"""Numbers in a weight from which threads share it."""


def blocks_of(packed: Tensor, weight: Tensor) -> NDArray[Any] | None:
    """(blocks, inputs, BLOCK): a view of the memory of a weight that oneDNN packed, or None where it lies otherwise.

    Every number is compared, so a format that is not the expected one is never read as if it were. The view does not
    keep `packed` alive. The inputs may have rows of padding at the end, and the last block too.

    Args:
        packed: What oneDNN made of `weight`.
        weight: (out, in) float32.
    """
    if weight.dtype != torch.float32 or not hasattr(torch.ops.mkldnn, "data_ptr"):
        return None
    num_outputs, num_inputs = weight.shape
    size = torch.ops.mkldnn._nbytes(packed) // weight.element_size()
    num_blocks = -(-num_outputs // BLOCK)
    depth, rest = divmod(size, num_blocks * BLOCK)
    if rest:
        return None
    memory = (ctypes.c_float * size).from_address(torch.ops.mkldnn.data_ptr(packed))
    blocks = np.ctypeslib.as_array(memory).reshape(num_blocks, depth, BLOCK)
    plain = weight.detach().contiguous().numpy()
    for index, block in enumerate(blocks):
        rows = plain[index * BLOCK : (index + 1) * BLOCK]
        if not np.array_equal(block[:num_inputs, : len(rows)].T, rows):
            return None
    return blocks


@intrinsic
def _add_dot(typing_context: Any, blocks: Any, start: Any, inputs: Any, at: Any, count: Any, output: Any, to: Any):
    """output[to : to + BLOCK] += the sum over i < count of inputs[at + i] * blocks[start + i * BLOCK :][:BLOCK].

    Offsets count numbers from the beginning of the arrays, which are contiguous. LLVM keeps the vector of sums in
    registers, which it does not do with a loop over an array.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def pointer(number: int, offset: Any) -> Any:
            data = context.make_array(signature.args[number])(context, builder, args[number]).data
            return builder.gep(data, [offset])

        def load(address: Any) -> Any:
            found = builder.load(builder.bitcast(address, vector.as_pointer()))
            found.align = 4
            return found

        vector, word = ir.VectorType(ir.FloatType(), BLOCK), ir.IntType(32)
        multiply_add = ir.FunctionType(vector, [vector] * 3)
        fma = cgutils.get_or_insert_function(builder.module, multiply_add, f"llvm.fma.v{BLOCK}f32")
        weights, numbers, target = pointer(0, args[1]), pointer(2, args[3]), pointer(5, args[6])
        nothing, sums = ir.Constant(vector, ir.Undefined), cgutils.alloca_once(builder, vector)
        builder.store(ir.Constant(vector, [0.0] * BLOCK), sums)
        with cgutils.for_range(builder, args[4]) as loop:
            first = builder.insert_element(nothing, builder.load(builder.gep(numbers, [loop.index])), word(0))
            spread = builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(word, BLOCK), [0] * BLOCK))
            here = builder.gep(weights, [builder.mul(loop.index, loop.index.type(BLOCK))])
            builder.store(builder.call(fma, [load(here), spread, builder.load(sums)]), sums)
        total = builder.fadd(load(target), builder.load(sums))
        builder.store(total, builder.bitcast(target, vector.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(blocks, types.intp, inputs, types.intp, types.intp, output, types.intp), codegen


def _row_product(blocks, inputs, bias, addend, output):
    """output = x W^T + b + addend for one row x (1, in). Bias (out,) and addend (1, out) may be empty.

    Outputs are filled up to whole blocks.
    """
    num_blocks, depth, _ = blocks.shape
    num_inputs = inputs.shape[1]
    for block in numba.prange(num_blocks):
        to = block * BLOCK
        output[0, to : to + BLOCK] = np.float32(0)
        for at in range(0, num_inputs, SUMMED):
            count = min(SUMMED, num_inputs - at)
            _add_dot(blocks, (block * depth + at) * BLOCK, inputs, at, count, output, to)
        for i in range(to, min(to + BLOCK, bias.shape[0])):
            output[0, i] += bias[i]
        for i in range(to, min(to + BLOCK, addend.shape[1])):
            output[0, i] += addend[0, i]


_serial = compile_kernel(_row_product, "row_product")
_parallel = compile_kernel(_row_product, "row_product_parallel", parallel=True)
NO_BIAS, NO_ADDEND = np.zeros(0, dtype=np.float32), np.zeros((1, 0), dtype=np.float32)


class RowProduct:
    """x W^T + b for single rows.

    Args:
        packed: A weight (out, in) in oneDNN's format.
        blocks: Its memory; see `blocks_of`.
        bias: (out,) float32, or none.
    """

    def __init__(self, packed: Tensor, blocks: NDArray[Any], bias: Tensor | None) -> None:
        self._packed, self._blocks, self._num_outputs = packed, blocks, packed.shape[0]
        self._bias = NO_BIAS if bias is None else bias.detach().contiguous().numpy()
        self._width = blocks.shape[0] * BLOCK
        self._is_large = blocks.size >= PARALLEL_WEIGHTS

    def __call__(self, inputs: Tensor, addend: Tensor | None = None) -> Tensor:
        """(1, in) to (1, out), with an addend (1, out) added where there is one."""
        output = torch.empty((1, self._width))
        added = NO_ADDEND if addend is None else addend.contiguous().numpy()
        kernel = _serial
        if self._is_large and (num_threads := torch.get_num_threads()) > 1:
            numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
            kernel = _parallel
        kernel(self._blocks, inputs.contiguous().numpy(), self._bias, added, output.numpy())
        return output if self._width == self._num_outputs else output[:, : self._num_outputs]
