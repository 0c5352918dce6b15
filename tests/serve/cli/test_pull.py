"""`mm pull`, against a small hub on this machine that huggingface_hub itself talks to."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

import serve.cli.app as app_module
from mm.models.shipped import SHIPPED

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Repositories below a folder: OWNER/NAME/file."""

    root: Path
    fetched: list[str]

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._describe("/".join(parts[2:4]), is_tree="tree" in parts)
        elif parts[2:3] == ["resolve"]:
            self._send_file(self.root / parts[0] / parts[1] / "/".join(parts[4:]))
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _describe(self, name: str, *, is_tree: bool) -> None:
        folder = self.root / name
        if not folder.is_dir():
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        tree = [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": COMMIT} for path in files]
        info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path.name} for path in files]}
        self._send(json.dumps(tree if is_tree else info).encode(), "application/json")

    def _send_file(self, path: Path) -> None:
        data = path.read_bytes()
        if self.command == "GET":
            self.fetched.append(path.name)
        self._send(data, "application/octet-stream", ETag=hashlib.sha1(data).hexdigest())

    def _send(self, data: bytes, kind: str, **headers: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    handler = type("OneHub", (Hub,), {"root": tmp_path / "hub", "fetched": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def pull(monkeypatch, capsys):
    """Exit code, stdout and stderr of `mm pull`."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mm", "pull", *arguments])
        with pytest.raises(SystemExit) as ended:
            app_module.main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return call


def repository(hub: Hub, name: str) -> Path:
    folder = hub.root / name
    folder.mkdir(parents=True)
    for path in (SHIPPED / "tiny").iterdir():
        if path.suffix in (".json", ".jinja", ".safetensors", ".md"):
            shutil.copy(path, folder)
    return folder


def test_a_model_is_downloaded_once_and_can_be_loaded(hub, pull):
    source = repository(hub, "owner/small")
    code, folder, errors = pull("owner/small")
    assert code == 0
    assert (Path(folder.strip()) / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert "README.md" not in hub.fetched
    assert f"{(source / 'model.safetensors').stat().st_size / 1e9:.2f} GB" in errors
    assert "its decoder 0.01 GB" in errors
    hub.fetched.clear()
    assert pull("owner/small")[:2] == (0, folder)
    assert "0.00 GB are not here yet" in pull("owner/small")[2]
    assert hub.fetched == []


def test_what_cannot_be_served_is_said_before_its_weights_are_fetched(hub, pull):
    folder = repository(hub, "owner/odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    code, shown, errors = pull("owner/odd")
    assert (code, shown) == (1, "")
    assert "unheard_of" in errors
    assert "model.safetensors" not in hub.fetched
    assert pull("owner/odd", "--force")[0] == 0
    assert "model.safetensors" in hub.fetched


def test_a_model_without_safetensors_is_refused_at_once(hub, pull):
    folder = repository(hub, "owner/old")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    code, _, errors = pull("owner/old")
    assert code == 1
    assert "holds no safetensors weights" in errors
    assert hub.fetched == []


def test_a_full_disk_is_noticed_before_anything_is_fetched(hub, pull, monkeypatch):
    repository(hub, "owner/small")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    code, _, errors = pull("owner/small")
    assert code == 1
    assert "free; set HF_HOME" in errors
    assert hub.fetched == []


@pytest.mark.usefixtures("hub")
def test_an_unknown_name_and_a_shipped_model(pull):
    assert "owner/none" in pull("owner/none")[2]
    assert pull("tiny")[1].startswith("tiny needs no download")
