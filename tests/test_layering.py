"""Imports point one way: between the packages, and between the rooms of `mm`; no file is part of a cycle.

Type-checking imports count like all others. Every failure names the file and the line.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
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

ROOMS = (
    {"errors", "processes"},
    {"settings"},
    {"data"},
    {"config"},
    {"plugins"},
    {"media"},
    {"encode", "models"},
    {"device", "engine"},
    {"vllm"},
    {"batch", "build"},
    {"api", "check"},
    {"__init__"},
)
"""Rooms of `mm`, lowest first. A room imports itself and lower ones; rooms of one set do not import each other."""

BESIDE = {("engine", "encode"), ("encode", "engine"), ("engine", "media"), ("models", "media")}
"""Imports that the order would allow, and that nothing needs: the two halves meet only in `build` and above."""

ONLY_IN_SERVE = frozenset({"ray", "fastapi", "starlette", "uvicorn", "sse_starlette", "prometheus_client"})
ONLY_TORCH = frozenset({"torch"})


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line number and dotted name of every import, wherever it stands; a relative one counts as "."."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." if node.level else node.module or ""


def room_of(module: str) -> str:
    """The room of a module of `mm`: the name after the package."""
    return module.split(".")[1] if "." in module else "__init__"


def broken_rules(module: str, source: str) -> list[str]:
    """What is wrong with the imports of a module."""
    package, problems = module.split(".")[0], []
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
        elif package == "mm" and root == "mm" and not _may_import_room(room_of(module), room_of(name)):
            problems.append(f"line {line}: the room {room_of(module)} must not import {name}")
    return problems


def _may_import_room(room: str, other: str) -> bool:
    rank = {name: i for i, names in enumerate(ROOMS) for name in names}
    if room == other or (other == "__init__" and rank[room] >= rank["batch"]):
        return True
    return rank[other] < rank[room] and (room, other) not in BESIDE


def _is_third_party(root: str) -> bool:
    return root not in sys.stdlib_module_names and root not in OURS


def modules(package: str) -> dict[str, Path]:
    """Dotted name of every module of a package, and its file."""
    files = sorted((ROOT / package).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    found = modules(package)
    assert found, f"no files in {package}"
    problems = [
        f"{path.relative_to(ROOT)}, {problem}"
        for module, path in found.items()
        for problem in broken_rules(module, path.read_text(encoding="utf-8"))
    ]
    assert not problems, "\n".join(problems)


def test_every_room_has_a_rank():
    rooms = {room_of(module) for module in modules("mm")}
    assert rooms == set().union(*ROOMS)


def dependencies(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Module to the modules that it imports, of those in `files` (dotted name to source)."""
    found: dict[str, set[str]] = {}
    for module, source in files.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in files else node.module for name in inner}
        found[module] = (names & files.keys()) - {module}
    return found


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of one cycle, in order; empty when there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if found := visit(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_file_is_part_of_a_cycle(package):
    graph = dependencies({module: path.read_text(encoding="utf-8") for module, path in modules(package).items()})
    assert cycle(graph) == []


def test_a_cycle_is_found_through_a_type_checking_import():
    files = {
        "mm.a": "from mm.b import B",
        "mm.b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mm import c",
        "mm.c": "def f():\n    import mm.a",
        "mm.d": "import mm.a",
    }
    assert cycle(dependencies(files)) == ["mm.a", "mm.b", "mm.c"]
    assert cycle(dependencies({name: source for name, source in files.items() if name != "mm.c"})) == []


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("mm.data.tokens", "import os\nfrom pruning.base import budget", "line 2: mm must not import pruning.base"),
        ("mm.data.tokens", "def f():\n    import serve.cli", "line 2: mm must not import serve.cli"),
        ("encoders.llava", "import pruning", "line 1: encoders must not import pruning"),
        ("pruning.base", "from encoders import cache", "line 1: pruning must not import encoders"),
        ("encoders.llava", "import ray", "line 1: only serve knows ray"),
        ("mm.api", "from fastapi import FastAPI", "line 1: only serve knows fastapi"),
        ("pruning.base", "import transformers", "line 1: pruning works with torch alone, not with transformers"),
        ("serve.stages", "from demos.bench import path", "line 1: serve must not import demos.bench"),
        ("mm.api", "from . import data", "line 1: relative import; write it in full"),
        ("mm.models.layers", "import mm.engine.loop", "line 1: the room models must not import mm.engine.loop"),
        ("mm.engine.loop", "import mm.encode.parts", "line 1: the room engine must not import mm.encode.parts"),
        ("mm.data.media", "from mm.plugins import spec", "line 1: the room data must not import mm.plugins"),
    ],
)
def test_a_broken_rule_is_found(module, source, problem):
    assert broken_rules(module, source) == [problem]


def test_allowed_imports_pass():
    assert (
        broken_rules("serve.stages", "import ray\nfrom fastapi import FastAPI\nimport encoders.llava\nimport mm") == []
    )
    assert broken_rules("pruning.base", "import torch\nimport math\nfrom mm.data.tokens import Grid") == []
    assert broken_rules("mm.engine.loop", "from mm.data.outputs import Event\nimport mm.models.layers") == []
