"""`mm plan` from the command line: the table, the files, what it refuses, and that it starts without torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mm.errors import MmError
from mm.settings import build
from serve.cli.app import app
from serve.cli.options import read_settings
from serve.config import ServeConfig
from serve.planning.curves import Picture, PlanError
from serve.planning.layout import Layout
from serve.planning.policies import Policies
from serve.planning.server_settings import settings_for
from serve.planning.traces import read_trace
from tests.helpers.planning import curves_data, fleet

AZURE = "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n"
RECORDED = "timestamp,prompt_tokens,images,patches,visual_tokens,output_tokens\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("curves.json").write_text(json.dumps(curves_data()))
    return tmp_path


def run(*options: str):
    return CliRunner().invoke(app, ["plan", "--curves", "curves.json", *options], catch_exceptions=False)


def test_a_plan_has_a_table_json_plots_and_settings(folder):
    traffic = ("--gpus", "4", "--rate", "6", "--images", "4", "--output-tokens", "50", "--requests", "300")
    files = ("--json", "plan.json", "--html", "plan.html", "--out", "serve.yaml")
    result = run(*traffic, "--ttft", "2", "--tpot", "0.1", "--price", "3", *files)
    assert result.exit_code == 0, result.output
    found = json.loads(Path("plan.json").read_text())
    names = [one["name"] for one in found["candidates"]]
    assert names[0] == "4 x colocated"
    assert sorted(names[1:]) == ["1E 1P 2D", "1E 2P 1D", "1E 3PD", "2E 1P 1D", "2E 2PD", "3E 1PD"]
    for one in found["candidates"]:
        if one["goodput"]:
            assert one["cost_per_1000_at_goodput"] == pytest.approx(12 / 3.6 / one["goodput"])
        assert one["at_equal_cost"] == one["at_equal_gpus"]
        assert 0 <= one["at_equal_gpus"]["attainment"] <= 1
    assert Path("plan.html").read_text().count("<svg") == 4
    best = max(found["candidates"], key=lambda one: one["goodput"] or 0)
    settings = build(ServeConfig, read_settings(Path("serve.yaml"), ServeConfig), "file")
    assert settings.num_decoders == len(best["decode"])
    assert settings.split == best["split"]
    assert (settings.num_encoders, settings.num_prefills) == (len(best["encode"]) or 1, len(best["prefill"]) or 1)


def test_an_overload_is_said(folder):
    result = run("--gpus", "2", "--rate", "100", "--requests", "300", "--ttft", "1", "--tpot", "1")
    assert "overloaded: its stages cannot do more than" in result.output


def test_two_kinds_of_gpu_are_compared_at_equal_cost(folder):
    only_encodes = {key: value for key, value in curves_data().items() if key not in ("prefill", "decode")}
    Path("small.json").write_text(json.dumps(only_encodes))
    options = ["plan", "--gpus", "big=1", "--gpus", "small=2", "--curves", "big=curves.json", "--curves"]
    options += ["small=small.json", "--price", "big=4", "--price", "small=1", "--rate", "3", "--images", "4"]
    options += ["--requests", "300", "--json", "plan.json", "--ttft", "2", "--tpot", "0.1", "--out", "serve.yaml"]
    result = CliRunner().invoke(app, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(Path("plan.json").read_text())["candidates"]
    assert [one["name"] for one in found] == ["1 x colocated", "2E(small) 1PD(big)"]
    base, split = found
    assert base["at_equal_gpus"]["rate"] == pytest.approx(1.0)  # a third of the GPUs gets a third of the rate
    assert base["at_equal_cost"]["rate"] == pytest.approx(2.0)  # it costs 4 of 6
    assert base["goodput_at_equal_cost"] == pytest.approx(base["goodput"] * 6 / 4)
    assert split["goodput_at_equal_cost"] == pytest.approx(split["goodput"])
    settings = read_settings(Path("serve.yaml"), ServeConfig)
    assert settings["encoder_accelerator_type"] == "small"


def test_a_large_fleet_is_searched(folder):
    result = run(
        "--gpus", "17", "--rate", "20", "--images", "4", "--requests", "200", "--split", "none", "--split", "ep"
    )
    assert "by climbing, not all" in result.output


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--rate", "0"), "rate is 0; it has to be above 0"),
        (("--rate", "-1"), "rate is -1"),
        (("--rate", "nan"), "rate is nan"),
        ((), "say what traffic to plan for"),
        (("--rate", "1", "--burstiness", "0"), "burstiness is 0"),
        (("--rate", "1", "--requests", "1"), "requests is 1"),
        (("--rate", "1", "--images", "-1"), "pictures is -1"),
        (("--rate", "1", "--output-tokens", "0"), "output_tokens is 0"),
        (("--rate", "1", "--keep-ratio", "0"), "keep_ratio is 0"),
        (("--rate", "1", "--ttft", "1"), "give both targets"),
        (("--rate", "1", "--ttft", "0", "--tpot", "1"), "the target ttft_s is 0"),
        (("--rate", "1", "--gpus", "x"), "--gpus has 'x'"),
        (("--rate", "1", "--price", "free"), "--price has 'free'"),
        (("--rate", "1", "--price", "h100=3"), "--price names GPUs of kind 'h100'"),
        (("--rate", "1", "--split", "ep"), "splits need `none`"),
        (("--rate", "1", "--split", "none", "--split", "x"), "split 'x' is unknown"),
        (("--rate", "1", "--transport", "pigeon"), "the transport 'pigeon' is not in the curves"),
        (("--trace", "none.csv"), "none.csv cannot be read"),
        (("--rate", "1", "--json", "no/such/folder"), "no/such/folder cannot be written"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(folder, options, problem):
    gpus = () if "--gpus" in options else ("--gpus", "2")
    with pytest.raises(MmError) as error:
        run(*gpus, *options)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (AZURE.replace("NumImages", "Images") + "1,1,1,1\n", "the column 'Images' is unknown"),
        ("a,b\n1,2\n", "the column 'a' is unknown"),
        ("TIMESTAMP,NumImages,ContextTokens\n1,1,1\n2,1,1\n", "the column(s) GeneratedTokens are missing"),
        (AZURE, "has 0 request(s)"),
        (AZURE + "1,1,200,1\n", "has 1 request(s)"),
        (AZURE + "1,1,200,1\n1,1,200,1\n", "all requests have the same TIMESTAMP"),
        (AZURE + "1,1,200,1\n2,1,200\n", "line 3: 3 values for 4 columns"),
        (AZURE + "1,1,200,1\nyesterday,1,200,1\n", "line 3: 'yesterday' is no time"),
        (AZURE + "1,1,200,1\n2,-1,200,1\n", "line 3: NumImages is '-1'"),
        (AZURE + "1,1,200,1\n2,1.5,200,1\n", "line 3: NumImages is '1.5'"),
        (AZURE + "1,1,200,1\n2,1,200,0\n", "line 3: GeneratedTokens is '0'"),
        (RECORDED + "1,10,1,0,5,1\n2,10,1,1,5,1\n", "images without patches"),
        (RECORDED + "1,10,1,4,11,1\n2,10,1,1,5,1\n", "more visual_tokens than prompt_tokens"),
    ],
)
def test_a_broken_trace_is_refused_by_line(tmp_path, content, problem):
    (tmp_path / "trace.csv").write_text(content)
    with pytest.raises(PlanError) as error:
        read_trace(tmp_path / "trace.csv", Picture(patches=4, tokens=2))
    assert problem in str(error.value)


def test_the_columns_of_the_azure_trace(tmp_path):
    rows = ["2024-10-15 00:00:02.5,2,500,7", "2024-10-15 00:00:00.1234567+00:00,0,20,3", "2024-10-15T00:00:01,9,10,1"]
    (tmp_path / "trace.csv").write_text(AZURE + "\n".join(rows) + "\n")
    found = read_trace(tmp_path / "trace.csv", Picture(patches=64, tokens=16))
    assert found.arrival_s == pytest.approx([0, 0.876544, 2.376544])
    assert found.pictures.tolist() == [0, 9, 2]
    assert found.prompt_tokens.tolist() == [20, 10, 500]
    assert found.visual_tokens.tolist() == [0, 10, 32]
    assert found.patches.tolist() == [0, 576, 128]
    assert "1 of 3 requests have fewer ContextTokens than their pictures would have" in found.notes[1]


def test_the_columns_of_a_recording(tmp_path):
    (tmp_path / "trace.csv").write_text(RECORDED + "100.5,30,1,64,16,9\n101.5,12,0,0,0,4\n")
    found = read_trace(tmp_path / "trace.csv", None)
    assert np.array_equal(found.arrival_s, [0, 1])
    assert (found.patches.tolist(), found.visual_tokens.tolist(), found.output_tokens.tolist()) == (
        [64, 0],
        [16, 0],
        [9, 4],
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"encoder": 1}, "'encoder' is unknown; did you mean"),
        ({"schema": 2}, "schema is 2"),
        ({"encode": None, "decode": None}, "needs prefill and decode together"),
        ({"decode": {"batch": [2, 1], "context": [0], "seconds": [[1], [1]]}}, "decode.batch is [2.0, 1.0]; it has to"),
        ({"decode": {"batch": [1], "context": [0], "seconds": [[-1]]}}, "decode.seconds is -1"),
        ({"decode": {"batch": [1], "context": [0], "seconds": [1, 2]}}, "decode.seconds has to have 1 rows"),
        ({"lanes": 0}, "lanes is 0"),
        ({"engine": {"max_num_seqs": 0}}, "engine.max_num_seqs is 0"),
        ({"picture": {"patches": 4}}, "picture.tokens is None"),
    ],
)
def test_broken_curves_are_refused_by_key(folder, changes, problem):
    Path("curves.json").write_text(json.dumps(curves_data(**changes)))
    with pytest.raises(PlanError) as error:
        run("--gpus", "2", "--rate", "1")
    assert problem in str(error.value)


def test_a_plan_imports_neither_torch_nor_ray(folder):
    code = (
        "import sys; from click.testing import CliRunner; from serve.cli.app import app;"
        "options = 'plan --gpus 2 --curves curves.json --rate 1 --requests 100 --out s.yaml'.split();"
        "r = CliRunner().invoke(app, options);"
        "assert r.exit_code == 0, r.output; assert not {'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=folder, env={"PYTHONPATH": str(Path(__file__).parents[3])}
    )


MADE = ("--gpus", "4", "--rate", "2", "--requests", "50")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--limit", "5", *MADE), "--limit takes the first requests of a trace, and there is no --trace"),
        (("--images", "0", "--keep-ratio", "0.5", *MADE), "--keep-ratio is about pictures, and --images 0"),
        (("--images", "0", "--patches", "5", "--tokens-per-image", "5", *MADE), "--patches is about pictures"),
        (("--images", "0", "--encode-workers", "3", *MADE), "--encode-workers is about pictures"),
        (("--sharding", *MADE), "--sharding shares the pictures of a request out, and each has one"),
        (("--images", "3", "--sharding", "--split", "none", *MADE), "--sharding is about stages that are apart"),
        (("--transport", "object_store", "--split", "none", *MADE), "--transport is about stages that are apart"),
        (("--images", "3", "--sharding", "--out", "s.yaml", *MADE), "--sharding cannot be kept in --out"),
        *(
            (("--gpus", "4", "--trace", "azure.csv", name, value), f"{name} is about made requests, and --trace brings")
            for name, value in {
                "--images": "1",
                "--prompt-tokens": "9",
                "--output-tokens": "9",
                "--requests": "9",
                "--burstiness": "1",
                "--seed": "3",
            }.items()
        ),
        (
            ("--gpus", "4", "--trace", "recorded.csv", "--patches", "5", "--tokens-per-image", "5"),
            "are for pictures of unknown size, and recorded.csv says how large each one is",
        ),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(folder, options: tuple[str, ...], says: str):
    Path("azure.csv").write_text(AZURE + "0,1,200,5\n1,0,20,5\n")
    Path("recorded.csv").write_text(RECORDED + "0,200,1,256,100,5\n1,20,0,0,0,5\n")
    with pytest.raises(PlanError, match=re.escape(says)):
        run(*options)


def test_the_settings_are_those_that_were_measured_and_planned_with(folder):
    about = {"model": "tiny", "device": "cpu", "settings": {"dtype": "float32", "threads": 2, "reducer": "uniform"}}
    Path("curves.json").write_text(json.dumps(curves_data(about=about)))
    result = run(*MADE, "--images", "4", "--ingresses", "2", "--encode-workers", "3", "--out", "serve.yaml")
    assert result.exit_code == 0, result.output
    found = read_settings(Path("serve.yaml"), ServeConfig)
    expected = {"dtype": "float32", "threads": 2, "reducer": "uniform", "ingresses": 2, "encode_workers": 3}
    assert expected.items() <= found.items()
    build(ServeConfig, found, "file")


@pytest.mark.parametrize(
    ("transport", "kept"), [("inline", "inline"), ("object_store", "object_store"), ("nvlink", None), (None, None)]
)
def test_the_transport_is_kept_where_the_server_has_it(transport: str | None, kept: str | None):
    layout = Layout(split="epd", encode=("gpu",), prefill=("gpu",), decode=("gpu",))
    found = settings_for(layout, fleet(3), Policies(transport=transport))
    assert found.get("kv_transport") == kept
