"""Checkpoints: a folder that cannot be used says why; a decoder never reads the tower's tensors."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mm.errors import UnknownModel
from mm.models import checkpoint
from mm.models.checkpoint import BadCheckpoint, find, read_config, read_tensors
from mm.models.families.llava import Llava
from tests.helpers.checkpoints import random_llava


@pytest.fixture
def folder(tmp_path):
    return random_llava(tmp_path / "llava")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


def test_a_decoder_reads_language_tensors_only(folder, monkeypatch):
    read = []
    original = checkpoint.safe_open

    class Spy:
        def __init__(self, *args, **kwargs):
            self.reader = original(*args, **kwargs)

        def __enter__(self):
            self.inner = self.reader.__enter__()
            return self

        def __exit__(self, *details):
            return self.reader.__exit__(*details)

        def keys(self):
            return self.inner.keys()

        def get_tensor(self, key):
            read.append(key)
            return self.inner.get_tensor(key)

    monkeypatch.setattr(checkpoint, "safe_open", Spy)
    Llava(folder)
    assert read
    assert all("language_model" in key or "lm_head" in key for key in read)


def test_sharded_checkpoints_load_alike(folder, tmp_path):
    whole = Llava(folder).language
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({k: tensors[k].clone() for k in keys}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = Llava(folder).language
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.state_dict().values(), sharded.model.state_dict().values(), strict=True)
    )
    assert torch.equal(whole.head_weight, sharded.head_weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if not k.endswith("model.norm.weight")}, "lacks norm.weight"),
        (lambda t: {k: v for k, v in t.items() if "lm_head" not in k}, "lacks lm_head.weight"),
        (
            lambda t: {k: (v[:-1].clone() if k.endswith("model.norm.weight") else v) for k, v in t.items()},
            "other shapes",
        ),
        (lambda t: t | {"language_model.model.layers.9.extra": torch.zeros(1)}, "does not: layers.9.extra"),
    ],
)
def test_wrong_weights_stop_the_load(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(BadCheckpoint, match=message):
        Llava(folder)


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadCheckpoint, match="convert them"):
        read_tensors(folder, lambda key: key)


def test_custom_code_is_never_run(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(BadCheckpoint, match="never run"):
        read_config(folder)


def test_an_index_cannot_point_outside_its_folder(folder):
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "../other.safetensors"}})
    )
    with pytest.raises(BadCheckpoint, match="outside"):
        read_tensors(folder, lambda key: key)


def test_unknown_models_are_named(tmp_path):
    with pytest.raises(UnknownModel, match="tiny"):
        find("tinny")
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        find(tmp_path)


def test_the_shipped_model_is_found_by_name(tmp_path):
    copy = shutil.copytree(find("tiny"), tmp_path / "copy")
    assert read_config(find("tiny")) == read_config(copy)
