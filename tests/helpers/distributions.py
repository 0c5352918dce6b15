"""Distributions as `pip install --target` leaves them: a folder on sys.path with modules and a dist-info."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from mm.plugins.registry import KINDS, PluginKind
from mm.plugins.spec import refresh

EntryPoints = Mapping[PluginKind, Mapping[str, str]]
"""Plugin kind to name to "module:Class"."""


def write_distribution(
    folder: Path, name: str, entry_points: EntryPoints, modules: Mapping[str, str] | None = None
) -> None:
    """Install a distribution to a folder.

    Args:
        modules: File name to source.
    """
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [
        line
        for kind, points in entry_points.items()
        for line in (f"[{KINDS[kind]}]", *(f"{point} = {value}" for point, value in points.items()), "")
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    for file, source in (modules or {}).items():
        (folder / file).write_text(source)


@contextlib.contextmanager
def on_path(*folders: Path) -> Iterator[None]:
    """The distributions of these folders are installed while the block runs. What it imports from them is forgotten."""
    before = set(sys.modules)
    sys.path[:0] = [str(folder) for folder in folders]
    importlib.invalidate_caches()
    refresh()
    try:
        yield
    finally:
        for folder in folders:
            sys.path.remove(str(folder))
        places = tuple(str(folder) for folder in folders)
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(places):
                del sys.modules[name]
        refresh()


@contextlib.contextmanager
def registered(folder: Path, kind: PluginKind, entry_points: Mapping[str, str]) -> Iterator[None]:
    """Names for classes that tests have, while the block runs."""
    write_distribution(folder, "mm-test-plugins", {kind: entry_points})
    with on_path(folder):
        yield
