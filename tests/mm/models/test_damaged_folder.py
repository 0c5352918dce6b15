"""A damaged model folder gives one line that names the file, whatever the damage."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mm
from mm.errors import MmError
from mm.models.folder import BadCheckpoint
from tests.helpers.checkpoints import random_idefics3, random_llava, random_qwen2_vl

NUM_MUTATIONS = int(os.environ.get("MM_FUZZ_FOLDERS", "20"))
VALUES: list[Any] = [
    None,
    [],
    {},
    "",
    "odd",
    -1,
    0,
    1,
    7,
    10**12,
    2.5,
    float("nan"),
    float("inf"),
    True,
    [1],
    {"a": 1},
    "../x",
]
FOLDERS = {"llava": random_llava, "idefics3": random_idefics3, "qwen2_vl": random_qwen2_vl}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of each family."""
    parent = tmp_path_factory.mktemp("whole")
    return {name: make(parent / name) for name, make in FOLDERS.items()}


def paths(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths to all values in a JSON document; of long lists and mappings only some."""
    found = [path] if path else []
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [])
    for key, inner in items if len(items) < 60 else items[:10]:
        found += paths(inner, (*path, key))
    return found


def mutated(text: str, rng: random.Random) -> bytes:
    """A JSON file with a key lost, a value replaced, or its bytes damaged."""
    kind = rng.randrange(10)
    data = text.encode()
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        at = rng.randrange(len(data))
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return rng.choice([b"", b"[]", b"null", b"3", b'"text"', b"\xff\xfe", b"{", b"[" * 5000, b"{}"])
    document = json.loads(text)
    path = rng.choice(paths(document))
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    if kind < 6 and isinstance(inner, dict):
        del inner[path[-1]]
    else:
        inner[path[-1]] = rng.choice(VALUES)
    return json.dumps(document).encode()


def use(folder: Path) -> None:
    """Load a model and ask it."""
    picture = np.full((40, 60, 3), 90, dtype=np.uint8)
    with mm.load(folder, dtype="float32", num_threads=1, kv_cache_gb=0.01, max_num_seqs=2) as model:
        model.generate("What?", images=[picture], max_new_tokens=2)


def problem_of(folder: Path) -> str:
    """What is wrong with how a folder is refused; empty where nothing is."""
    try:
        use(folder)
    except MmError as error:
        text = str(error)
        return "" if "\n" not in text and len(text) < 700 else f"a long text: {text!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("name", FOLDERS)
def test_mutated_settings_are_used_or_refused_in_one_line(whole, tmp_path, name):
    rng = random.Random(sum(map(ord, name)))
    files = sorted(path.name for path in whole[name].glob("*.json"))
    folder = Path(shutil.copytree(whole[name], tmp_path / name))
    found = []
    for _ in range(NUM_MUTATIONS):
        file = rng.choice(files)
        before = (folder / file).read_text()
        damaged = mutated(before, rng)
        (folder / file).write_bytes(damaged)
        if problem := problem_of(folder):
            found.append((file, problem, changes(before, damaged)))
        (folder / file).write_text(before)
    assert not found


def changes(before: str, damaged: bytes) -> str:
    """How a damaged document differs, for a failing test."""
    try:
        after = json.loads(damaged)
    except (ValueError, RecursionError):
        return repr(damaged[:60])
    old = dict(flat(json.loads(before)))
    new = dict(flat(after))
    return str(
        [(path, old.get(path), new.get(path)) for path in {**old, **new} if str(old.get(path)) != str(new.get(path))][
            :4
        ]
    )


def flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    inner = [pair for key, one in items for pair in flat(one, f"{path}.{key}")]
    return inner or [(path, value)]


JSON_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
)


@pytest.mark.parametrize("file", JSON_FILES)
@pytest.mark.parametrize("damage", [b"", b"[1]", b'{"a": ', b"\xff\xfe{}"])
def test_a_damaged_file_is_named(whole, tmp_path, file, damage):
    folder = Path(shutil.copytree(whole["llava"], tmp_path / "llava"))
    (folder / file).write_bytes(damage)
    with pytest.raises(BadCheckpoint, match=file.removesuffix(".json")):
        mm.load(folder, dtype="float32")


@pytest.mark.parametrize("file", JSON_FILES)
def test_a_folder_in_place_of_a_file_is_named(whole, tmp_path, file):
    folder = Path(shutil.copytree(whole["llava"], tmp_path / "llava"))
    (folder / file).unlink()
    (folder / file).mkdir()
    with pytest.raises(BadCheckpoint, match=file.removesuffix(".json")):
        mm.load(folder, dtype="float32")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text_config.rms_norm_eps", float("nan")),
        ("text_config.hidden_size", "wide"),
        ("text_config.num_hidden_layers", 10**9),
        ("vision_config.image_size", 10**9),
        ("image_token_id", 10**9),
        ("vision_feature_layer", "last"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(whole, tmp_path, key, value):
    folder = Path(shutil.copytree(whole["llava"], tmp_path / "llava"))
    config = json.loads((folder / "config.json").read_text())
    *outer, name = key.split(".")
    inner = config
    for part in outer:
        inner = inner[part]
    inner[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        mm.load(folder, dtype="float32")


def test_damaged_weights_are_named(whole, tmp_path):
    folder = Path(shutil.copytree(whole["llava"], tmp_path / "llava"))
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = next(key for key in header if key != "__metadata__")
    lie = json.dumps(header | {name: header[name] | {"data_offsets": [0, 10**12]}}).encode()
    for damage in (
        b"",
        data[:100],
        data[: len(data) // 2],
        bytes(8) + data[8:],
        b"\xff" * 64,
        len(lie).to_bytes(8, "little") + lie + data[8 + size :],
    ):
        file.write_bytes(damage)
        with pytest.raises(BadCheckpoint, match=r"model\.safetensors"):
            mm.load(folder, dtype="float32")
    file.unlink()
    file.mkdir()
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors"):
        mm.load(folder, dtype="float32")


def test_an_index_that_names_what_is_not_there_is_named(whole, tmp_path):
    folder = Path(shutil.copytree(whole["llava"], tmp_path / "llava"))
    index = folder / "model.safetensors.index.json"
    for weight_map, what in [
        ({"lm_head.weight": "gone.safetensors"}, "gone.safetensors"),
        ({"lm_head.weight": 3}, "lm_head.weight"),
        ([], "weight_map"),
        ({"lm_head.weight": "../other.safetensors"}, "outside the folder"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(BadCheckpoint, match=what):
            mm.load(folder, dtype="float32")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(whole, tmp_path):
    folder = Path(shutil.copytree(whole["llava"], tmp_path / "llava"))
    (folder / "config.json").chmod(0)
    with pytest.raises(BadCheckpoint, match=r"config\.json cannot be read: Permission denied"):
        mm.load(folder, dtype="float32")
