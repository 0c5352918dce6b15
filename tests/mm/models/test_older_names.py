"""Checkpoints whose tensors have the names of older releases: whatever transformers loads whole is loaded too.

The other forms are refused, or give the same answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

import mm
from mm.models.folder import BadCheckpoint
from tests.helpers.checkpoints import (
    random_idefics3,
    random_llava,
    random_qwen2_5_vl,
    random_qwen2_vl,
    random_smolvlm,
    random_video_llava,
)
from tests.helpers.families import write

PICTURE = np.random.default_rng(3).integers(0, 256, (60, 90, 3), dtype=np.uint8)
RENAMINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "as in the model": (),
    "decoder whole": (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")),
    "decoder first": (("model.language_model.", "model."),),
    "text model": (("model.language_model.", "model.text_model."),),
    "without model": (),
}
"""Name of a form to prefixes in the model and in the file; what begins with none of them loses `model.`"""
MAKERS: dict[str, Callable[[Path], object]] = {
    "llava": random_llava,
    "video_llava": random_video_llava,
    "qwen2_vl": random_qwen2_vl,
    "qwen2_5_vl": random_qwen2_5_vl,
    "idefics3": random_idefics3,
    "smolvlm": random_smolvlm,
    **{name: lambda folder, name=name: write(name, folder) for name in ("llava_next", "gemma3", "qwen3_vl")},
}


def renamed(name: str, form: str) -> str:
    for prefix, older in RENAMINGS[form]:
        if name.startswith(prefix):
            return older + name.removeprefix(prefix)
    return name if form == "as in the model" else name.removeprefix("model.")


def answer_of(folder: Path) -> tuple[int, ...]:
    with mm.load(folder, dtype="float32", num_threads=1, skip_self_test=True) as model:
        return model.generate("Hi", images=[PICTURE], max_new_tokens=6, temperature=0).token_ids[0]


@pytest.mark.parametrize("name", MAKERS)
def test_every_form_that_transformers_loads_is_loaded(name: str, tmp_path: Path) -> None:
    MAKERS[name](tmp_path)
    expected = answer_of(tmp_path)
    tensors = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    loaded = set()
    for form in RENAMINGS:
        for file in tmp_path.glob("*.safetensors*"):
            file.unlink()
        names = {renamed(one, form): one for one in tensors}
        save_file({new: tensors[old].clone() for new, old in names.items()}, tmp_path / "model.safetensors")
        kwargs = {"dtype": torch.float32, "output_loading_info": True}
        theirs, info = AutoModelForImageTextToText.from_pretrained(tmp_path, **kwargs)
        state = theirs.state_dict()
        if not info["missing_keys"] and all(torch.equal(state[one], tensors[one]) for one in tensors):
            loaded.add(form)
            assert answer_of(tmp_path) == expected, form
        else:
            with contextlib.suppress(BadCheckpoint):
                assert answer_of(tmp_path) == expected, form
    assert "as in the model" in loaded
