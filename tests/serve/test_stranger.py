"""A reducer from a wheel of somebody else: built, installed beside us, and used by name like our own."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

MODULE = '''
"""Every third token."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from mm.plugins.reducer import Count, Reduction, Stage


@dataclass(frozen=True, kw_only=True)
class EveryNth:
    """Keep every n-th token (a stranger's)."""

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.PRE_LLM,)
    needs: ClassVar[frozenset[str]] = frozenset()
    query_aware: ClassVar[bool] = False
    count: ClassVar[Count] = "fixed"
    n: int = 3

    def plan(self, num_tokens: int, *_: object) -> int:
        return -(-num_tokens // self.n)

    def after_encode(self, tokens, context) -> Reduction:
        return Reduction(keep=torch.arange(0, tokens.num_tokens, self.n))
'''

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "stranger-reducers"
version = "1.0"

[project.entry-points."mm.reducers"]
everynth = "stranger_reducers:EveryNth"

[tool.setuptools]
py-modules = ["stranger_reducers"]
"""

USE = """
import json, sys
import mm
from mm.plugins.registry import describe

(row,) = [row for row in describe("reducer") if row["name"] == "everynth"]
model = mm.load("tiny", dtype="float32", num_threads=1)
answer = model.generate("What is this?", images=[sys.argv[1]], reducer="everynth:n=4 + fastv", max_new_tokens=2)
kept, num_rows = len(answer.kept[0].kept), answer.usage.num_prompt_tokens
print(json.dumps([row["summary"], row["options"], answer.reducer, kept, num_rows]))
"""

SAMPLE = Path(__file__).parents[2] / "demos/samples/one_of_each.png"


def test_a_stranger_s_wheel_brings_a_reducer(tmp_path):
    project, wheels, site = tmp_path / "project", tmp_path / "wheels", tmp_path / "site"
    project.mkdir()
    (project / "stranger_reducers.py").write_text(MODULE)
    (project / "pyproject.toml").write_text(PROJECT)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    wheels.mkdir()
    subprocess.run([sys.executable, "-c", build, wheels], cwd=project, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:  # what installing a pure wheel comes to
        file.extractall(site)
    assert list(site.glob("*.dist-info/entry_points.txt"))
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({str(site)!r})\n{USE}", SAMPLE],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    summary, options, reducer, kept, num_rows = json.loads(run.stdout.splitlines()[-1])
    assert summary == "Keep every n-th token (a stranger's)."
    assert options == {"n": 3}
    assert reducer.startswith("everynth:n=4 + fastv:")
    assert kept == 32
    assert 64 < num_rows < 256
