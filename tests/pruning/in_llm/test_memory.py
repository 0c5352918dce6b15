"""None of the methods inside the decoder makes a full attention map, at 3,000 visual tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_a_method_takes_far_less_than_one_attention_map():
    """In a process of its own, whose peak is not hidden by that of other tests."""
    run = subprocess.run(
        [sys.executable, "-m", "demos.bench.in_llm_memory"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    record = json.loads(run.stdout.splitlines()[-1])
    none, *methods, whole = record["rows"]
    assert whole["peak_grew_bytes"] > whole["largest_tensor_bytes"] > 300 << 20
    assert {row["method"].partition(":")[0] for row in methods} == {"fastv", "pyramiddrop", "mustdrop"}
    for row in methods:
        assert 0 < row["left"] < record["visual_tokens"], row
        assert row["largest_tensor_bytes"] < 1.1 * none["largest_tensor_bytes"], row
        assert row["peak_grew_bytes"] < whole["largest_tensor_bytes"] / 8, row
