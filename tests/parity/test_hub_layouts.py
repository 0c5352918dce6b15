"""Real metadata of published checkpoints: scaled down they answer as transformers does, or they are refused by name."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import PIL.Image
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import mm
from mm.errors import MmError
from tests.helpers.hub import HUB, write_scaled
from tests.parity.test_families import PICTURES

pytestmark = [
    pytest.mark.skipif(not HUB.is_dir(), reason="the metadata lie beside the repository, in ../shared/hub"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]


@dataclass(frozen=True)
class Layout:
    """What a folder lacks.

    Attributes:
        tokenizer_of: The folder that has its tokenizer's and processor's settings, where it has none.
        picture: What its chat template writes for a picture, where it has no template.
    """

    tokenizer_of: str | None = None
    picture: str = ""


SERVED = {
    "llava-1.5-7b-hf": Layout(),
    "Qwen2.5-VL-3B-Instruct": Layout("Qwen2-VL-2B-Instruct-AWQ"),
    "Qwen2.5-VL-3B-Instruct-AWQ.sophgo-mixed": Layout(),
    "Qwen2.5-VL-7B-Instruct": Layout("Qwen2-VL-2B-Instruct-AWQ"),
    "Qwen3-VL-4B-Instruct": Layout(),
    "Qwen3-VL-8B-Instruct": Layout("Qwen3-VL-4B-Instruct"),
    "gemma-3-4b-it": Layout(),
    "gemma-4-E2B-it": Layout(picture="<|image|>"),
    "Qwen3.5-0.8B": Layout(),
    "Qwen3.5-9B": Layout("Qwen3.5-0.8B"),
    "GLM-4.1V-9B-Thinking": Layout(picture="<|begin_of_image|><|image|><|end_of_image|>"),
    "Qwen2-VL-2B-Instruct-AWQ": Layout(),
    "Qwen3.6-27B-FP8": Layout("Qwen3.5-0.8B"),
    "MiniCPM-V-4.6-AWQ": Layout(),
}
"""Quantised ones in the form from which they were made."""

REFUSED = {
    "Qwen2-VL-2B-Instruct-AWQ": "quantised with awq",
    "MiniCPM-V-4.6-AWQ": "quantised with awq",
    "olmOCR-2-7B-1025-FP8": "quantised with compressed-tensors",
    "Qwen3.5-9B-MLX-8bit": "quantised with a method without a name",
    "Qwen3.6-27B-FP8": "quantised with fp8",
    "Devstral-Small-2-24B-Instruct-2512-FP8": "quantised with fp8",
    "LLaVA-NeXT-Video-7B-32K-hf.bnb-nf4": "quantised with bitsandbytes",
    "InternVL3_5-1B-language-GPTQ-int4.axera": "'qwen3', for which no .* is installed",
    "InternVL3-1B-2B-original-form": "has no config.json",
    "DeepSeek-OCR-2": "auto_map",
    "MiniCPM-V-4": "auto_map",
    "MiniCPM-V-2_6": "auto_map",
    "Llama-3.2-11B-Vision-Instruct": "tokenizer|cross_attention",
    "LFM2.5-VL-1.6B": "processor",
    "granite-docling-258M": "processor",
    "paligemma-3b-pt-224": "processor",
}
"""Folder to why it is refused as it is; the last ones lack files that no copy has."""

UNTESTED = {
    "SmolVLM2-256M-Video-Instruct": "no copy has its tokenizer; tests/parity/test_idefics3.py has one of its kind"
}


def test_every_folder_is_here():
    folders = {path.name for path in HUB.iterdir() if path.is_dir()}
    assert folders == SERVED.keys() | REFUSED.keys() | UNTESTED.keys()


@pytest.mark.parametrize("name", SERVED)
def test_answers_as_transformers_does(name, tmp_path):
    layout = SERVED[name]
    folder = write_scaled(name, tmp_path, layout.tokenizer_of)
    if layout.picture:
        (folder / "chat_template.jinja").write_text(CHAT.replace("PICTURE", layout.picture))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=processor.chat_template,
        add_generation_prompt=True,
        tokenize=False,
    )
    bos = processor.tokenizer.bos_token
    inputs = processor(
        text=[text],
        images=[PIL.Image.fromarray(PICTURES[0])],
        return_tensors="pt",
        add_special_tokens=not (bos and text.startswith(bos)),
    )
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs.input_ids.shape[1] :].tolist()
    with mm.load(folder, dtype="float32", num_threads=1, skip_self_test=True) as ours:
        given = ours.generate("What is it?", images=[PICTURES[0]], max_new_tokens=6, temperature=0)
    assert list(given.token_ids[0]) == expected


CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else 'PICTURE' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant:{% endif %}"
)


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_by_name(name, tmp_path):
    folder = shutil.copytree(HUB / name, tmp_path / "model")
    tensors = {f"any.{i}": torch.zeros(1) for i in range(1000)}  # none is read
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(MmError, match=REFUSED[name]) as refused:
        mm.load(folder, dtype="float32", num_threads=1)
    assert str(folder) in str(refused.value)
