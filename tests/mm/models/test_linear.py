"""Layers with a packed weight give what plain linear layers give."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mm.models.linear import PackedLinear, PackedLinearModule, is_packable, prepack_linears

needs_packing = pytest.mark.skipif(not is_packable(torch.zeros(4, 4)), reason="no blocked format on this machine")
DTYPES = [torch.float32, torch.bfloat16]


def linear_of(
    num_outputs: int, num_inputs: int, *, bias: bool = False, dtype: torch.dtype = torch.float32
) -> PackedLinear:
    draw = torch.Generator().manual_seed(num_outputs)
    weight = torch.randn(num_outputs, num_inputs, generator=draw).to(dtype)
    return PackedLinear(weight, torch.randn(num_outputs, generator=draw).to(dtype) if bias else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (64, 256), (1000, 129)])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 5, 33, 64, 65, 80, 97])
def test_prepacking_keeps_the_outputs(num_tokens, shape, bias, dtype):
    linear = linear_of(*shape, bias=bias, dtype=dtype)
    inputs, hidden = torch.randn(num_tokens, shape[1]).to(dtype), torch.randn(num_tokens, shape[0]).to(dtype)
    plain, part = linear(inputs), linear.part(inputs, slice(0, (shape[0] + 1) // 2))
    added = None if bias else linear.add_to(hidden, inputs)
    linear.prepack()
    near = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.2, "rtol": 0.02}
    torch.testing.assert_close(linear(inputs), plain, **near)
    torch.testing.assert_close(linear.part(inputs, slice(0, (shape[0] + 1) // 2)), part, **near)
    if added is not None:
        torch.testing.assert_close(linear.add_to(hidden, inputs), added, **near)
    assert linear.num_outputs == shape[0]


class LengthsMultiplied(TorchDispatchMode):
    """Notes how many rows oneDNN is given."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_linear_pointwise" in str(func):
            self.seen.add(len(args[0]))
        return func(*args, **(kwargs or {}))


@needs_packing
@pytest.mark.parametrize("adds", [False, True])
def test_long_inputs_come_in_few_lengths(adds):
    """oneDNN keeps code for each length that it has seen."""
    linear = linear_of(8, 8)
    linear.prepack()
    with LengthsMultiplied() as lengths:
        for n in range(513):
            rows = torch.randn(n, 8)
            assert len(linear.add_to(rows, rows) if adds else linear(rows)) == n
    assert lengths.seen - {1} == {0, *range(2, 65), *range(80, 513, 16)}  # one row may have a product of its own


@needs_packing
@pytest.mark.parametrize("num_tokens", [3, 70])
def test_what_is_added_to_stays_as_it_was(num_tokens):
    linear, hidden = linear_of(8, 8), torch.ones(num_tokens, 8)
    linear.prepack()
    linear.add_to(hidden, torch.randn(num_tokens, 8))
    assert (hidden == 1).all()


@needs_packing
@pytest.mark.parametrize("shape", [(), (3,), (70, 3)])
def test_linear_layers_inside_a_module_are_replaced(shape):
    module = nn.Sequential(nn.Linear(8, 16), nn.Sequential(nn.SiLU(), nn.Linear(16, 4, bias=False)))
    inputs = torch.randn(*shape, 8)
    with torch.no_grad():
        plain = module(inputs)
        prepack_linears(module)
        torch.testing.assert_close(module(inputs), plain)
    assert [type(m) for m in module.modules() if isinstance(m, PackedLinearModule | nn.Linear)] == [
        PackedLinearModule
    ] * 2


def test_other_precisions_stay_as_they_are():
    assert not is_packable(torch.zeros(4, 4, dtype=torch.float64))
    assert not is_packable(torch.zeros(4, 4, device="meta"))
    linear = PackedLinear(torch.eye(3, dtype=torch.float64))
    linear.prepack()
    assert linear(torch.ones(1, 3, dtype=torch.float64)).tolist() == [[1, 1, 1]]
