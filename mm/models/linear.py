"""Linear layers whose weights never change, with the weights in the format that the machine multiplies fastest.

On x86 CPUs torch multiplies float32 through MKL, which reads the weight as it is stored. oneDNN multiplies by a weight
in its own blocked format. On AMD's processors that is 2 to 3 times as fast for two inputs or more, and one input is
multiplied by `mm.models.row_product` (`python -m demos.bench.products`). The operators are those that torch.compile
puts in place of frozen linear layers.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from mm.models.pages import release_pages

if TYPE_CHECKING:
    from mm.models.row_product import RowProduct

NUM_INPUTS = 8
"""The number of inputs for which the blocked format is chosen. Any number may be multiplied."""
EXACT_INPUTS, ROUND_TO = 64, 16
"""Up to EXACT_INPUTS inputs are multiplied as they are. More are filled up with zeros to a multiple of ROUND_TO.

oneDNN generates code for each number of inputs, which takes up to 17 ms and half a megabyte, and keeps the last 1,024
pieces. Prompts of all lengths made a server grow by 750 MB and pay those milliseconds again and again.
"""
_Operator = Callable[..., Tensor]


class PackedLinear:
    """x W^T + b.

    Args:
        weight: (out, in).
        bias: (out,), or none.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias
        self._is_packed = False
        self._one_row: RowProduct | None = None

    @property
    def weight(self) -> Tensor:
        """(out, in). Only before `prepack`."""
        assert not self._is_packed, "the weight is in oneDNN's format"
        return self._weight

    @property
    def bias(self) -> Tensor | None:
        """(out,), or none."""
        return self._bias

    @property
    def num_outputs(self) -> int:
        return self._weight.shape[0]

    def prepack(self) -> None:
        """Repack the weight into oneDNN's blocked format where that is faster, and free the original."""
        if not self._is_packed and is_packable(self._weight):
            plain = self._weight.detach()
            packed = cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(plain, NUM_INPUTS))
            self._one_row = row_product(packed, plain, self._bias)
            self._weight, self._is_packed = packed, True
            release_pages(plain)
            # The overloads themselves: to choose one by the arguments takes 3 us a call.
            self._multiply = cast(_Operator, torch.ops.mkldnn._linear_pointwise.default)
            self._multiply_and_add = cast(_Operator, torch.ops.mkldnn._linear_pointwise.binary)

    def __call__(self, inputs: Tensor) -> Tensor:
        """(T, in) to (T, out)."""
        if self._is_packed:
            num_rows = inputs.shape[0]
            if num_rows == 1 and self._one_row is not None:
                return self._one_row(inputs)
            if num_rows <= EXACT_INPUTS:
                return self._multiply(inputs, self._weight, self._bias, "none", [], "")
            return self._multiply(filled_up(inputs), self._weight, self._bias, "none", [], "")[:num_rows]
        return nn.functional.linear(inputs, self._weight, self._bias)

    def add_to(self, hidden: Tensor, inputs: Tensor) -> Tensor:
        """hidden + x W^T + b, (T, out). `hidden` stays as it is.

        Args:
            hidden: (T, out).
            inputs: (T, in).
        """
        if self._is_packed:
            num_rows = inputs.shape[0]
            if num_rows == 1 and self._one_row is not None:
                return self._one_row(inputs, hidden)
            if num_rows <= EXACT_INPUTS:
                return self._multiply_and_add(inputs, hidden, self._weight, self._bias, "add")
            rows, to = filled_up(inputs), filled_up(hidden)
            return self._multiply_and_add(rows, to, self._weight, self._bias, "add")[:num_rows]
        total = torch.addmm(hidden, inputs, self._weight.t())
        return total if self._bias is None else total.add_(self._bias)

    def part(self, inputs: Tensor, outputs: slice) -> Tensor:
        """(T, n): only some of the outputs."""
        if self._is_packed:
            return self(inputs)[:, outputs]
        return nn.functional.linear(inputs, self._weight[outputs], None if self._bias is None else self._bias[outputs])


def row_product(packed: Tensor, weight: Tensor, bias: Tensor | None) -> RowProduct | None:
    """The product of single rows with a weight that oneDNN packed, or None where we do not know its format."""
    if weight.dtype != torch.float32:
        return None
    from mm.models.row_product import RowProduct, blocks_of

    blocks = blocks_of(packed, weight)
    return None if blocks is None else RowProduct(packed, blocks, bias)


def filled_up(inputs: Tensor) -> Tensor:
    """(T, in) with rows of zeros added up to a multiple of ROUND_TO; see EXACT_INPUTS."""
    missing = -inputs.shape[0] % ROUND_TO
    return nn.functional.pad(inputs, (0, 0, 0, missing)) if missing else inputs


class PackedLinearModule(nn.Module):
    """A `PackedLinear` in the place of an `nn.Linear` that is not trained any more."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        bias = bias_of(linear)
        self.linear = PackedLinear(linear.weight.detach(), None if bias is None else bias.detach())
        self.linear.prepack()

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        outputs = self.linear(inputs.reshape(-1, inputs.shape[-1]))
        return outputs.view(*inputs.shape[:-1], outputs.shape[-1])


def prepack_linears(module: nn.Module) -> None:
    """Replace the linear layers of a module that is not trained any more, where packed ones are faster."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear and is_packable(child.weight):
            setattr(module, name, PackedLinearModule(child))
        else:
            prepack_linears(child)


def bias_of(linear: nn.Linear) -> Tensor | None:
    """The bias; torch declares it as always present."""
    return cast("Tensor | None", linear.bias)


def is_packable(weight: Tensor) -> bool:
    """Whether oneDNN has a blocked format for the weight on this machine."""
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
