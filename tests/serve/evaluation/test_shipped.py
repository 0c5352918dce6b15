"""The set and the model that ship: the file is sound, and both ways to the model give the same answers."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from pathlib import Path

import pytest
import uvicorn

from demos.train.data.scenes import HELD_OUT
from mm.config import ModelConfig
from serve.api.routes import create_app
from serve.config import ServeConfig
from serve.evaluation.items import choose, held_out_path, read_test_set
from serve.evaluation.local import LocalBackend
from serve.evaluation.remote import RemoteBackend
from serve.evaluation.run import ask_items
from serve.evaluation.scoring import content
from serve.stages import build_local_runtime

BARS = ("exist", "where", "relation", "count", "read", "chart", "caption", "clip-happens", "clip-first")


@pytest.fixture(scope="module")
def shipped():
    return read_test_set()


def test_the_set_is_small_and_covers_what_the_model_is_held_to(shipped):
    assert held_out_path().stat().st_size <= 8_000_000
    media = {item.media_index: item.kind for item in shipped.items}
    kinds = Counter(media.values())
    assert kinds["image"] >= 250
    assert kinds["video"] >= 80
    unseen = Counter(item.task for item in shipped.items if item.wording == "unseen")
    assert all(unseen[task] >= 100 for task in BARS)
    crowded = Counter(i.task for i in shipped.items if i.wording == "unseen" and (i.num_objects or 0) >= 3)
    assert all(crowded[task] >= 100 for task in ("color", "shape", "size"))
    assert {item.wording for item in shipped.items} == {"trained", "unseen"}


def test_every_item_of_the_set_is_whole(shipped):
    by_id = shipped.by_id()
    for item in shipped.items:
        assert item.seed >= HELD_OUT
        assert item.scoring != "content" or content(item.answer)
        assert all(content(other) != content(item.answer) for other in item.accepted if item.scoring == "content")
        assert by_id[item.swap_id].task == item.task
        assert item.media[:3] == b"\xff\xd8\xff" if item.kind == "image" else item.media[4:8] == b"ftyp"


def test_the_readme_reads_the_file_with_pyarrow_alone(shipped, monkeypatch, capsys):
    root = Path(__file__).resolve().parents[3]
    snippet = next(
        b for b in re.findall(r"```python\n(.*?)```", (root / "docs" / "guide.md").read_text(), re.S) if "parquet" in b
    )
    monkeypatch.chdir(root)
    exec(compile(snippet, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].endswith(f"{shipped.items[0].answer} image/jpeg {len(shipped.items[0].media)}")


@pytest.fixture(scope="module")
def few(shipped):
    return choose(shipped, ["color", "read", "clip-happens"], "trained", 3)


@pytest.fixture(scope="module")
def local(few, shipped):
    backend = LocalBackend(ModelConfig(num_threads=1), num_frames=16, max_tokens=64)
    return [ask_items(few, shipped.by_id(), backend, reducer) for reducer in ("none", "uniform:keep_ratio=0.25")]


def test_in_process_and_http_give_the_same_result(few, shipped, local):
    config = ServeConfig(model=ModelConfig(num_threads=1))
    runtime = build_local_runtime(config)
    server = uvicorn.Server(uvicorn.Config(create_app(runtime, config), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        backend = RemoteBackend(f"http://127.0.0.1:{port}", concurrency=2, num_frames=16, max_tokens=64)
        with contextlib.closing(backend):
            over_http = [ask_items(few, shipped.by_id(), backend, c.reducer) for c in local]
    finally:
        server.should_exit = True
        thread.join()
        runtime.close()
    assert over_http == local


def test_tokens_are_counted_and_seeing_helps(few, local):
    assert [column.kept_share for column in local] == [1.0, 0.25]
    assert sum(local[0].right) > sum(map(bool, local[0].swapped_right))
