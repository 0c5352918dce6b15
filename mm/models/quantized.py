"""Weights of 8 bits on a CPU: less memory than float32 needs, and products of whole numbers.

Each output of a linear layer has a scale of its own, and each input row gets one when it is multiplied (dynamic
quantization per token, as in Yao et al., arXiv:2206.01861, section 3.2). Products and sums are exact integers, so a
row's result does not depend on the rows beside it. `python -m demos.bench.quantized` prints speed and error.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from mm.models.linear import EXACT_INPUTS, PackedLinear, PackedLinearModule, bias_of, filled_up
from mm.models.pages import release_pages

LEVELS = 127
"""Inputs and weights are whole numbers from -LEVELS to LEVELS."""
SAFE_LEVELS = 63
"""The same for weights on processors that add two products in 16 bits: 2 * 255 * 63 fits, 2 * 255 * 127 does not."""


class Int8Rows:
    """A matrix of 8 bits with a scale for each row.

    Args:
        weight: (rows, columns), floating point.

    Attributes:
        values: int8, as the weight.
        scales: float32 (rows,).
    """

    def __init__(self, weight: Tensor) -> None:
        found = weight.detach().float()
        self.dtype, self.scales = weight.dtype, found.abs().amax(1).clamp(min=1e-12) / weight_levels()
        self.values = (found / self.scales[:, None]).round_().to(torch.int8)
        release_pages(weight)

    def __call__(self, ids: Tensor) -> Tensor:
        """The rows of (T,) ids, (T, columns), as an embedding gives them."""
        return (self.values[ids].float() * self.scales[ids, None]).to(self.dtype)

    def dequantized(self) -> Tensor:
        """The whole matrix in the dtype of the weight that it was made from."""
        return (self.values.float() * self.scales[:, None]).to(self.dtype)


class Int8Linear:
    """x W^T + b, with weights of 8 bits.

    Args:
        rows: The weight (out, in).
        bias: (out,), or none.
        is_shared: The rows are an embedding too. They are multiplied as they are, at half the speed, and not held
            a second time in oneDNN's format.
    """

    def __init__(self, rows: Int8Rows, bias: Tensor | None = None, *, is_shared: bool = False) -> None:
        self._scales, self._dtype, self.num_outputs = rows.scales, rows.dtype, rows.values.shape[0]
        self._bias = None if bias is None else bias.detach()
        self._shared = rows.values.T if is_shared else None
        self._weight = None if is_shared else torch.ops.onednn.qlinear_prepack(rows.values, None)
        self._zeros = torch.zeros(self.num_outputs, dtype=torch.int64)

    def __call__(self, inputs: Tensor) -> Tensor:
        """(T, in) to (T, out)."""
        products = self._products(inputs)
        return products if self._bias is None else products.add_(self._bias)

    def add_to(self, hidden: Tensor, inputs: Tensor) -> Tensor:
        """hidden + x W^T + b, (T, out). `hidden` stays as it is."""
        return self(inputs).add_(hidden)

    def part(self, inputs: Tensor, outputs: slice) -> Tensor:
        """(T, n): only some of the outputs."""
        return self(inputs)[:, outputs]

    def prepack(self) -> None:
        """Does nothing: the weight is packed already."""

    def _products(self, inputs: Tensor) -> Tensor:
        count = inputs.shape[0]
        values, scales = quantize_rows(inputs if count <= EXACT_INPUTS else filled_up(inputs))
        if self._shared is not None:
            products = torch.ops.aten._int_mm.default(values, self._shared).float().mul_(self._scales).mul_(scales)
            return products[:count].to(self._dtype)
        products = _multiply(values, self._weight, self._scales, self._zeros)
        return products.mul_(scales)[:count].to(self._dtype)


ZERO = 128
"""The byte that stands for 0 in the inputs of a product."""


def _multiply(values: Tensor, packed: Tensor | None, scales: Tensor, zeros: Tensor) -> Tensor:
    """Products (T, out) float32 of int8 inputs (T, in) with packed weights, times the weights' scales.

    The inputs go in as bytes without sign. With a sign, oneDNN has fast code for processors with AMX only, and takes
    a reference that is a thousand times slower on others.
    """
    unsigned = values.view(torch.uint8).bitwise_xor(ZERO)
    return torch.ops.onednn.qlinear_pointwise.default(
        unsigned, 1.0, ZERO, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def quantize_rows(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (T, D) and scales (T, 1) of rows (T, D): the largest number of a row becomes LEVELS or -LEVELS.

    A row that is not finite gets the scale NaN, so that its result is NaN too.
    """
    if inputs.dtype == torch.float32 and inputs.is_contiguous():
        from mm.models.cpu_kernels import quantize

        values, scales = torch.empty(inputs.shape, dtype=torch.int8), inputs.new_empty((inputs.shape[0], 1))
        quantize(inputs.numpy(), inputs.view(torch.int32).numpy(), LEVELS, values.numpy(), scales.numpy())
        return values, scales
    rows = inputs.float()
    scales = rows.abs().amax(1, keepdim=True) / LEVELS
    values = torch.where(scales > 0, rows / scales, 0.0)
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    return values.nan_to_num_(0.0).round_().to(torch.int8), scales


class Int8LinearModule(nn.Module):
    """An `Int8Linear` in the place of an `nn.Linear`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = Int8Linear(Int8Rows(linear.weight), bias_of(linear))

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        outputs = self.linear(inputs.reshape(-1, inputs.shape[-1]))
        return outputs.view(*inputs.shape[:-1], outputs.shape[-1])


def quantized(linear: PackedLinear | Int8Linear) -> Int8Linear:
    """The layer with weights of 8 bits."""
    return linear if isinstance(linear, Int8Linear) else Int8Linear(Int8Rows(linear.weight), linear.bias)


def quantize_linears(module: nn.Module) -> None:
    """Replace the linear layers of a module that is not trained any more."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            setattr(module, name, Int8LinearModule(child))
        elif not isinstance(child, PackedLinearModule):
            quantize_linears(child)


@functools.cache
def weight_levels() -> int:
    """LEVELS, or SAFE_LEVELS where the processor's sums of int8 products overflow with LEVELS.

    That is so without VNNI instructions. It is found by a product of largest numbers.
    """
    weights = torch.full((16, 256), LEVELS, dtype=torch.int8)
    packed, scales = torch.ops.onednn.qlinear_prepack(weights, None), torch.ones(16)
    found = _multiply(weights, packed, scales, torch.zeros(16, dtype=torch.int64))
    return LEVELS if bool((found == 256 * LEVELS**2).all()) else SAFE_LEVELS


def is_available() -> bool:
    """Whether this build of torch has the products."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")
