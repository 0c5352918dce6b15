"""The command line: instant help, one-line errors, and capabilities that match the registry."""

import json
import socket
import subprocess
import sys

import pytest

import serve.cli.app as app_module
from mm.plugins.registry import KINDS, names

COMMANDS = ["", "serve", "caption", "compare", "eval", "demo", "plugins"]

HELP = """
import sys, time
start = time.process_time()
from serve.cli.app import app
try:
    app(sys.argv[1:] + ["--help"], prog_name="mm")
except SystemExit as exit:
    assert exit.code == 0
heavy = sorted({"torch", "ray", "numpy", "transformers", "gradio", "fastapi", "PIL", "pyarrow"} & set(sys.modules))
print("HEAVY", heavy, file=sys.stderr)
print("CPU", time.process_time() - start, file=sys.stderr)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_brings_in_nothing_heavy(command):
    arguments = [command] if command else []
    run = subprocess.run([sys.executable, "-c", HELP, *arguments], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "HEAVY []" in run.stderr
    assert "Usage: mm" in run.stdout


def test_plugins_lists_all_that_is_registered(monkeypatch, capsys):
    assert run_here(monkeypatch, "plugins", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["kind"], row["name"]) for row in rows} == {(kind, name) for kind in KINDS for name in names(kind)}
    divprune = next(row for row in rows if row["name"] == "divprune")
    assert divprune["stage"] == "pre_llm"
    assert divprune["options"] == {"keep_ratio": 0.25, "joint": False}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "tinny", "--in-process"], "the model 'tinny' does not exist"),
        (["serve", "--in-process", "--reducer", "divprun"], "did you mean 'divprune'"),
        (["serve", "--in-process", "--reducer", "divprune:keep_ratio=2"], "keep_ratio"),
        (["serve", "--in-process", "--video-decoder", "ffmpeg"], "ffmpeg"),
        (["serve", "--in-process", "--dtype", "float8"], "float8"),
        (["serve", "--in-process", "--device", "gpu9"], "gpu9"),
        (["serve", "--in-process", "--kv-cache-gb", "0"], "kv_cache_gb"),
        (["caption", "absent-folder", "--out", "out"], "absent-folder"),
        (["demo", "--url", "localhost"], "http://"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_here(monkeypatch, *arguments) == 1
    told = capsys.readouterr().err.splitlines()
    assert message in "\n".join(told)
    assert not any("Traceback" in line for line in told)


def run_here(monkeypatch, *arguments: str) -> int:
    """The exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["mm", *arguments])
    monkeypatch.setattr(app_module.logging, "basicConfig", lambda **options: None)
    with pytest.raises(SystemExit) as ended:
        app_module.main()
    return int(ended.value.code or 0)


def test_a_taken_port_is_told_before_anything_is_loaded(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert run_here(monkeypatch, "serve", "--in-process", "--port", str(taken.getsockname()[1])) == 1
    assert "choose another" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "caption"])
def test_the_engine_is_bounded_from_the_command_line(command, tmp_path, monkeypatch):
    """What is given arrives in the configuration that the model is built from."""
    made = []

    def caught(**fields):
        made.append(fields)
        raise SystemExit(0)

    monkeypatch.setattr(app_module, "model_config", caught)
    arguments = {"serve": ["--in-process", "--max-waiting", "7"], "caption": [str(tmp_path), "--out", "out"]}[command]
    given = ["--kv-cache-gb", "0.5", "--max-num-seqs", "3", "--max-batch-tokens", "64", "--no-prefix-caching"]
    assert run_here(monkeypatch, command, *arguments, *given, "--dtype", "float32") == 0
    (fields,) = made
    assert fields["kv_cache_gb"] == 0.5
    assert (fields["max_num_seqs"], fields["max_batch_tokens"]) == (3, 64)
    assert (fields["prefix_caching"], fields["dtype"]) == (False, "float32")
    assert fields.get("max_waiting", 7) == 7


@pytest.mark.parametrize("given", [[], ["--lenient-reducers"]])
@pytest.mark.parametrize(("command", "arguments"), [("serve", ["--in-process"]), ("caption", ["."]), ("demo", [])])
def test_every_command_that_answers_takes_lenient_reducers(command, arguments, given, tmp_path, monkeypatch):
    made = []

    def caught(**fields):
        made.append(fields)
        raise SystemExit(0)

    monkeypatch.setattr(app_module, "model_config", caught)
    out = ["--out", str(tmp_path)] if command == "caption" else []
    assert run_here(monkeypatch, command, *arguments, *out, *given) == 0
    assert made[0]["lenient_reducers"] is bool(given)
