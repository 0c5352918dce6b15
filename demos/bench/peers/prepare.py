"""The same model for every peer, in the form that each of them reads, and the pictures."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from demos.bench.peers.environments import Peer, Unavailable, last_words
from demos.bench.peers.names import PICTURE, PROMPT, QUESTION
from demos.bench.peers.shapes import write_qwen
from demos.train.data.scenes import HELD_OUT, draw_scene, sample_scene
from mm.models.checkpoint import find

SHAPES = {"qwen2.5-vl-349m": write_qwen}
"""What writes a model with random weights, by name."""
TOWER = "vision_tower."
TEMPLATE = "chat_template.jinja"
ROOT = Path(__file__).parents[3]


def write_pictures(folder: Path, number: int, first: int, side: int) -> list[Path]:
    """Drawn scenes that differ, as PNG files of `side` pixels: new ones for each `first`."""
    paths = [folder / f"{first + index}.png" for index in range(number)]
    for index, path in enumerate(paths):
        scene = draw_scene(sample_scene(HELD_OUT + first + index))
        PIL.Image.fromarray(np.asarray(scene)).resize((side, side)).save(path)
    return paths


def base_model(name: str, cache: Path) -> Path:
    """The model's folder: a shape of `SHAPES`, or a copy of a LLaVA whose prompts have a line break after the picture.

    OpenVINO GenAI always writes one there. With it every peer gets the same tokens.
    """
    if name in SHAPES:
        return _once(cache / "models" / name, lambda folder: SHAPES[name](folder))
    source = find(name)
    key = hashlib.sha256(str([(p.name, p.stat().st_size) for p in sorted(source.iterdir())]).encode()).hexdigest()[:8]
    folder = cache / "models" / f"{source.name}-{key}"
    if (folder / TEMPLATE).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    template = (source / TEMPLATE).read_text(encoding="utf-8")
    if "'<image>'" not in template:
        raise ValueError(f"--model was {name!r}: its {TEMPLATE} has no '<image>', which this benchmark changes")
    for path in source.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    (folder / TEMPLATE).write_text(template.replace("'<image>'", "'<image>\\n'"), encoding="utf-8")
    return folder


def model_for(peer: Peer, python: Path, base: Path, quantize: str) -> Path:
    """The folder that the peer reads.

    Raises:
        Unavailable: The peer cannot take the model.
    """
    if peer.name == "llamacpp":
        return gguf(python, base, quantize)
    if peer.name == "vllm":
        return with_old_names(base)
    return export(python, base, quantize) if peer.name == "openvino" else base


def gguf(python: Path, base: Path, quantize: str) -> Path:
    """llama.cpp's files, written by `write_gguf`, and the prompt.

    Raises:
        Unavailable: The model is no Qwen2.5-VL, or cannot be written.
    """
    kind = json.loads((base / "config.json").read_text(encoding="utf-8"))["model_type"]
    if kind != "qwen2_5_vl":
        raise Unavailable(f"it reads GGUF, which this script writes of Qwen2.5-VL alone, and not of {kind}")
    weights = {"none": "f32", "int8": "q8_0"}[quantize]

    def write(folder: Path) -> None:
        command = [str(python), "-m", "demos.bench.peers.write_gguf", str(base), str(folder), weights]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise Unavailable(f"its files cannot be written: {last_words(done.stderr)}")
        (folder / PROMPT).write_text(prompt_of(base), encoding="utf-8")

    return _once(base.with_name(f"{base.name}-gguf-{weights}"), write)


def prompt_of(base: Path) -> str:
    """The model's prompt with PICTURE and QUESTION in their places."""
    words = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    template = (base / TEMPLATE).read_text(encoding="utf-8")
    text = words.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, add_generation_prompt=True, tokenize=False
    )
    return text.replace("<|vision_start|><|image_pad|><|vision_end|>", PICTURE)


def with_old_names(base: Path) -> Path:
    """The model with the names of tower weights that vLLM reads, and transformers before 5.20."""
    files = list(base.glob("*.safetensors"))
    if not any(old_name(name) != name for path in files for name in safe_open(path, "pt").keys()):  # noqa: SIM118
        return base

    def write(folder: Path) -> None:
        shutil.copytree(base, folder)
        for path in folder.glob("*.safetensors"):
            save_file({old_name(name): x for name, x in load_file(path).items()}, path, metadata={"format": "pt"})

    return _once(base.with_name(f"{base.name}-old-names"), write)


def _once(folder: Path, write: Callable[[Path], object]) -> Path:
    """The folder, which `write` makes if it is not there. One that was not finished is made again."""
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        unfinished.rename(folder)
    return folder


def old_name(name: str) -> str:
    """The name of a weight before LLaVA's tower lost a level."""
    before, tower, after = name.partition(TOWER)
    is_new = bool(tower) and not after.startswith("vision_model.")
    return f"{before}{tower}vision_model.{after}" if is_new else name


def export(python: Path, base: Path, quantize: str) -> Path:
    """OpenVINO's files, made by optimum-intel.

    Raises:
        Unavailable: The export failed, or read a model without some of its weights.
    """
    weights = {"none": "fp32", "int8": "int8"}[quantize]
    source = with_old_names(base)

    def write(folder: Path) -> None:
        command = [str(python.with_name("optimum-cli")), "export", "openvino", "--model", str(source)]
        command += ["--task", "image-text-to-text", "--weight-format", weights, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"optimum-intel cannot export it: {last_words(done.stderr)}")
        if "| MISSING" in done.stdout + done.stderr:
            raise Unavailable("optimum-intel reads the model without some of its weights, so it would answer otherwise")
        _with_shortest_edge(folder / "preprocessor_config.json")

    return _once(base.with_name(f"{base.name}-openvino-{weights}"), write)


def _with_shortest_edge(path: Path) -> None:
    """Say the size of square pictures as OpenVINO GenAI reads it: else it enlarges them to its default and crops."""
    config = json.loads(path.read_text(encoding="utf-8"))
    size = config.get("size", {})
    if set(size) == {"height", "width"} and size["height"] == size["width"]:
        path.write_text(json.dumps(config | {"size": {"shortest_edge": size["height"]}}), encoding="utf-8")
