"""Damaged model folders through the command line: one line that says what is wrong, and exit code 1."""

from __future__ import annotations

import json
import logging
import random
import shutil
import sys
from pathlib import Path

import PIL.Image
import pytest

from serve.api.server import _Server
from serve.cli.app import main
from tests.helpers.checkpoints import random_llava
from tests.mm.models.test_damaged_folder import mutated

NUM_MUTATIONS = 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return random_llava(tmp_path_factory.mktemp("whole") / "llava")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command here. Servers end at once."""
    monkeypatch.setattr(_Server, "run", lambda server: None)
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)

    def run_here(*arguments: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["mm", *arguments])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, capsys.readouterr().err.splitlines()

    return run_here


@pytest.fixture(params=["serve", "caption"])
def arguments(request, tmp_path):
    """Of a command that loads a folder."""
    options = ["--kv-cache-gb", "0.01", "--dtype", "float32", "--threads", "1"]
    if request.param == "serve":
        return lambda folder: ["serve", str(folder), "--in-process", "--port", "0", *options]
    PIL.Image.new("RGB", (40, 60), "red").save(tmp_path / "red.png")
    where = [str(tmp_path / "red.png"), "--out", str(tmp_path / "out"), "--restart", "--quiet", "--max-tokens", "1"]
    return lambda folder: ["caption", *where, "--model", str(folder), *options]


def test_mutated_settings_are_used_or_refused_in_one_line(whole, tmp_path, run, arguments):
    rng = random.Random(len(arguments(whole)))
    folder = Path(shutil.copytree(whole, tmp_path / "llava"))
    assert run(*arguments(folder))[0] == 0
    codes, wrong = [], []
    for _ in range(NUM_MUTATIONS):
        file = rng.choice(sorted(path.name for path in folder.glob("*.json")))
        before = (folder / file).read_text()
        (folder / file).write_bytes(mutated(before, rng))
        code, said = run(*arguments(folder))
        (folder / file).write_text(before)
        codes.append(code)
        errors = [line for line in said if "the model folder" in line]
        if code not in (0, 1, 3) or (code == 1 and len(errors) != 1) or any("Traceback" in line for line in said):
            wrong.append((file, code, said))
    assert not wrong
    assert 1 in codes


def test_a_template_that_takes_too_much_is_refused(whole, tmp_path, run, arguments):
    folder = Path(shutil.copytree(whole, tmp_path / "llava"))
    for file in ("tokenizer_config.json", "processor_config.json"):
        if (folder / file).exists():
            found = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps(found | {"chat_template": "{{ 'a' | center(3000000000) }}"}))
    (folder / "chat_template.jinja").write_text("{{ 'a' | center(3000000000) }}")
    code, said = run(*arguments(folder))
    (line,) = [line for line in said if "the model folder" in line]
    assert code == 1
    assert line.startswith("mm")
    assert "the chat template: needed more than 512 MiB of memory" in line
