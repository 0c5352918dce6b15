"""Products in another layout are the same products."""

import pytest
import torch
from torch import nn

from mm.models.linear import PackedLinear, PackedProduct, is_packable, pack_linears

needs_layout = pytest.mark.skipif(not is_packable(torch.zeros(4, 4)), reason="no other layout on this machine")
DTYPES = [torch.float32, torch.bfloat16]


def product_of(
    num_outputs: int, num_inputs: int, *, bias: bool = False, dtype: torch.dtype = torch.float32
) -> PackedProduct:
    draw = torch.Generator().manual_seed(num_outputs)
    weight = torch.randn(num_outputs, num_inputs, generator=draw).to(dtype)
    return PackedProduct(weight, torch.randn(num_outputs, generator=draw).to(dtype) if bias else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (64, 256), (1000, 129)])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 5, 33])
def test_another_layout_gives_the_same_product(num_rows, shape, bias, dtype):
    product = product_of(*shape, bias=bias, dtype=dtype)
    rows, hidden = torch.randn(num_rows, shape[1]).to(dtype), torch.randn(num_rows, shape[0]).to(dtype)
    plain, part = product(rows), product.part(rows, slice(0, (shape[0] + 1) // 2))
    added = None if bias else product.added_to(hidden, rows)
    product.pack()
    near = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.2, "rtol": 0.02}
    torch.testing.assert_close(product(rows), plain, **near)
    torch.testing.assert_close(product.part(rows, slice(0, (shape[0] + 1) // 2)), part, **near)
    if added is not None:
        torch.testing.assert_close(product.added_to(hidden, rows), added, **near)
    assert product.num_outputs == shape[0]


@needs_layout
def test_what_is_added_to_stays_as_it_was():
    product, hidden = product_of(8, 8), torch.ones(3, 8)
    product.pack()
    product.added_to(hidden, torch.randn(3, 8))
    assert (hidden == 1).all()


@needs_layout
def test_linear_layers_inside_a_module_are_replaced():
    module = nn.Sequential(nn.Linear(8, 16), nn.Sequential(nn.SiLU(), nn.Linear(16, 4, bias=False)))
    rows = torch.randn(2, 3, 8)
    with torch.no_grad():
        plain = module(rows)
        pack_linears(module)
        torch.testing.assert_close(module(rows), plain)
    assert [type(m) for m in module.modules() if isinstance(m, PackedLinear | nn.Linear)] == [PackedLinear] * 2


def test_other_precisions_stay_as_they_are():
    assert not is_packable(torch.zeros(4, 4, dtype=torch.float64))
    assert not is_packable(torch.zeros(4, 4, device="meta"))
    product = PackedProduct(torch.eye(3, dtype=torch.float64))
    product.pack()
    assert product(torch.ones(1, 3, dtype=torch.float64)).tolist() == [[1, 1, 1]]
