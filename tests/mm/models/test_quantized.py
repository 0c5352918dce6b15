"""Decoder weights of 8 bits: exact integer products, and a model that equals transformers' with the same rounding."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoTokenizer

import mm
from mm.errors import InvalidOption
from mm.models.linear import EXACT_INPUTS
from mm.models.quantized import (
    LEVELS,
    Int8Linear,
    Int8LinearModule,
    Int8Rows,
    quantize_linears,
    quantize_rows,
    weight_levels,
)
from tests.helpers.checkpoints import random_llava, random_qwen2_5_vl

SHAPES = [(1, 1, 1), (1, 64, 48), (3, 257, 129), (8, 128, 512), (EXACT_INPUTS + 5, 96, 33), (300, 64, 64)]
"""Rows, inputs, outputs."""


def rounded(values: torch.Tensor, levels: int) -> torch.Tensor:
    """Each row as whole numbers times a scale, in float64."""
    rows = values.double()
    scales = rows.abs().amax(-1, keepdim=True).clamp(min=1e-12) / levels
    return (rows / scales).round() * scales


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_that_of_the_rounded_numbers(shape, has_bias, is_shared):
    count, width, outputs = shape
    generator = torch.Generator().manual_seed(sum(shape))
    weight, inputs, hidden = (
        torch.randn(size, generator=generator) for size in ((outputs, width), (count, width), (count, outputs))
    )
    bias = torch.randn(outputs, generator=generator) if has_bias else None
    linear = Int8Linear(Int8Rows(weight), bias, is_shared=is_shared)
    expected = rounded(inputs, LEVELS) @ rounded(weight, weight_levels()).T + (0 if bias is None else bias.double())
    assert linear.num_outputs == outputs
    torch.testing.assert_close(linear(inputs).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear.add_to(hidden, inputs).double(), expected + hidden, rtol=1e-5, atol=1e-5)
    part = slice(outputs // 3, outputs // 3 + 1)
    torch.testing.assert_close(linear.part(inputs, part).double(), expected[:, part], rtol=1e-5, atol=1e-5)


def test_result_of_a_row_does_not_depend_on_the_others():
    generator = torch.Generator().manual_seed(0)
    linear = Int8Linear(Int8Rows(torch.randn(80, 200, generator=generator)))
    inputs = torch.randn(100, 200, generator=generator) * torch.logspace(-3, 3, 100)[:, None]
    together = linear(inputs)
    for size in (1, 7, 64):
        assert torch.equal(together, torch.cat([linear(part) for part in inputs.split(size)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_row_that_is_not_finite_stays_so_and_harms_no_other(bad, dtype):
    inputs = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    linear = Int8Linear(Int8Rows(torch.randn(8, 40).to(dtype)))
    good = linear(inputs)
    inputs[1, 5] = bad
    found = linear(inputs)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], good[[0, 2]])


def test_kernel_and_torch_round_alike():
    inputs = torch.randn(20, 301, generator=torch.Generator().manual_seed(2))
    inputs[3] = 0
    values, scales = quantize_rows(inputs)
    others, their_scales = quantize_rows(inputs.double())
    assert (values - others).abs().max() <= 1  # of a number in the middle between two
    assert (values == others).float().mean() > 0.999
    torch.testing.assert_close(scales, their_scales.float())
    assert values[3].eq(0).all()


def test_sums_do_not_overflow_on_a_processor_without_vnni():
    program = (
        "import torch; from mm.models.quantized import Int8Linear, Int8Rows, weight_levels;"
        "rows = Int8Rows(torch.ones(16, 512)); linears = [Int8Linear(rows, is_shared=shared) for shared in (0, 1)];"
        "errors = [(linear(torch.ones(n, 512)) - 512).abs().max().item() for linear in linears for n in (1, 4, 80)];"
        "print(weight_levels(), max(errors))"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    levels, error = done.stdout.split()
    assert int(levels) == 63
    assert float(error) < 1e-3


def test_other_modules_keep_their_place():
    module = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2, bias=False)))
    inputs = torch.randn(5, 8)
    expected = module(inputs)
    quantize_linears(module)
    assert isinstance(module[0], Int8LinearModule)
    assert isinstance(module[2][0], Int8LinearModule)
    torch.testing.assert_close(module(inputs), expected, rtol=0.1, atol=0.1)


class Rounded(nn.Module):
    """A linear layer of transformers' with weights and inputs rounded as ours are."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = rounded(linear.weight.detach(), weight_levels()).float(), linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(rounded(inputs, LEVELS).float(), self.weight, self.bias)


def round_linears(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, Rounded(child))
        else:
            round_linears(child)


@pytest.mark.parametrize("make", [random_llava, random_qwen2_5_vl])
def test_model_equals_transformers_with_the_same_rounding(make, tmp_path):
    folder = make(tmp_path)
    with mm.load(folder, dtype="float32", quantize="int8") as model:
        answer = model.generate("What is this?", max_new_tokens=12, temperature=0, ignore_eos=True)
        prompt = model.engine.family.language
        assert prompt.head_weight.shape[0] == prompt.vocab_size
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    decoder = theirs.model.language_model
    round_linears(decoder)
    embedding = decoder.get_input_embeddings()
    embedding.weight.data = rounded(embedding.weight.data, weight_levels()).float()
    theirs.lm_head = Rounded(theirs.lm_head)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}]}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = theirs.generate(**ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert list(answer.token_ids[0]) == found[0, ids["input_ids"].shape[1] :].tolist()


def test_it_is_refused_where_it_cannot_work():
    with pytest.raises(InvalidOption, match="compile"):
        mm.load("tiny", quantize="int8", compile=True)
    with pytest.raises(InvalidOption, match="int4"):
        mm.load("tiny", quantize="int4")


PRODUCTS = """
import torch
from mm.models.quantized import Int8Linear, Int8Rows
for rows in (1, 4, 33):
    Int8Linear(Int8Rows(torch.rand(64, 96) - 0.5))(torch.rand(rows, 96) - 0.5)
"""


def test_products_are_not_those_of_a_reference():
    """oneDNN says which code it took. Its reference is a thousand times slower, and gives the same numbers."""
    environment = os.environ | {"ONEDNN_VERBOSE": "1"}
    run = subprocess.run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True, env=environment, check=True)
    taken = [line.split(",")[6:8] for line in run.stdout.splitlines() if ",exec,cpu,matmul," in line]
    assert len(taken) >= 3
    assert not [name for one in taken for name in one if name.startswith("ref")], taken
