"""Pages of a mapped file are given back when their values are held elsewhere, and no value is lost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mm.models.linear import PackedLinear
from mm.models.pages import release_pages

NUM_BYTES = 64 << 20


def resident_of_files() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssFile"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are given back on Linux")
def test_pages_of_a_file_are_given_back_and_can_be_read_again(tmp_path: Path) -> None:
    values = torch.randn(NUM_BYTES // 4 // 1024, 1024)
    save_file({"weight": values, "norm": torch.ones(8)}, tmp_path / "x.safetensors")
    before = resident_of_files()
    with safe_open(tmp_path / "x.safetensors", framework="pt") as reader:
        mapped, _norm = reader.get_tensor("weight"), reader.get_tensor("norm")
    assert torch.equal(mapped, values)
    assert resident_of_files() - before > NUM_BYTES * 0.9, "the file is not mapped, so the test shows nothing"
    release_pages(mapped)
    assert resident_of_files() - before < NUM_BYTES * 0.1
    assert torch.equal(mapped, values)


def test_values_that_are_in_no_file_stay() -> None:
    values = torch.randn(512, 1024)
    kept = values.clone()
    release_pages(values)
    release_pages(values[3])
    release_pages(torch.ones(2))
    assert torch.equal(values, kept)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are given back on Linux")
def test_a_packed_weight_leaves_no_pages_of_its_file(tmp_path: Path) -> None:
    save_file({"weight": torch.randn(NUM_BYTES // 4 // 1024, 1024), "norm": torch.ones(8)}, tmp_path / "x.safetensors")
    before = resident_of_files()
    with safe_open(tmp_path / "x.safetensors", framework="pt") as reader:
        linear, _norm = PackedLinear(reader.get_tensor("weight")), reader.get_tensor("norm")
    row = torch.randn(1, 1024)
    expected = linear(row)
    linear.prepack()
    assert resident_of_files() - before < NUM_BYTES * 0.1
    assert torch.allclose(linear(row), expected, atol=1e-3)
