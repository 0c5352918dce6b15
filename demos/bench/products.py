"""How much faster are products with a prepacked weight?

    python -m demos.bench.products [--out FILE]

One thread, microseconds of processor time, the best of five medians' worth of calls. The weights are taken in turn from
a dozen, so that none is in the nearest cache. `torch`: `nn.functional.linear`; `packed`: `mm.models.linear`. The limit
is what reading the weight once takes at this machine's bandwidth, or the arithmetic at the rate of a large product.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from demos.bench.machine import facts, product_gflop_per_s, read_gb_per_s
from mm.models.linear import PackedLinear

SHAPES = ((1024, 256), (256, 512), (1536, 576), (576, 1536), (4096, 4096))
ROWS = (1, 2, 5, 16, 64, 256)
NUM_WEIGHTS = 12


def best_us(run: Callable[[int], object], calls: int) -> float:
    times = []
    for _ in range(5):
        start = time.thread_time()
        for i in range(calls):
            run(i % NUM_WEIGHTS)
        times.append(time.thread_time() - start)
    return 1e6 * min(times) / calls


@torch.inference_mode()
def measure(dtype: torch.dtype, num_outputs: int, num_inputs: int, num_rows: int, limits: tuple[float, float]) -> dict:
    weights = [torch.randn(num_outputs, num_inputs).to(dtype) for _ in range(NUM_WEIGHTS)]
    products = [PackedLinear(weight) for weight in weights]
    for product in products:
        product.prepack()
    rows = torch.randn(num_rows, num_inputs).to(dtype)
    calls = max(NUM_WEIGHTS, int(2e9 / (num_outputs * num_inputs * num_rows)) if num_rows > 1 else 200)
    calls = min(calls, 400)
    plain = best_us(lambda i: nn.functional.linear(rows, weights[i]), calls)
    ours = best_us(lambda i: products[i](rows), calls)
    read_us = 1e-3 * weights[0].nbytes / limits[0]
    product_us = 2e-3 * num_outputs * num_inputs * num_rows / limits[1]
    found = {"dtype": str(dtype)[6:], "shape": [num_outputs, num_inputs], "rows": num_rows}
    return found | {"torch_us": plain, "laid_out_us": ours, "limit_us": max(read_us, product_us)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write table and figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines, found = [f"{'dtype':10}{'weight':>12}{'rows':>6}{'torch':>9}{'packed':>10}{'ratio':>8}{'limit':>9}"], []
    for dtype in (torch.float32, torch.bfloat16):
        limits = read_gb_per_s(), product_gflop_per_s(512, 1024, 1024, dtype)
        for shape in SHAPES:
            for num_rows in ROWS:
                row = measure(dtype, *shape, num_rows, limits)
                ratio = row["torch_us"] / row["laid_out_us"]
                lines.append(
                    f"{row['dtype']:10}{'x'.join(map(str, shape)):>12}{num_rows:6}{row['torch_us']:9.0f}"
                    f"{row['laid_out_us']:10.0f}{ratio:7.2f}x{row['limit_us']:9.1f}"
                )
                found.append(row)
                print(lines[-1], flush=True)
    text = "\n".join([*lines, "", json.dumps({"question": "products", "rows": found, "machine": facts()})]) + "\n"
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
