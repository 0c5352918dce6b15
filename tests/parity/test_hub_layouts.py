"""Real metadata of published checkpoints, scaled down: they load and answer as transformers does."""

from __future__ import annotations

import PIL.Image
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import mm
from tests.helpers.hub import HUB, write_scaled
from tests.parity.test_families import PICTURES

pytestmark = pytest.mark.skipif(not HUB.is_dir(), reason="the metadata lie beside the repository, in ../shared/hub")

SERVED = {
    "llava-1.5-7b-hf": None,
    "Qwen2.5-VL-3B-Instruct": "Qwen2-VL-2B-Instruct-AWQ",
    "Qwen2.5-VL-7B-Instruct": "Qwen2-VL-2B-Instruct-AWQ",
    "Qwen3-VL-4B-Instruct": None,
    "Qwen3-VL-8B-Instruct": "Qwen3-VL-4B-Instruct",
    "gemma-3-4b-it": None,
}
"""Folder to the one that has its tokenizer's and processor's settings, where it has none."""


@pytest.mark.parametrize("name", SERVED)
def test_answers_as_transformers_does(name, tmp_path):
    folder = write_scaled(name, tmp_path, SERVED[name])
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    inputs = processor(
        text=[text],
        images=[PIL.Image.fromarray(PICTURES[0])],
        return_tensors="pt",
        add_special_tokens=not (bos and text.startswith(bos)),
    )
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs.input_ids.shape[1] :].tolist()
    with mm.load(folder, dtype="float32", num_threads=1) as ours:
        given = ours.generate("What is it?", images=[PICTURES[0]], max_new_tokens=6, temperature=0)
    assert list(given.token_ids[0]) == expected
