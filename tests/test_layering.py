"""Imports point one way: serve to encoders and pruning, those to mm. Names the line that breaks a rule."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = frozenset({"mm", "pruning", "encoders", "serve", "demos", "tests"})
MAY_IMPORT = {
    "mm": frozenset({"mm"}),
    "pruning": frozenset({"mm", "pruning"}),
    "encoders": frozenset({"mm", "encoders"}),
    "serve": frozenset({"mm", "pruning", "encoders", "serve"}),
}
"""Package to those of ours that it may import."""

ONLY_IN_SERVE = frozenset({"ray", "fastapi", "starlette", "uvicorn", "sse_starlette", "prometheus_client"})
ONLY_TORCH = frozenset({"torch"})


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line number and dotted name of every import, wherever it stands; a relative one counts as "."."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." if node.level else node.module or ""


def broken_rules(package: str, source: str) -> list[str]:
    problems = []
    for line, name in imports(source):
        root = name.split(".")[0]
        if root == "":
            problems.append(f"line {line}: relative import; write it in full")
        elif root in OURS and root not in MAY_IMPORT[package]:
            problems.append(f"line {line}: {package} must not import {name}")
        elif root in ONLY_IN_SERVE and package != "serve":
            problems.append(f"line {line}: only serve knows {root}")
        elif package == "pruning" and _is_third_party(root) and root not in ONLY_TORCH:
            problems.append(f"line {line}: pruning works with torch alone, not with {root}")
    return problems


def _is_third_party(root: str) -> bool:
    return root not in sys.stdlib_module_names and root not in OURS


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no files in {package}"
    problems = [
        f"{path.relative_to(ROOT)}, {problem}"
        for path in files
        for problem in broken_rules(package, path.read_text(encoding="utf-8"))
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("package", "source", "problem"),
    [
        ("mm", "import os\nfrom pruning.base import budget", "line 2: mm must not import pruning.base"),
        ("mm", "def f():\n    import serve.cli.app", "line 2: mm must not import serve.cli.app"),
        ("encoders", "import pruning", "line 1: encoders must not import pruning"),
        ("pruning", "from encoders import cache", "line 1: pruning must not import encoders"),
        ("encoders", "import ray", "line 1: only serve knows ray"),
        ("mm", "from fastapi import FastAPI", "line 1: only serve knows fastapi"),
        ("pruning", "import transformers", "line 1: pruning works with torch alone, not with transformers"),
        ("serve", "from demos.bench import path", "line 1: serve must not import demos.bench"),
        ("mm", "from . import data", "line 1: relative import; write it in full"),
    ],
)
def test_a_broken_rule_is_found(package, source, problem):
    assert broken_rules(package, source) == [problem]


def test_allowed_imports_pass():
    assert broken_rules("serve", "import ray\nfrom fastapi import FastAPI\nimport encoders.cache\nimport mm") == []
    assert broken_rules("pruning", "import torch\nimport math\nfrom mm.data.media import Grid") == []
