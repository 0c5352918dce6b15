"""A model folder never makes anything run, and nobody is asked whether it may."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest

import mm
from mm.errors import MmError
from mm.models.checkpoint import find
from mm.models.folder import BadCheckpoint, check_folder
from tests.helpers.checkpoints import random_llava

ROOT = Path(__file__).parents[3]
LOADERS = ("from_pretrained", "from_config")
CODE = "from pathlib import Path\nPath(__file__).with_name('was_run').touch()\n\nclass Own:\n    pass\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return random_llava(tmp_path_factory.mktemp("whole") / "llava")


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "llava"))


@pytest.fixture(autouse=True)
def _nobody_is_asked(monkeypatch):
    def ask(*_):
        raise AssertionError("somebody was asked on the terminal")

    monkeypatch.setattr("builtins.input", ask)


def add(path: Path, keys: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(old | keys))


AUTO = {"auto_map": dict.fromkeys(("AutoConfig", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor"), "own.Own")}
FILES = [
    ("config.json", AUTO),
    ("config.json", {"vision_config": AUTO}),
    ("processor_config.json", AUTO),
    ("processor_config.json", {"image_processor": {"auto_map": {"AutoImageProcessor": "owner/name--own.Own"}}}),
    ("preprocessor_config.json", AUTO),
    ("video_preprocessor_config.json", AUTO),
    ("tokenizer_config.json", AUTO),
    ("tokenizer_config.json", {"auto_map": ["own.Own", None]}),
    ("generation_config.json", {"custom_generate": "owner/name"}),
    ("adapter_config.json", {"auto_mapping": {"base_model_class": "Own", "parent_library": "own"}}),
    ("drafters/deep/config.json", AUTO),
    ("onnx/unknown_name.json", AUTO),
    ("processor_config.json", {"audio_tokenizer": {"audio_tokenizer_name_or_path": "owner/name"}}),
    ("config.json", {"attn_implementation": "owner/kernel"}),
    ("config.json", {"text_config": {"_attn_implementation": {"": "owner/kernel"}}}),
]


@pytest.mark.parametrize(("file", "keys"), FILES)
def test_a_folder_that_asks_for_code_is_refused_by_file_and_key(folder, file, keys):
    (folder / "own.py").write_text(CODE)
    add(folder / file, keys)
    key = next(iter(keys)) if not isinstance(next(iter(keys.values())), dict) else ""
    with pytest.raises(BadCheckpoint, match=file) as caught:
        mm.load(folder)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "was_run").exists()


def test_a_key_spelled_with_escapes_is_found(folder):
    path = folder / "processor_config.json"
    path.write_text(path.read_text().replace("{", '{"\\u0061uto_map": {"AutoProcessor": "own.Own"}, ', 1))
    with pytest.raises(BadCheckpoint, match=r"processor_config.json: auto_map"):
        find(folder)


def test_generation_code_in_a_folder_is_refused(folder):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE)
    with pytest.raises(BadCheckpoint, match=r"custom_generate/generate.py"):
        find(folder)


def test_a_downloaded_checkpoint_is_checked_too(folder, monkeypatch):
    add(folder / "processor_config.json", AUTO)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(folder))
    with pytest.raises(BadCheckpoint, match="auto_map"):
        find("owner/name")


def test_a_folder_reached_through_a_link_is_checked_once(folder, tmp_path):
    other = tmp_path / "elsewhere"
    add(other / "config.json", AUTO)
    (folder / "linked").symlink_to(other)
    with pytest.raises(BadCheckpoint, match=r"linked/config.json"):
        find(folder)
    (folder / "linked").unlink()
    (folder / "itself").symlink_to(folder)
    assert find(folder) == folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused_by_name_and_never_opened(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(BadCheckpoint, match=r"no safetensors weights \(.bin and .pt files are refused"):
        mm.load(folder)
    index = {"weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadCheckpoint, match=rf"lm_head.weight names {name}; only safetensors files are read"):
        mm.load(folder)


def sources() -> list[Path]:
    """Every file of ours but the tests, which read folders that they wrote."""
    packages = ("mm", "encoders", "pruning", "serve", "demos")
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def calls(name: str) -> list[str]:
    """Calls of a method of that name in the whole project that do not say trust_remote_code=False."""
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") != name:
                continue
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if given.get("trust_remote_code") != "False":
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


@pytest.mark.parametrize("name", LOADERS)
def test_every_call_that_reads_a_folder_refuses_its_code(name):
    assert calls(name) == []


def test_every_pickle_that_is_read_holds_nothing_but_weights():
    loads = [
        (path, node)
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert loads
    for path, node in loads:
        assert path.relative_to(ROOT).parts[:2] == ("demos", "train"), f"{path}: only training reads pickles, its own"
        assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path


def test_the_shipped_models_are_accepted():
    for name in ("tiny", "tiny_plain"):
        check_folder(find(name))


def test_a_timm_checkpoint_that_is_a_pickle_is_refused_by_name(tmp_path):
    pytest.importorskip("timm")
    from encoders.timm_vit import TimmEncoder

    for name in ("weights.pt", "weights.bin", "weights.pth", "weights.npz"):
        (tmp_path / name).write_bytes(b"never opened")
        with pytest.raises(MmError, match=r"only \.safetensors files are read"):
            TimmEncoder("vit_tiny_patch16_224", checkpoint=tmp_path / name)
