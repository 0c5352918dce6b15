"""The product of single rows: sums are those of float64, threads change nothing, a strange format is not read."""

import numpy as np
import pytest
import torch

from mm.models import row_product
from mm.models.linear import PackedLinear, is_packable
from mm.models.row_product import BLOCK, RowProduct, blocks_of

needs_packing = pytest.mark.skipif(not is_packable(torch.zeros(4, 4)), reason="no blocked format on this machine")
SHAPES = [(1, 1), (7, 3), (64, 256), (65, 512), (128, 513), (1000, 1300)]


def packed_by_hand(weight: torch.Tensor, depth: int | None = None) -> np.ndarray:
    """The format, with padding that a product must not read."""
    num_outputs, num_inputs = weight.shape
    blocks = np.full((-(-num_outputs // BLOCK), depth or num_inputs, BLOCK), 7, np.float32)
    for output in range(num_outputs):
        blocks[output // BLOCK, :num_inputs, output % BLOCK] = weight[output].numpy()
    return blocks


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("is_parallel", [False, True])
def test_sums_are_those_of_float64(shape, has_bias, adds, is_parallel, monkeypatch):
    draw = torch.Generator().manual_seed(sum(shape))
    weight, inputs = torch.randn(shape, generator=draw), torch.randn(1, shape[1], generator=draw)
    bias = torch.randn(shape[0], generator=draw) if has_bias else None
    addend = torch.randn(1, shape[0], generator=draw) if adds else None
    if is_parallel:
        monkeypatch.setattr(row_product, "PARALLEL_WEIGHTS", 0)
        monkeypatch.setattr(row_product, "_serial", None)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    product = RowProduct(weight, packed_by_hand(weight, shape[1] + 3), bias)
    before = None if addend is None else addend.clone()
    found = product(inputs, addend)
    expected = inputs.double() @ weight.double().T
    expected += 0 if bias is None else bias
    expected += 0 if addend is None else addend
    torch.testing.assert_close(found.double(), expected, atol=1e-6 * shape[1] + 1e-6, rtol=1e-5)
    assert found.shape == (1, shape[0])
    assert addend is None or torch.equal(addend, before)


def test_rows_that_are_not_contiguous_are_read_right():
    weight = torch.randn(64, 8)
    product = RowProduct(weight, packed_by_hand(weight), None)
    inputs, addend = torch.randn(8, 5).T[2:3], torch.randn(64, 3).T[1:2]
    torch.testing.assert_close(product(inputs, addend), inputs @ weight.T + addend)


@needs_packing
@pytest.mark.parametrize("shape", SHAPES[2:])
def test_the_memory_of_a_packed_weight_is_found_and_compared(shape):
    weight = torch.randn(shape)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
    blocks = blocks_of(packed, weight)
    assert blocks is not None
    np.testing.assert_array_equal(blocks[0, : shape[1], 0], weight[0].numpy())
    assert blocks_of(packed, weight.clone().index_fill_(1, torch.tensor([shape[1] - 1]), 9.0)) is None
    assert blocks_of(packed, weight.to(torch.bfloat16)) is None


def test_another_format_is_not_read(monkeypatch):
    weight = torch.arange(64 * 64, dtype=torch.float32).reshape(64, 64)
    monkeypatch.setattr(torch.ops.mkldnn, "data_ptr", torch.Tensor.data_ptr, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_nbytes", lambda packed: packed.numel() * 4, raising=False)
    assert blocks_of(weight, weight) is None
    assert blocks_of(torch.cat([weight, weight[:1]]), weight) is None
    assert blocks_of(weight[:32], weight) is None
    assert blocks_of(torch.arange(4097.0), weight) is None
    blocks = blocks_of(weight.T.contiguous(), weight)
    assert blocks is not None
    assert blocks.shape == (1, 64, 64)


@needs_packing
@pytest.mark.parametrize("adds", [False, True])
def test_a_packed_layer_multiplies_single_rows_with_it(adds, monkeypatch):
    linear = PackedLinear(torch.randn(70, 9), None if adds else torch.randn(70))
    linear.prepack()
    assert linear._one_row is not None
    rows, hidden = torch.randn(2, 9), torch.randn(2, 70)
    together = linear.add_to(hidden, rows) if adds else linear(rows)
    monkeypatch.setattr(linear, "_multiply", None)
    monkeypatch.setattr(linear, "_multiply_and_add", None)
    for i in range(2):
        alone = linear.add_to(hidden[i : i + 1], rows[i : i + 1]) if adds else linear(rows[i : i + 1])
        torch.testing.assert_close(alone[0], together[i])


@needs_packing
def test_a_format_that_is_not_known_is_left_to_onednn(monkeypatch):
    monkeypatch.setattr(row_product, "blocks_of", lambda *_: None)
    weight, row = torch.randn(70, 9), torch.randn(1, 9)
    linear = PackedLinear(weight)
    linear.prepack()
    assert linear._one_row is None
    torch.testing.assert_close(linear(row), row @ weight.T)
