"""An environment of its own for each peer, made once in a cache folder from the pins in peers.toml."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

PINS = Path(__file__).parent / "peers.toml"


class Unavailable(Exception):
    """A peer cannot be installed, or cannot take the model. Its text becomes the peer's line in the page."""


@dataclass(frozen=True)
class Peer:
    """What peers.toml says of a peer.

    Attributes:
        packages: Pinned, in pip's form.
        override: Versions that count instead of those that the packages ask for.
    """

    name: str
    what: str
    packages: tuple[str, ...]
    override: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Changes when the pins change."""
        text = json.dumps([sys.version_info[:2], self.packages, self.override])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_peers(path: Path = PINS) -> dict[str, Peer]:
    """All peers by name.

    Raises:
        ValueError: A package is not pinned.
    """
    peers: dict[str, Peer] = {}
    for name, raw in tomllib.loads(path.read_text(encoding="utf-8")).items():
        packages, override = tuple(raw["packages"]), tuple(raw["override"])
        if loose := [package for package in packages + override if "==" not in package]:
            raise ValueError(f"{path.name}: {name} has packages without a version: {', '.join(loose)}; pin them by ==")
        peers[name] = Peer(name, raw["what"], packages, override)
    return peers


def chosen(text: str, peers: dict[str, Peer]) -> list[Peer]:
    """The peers of a list such as "hf,openvino", each once.

    Raises:
        ValueError: A name is unknown, or none is given.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if unknown := [name for name in names if name not in peers]:
        raise ValueError(f"--peers was {text!r}: unknown {', '.join(unknown)}; allowed: {', '.join(peers)}")
    if not names:
        raise ValueError(f"--peers was {text!r}: give at least one of {', '.join(peers)}")
    return [peers[name] for name in names]


def uv() -> str:
    """The path of uv.

    Raises:
        Unavailable: It is not installed.
    """
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.is_file() else shutil.which("uv")
    if found is None:
        raise Unavailable("uv is not installed; pip install uv")
    return found


def environment(peer: Peer, cache: Path) -> Path:
    """The Python of the peer's environment, which is made if there is none with these pins.

    Raises:
        Unavailable: It cannot be made; the text is the last line that uv said.
    """
    folder = cache / "environments" / f"{peer.name}-{peer.key}"
    python, made = folder / "bin" / "python", folder / ".made"
    if made.is_file():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    version = ".".join(map(str, sys.version_info[:2]))
    _uv("venv", "--python", version, str(folder))
    overrides = folder / "overrides.txt"
    overrides.write_text("".join(f"{package}\n" for package in peer.override), encoding="utf-8")
    _uv("pip", "install", "--python", str(python), "--override", str(overrides), *peer.packages)
    made.touch()
    return python


def _uv(*arguments: str) -> None:
    done = subprocess.run([uv(), "--quiet", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"uv {arguments[0]} failed: {last_words(done.stderr)}")


def last_words(text: str, longest: int = 300) -> str:
    """The end of what a program said, in one line."""
    return " ".join(text.split())[-longest:] or "it said nothing"
