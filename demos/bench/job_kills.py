"""A Parquet job that is killed again and again: `python -m demos.bench.job_kills --way here --rows 5000 --kills 20`.

The table has 3 % rows that are no pictures and 30 % that repeat an earlier picture. `mm run-batch` answers it with the
shipped model in its own process (`here`), in two workers (`workers`), or by a server that the script starts (`url`).
The job gets SIGKILL at random points; with workers, every other kill hits one of these instead, and the job goes on.

A point is a number of rows that have been written, drawn from all rows, and a moment after the first record that comes
then. So every kill hits a job that has written something in this run: never one that still loads its model. A kill
that finds the job done does not count, and with fewer kills than asked the script fails.

After each kill every visible file of the results is read. At the end every row has to be there exactly once, and the
failures have to be the rows that are no pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

BAD_SHARE, EQUAL_SHARE = 0.03, 0.30
MM = [sys.executable, "-c", "from serve.cli.app import main; main()"]
REDUCER = ["--reducer", "uniform:keep_ratio=0.05"]
WAYS = ("here", "workers", "url")
POLL_S, MAX_WAIT_S, START_S = 0.01, 0.5, 300.0


def make_table(path: Path, num_rows: int, chance: random.Random) -> set[int]:
    """Write the table; the ids of the rows that are no pictures."""
    pictures: list[bytes] = []
    data: list[bytes] = []
    bad: set[int] = set()
    for i in range(num_rows):
        if chance.random() < BAD_SHARE:
            bad.add(i)
            data.append(b"no picture, row %d" % i)
        elif pictures and chance.random() < EQUAL_SHARE:
            data.append(chance.choice(pictures))
        else:
            image = Image.new("RGB", (32, 32), tuple(chance.randrange(256) for _ in range(3)))
            ImageDraw.Draw(image).point((chance.randrange(32), chance.randrange(32)), "black")
            file = io.BytesIO()
            image.save(file, "PNG")
            pictures.append(file.getvalue())
            data.append(pictures[-1])
    pq.write_table(pa.table({"id": list(range(num_rows)), "image": data}), path)
    return bad


def check_files(out: Path) -> int:
    """Read every visible file; the number of records in shards."""
    count = 0
    for path in out.glob("*") if out.is_dir() else ():
        if path.suffix == ".parquet":
            count += pq.read_table(path).num_rows
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            for line in path.read_text().splitlines():
                json.loads(line)
    return count


def count_written(out: Path) -> int:
    """Records that a job has kept, in shards or not yet; cheap, while the job runs."""
    with contextlib.suppress(OSError, ValueError):
        in_shards = json.loads((out / "manifest.json").read_bytes())["rows"]
        return in_shards + (out / ".pending.jsonl").read_bytes().count(b'{"record"')
    return 0


@dataclass
class Kills:
    """How often the job and its workers were killed, each time after rows had been written in that run."""

    job: int = 0
    workers: int = 0

    @property
    def total(self) -> int:
        return self.job + self.workers


def workers_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def wait_for(process: subprocess.Popen, out: Path, num_rows: int) -> bool:
    """Wait until so many rows are written; whether the job still runs."""
    while count_written(out) < num_rows:
        if process.poll() is not None:
            return False
        time.sleep(POLL_S)
    return process.poll() is None


def kill_often(command: list[str], out: Path, points: list[int], chance: random.Random, way: str) -> Kills:
    """Run the job and kill it at each of the points, until they are used up or it is done."""
    kills, process, at_start = Kills(), subprocess.Popen(command), 0
    for i, point in enumerate(points):
        if not wait_for(process, out, max(point, at_start + 1)):
            break
        time.sleep(chance.uniform(0, MAX_WAIT_S))
        workers = workers_of(process.pid) if way == "workers" and i % 2 else []
        if process.poll() is not None:
            break
        count = count_written(out)
        assert count > at_start, "a kill before anything was written"
        os.kill(chance.choice(workers) if workers else process.pid, signal.SIGKILL)
        kills.workers += bool(workers)
        kills.job += not workers
        if not workers:
            process.wait()
        at_start = count_written(out)
        whom = "a worker" if workers else "the job"
        print(
            f"kill {i + 1}: {whom}, {at_start} rows written; all files read, {check_files(out)} in shards", flush=True
        )
        if not workers:
            process = subprocess.Popen(command)
    process.wait()
    return kills


@contextlib.contextmanager
def server() -> Iterator[str]:
    """`mm serve` with the shipped model; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*MM, "serve", "tiny", "--in-process", "--port", str(port), *REDUCER]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def check_results(out: Path, num_rows: int, bad: set[int]) -> int:
    """Every row is there once, and the failures are the bad rows. The number of records."""
    ids = [record["id"] for path in out.glob("part-*.parquet") for record in pq.read_table(path).to_pylist()]
    failed = [json.loads(line)["id"] for line in (out / "failures.jsonl").read_text().splitlines()]
    assert sorted(ids + failed) == list(range(num_rows)), "a row is lost or doubled"
    assert set(failed) == bad, f"the failures are not the bad rows: {sorted(set(failed) ^ bad)}"
    return len(ids)


def run_way(way: str, num_rows: int, num_kills: int, seed: int) -> str:
    """One job in one way; what came out."""
    chance, start = random.Random(f"{seed} {way}"), time.monotonic()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        bad, out = make_table(folder / "rows.parquet", num_rows, chance), folder / "out"
        command = [*MM, "run-batch", str(folder / "rows.parquet"), "--to", "parquet", "--out", str(out)]
        command += ["--max-tokens", "4", "--shard-rows", "128", "--quiet"]
        places = {"here": list, "workers": lambda: ["--workers", "2"]}
        command += ["--url", stack.enter_context(server())] if way == "url" else [*REDUCER, *places[way]()]
        points = sorted(chance.randrange(int(num_rows * 0.95)) for _ in range(num_kills))
        kills = kill_often(command, out, points, chance, way)
        code = subprocess.run(command, check=False).returncode
        assert code == (3 if bad else 0), f"the last run ended with exit code {code}"
        check_files(out)
        count = check_results(out, num_rows, bad)
    assert kills.total == num_kills, f"only {kills.total} of {num_kills} kills hit a job that had written rows"
    seconds = time.monotonic() - start
    return (
        f"{way}: {num_rows} rows, {kills.job} kills of the job and {kills.workers} of workers, each after rows were "
        f"written; {count} records, {len(bad)} failures, each row exactly once, failures are the bad rows; "
        f"{seconds:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, action="append", help="repeat it for several; all when not given")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for way in options.way or WAYS:
        print(run_way(way, options.rows, options.kills, options.seed), flush=True)


if __name__ == "__main__":
    main()
