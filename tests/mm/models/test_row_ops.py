"""Norms and gated activations by compiled loops are those that torch computes."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from mm.models.row_ops import build_gated, build_norm, has_kernels

SIZES = [(0, 256), (1, 256), (8, 704), (33, 30), (5, 1)]


def rows(num_rows, width, scale=1.0):
    generator = torch.Generator().manual_seed(num_rows * 1000 + width)
    return torch.randn(num_rows, width, generator=generator) * scale


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_norm_is_torchs(size, scale):
    hidden, weight = rows(*size, scale), rows(1, size[1])[0]
    kernel = build_norm(weight, 1e-5, on_cpu_kernels=True)
    torch.testing.assert_close(kernel(hidden), torch.rms_norm(hidden, weight.shape, weight, 1e-5), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", [nn.SiLU(), ACT2FN["silu"]])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0])
def test_gated_silu_is_torchs(size, activation, scale):
    gate_up = rows(size[0], 2 * size[1], scale)
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = (nn.functional.silu(gate) * up).float()
    found = build_gated(activation, on_cpu_kernels=True)(gate_up)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-30)


def test_activation_without_kernel_is_called():
    gate_up = rows(3, 8)
    expected = nn.functional.gelu(gate_up[:, :4], approximate="tanh") * gate_up[:, 4:]
    torch.testing.assert_close(build_gated(ACT2FN["gelu_pytorch_tanh"], on_cpu_kernels=True)(gate_up), expected)


def test_row_does_not_depend_on_others():
    """Otherwise an answer would depend on who else is being served."""
    hidden, weight, gate_up = rows(9, 100), rows(1, 100)[0], rows(9, 100)
    norm, gated = build_norm(weight, 1e-5, on_cpu_kernels=True), build_gated(nn.SiLU(), on_cpu_kernels=True)
    for i in range(9):
        assert torch.equal(norm(hidden)[i : i + 1], norm(hidden[i : i + 1]))
        assert torch.equal(gated(gate_up)[i : i + 1], gated(gate_up[i : i + 1]))


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, True), (torch.bfloat16, False)])
def test_kernels_are_for_float32(dtype, expected):
    assert has_kernels(torch.zeros(1, dtype=dtype)) is expected
