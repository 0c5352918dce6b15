"""A Parquet job that is killed again and again: `python -m demos.bench.job_kills --rows 5000 --kills 20 --seconds 240`.

The table has 3 % rows that are no pictures and 30 % that repeat an earlier picture. `mm run-batch` answers it with the
shipped model in its own process (or with --url elsewhere), and gets SIGKILL at random moments. After each kill every
visible file of the results is read. At the end every row has to be there exactly once, and the failures have to be the
rows that are no pictures. With --seconds the kills end in time for one last run, which --limit rows may make shorter.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

BAD_SHARE, EQUAL_SHARE = 0.03, 0.30
MM = [sys.executable, "-c", "from serve.cli.app import main; main()"]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--url")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, start = random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bad = make_table(folder / "rows.parquet", options.rows, chance)
        out = folder / "out"
        command = [*MM, "run-batch", str(folder / "rows.parquet"), "--to", "parquet", "--out", str(out)]
        command += ["--max-tokens", "4", "--shard-rows", "128", "--quiet"]
        command += ["--url", options.url] if options.url else ["--reducer", "uniform:keep_ratio=0.05"]
        kills = 0
        while kills < options.kills and time.monotonic() - start < options.seconds * 0.7:
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            wait_s = chance.uniform(0.5, options.seconds * 0.7 / options.kills)
            try:
                process.wait(wait_s)
                break
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
            print(f"kill {kills} after {wait_s:.1f} s: {check_files(out)} rows in shards, all files read", flush=True)
        code = subprocess.run(command, check=False).returncode
        count = check_files(out)
        shards = list(out.glob("part-*.parquet"))
        ids = [record["id"] for path in shards for record in pq.read_table(path).to_pylist()]
        failed = [json.loads(line)["id"] for line in (out / "failures.jsonl").read_text().splitlines()]
        assert sorted(ids + failed) == list(range(options.rows)), "a row is lost or doubled"
        assert set(failed) == bad, "the failures are not the bad rows"
        seconds = time.monotonic() - start
        print(
            f"{options.rows} rows, {kills} kills, {seconds:.0f} s: exit code {code}, {count} records, {len(failed)} "
            "failures, each row exactly once, failures are the bad rows"
        )


if __name__ == "__main__":
    main()
