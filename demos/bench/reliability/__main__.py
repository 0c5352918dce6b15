"""Does the server keep what it promises when something goes wrong?

Run python -m demos.bench.reliability [--release] [--only R4 --only R7] [--seed N]

Each check starts servers as users do, breaks something, and measures what clients see. Everything random comes from a
seed that is new for each run and printed, so that a run can be repeated. The CI size takes about ten minutes on two
cores, the release size hours. The table is printed and written to demos/bench/results/reliability-*.md. A promise
without a check says so. The exit code is 1 if a figure missed its goal or a check failed.

A new check is a function with `@check("R8")` in a file of this folder; see `kills.py`. Each yields figures.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import secrets
import time
import traceback
from datetime import date
from pathlib import Path

from demos.bench.machine import facts
from demos.bench.reliability.checks import CHECKS, PROMISES, Check, Figure, Settings

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
HEADER = "| # | promise | figure | measured | goal | verdict |\n|---|---|---|---|---|---|"


def run(function: Check, settings: Settings) -> list[Figure]:
    """The figures of a check. What a check raises is a figure that missed its goal."""
    figures = []
    try:
        figures.extend(function(settings))
    except Exception as error:
        traceback.print_exc()
        what = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        text = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        figures.append(Figure(what=what, value=text, goal="no exception", is_reached=False))
    return figures


def row(name: str, figure: Figure) -> str:
    verdict = ("reached" if figure.is_reached else "**missed**") if figure.goal else "noted"
    cells = (name, PROMISES[name], figure.what, figure.value, figure.goal, verdict)
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--release", action="store_true", help="hours instead of minutes")
    parser.add_argument("--only", action="append", choices=PROMISES, help="repeat for several")
    parser.add_argument("--seed", type=int, help="of an earlier run")
    args = parser.parse_args()
    for module in pkgutil.iter_modules([str(HERE)]):
        if module.name != "__main__":
            importlib.import_module(f"demos.bench.reliability.{module.name}")
    seed = secrets.randbits(32) if args.seed is None else args.seed
    settings = Settings(is_release=args.release, seed=seed)
    chosen = args.only or list(PROMISES)
    print(f"seed {seed}\n{HEADER}", flush=True)
    start, rows, missed = time.monotonic(), [], 0
    for name in chosen:
        for function in CHECKS.get(name, ()):
            figures = run(function, settings)
            missed += sum(not figure.is_reached for figure in figures)
            rows += [row(name, figure) for figure in figures]
            print("\n".join(rows[-len(figures) :]), flush=True)
    without = [name for name in chosen if name not in CHECKS]
    rows += [f"| {name} | {PROMISES[name]} | | | | no check yet |" for name in without]
    print("\n".join(rows[len(rows) - len(without) :]))
    write(rows, settings, time.monotonic() - start, args.only)
    raise SystemExit(1 if missed else 0)


def write(rows: list[str], settings: Settings, seconds: float, only: list[str] | None) -> None:
    machine = facts()
    size = "release" if settings.is_release else "ci"
    part = "-".join(["", *only]).lower() if only else ""
    path = RESULTS / f"reliability-{size}{part}-{machine['cores']}core.md"
    lines = [
        f"# Reliability, {size} size",
        "",
        f"`python -m demos.bench.reliability{' --release' if settings.is_release else ''}"
        f"{''.join(f' --only {name}' for name in only or ())}`, {date.today()}, {seconds / 60:.0f} minutes, "
        f"seed {settings.seed}, commit {machine['commit'][:12]}, {machine['cores']} cores ({machine['cpu']}), "
        f"load average at the end {machine['load_average']}.",
        "",
        HEADER,
        *rows,
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
