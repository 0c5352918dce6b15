"""The command line: instant help, one-line errors, and capabilities that match the registry."""

import json
import logging
import socket
import subprocess
import sys

import click
import httpx
import pytest

from mm.models.shipped import SHIPPED
from mm.plugins.registry import KINDS, names
from mm.settings import settings_of
from serve.cli.app import app, main
from serve.cli.checks import warn_of_limits
from serve.config import ServeConfig
from tests.serve.conftest import free_port

COMMANDS = [
    "",
    "serve",
    "chat",
    "doctor",
    "completion",
    "caption",
    "run-batch",
    "compare",
    "embed",
    "eval",
    "tune",
    "demo",
    "plugins",
]

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
        (["serve", "--in-process", "--dtype", "float8"], "float8"),
        (["serve", "--in-process", "--device", "gpu9"], "gpu9"),
        (["serve", "--in-process", "--kv-cache-gb", "0"], "kv_cache_gb"),
        (["serve", "--in-process", "--encoders", "2"], "'encoders' belongs to Ray"),
        (["serve", "--in-process", "--ray-cpus", "2"], "'ray_cpus' belongs to Ray"),
        (["serve", "--header-timeout-s", "2"], "'header_timeout_s' belongs to --in-process"),
        (["serve", "--allow-host", "http://x"], "without scheme and port"),
        (["demo", "--allow-origin", "example.org"], "https://example.org"),
        (["serve", "--port", "99999"], "0 to 65535"),
        (["serve", "--device", "cuda:7"], "device"),
        (["serve", "./absent"], "'./absent' does not exist"),
        (["serve", "--chat-template", "absent.jinja"], "cannot be read"),
        (["serve", "--kv-cache-gb", "100000"], "GiB are free"),
        (["serve", "--ray-cpus", "0.5"], "the replicas reserve"),
        (["serve", "--decoder-gpus", "64"], "GPUs"),
        (["serve", "--drafter", "coppy"], "did you mean 'copy'"),
        (["serve", "--ui", "--api-key", "x"], "cannot go with API keys"),
        (["serve", "--ui", "--ingresses", "2"], "single HTTP replica"),
        (["caption", "absent-folder", "--out", "out"], "absent-folder"),
        (["demo", "--url", "localhost"], "http://"),
    ],
)
def test_mistakes_are_reported_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_here(monkeypatch, *arguments) == 1
    reported = capsys.readouterr().err.splitlines()
    assert message in "\n".join(reported)
    assert not any("Traceback" in line for line in reported)


EARLY = """
import sys
from serve.cli.app import main
sys.argv = ["mm", *sys.argv[1:]]
try:
    main()
finally:
    print("HEAVY", sorted({"torch", "ray", "numpy", "transformers"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("wrong", [["./absent"], ["--device", "cuda:7"], ["--reducer", "nope"], ["no_template"]])
def test_what_is_wrong_is_said_before_torch_is_imported(wrong, tmp_path):
    folder = tmp_path / "no_template"
    folder.mkdir()
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        (folder / name).symlink_to(SHIPPED / "tiny" / name)
    arguments = [str(folder) if word == "no_template" else word for word in wrong]
    run = subprocess.run(
        [sys.executable, "-c", EARLY, "serve", "--port", "0", *arguments], capture_output=True, text=True, timeout=60
    )
    assert "HEAVY []" in run.stderr
    assert run.stderr.startswith("mm: ")
    assert ("--chat-template FILE" in run.stderr) == (wrong == ["no_template"])


def run_here(monkeypatch, *arguments: str) -> int:
    """The exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["mm", *arguments])
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_every_setting_whose_help_names_ray_is_refused_without_it():
    ray_only = {one.name for one in settings_of(ServeConfig) if one.bounds.ray_only}
    assert ray_only == {one.name for one in settings_of(ServeConfig) if "Ray" in one.bounds.help}


@pytest.mark.parametrize(("model", "says"), [("tiny", True), ("tiny_plain", True), ("owner/tiny", False)])
def test_a_shipped_model_says_what_it_cannot_do(model, says, capsys):
    warn_of_limits(model)
    assert ("photographs" in capsys.readouterr().err) == says


def test_a_shipped_model_is_known_by_its_folder_too(capsys):
    warn_of_limits(str(SHIPPED / "tiny"))
    assert "tiny was trained on drawn shapes" in capsys.readouterr().err


def test_a_taken_port_is_reported_before_anything_is_loaded(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert run_here(monkeypatch, "serve", "--in-process", "--port", str(taken.getsockname()[1])) == 1
    assert "choose another" in capsys.readouterr().err


@pytest.fixture
def configured(monkeypatch):
    """Run a command up to where its model would be loaded; the `ModelConfig` it made."""
    made = []
    monkeypatch.setattr("serve.cli.serve._run", lambda config, in_process: made.append(config.model))
    monkeypatch.setattr("serve.jobs.caption.run_caption", lambda job: made.append(job.model) or 0)
    monkeypatch.setattr("serve.page.launch.run_demo", lambda config: made.append(config.server.model))
    monkeypatch.setattr("serve.page.choices.with_drafters", lambda config: config)

    def call(*arguments: str):
        assert run_here(monkeypatch, *arguments) == 0
        return made.pop()

    return call


@pytest.mark.parametrize("command", ["serve", "caption"])
def test_the_engine_is_bounded_from_the_command_line(command, tmp_path, configured):
    """What is given arrives in the configuration that the model is built from."""
    port = ["--in-process", "--max-waiting", "7", "--port", str(free_port())]
    arguments = {"serve": port, "caption": [str(tmp_path), "--out", str(tmp_path / "out")]}[command]
    given = ["--kv-cache-gb", "0.5", "--max-num-seqs", "3", "--max-batch-tokens", "64", "--no-prefix-caching"]
    config = configured(command, *arguments, *given, "--dtype", "float32")
    assert config.kv_cache_gb == 0.5
    assert (config.max_num_seqs, config.max_batch_tokens) == (3, 64)
    assert (config.prefix_caching, config.dtype) == (False, "float32")
    assert config.max_waiting == (7 if command == "serve" else 256)


@pytest.mark.parametrize("given", [[], ["--lenient-reducers"]])
@pytest.mark.parametrize("command", ["serve", "caption", "demo"])
def test_every_command_that_answers_takes_lenient_reducers(command, given, tmp_path, configured):
    arguments = {
        "serve": ["--in-process", "--port", str(free_port())],
        "caption": [".", "--out", str(tmp_path)],
        "demo": [],
    }[command]
    assert configured(command, *arguments, *given).reducers.on_error == ("keep_all" if given else "fail")


@pytest.mark.parametrize("command", ["", "serve", "caption", "compare", "eval", "tune", "demo", "plugins"])
def test_no_option_that_there_was_is_gone(command):
    """The options of the commands as they were before they were made from the settings."""
    assert set(OPTIONS[command].split()) <= set(options_of(app.commands[command] if command else app))


def options_of(command: click.Command) -> list[str]:
    return [name for one in command.params for name in (*one.opts, *one.secondary_opts)]


MODEL = "--model --device --dtype --frames --fps --threads"
ENGINE = (
    "--reducer --lenient-reducers --kv-cache-gb --max-num-seqs --max-batch-tokens --prefix-caching --no-prefix-caching "
    "--cuda-graphs --no-cuda-graphs --compile --no-compile --drafter --max-draft-tokens"
)
OPTIONS = {
    "": "--version",
    "plugins": "--json",
    "serve": f"{ENGINE} {MODEL.removeprefix('--model')} --host --port --in-process --encoders --decoders "
    "--max-decoders --ingresses --encoder-gpus --decoder-gpus --ray-cpus --allow-reducer --min-keep-ratio "
    "--max-waiting --allow-drafter --served-model-name --allow-media-domain --api-key",
    "caption": f"{ENGINE} {MODEL} --out --prompt --max-tokens --pattern --limit --retry-failed --restart "
    "--quiet --json",
    "compare": f"{MODEL} --prompt --reducer --out --max-tokens --json",
    "eval": "--model --reducer --task --wording --limit --data --control --no-control --suffix --json --answers "
    "--quiet --url --api-key --concurrency --frames --max-tokens --device --dtype --threads",
    "tune": "--budget --search --tolerance --trials --out --task --limit --quiet --frames --max-tokens "
    "--device --dtype --threads",
    "demo": "--url --host --port --model --reducer --lenient-reducers --drafter --allow-drafter --device --dtype "
    "--threads --api-key",
}


def test_plugins_that_a_server_switched_off_are_marked(monkeypatch, capsys):
    off = {"kind": "reducer", "name": "divprune", "reason": "failed in the tower", "retry_in_s": 41.0}
    answer = httpx.Response(200, json={"status": "ok", "plugins_off": [off]})
    asked = []
    monkeypatch.setattr(httpx, "get", lambda url, **options: asked.append(url) or answer)
    assert run_here(monkeypatch, "plugins", "--json", "--url", "http://127.0.0.1:8000/v1/") == 0
    rows = json.loads(capsys.readouterr().out)
    assert asked == ["http://127.0.0.1:8000/health"]
    assert {row["name"]: row["off"] for row in rows if "off" in row} == {
        "divprune": "failed in the tower; tried again in 41 s"
    }
    assert run_here(monkeypatch, "plugins", "--url", "http://127.0.0.1:8000") == 0
    assert "off: failed in the tower" in capsys.readouterr().out


def test_a_server_that_does_not_answer_is_named(monkeypatch, capsys):
    port = free_port()
    assert run_here(monkeypatch, "plugins", "--url", f"http://127.0.0.1:{port}") == 1
    assert f"http://127.0.0.1:{port} does not answer" in capsys.readouterr().err


def test_doctor_says_what_is_missing(monkeypatch, capsys):
    assert run_here(monkeypatch, "doctor", "--json") == 0
    findings = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert findings["packages [models]"]["advice"] == ""
    assert "tiny" in findings["shipped models"]["value"]
    monkeypatch.setattr(
        "serve.cli.doctor.requires", lambda name: ["nowhere>=1; extra == 'x'", 'torch>=99; extra == "models"']
    )
    assert run_here(monkeypatch, "doctor") == 1
    assert "FAIL  packages [models]: torch is" in capsys.readouterr().out


def test_chat_sends_the_pictures_whose_paths_stand_in_the_question(tmp_path, monkeypatch, capsys):
    from serve.cli.chat import content_of, talk

    picture = tmp_path / "a picture.png"
    picture.write_bytes(b"png")
    media, text = content_of(f"What is in '{picture}' and in absent.png?")
    assert media["image_url"]["url"] == "data:image/png;base64,cG5n"
    assert text["text"] == "What is in and in absent.png?"
    assert content_of("what's this")[0]["text"] == "what's this"
    lines = iter(["one", "/clear", "two", "three", "/quit", "four"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    asked = []

    def answer(messages):
        asked.append(len(messages))
        yield from ("an ", "answer")

    talk(answer, shows_prompt=False)
    assert asked == [1, 1, 3]
    assert capsys.readouterr().out.count("an answer") == 3


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell, monkeypatch, capsys):
    assert run_here(monkeypatch, "completion", shell) == 0
    assert "_MM_COMPLETE" in capsys.readouterr().out
