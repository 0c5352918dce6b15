"""`mm check`: what is said of a folder without its weights."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import mm
from mm.check import check_model
from mm.models.checkpoint import find
from serve.cli.app import app
from tests.helpers.families import write
from tests.parity.test_families import PICTURES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write("qwen3_vl", tmp_path_factory.mktemp("check"))


def test_counts_are_those_of_the_served_model(folder):
    height, width = PICTURES[0].shape[:2]
    found = check_model(folder, height=height, width=width, num_frames=4)
    with mm.load(folder, dtype="float32", num_threads=1) as model:
        usage = model.generate("?", images=[PICTURES[0]], max_new_tokens=1).usage
        tower = sum(
            t.numel() * 4 for name, t in model.encode_parts.encoder.whole.model.named_parameters() if not t.is_meta
        )
    assert found["served"]
    assert found["media"]["image"].startswith(f"{usage.num_visual_tokens_in} visual tokens")
    assert found["memory"]["encoder_bytes"] == tower
    assert found["decoder"]["deepstack_planes"] == 2
    assert found["reducers"]["divprune"] == found["reducers"]["fastv"] == "yes"
    assert found["reducers"]["visionzip"].startswith("no: ")


def test_needs_no_weights_and_says_what_is_wrong(folder, tmp_path):
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    done = CliRunner().invoke(app, ["check", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert done.exit_code == 1
    assert "quantised: no: " in done.output
    assert "gptq" in done.output


def test_a_folder_without_tokenizer_files_is_not_served(folder, tmp_path):
    """transformers makes an empty tokenizer of tokenizer_config.json alone, whose texts hold no placeholder."""
    for path in folder.iterdir():
        if path.suffix != ".safetensors" and path.name != "tokenizer.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    found = check_model(tmp_path)
    assert "tokenizer" in found["media"]
    assert not found["served"]


def test_both_engines_stand_side_by_side(folder):
    """Qwen3-VL has DeepStack and three position axes, which vLLM does not take from embeddings."""
    found = check_model(folder)["engines"]
    assert found["model"]["native"] == "yes"
    assert found["model"]["vllm"].startswith("no: positions in time, height and width")
    assert found["reducer divprune"] == {
        "native": "yes",
        "vllm": "no: leaves tokens whose positions in time, height and width are not those of a whole grid",
    }
    assert found["reducer none"]["vllm"] == "yes"
    assert found["drafter copy"] == {"native": "yes", "vllm": "no: it has its own"}
    shipped = check_model(find("tiny"))["engines"]
    assert shipped["model"]["vllm"].startswith("yes, where vLLM has the architecture")
    assert shipped["reducer divprune"] == {"native": "yes", "vllm": "yes"}
    assert shipped["reducer fastv"]["vllm"] == "no: acts inside the decoder (in_prefill)"
    assert shipped["positions kept"]["vllm"].startswith("no: ")
    lines = CliRunner().invoke(app, ["check", str(find("tiny"))]).output.splitlines()
    header = next(line for line in lines if line.startswith("engines:"))
    row = next(line for line in lines if line.startswith("  reducer fastv"))
    assert header.split() == ["engines:", "native", "vllm"]
    assert row[header.index("vllm") :] == "no: acts inside the decoder (in_prefill)"
