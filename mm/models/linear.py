"""Products with a weight that never changes, in the layout that is fastest for it.

On x86 CPUs torch multiplies float32 through MKL, which reads the weight as it stands. oneDNN reads one that was laid
out for it once, on AMD's processors 2 to 3 times as fast from two rows on (`python -m demos.bench.products`). The
operators are those that torch.compile puts in place of frozen linear layers.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor, nn

ROWS = 8
"""For how many rows the layout is chosen; any number may be multiplied."""


class PackedProduct:
    """x W^T + b.

    Args:
        weight: (out, in).
        bias: (out,), or none.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias
        self._is_packed = False

    @property
    def num_outputs(self) -> int:
        return self._weight.shape[0]

    def pack(self) -> None:
        """Lay the weight out anew, where that is faster. The weight as it was is let go."""
        if not self._is_packed and is_packable(self._weight):
            self._weight, self._is_packed = torch.ops.mkldnn._reorder_linear_weight(self._weight.detach(), ROWS), True

    def __call__(self, rows: Tensor) -> Tensor:
        """(R, in) to (R, out)."""
        if self._is_packed:
            return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return nn.functional.linear(rows, self._weight, self._bias)

    def added_to(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """(R, out): the product of rows (R, in), which has no bias, added to hidden (R, out)."""
        if self._is_packed:
            return torch.ops.mkldnn._linear_pointwise.binary(rows, hidden, self._weight, None, "add")
        return torch.addmm(hidden, rows, self._weight.t())

    def part(self, rows: Tensor, outputs: slice) -> Tensor:
        """(R, n): only some outputs."""
        if self._is_packed:
            return self(rows)[:, outputs]
        return nn.functional.linear(rows, self._weight[outputs], None if self._bias is None else self._bias[outputs])


class PackedLinear(nn.Module):
    """A linear layer that is trained no more."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.product = PackedProduct(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
        self.product.pack()

    def forward(self, rows: Tensor) -> Tensor:
        return self.product(rows)


def pack_linears(module: nn.Module) -> None:
    """Replace the linear layers of a module that is trained no more, where that is faster."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear and is_packable(child.weight):
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child)


def is_packable(weight: Tensor) -> bool:
    """Whether oneDNN takes such a weight on this machine."""
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
