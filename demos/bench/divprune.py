"""What does DivPrune's selection cost, against the plain loop and against the machine?

Run  python -m demos.bench.divprune [--threads 1] [--repeats 5] [--out FILE]      (five minutes on one core)

Three implementations that choose the same tokens, interleaved in one process, from embeddings to chosen indices. The
times include normalising and the N x N similarities:

    ours         our reducer: half of the symmetric matrix, a running minimum
    plain rows   the authors' loop: the minimum over all rows chosen so far, read again from the full matrix each step
    plain full   the whole matrix read at each step, with the rows not chosen masked (which also writes a masked copy)

`limit` is half a float32 product of N x D by D x N at the rate measured here. The first token needs every pair, and an
implementation that computes every pair once in float32 cannot be faster. At large D the limit bounds all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from demos.bench.machine import facts, product_gflop_per_s, read_gb_per_s
from pruning.pre_llm.divprune import BLOCK_ROWS, pick_order

CASES = [(576, 144, 256), (576, 64, 4096), (2880, 288, 256), (2880, 720, 256), (2880, 288, 4096), (2880, 720, 4096)]
"""(N, k, D): 576 tokens as in LLaVA and 2880 as in LLaVA-NeXT, a tenth or a quarter kept, a small and a 7B width."""

SEED = 0


def full_distances(embeddings: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
    return 1 - unit @ unit.T


def first_token(distances: Tensor) -> Tensor:
    """The farthest nearest neighbour, as published: the second smallest distance of each column."""
    return torch.topk(distances, 2, dim=0, largest=False).values[1].argmax()


def plain_rows(embeddings: Tensor, k: int) -> Tensor:
    distances = full_distances(embeddings)
    chosen = torch.empty(k, dtype=torch.int64)
    chosen[0] = first_token(distances)
    for step in range(1, k):
        chosen[step] = torch.min(distances.index_select(0, chosen[:step]), dim=0).values.argmax()
    return chosen


def plain_full(embeddings: Tensor, k: int) -> Tensor:
    distances = full_distances(embeddings)
    chosen = torch.empty(k, dtype=torch.int64)
    chosen[0] = first_token(distances)
    left_out = torch.ones(len(embeddings), 1, dtype=torch.bool)
    for step in range(1, k):
        left_out[chosen[step - 1]] = False
        chosen[step] = torch.where(left_out, torch.inf, distances).amin(dim=0).argmax()
    return chosen


WAYS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "ours": pick_order,
    "plain rows": plain_rows,
    "plain full": plain_full,
}


def measure(embeddings: Tensor, k: int, repeats: int) -> dict[str, list[float]]:
    """Wall milliseconds of each way; every round runs all of them, so that a slow moment hits all."""
    assert len({tuple(way(embeddings, k).tolist()) for way in WAYS.values()}) == 1, "the ways choose different tokens"
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(repeats):
        for name, way in WAYS.items():
            start = time.perf_counter()
            way(embeddings, k)
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def bench(case: tuple[int, int, int], repeats: int) -> dict:
    num_tokens, k, width = case
    embeddings = torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(SEED))
    times = measure(embeddings, k, repeats)
    medians = {name: statistics.median(values) for name, values in times.items()}
    rate = product_gflop_per_s(num_tokens, width, BLOCK_ROWS)
    return {
        "num_tokens": num_tokens,
        "num_kept": k,
        "width": width,
        "median_ms": {name: round(value, 2) for name, value in medians.items()},
        "min_ms": {name: round(min(values), 2) for name, values in times.items()},
        "product_gflops": round(rate, 1),
        "half_product_ms": round(num_tokens**2 * width / rate * 1e-6, 2),
        "plain_rows_over_ours": round(medians["plain rows"] / medians["ours"], 1),
        "plain_full_over_ours": round(medians["plain full"] / medians["ours"], 1),
    }


def report(rows: list[dict], header: str) -> str:
    lines = [header, ""]
    lines.append(
        f"{'N':>5} {'k':>4} {'D':>5} {'ours':>9} {'plain rows':>11} {'plain full':>11} {'limit':>8}   times ours"
    )
    for row in rows:
        ms = row["median_ms"]
        lines.append(
            f"{row['num_tokens']:>5} {row['num_kept']:>4} {row['width']:>5} {ms['ours']:>6.1f} ms "
            f"{ms['plain rows']:>8.1f} ms {ms['plain full']:>8.1f} ms {row['half_product_ms']:>5.1f} ms   "
            f"{row['plain_rows_over_ours']:.1f} / {row['plain_full_over_ours']:.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    bandwidth = read_gb_per_s(args.repeats)
    load = os.getloadavg()[0]
    rows = [bench(case, args.repeats) for case in CASES]
    header = (
        f"DivPrune selection, {args.threads} thread(s), median of {args.repeats}; memory read {bandwidth:.1f} GB/s; "
        f"load average at the start {load:.1f}"
    )
    result = {
        "question": "divprune",
        "machine": facts(),
        "config": {"threads": args.threads, "repeats": args.repeats, "seed": SEED, "load_average": round(load, 2)},
        "read_gb_per_s": round(bandwidth, 1),
        "cases": rows,
    }
    text = report(rows, header) + "\n\n" + json.dumps(result)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
