"""What is left on disk when a job ends before its time, and what the next run makes of it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serve.jobs.conftest import Jobs, read_lines, until
from tests.serve.jobs.fake import NUM_TOGETHER, caption_of

NUM_GOOD, NUM_BROKEN = 27, 3
DELAY_S = 0.01


@pytest.fixture
def texts(fill: Callable[..., None]) -> dict[str, str]:
    made = {f"a{i:02}": f"text {i}" for i in range(NUM_GOOD)} | {
        f"a{7 * i:02}x": f"broken{i}" for i in range(NUM_BROKEN)
    }
    fill(**made)
    return made


def records(out: Path) -> list[dict]:
    return read_lines(out / "captions.jsonl") + read_lines(out / "failures.jsonl")


def log(out: Path) -> list[str]:
    path = Path(f"{out}.log")
    return path.read_text().split("\n")[:-1] if path.exists() else []


def check_complete(out: Path, folder: Path, texts: dict[str, str]) -> None:
    wanted = {str(folder / f"{name}.png") for name, text in texts.items() if not text.startswith("broken")}
    captions = {line["path"]: line["caption"] for line in read_lines(out / "captions.jsonl")}
    assert captions == {path: caption_of(Path(path).read_bytes()) for path in wanted}
    failures = read_lines(out / "failures.jsonl")
    assert [line["code"] for line in failures] == ["media_undecodable"] * NUM_BROKEN
    assert len(records(out)) == NUM_GOOD + NUM_BROKEN, "an item has two records"
    for name in ("captions.jsonl", "failures.jsonl"):
        assert (out / name).read_bytes().endswith(b"\n")


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_five_random_points_every_item_comes_out_once(
    jobs: Jobs, folder: Path, tmp_path: Path, texts: dict[str, str], seed: int
):
    chance = random.Random(seed)
    out = tmp_path / "out"
    num_records = 0
    for point in sorted(chance.sample(range(NUM_GOOD + NUM_BROKEN), 5)):
        pid = jobs.start(folder, out, DELAY_S)
        until(lambda point=point: len(records(out)) >= point)
        time.sleep(chance.uniform(0, 2 * DELAY_S))
        os.kill(pid, signal.SIGKILL)
        assert jobs.wait(pid) == -signal.SIGKILL
        assert len(records(out)) >= num_records, "a record was lost"
        num_records = len(records(out))
    pid = jobs.start(folder, out)
    assert jobs.wait(pid) == 3, Path(f"{out}.said").read_text()
    check_complete(out, folder, texts)
    again = Counter(log(out)).total() - NUM_GOOD
    assert 0 <= again <= 5 * NUM_TOGETHER, "a kill costs the items that were being answered, and no other"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_job_after_the_items_begun(
    jobs: Jobs, folder: Path, tmp_path: Path, texts: dict[str, str], number: int, code: int
):
    out = tmp_path / "out"
    pid = jobs.start(folder, out, DELAY_S)
    until(lambda: len(records(out)) >= 5)
    os.kill(pid, number)
    assert jobs.wait(pid) == code
    said = Path(f"{out}.said").read_text()
    assert "finishing what was begun" in said
    assert "run the same command again to go on" in said
    assert 5 <= len(records(out)) < NUM_GOOD + NUM_BROKEN
    assert len(log(out)) == len(read_lines(out / "captions.jsonl")), "an item was begun and not written"
    assert jobs.wait(jobs.start(folder, out)) == 3
    check_complete(out, folder, texts)
    assert len(log(out)) == NUM_GOOD


def test_a_second_interrupt_ends_it_at_once(jobs: Jobs, folder: Path, tmp_path: Path, texts: dict[str, str]):
    out = tmp_path / "out"
    pid = jobs.start(folder, out, 1.0)
    until(lambda: len(log(out)) >= 1)
    start = time.monotonic()
    os.kill(pid, signal.SIGINT)
    until(lambda: "finishing" in Path(f"{out}.said").read_text())
    os.kill(pid, signal.SIGINT)
    assert jobs.wait(pid) == 130
    assert time.monotonic() - start < 5
    assert "stopped at once" in Path(f"{out}.said").read_text()
    assert jobs.wait(jobs.start(folder, out)) == 3
    check_complete(out, folder, texts)


def test_two_jobs_do_not_share_a_folder(jobs: Jobs, folder: Path, tmp_path: Path, texts: dict[str, str]):
    out = tmp_path / "out"
    first = jobs.start(folder, out, 1.0)  # so slow that the second one starts before it is done
    until(lambda: bool(records(out)))
    second = jobs.start(folder, out, DELAY_S, tmp_path / "second.said")  # which the first does not write to
    assert jobs.wait(second) == 1
    assert "another caption job is writing to" in (tmp_path / "second.said").read_text()
    assert jobs.wait(first) == 3
    check_complete(out, folder, texts)
    assert len(log(out)) == NUM_GOOD
