"""A fast matrix product of many rows with a few, on the CPU.

On x86 CPUs torch multiplies float32 matrices through MKL. oneDNN is 2 to 3 times as fast on AMD processors when one
operand was first repacked into its blocked format, and repacking 128 rows costs little. Elsewhere torch's own product
is used.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

BATCH_HINT = 8
"""The number of rows that oneDNN chooses its format for. Any number of rows may be multiplied afterwards."""


def product_with(few: Tensor, many: Tensor) -> Tensor:
    """`many` (R, D) times the transpose of `few` (n, D): (R, n) float32."""
    if not _has_packed_product(few):
        return torch.nn.functional.linear(many, few)
    packed = torch.ops.mkldnn._reorder_linear_weight(few, BATCH_HINT)
    return torch.ops.mkldnn._linear_pointwise(many, packed, None, "none", [], "")


def _has_packed_product(few: Tensor) -> bool:
    on_x86 = few.device.type == "cpu" and platform.machine() in ("x86_64", "AMD64")
    return on_x86 and few.dtype == torch.float32 and torch.backends.mkldnn.is_available()
