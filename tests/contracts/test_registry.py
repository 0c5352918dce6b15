"""Every plugin file has its entry point, and every entry point its plugin."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mm.plugins.registry import KINDS, describe, get, names

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "pruning/pixels": "reducer",
    "pruning/before_vit": "reducer",
    "pruning/in_vit": "reducer",
    "pruning/temporal": "reducer",
    "pruning/pre_llm": "reducer",
    "pruning/in_llm": "reducer",
    "encoders/towers": "encoder",
    "mm/engine/drafters": "drafter",
}
"""Folders in which each file is one plugin."""


def plugin_files() -> list[tuple[str, Path]]:
    return [
        (kind, path)
        for folder, kind in FOLDERS.items()
        for path in sorted((ROOT / folder).glob("*.py"))
        if not path.name.startswith("_") and path.name != "base.py"
    ]


@pytest.mark.parametrize(("kind", "path"), plugin_files(), ids=lambda value: getattr(value, "name", value))
def test_every_plugin_file_is_registered(kind, path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    registered = {get(kind, name).__module__ for name in names(kind)}
    assert module in registered, (
        f'{path.relative_to(ROOT)} has no line under [project.entry-points."{KINDS[kind]}"] in pyproject.toml, '
        "or the install is stale: run make install"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_point_loads(kind):
    rows = list(describe(kind))
    assert [row["name"] for row in rows] == names(kind)
    for row in rows:
        assert row["summary"], f"{row['name']} needs a first docstring line: it is what `mm plugins` prints"


@pytest.mark.parametrize("kind", ["reducer", "drafter", "encoder"])
def test_the_installed_names_are_those_of_the_project_file(kind):
    text = (ROOT / "pyproject.toml").read_text()
    _, _, tail = text.partition(f'[project.entry-points."{KINDS[kind]}"]\n')
    declared = dict(line.split(" = ") for line in tail.split("\n\n")[0].splitlines())
    installed = {name: f"{get(kind, name).__module__}:{get(kind, name).__qualname__}" for name in names(kind)}
    ours = {name: target for name, target in installed.items() if target.split(".")[0] in ("pruning", "encoders", "mm")}
    assert ours == {name: ast.literal_eval(target) for name, target in declared.items()}


def test_importing_a_reducer_needs_torch_alone():
    for kind, path in plugin_files():
        if kind == "reducer":
            imported = ast.walk(ast.parse(path.read_text()))
            roots = {node.module.split(".")[0] for node in imported if isinstance(node, ast.ImportFrom) and node.module}
            assert roots <= {"__future__", "collections", "dataclasses", "math", "typing", "torch", "mm", "pruning"}, (
                path
            )
