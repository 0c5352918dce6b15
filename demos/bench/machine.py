"""Where a benchmark ran, and what that machine can do at most, measured in the same run."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from mm.models.linear import PackedLinear


def facts() -> dict:
    """Commit, processor and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "commit": git.stdout.strip() or "unknown",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def wall_s(device: str = "cpu") -> float:
    """Wall time at which the device has finished all its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def best_s(run: Callable[[], object], repeats: int = 5, device: str = "cpu") -> float:
    """The fastest of `repeats` runs after one warm-up, in seconds."""
    times = []
    for _ in range(repeats + 1):
        start = wall_s(device)
        run()
        times.append(wall_s(device) - start)
    return min(times[1:])


def read_gb_per_s(repeats: int = 5, device: str = "cpu") -> float:
    """Memory bandwidth of reading 256 MB, on a GPU 4 GB."""
    data = torch.ones(64_000_000 if device == "cpu" else 1_000_000_000, device=device)
    return 1e-9 * data.nbytes / best_s(lambda: data.sum(), repeats, device)


def product_gflop_per_s(
    rows: int, inner: int, columns: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> float:
    """Rate of one (rows, inner) x (inner, columns) product, with the weight prepacked."""
    left = torch.randn(rows, inner, dtype=dtype, device=device)
    right = PackedLinear(torch.randn(columns, inner, dtype=dtype, device=device))
    right.prepack()
    return 2e-9 * rows * inner * columns / best_s(lambda: right(left), device=device)
