"""What README shows works as it stands: its Python runs, its commands and options exist, its links lead somewhere."""

import base64
import re
import shlex
from pathlib import Path

import pytest

from serve.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_answers(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(blocks("python")[0], "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip()
    assert lines[-1] == "64 of 256 visual tokens"


def test_the_client_example_answers(monkeypatch, capsys):
    import openai
    from fastapi.testclient import TestClient

    from serve.api.routes import create_app
    from serve.config import ServeConfig
    from serve.stages import build_local_runtime

    monkeypatch.chdir(ROOT)
    config = ServeConfig()
    runtime = build_local_runtime(config)
    try:
        with TestClient(create_app(runtime, config), base_url="http://127.0.0.1:8000") as client:
            monkeypatch.setattr(openai, "OpenAI", lambda **options: original(**options, http_client=client))
            exec(compile(blocks("python")[1], "README.md", "exec"), {"data_url": data_url})
    finally:
        runtime.close()
    assert capsys.readouterr().out.strip().endswith(" 64")


def test_the_batch_example_answers(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(blocks("python")[2], "README.md", "exec"), {})
    told = [line for line in capsys.readouterr().out.splitlines() if line.endswith("prompt tokens were cached")]
    assert len(told) == 3


def data_url(path: str) -> str:
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def original(**options):
    from openai._client import OpenAI

    return OpenAI(**options)


def commands() -> list[list[str]]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("mm ")]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_and_options_exist(command):
    known = app.commands[command[1]]
    options = {option for parameter in known.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in command[2:] if word.startswith("--")} <= options


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE))
    assert named == {"serve", "test"}
    assert named <= targets


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []
