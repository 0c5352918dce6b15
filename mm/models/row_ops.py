"""What a decoder layer does with each row by itself: norms and gated activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

RowOp = Callable[[Tensor], Tensor]


def has_kernels(weight: Tensor) -> bool:
    """Whether `mm.models.cpu_kernels` can compute with a layer of such weights."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def build_norm(weight: Tensor, epsilon: float, *, on_cpu_kernels: bool) -> RowOp:
    """x / sqrt(mean(x^2) + epsilon) * weight, over rows (T, D) (Zhang and Sennrich, arXiv:1910.07467, eq. 4)."""
    if not on_cpu_kernels:
        return lambda hidden: torch.rms_norm(hidden, weight.shape, weight, epsilon)
    from mm.models.cpu_kernels import rms_norm

    weights = weight.detach().numpy()

    def norm(hidden: Tensor) -> Tensor:
        output = torch.empty_like(hidden)
        rms_norm(hidden.numpy(), weights, epsilon, output.numpy())
        return output

    return norm


def build_gated(activation: RowOp, *, on_cpu_kernels: bool) -> RowOp:
    """activation(gate) * up, of rows (T, 2 * I) that hold gate and up, to (T, I) (Shazeer, arXiv:2002.05202, eq. 6).

    Only SiLU has a kernel.
    """
    if not (on_cpu_kernels and _is_silu(activation)):

        def gated(gate_up: Tensor) -> Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            return activation(gate).mul_(up)

        return gated
    from mm.models.cpu_kernels import gated_silu

    def gated_by_kernel(gate_up: Tensor) -> Tensor:
        output = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
        gated_silu(gate_up.numpy(), output.numpy())
        return output

    return gated_by_kernel


def _is_silu(activation: object) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
