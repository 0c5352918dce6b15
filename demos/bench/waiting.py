"""What requests that wait add to a step of those that run.

Run  python -m demos.bench.waiting [--waiting 4000] [--running 8] [--rounds 6]

`--running` sequences decode, which is all that fit. In every other round `--waiting` more requests are in the queue. A
figure is the median processor time of a step; rounds with and without a queue alternate.
"""

from __future__ import annotations

import argparse
import statistics
import time

import mm
from demos.bench.machine import facts
from mm.api import build_request
from mm.data.tokens import EncodedMedia
from mm.engine.loop import OutputQueue

NUM_STEPS = 60


def submit(model: mm.Model, count: int) -> list[OutputQueue]:
    """Requests of one word with a deadline, as a server's have."""
    requests = (
        build_request("Hello", max_new_tokens=NUM_STEPS + 20, temperature=0, ignore_eos=True, timeout_s=3600)
        for _ in range(count)
    )
    return [model.loop.submit(request, EncodedMedia()).queue for request in requests]


def step_times(model: mm.Model, num_running: int, num_waiting: int) -> list[float]:
    """Processor seconds of each of NUM_STEPS decoding steps."""
    submit(model, num_running)
    for _ in range(5):
        model.engine.step()
    submit(model, num_waiting)
    model.engine.step()
    times = []
    for _ in range(NUM_STEPS):
        start = time.thread_time()
        model.engine.step()
        times.append(time.thread_time() - start)
    stats = model.engine.stats
    assert (stats.num_running, stats.num_waiting) == (num_running, num_waiting)
    model.engine.fail_all(mm.errors.EngineError("the round is over"))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, default=4000)
    parser.add_argument("--running", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    model = mm.load("tiny", dtype="float32", num_threads=1, max_num_seqs=args.running, max_waiting=args.waiting + 100)
    step_times(model, args.running, 0)  # warm
    ratios = []
    for _ in range(args.rounds):
        alone, queued = (statistics.median(step_times(model, args.running, n)) for n in (0, args.waiting))
        ratios.append(queued / alone)
        print(f"a step: {alone * 1e3:.2f} ms alone, {queued * 1e3:.2f} ms with {args.waiting} waiting")
    print(f"ratio: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")
    print(facts())


if __name__ == "__main__":
    main()
