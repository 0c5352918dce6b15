"""What a benchmark says about where it ran, and what that machine can do at most, measured in the same run."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers


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


def best_s(run: Callable[[], object], repeats: int = 5) -> float:
    """The fastest of `repeats` runs after one warm-up, in seconds."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def read_gb_per_s(repeats: int = 5) -> float:
    """Memory bandwidth of reading 256 MB."""
    data = torch.ones(64_000_000)
    return 1e-9 * data.nbytes / best_s(lambda: data.sum(), repeats)


def product_gflop_per_s(rows: int, inner: int, columns: int, dtype: torch.dtype = torch.float32) -> float:
    """Rate of one (rows, inner) x (inner, columns) product."""
    left, right = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
    return 2e-9 * rows * inner * columns / best_s(lambda: left @ right)
