"""A file in the form of the public Azure LMM trace, made up, and how long `mm plan` takes for it.

    python -m demos.bench.planning.azure --requests 100000

The columns are TIMESTAMP, NumImages, ContextTokens and GeneratedTokens. The public trace (CC-BY) is not copied here;
what is imitated of it is what "ModServe" (SoCC 2025) says: pictures per request are heavy-tailed, and pictures come in
bursts that have nothing to do with the text traffic.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from demos.bench.planning.published import curves_of_paper
from serve.planning.command import PlanJob, run_plan
from serve.planning.traffic import Shape


def make(path: Path, num: int, rate: float, seed: int = 0) -> None:
    """Write a trace of `num` requests with `rate` requests per second on the mean."""
    rng = np.random.default_rng(seed)
    # Two processes: text at an even pace, and pictures that come in bursts of minutes.
    num_text = num // 2
    text = np.sort(rng.uniform(0, num / rate, num_text))
    gaps = (
        rng.gamma(0.3, 1, num - num_text)
        * np.repeat(rng.lognormal(0, 0.7, (num - num_text) // 200 + 1), 200)[: num - num_text]
    )
    pictures = np.cumsum(gaps) * (num / rate / gaps.sum())
    images = np.concatenate([np.zeros(num_text), np.minimum(16, rng.zipf(2.2, num - num_text))]).astype(int)
    times = np.concatenate([text, pictures])
    order = np.argsort(times)
    context = np.maximum(8, rng.lognormal(6.0, 0.9, num)).astype(int) + images * 640
    generated = np.maximum(1, rng.lognormal(4.2, 0.8, num)).astype(int)
    start = datetime(2024, 10, 15, tzinfo=UTC)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["TIMESTAMP", "NumImages", "ContextTokens", "GeneratedTokens"])
        for i in order:
            at = start + timedelta(seconds=float(times[i]))
            writer.writerow([at.isoformat(" ", "microseconds"), images[i], context[i], generated[i]])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=2.5)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--keep", type=Path, help="write the trace to this file and leave it there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace, curves = args.keep or Path(folder) / "trace.csv", Path(folder) / "curves.json"
        make(trace, args.requests, args.rate)
        curves.write_text(json.dumps(curves_of_paper(front_end_workers=8)))
        begun, processor = time.perf_counter(), time.process_time()
        run_plan(
            PlanJob(gpus=(str(args.gpus),), curves=(str(curves),), trace=trace, shape=Shape(), ttft_s=5.0, tpot_s=0.12)
        )
        wall, processor = time.perf_counter() - begun, time.process_time() - processor
        print(f"{args.requests} requests, {args.gpus} GPUs: {wall:.1f} s, of them {processor:.1f} s of processor time")


if __name__ == "__main__":
    main()
