"""The bounds that keep the code readable: length of files and functions, real types in public signatures."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("mm", "pruning", "encoders", "serve")
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 50
JSON_TYPES = (
    "dict[str, Any]",
    "Mapping[str, Any]",
    "dataclasses.Field[Any]",
    "NDArray[Any]",
    "Coroutine[Any, Any, T]",
    "LoadedDrafter[Any]",
)
"""Where `Any` is meant: JSON, library types that need it, and sessions, which only their drafter knows."""

JSON_VALUES = {
    "serve/api": "request and response bodies",
    "serve/cli": "values of a configuration file",
    "mm/config.py": "values of a configuration file",
    "mm/settings.py": "values of a configuration file",
    "mm/data/sampling_params.py": "defaults of any option",
    "mm/plugins/registry.py": "options of a plugin, which are JSON",
    "serve/page/reply.py": "a response body",
    "serve/deployments/calls.py": "what replicas take and return",
    "serve/deployments/transport.py": "messages of any shape",
}
"""Files whose public functions take or return what comes, whatever it is."""


def files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def functions(tree: ast.AST, is_public: bool = True) -> Iterator[tuple[bool, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function, and whether it is public."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, is_public and not node.name.startswith("_"))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield is_public and (not node.name.startswith("_") or node.name in ("__init__", "__call__")), node
            yield from functions(node, False)
        elif isinstance(node, ast.If | ast.Try):
            yield from functions(node, is_public)


def annotations(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    given = [argument.annotation for argument in every if argument is not None] + [function.returns]
    yield from (ast.unparse(annotation) for annotation in given if annotation is not None)


def names_any(annotation: str) -> bool:
    for allowed in JSON_TYPES:
        annotation = annotation.replace(allowed, "None")
    return any(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(ast.parse(annotation or "None")))


def problems(path: Path, source: str) -> list[str]:
    """What is too long or has no real type."""
    found = []
    if (num_lines := source.count("\n")) > MAX_FILE_LINES:
        found.append(f"{path}: {num_lines} lines; the limit is {MAX_FILE_LINES}")
    takes_json = any(path.as_posix().startswith(prefix) for prefix in JSON_VALUES)
    for is_public, function in functions(ast.parse(source)):
        length = (function.end_lineno or 0) - function.lineno + 1
        if length > MAX_FUNCTION_LINES:
            found.append(f"{path}:{function.lineno}: {function.name} has {length} lines")
        untyped = [annotation for annotation in annotations(function) if names_any(annotation)]
        if is_public and untyped and not takes_json:
            found.append(f"{path}:{function.lineno}: {function.name} has Any in its signature: {untyped[0]}")
    return found


def test_the_packages_keep_the_bounds():
    found = [one for path in files() for one in problems(path.relative_to(ROOT), path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_the_engine_is_short():
    assert len((ROOT / "mm" / "engine" / "engine.py").read_text().splitlines()) < 200


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(x: Any) -> int: ...", "has Any"),
        ("class A:\n    def g(self) -> list[Any]: ...", "has Any"),
        ("def f(x: dict[str, Any]) -> Any | None: ...", "has Any"),
        ("def f():\n" + "    pass\n" * 51, "has 52 lines"),
        ("\n" * 351, "351 lines"),
    ],
)
def test_a_problem_is_found(source, expected):
    assert expected in problems(Path("mm/new.py"), source)[0]


@pytest.mark.parametrize(
    "source",
    ["def f(x: dict[str, Any]) -> int: ...", "def _f(x: Any): ...", "class _A:\n    def g(self, x: Any): ..."],
)
def test_what_is_allowed_passes(source):
    assert problems(Path("mm/new.py"), source) == []
