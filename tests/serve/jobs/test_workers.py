"""Workers of this machine: rows shared out as workers are free, and none lost with a worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm.config import ModelConfig
from serve.jobs.batch import answering
from serve.jobs.batch.job import BatchJob
from serve.jobs.batch.run import run_batch
from serve.jobs.job import JobError
from tests.serve.jobs import fake_app
from tests.serve.jobs.conftest import until
from tests.serve.jobs.rows_server import answer_of
from tests.serve.jobs.test_batch import failures_of, picture, records_of


@pytest.fixture(autouse=True)
def fake(tmp_path, monkeypatch):
    monkeypatch.setenv(fake_app.LOG, str(tmp_path / "log"))
    monkeypatch.setattr(answering, "application", fake_app.application)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


def run(folder: Path, data: list[bytes], **options) -> int:
    pq.write_table(pa.table({"image": data}), folder / "rows.parquet")
    job = BatchJob(inputs=(str(folder / "rows.parquet"),), out=folder / "out", workers=2, quiet=True, **options)
    return run_batch(job)


def check(out: Path, data: list[bytes], bad: set[int]) -> None:
    """Every row is there once, with its answer, but for the bad ones."""
    found = [(record["id"], record["text"]) for record in records_of(out)]
    assert sorted(found) == [(i, answer_of(content)) for i, content in enumerate(data) if i not in bad]
    assert sorted(failure["id"] for failure in failures_of(out)) == sorted(bad)


def test_workers_share_the_rows_and_a_slow_one_holds_nobody(tmp_path):
    data = [b"\x89PNG wait for 29", *(picture(i) for i in range(29))]
    assert run(tmp_path, data, concurrency=1) == 0
    check(tmp_path / "out", data, set())
    pids = {int(pid) for pid, _ in fake_app.lines()}
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_a_row_that_kills_workers_fails_and_takes_no_other_row_with_it(tmp_path, capsys):
    data = [picture(i) for i in range(24)]
    data[5] = data[17] = b"\x89PNG kill"
    data[9] = b"\x89PNG raise"
    assert run(tmp_path, data, concurrency=8, dedup="none") == 3
    check(tmp_path / "out", data, {5, 9, 17})
    found = {failure["id"]: (failure["code"], failure["attempts"]) for failure in failures_of(tmp_path / "out")}
    assert found == {5: ("worker_died", 2), 17: ("worker_died", 2), 9: ("status_500", 1)}
    assert "was killed by SIGKILL" in capsys.readouterr().err


def test_a_worker_killed_from_outside_loses_no_row(tmp_path):
    data = [b"\x89PNG slow %d" % i for i in range(20)]

    def kill() -> None:
        until(lambda: len(fake_app.lines()) >= 1)
        os.kill(int(fake_app.lines()[0][0]), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert run(tmp_path, data, concurrency=2) == 0
    killer.join()
    check(tmp_path / "out", data, set())
    assert len({pid for pid, _ in fake_app.lines()}) >= 2


@pytest.mark.parametrize(("build", "said"), [("broken", "the model is broken"), ("dying", "ended with exit code 9")])
def test_workers_that_cannot_start_end_the_job_with_the_reason(tmp_path, monkeypatch, capsys, build, said):
    monkeypatch.setattr(answering, "application", getattr(fake_app, build))
    assert run(tmp_path, [picture(0)]) == 1
    assert said in capsys.readouterr().err


def test_a_killed_job_leaves_no_worker_behind(tmp_path):
    pq.write_table(pa.table({"image": [b"\x89PNG slow %d" % i for i in range(2000)]}), tmp_path / "rows.parquet")
    program = (
        "import os, sys; sys.path[0] = os.getcwd(); from pathlib import Path; "
        "from serve.jobs.batch import answering, run; "
        "from tests.serve.jobs import fake_app; answering.application = fake_app.application; "
        "from serve.jobs.batch.job import BatchJob; os.sched_getaffinity = lambda pid: {0, 1}; "
        "run.run_batch(BatchJob(inputs=(sys.argv[1],), out=Path(sys.argv[2]), workers=2, quiet=True, concurrency=1))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "rows.parquet"), str(tmp_path / "out")]
    job = subprocess.Popen(command, cwd=Path(__file__).parents[3])
    try:
        until(lambda: len({pid for pid, _ in fake_app.lines()}) == 2)
    finally:
        job.kill()
        job.wait()
    workers = {int(pid) for pid, _ in fake_app.lines()}
    until(lambda: not any(_runs(pid) for pid in workers))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_bad_numbers_of_workers_and_two_places_at_once_are_refused(tmp_path):
    inputs = {"inputs": ("rows.parquet",), "out": tmp_path}
    for number in (0, -1, 3):
        with pytest.raises(
            JobError, match=rf"workers was {number}; allowed on this machine, which has 2 cores: 1 to 2"
        ):
            BatchJob(workers=number, **inputs)
    with pytest.raises(JobError, match="--url asks a server; leave one of them out"):
        BatchJob(workers=2, url="http://localhost:1", **inputs)
    with pytest.raises(JobError, match="tensor_parallel"):
        BatchJob(workers=2, model=ModelConfig(tensor_parallel=2), **inputs)


def test_workers_share_cores_and_gpus(monkeypatch):
    found = answering.shares(ModelConfig(), 2)
    assert [(one.device, one.num_threads) for one in found] == [("cpu", 1), ("cpu", 1)]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    found = answering.shares(ModelConfig(device="cuda"), 3)
    assert [(one.device, one.gpu_share) for one in found] == [("cuda:0", 0.5), ("cuda:1", 0.5), ("cuda:0", 0.5)]
    assert {(one.device, one.gpu_share) for one in answering.shares(ModelConfig(device="cuda:1"), 4)} == {
        ("cuda:1", 0.25)
    }
