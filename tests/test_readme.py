"""README and guide work as they stand: Python runs as printed, commands and options exist, links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from serve.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs" / "guide.md", ROOT / "docs" / "architecture.md"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


CARDS = sorted((ROOT / "mm" / "models" / "weights").rglob("README.md"))
SNIPPETS = [
    pytest.param(page, code, id=f"{page.stem}-{i}") for page in PAGES for i, code in enumerate(blocks(page, "python"))
]
CARD_SNIPPETS = [
    pytest.param(card, code, id=f"{card.parent.name}-{i}")
    for card in CARDS
    for i, code in enumerate(blocks(card, "python"))
]
EXPECTED = {"README-0": "64 of 256 visual tokens", "guide-0": "prompt tokens were cached", "guide-1": " 64"}
"""How the output of some snippets ends."""


@pytest.fixture
def at_port_8000(monkeypatch):
    """The server that a client of the guide finds at its address, without a socket."""
    import openai
    from fastapi.testclient import TestClient

    from serve.api.routes import create_app
    from serve.config import ServeConfig
    from serve.stages import build_local_runtime

    config = ServeConfig()
    runtime = build_local_runtime(config)
    original = openai.OpenAI
    try:
        with TestClient(create_app(runtime, config), base_url="http://127.0.0.1:8000") as client:
            monkeypatch.setattr(openai, "OpenAI", lambda **options: original(**options, http_client=client))
            yield
    finally:
        runtime.close()


@pytest.mark.parametrize(("page", "code"), SNIPPETS)
def test_python_runs_as_printed_in_an_empty_folder(page, code, request, tmp_path, monkeypatch, capsys):
    if "OpenAI(" in code:
        request.getfixturevalue("at_port_8000")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page.name, "exec"), {})
    written = capsys.readouterr().out
    assert written.strip()
    assert written.rstrip().endswith(EXPECTED.get(request.node.callspec.id, ""))


@pytest.mark.parametrize(("card", "code"), CARD_SNIPPETS)
def test_python_of_a_model_card_runs(card, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(compile(code, card.parent.name, "exec"), found)
    assert found["model"] is not None


def commands() -> list[list[str]]:
    pages = [PAGES[0], *sorted((ROOT / "docs").rglob("*.md"))]
    lines = [
        line.split("#")[0].strip() for page in pages for block in blocks(page, "bash") for line in block.splitlines()
    ]
    return [shlex.split(line) for line in lines if line.startswith("mm ")]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_and_options_exist(command):
    known, rest = app, command[1:]
    while isinstance(known, click.Group):
        known, rest = known.commands[rest[0]], rest[1:]
    options = {option for parameter in known.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in rest if word.startswith("--")} <= options


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"^make (\w+)", PAGES[0].read_text(), flags=re.MULTILINE))
    assert named == {"serve", "test"}
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert links
    assert [link for link in links if not link.startswith("http") and not (page.parent / link).exists()] == []


def test_paths_of_the_architecture_exist():
    """Every path in code marks that begins with a package is there."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    paths = re.findall(r"`((?:mm|serve|pruning|encoders|tests|demos)/[\w/.]+)`", text)
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_docs_build_without_network(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    for page in ("index.html", "guide/index.html", "methods/divprune/index.html", "search/search_index.json"):
        assert (tmp_path / "site" / page).is_file()
    used = re.findall(
        r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', (tmp_path / "site" / "index.html").read_text()
    )
    assert used == [], "a page loads something from elsewhere"
