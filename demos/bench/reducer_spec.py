"""How long does it take to handle the reducer's text of a request?

Run  python -m demos.bench.reducer_spec [--spec "visionzip:keep_ratio=0.25"] [--repeats 2000] [--base FOLDER]

Resolving a reducer is parsing its text, building it, deriving its canonical form and checking it against the encoder
and the server's policy: what each request pays before its media are looked at. The model is `tiny`. The first request
with a text is left out: it imports the plugin.

With `--base`, a checkout of an earlier commit with its own virtual environment in .venv, the same is measured there
in the form that its code has: two calls of `resolve_reducer`, the canonical text, and the text of the part before the
decoder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

BASE = """
import json, statistics, sys, time
from {build} import build_encode_parts
from {config} import ModelConfig
from {request} import VisionOptions
from {policy} import resolve_reducer
from {spec} import canonical_spec, encode_spec

parts = build_encode_parts(ModelConfig(dtype="float32"))
vision = VisionOptions(reducer=sys.argv[1])

def handle():
    encode_spec(resolve_reducer(vision, parts))
    canonical_spec(resolve_reducer(vision, parts))

handle()
found = []
for _ in range(int(sys.argv[2])):
    start = time.perf_counter()
    handle()
    found.append(1e6 * (time.perf_counter() - start))
print(json.dumps(statistics.median(found)))
"""
BASES = [
    {
        "build": "mm.build",
        "config": "mm.config",
        "request": "mm.data.request",
        "policy": "mm.encode.policy",
        "spec": "mm.plugins.spec",
    },
    {
        "build": "mm.api",
        "config": "mm.core.config",
        "request": "mm.core.data",
        "policy": "mm.engine.generate",
        "spec": "mm.core.plugins",
    },
]
"""Where earlier commits have these names; the first that can be imported is taken."""


def median_us(run: Callable[[], object], repeats: int) -> float:
    run()
    found: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(1e6 * (time.perf_counter() - start))
    return statistics.median(found)


def ours(spec: str, repeats: int) -> float:
    from mm.build import build_encode_parts
    from mm.config import ModelConfig
    from mm.data.request import VisionOptions
    from mm.encode.policy import resolve_reducer

    parts = build_encode_parts(ModelConfig(dtype="float32"))
    vision = VisionOptions(reducer=spec)

    def handle() -> tuple[str, str]:
        found = resolve_reducer(vision, parts)
        return found.before_decoder, found.canonical

    return median_us(handle, repeats)


def base(folder: Path, spec: str, repeats: int) -> float:
    for names in BASES:
        command = [folder / ".venv/bin/python", "-c", BASE.format(**names), spec, str(repeats)]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if run.returncode == 0:
            return float(json.loads(run.stdout))
    raise SystemExit(f"{folder}: {run.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", default="visionzip:keep_ratio=0.25")
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--base", type=Path)
    options = parser.parse_args()
    row = {"spec": options.spec, "median_us": round(ours(options.spec, options.repeats), 2)}
    if options.base is not None:
        row["base_median_us"] = round(base(options.base, options.spec, max(20, options.repeats // 20)), 2)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
