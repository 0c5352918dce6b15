"""The measurements of docs/reducers.md in one command: what reduction costs and saves, and the page's tables.

    python -m demos.bench.reducer_page [--restart] [--minutes 40] [--jobs 2]      measure, then write the page
    python -m demos.bench.reducer_page --no-measure                               only write the page
    python -m demos.bench.reducer_page --only-plain [--restart] [--minutes 16]    measure tiny_plain alone

`demos.bench.reducers` asks pictures and clips, one after the other or, with `--jobs 2`, at the same time. What was
measured before with the same settings is not measured again, so a stopped run can be continued. `--restart` begins
anew; use it after the model has changed. The most informative rows come first, a tenth of the tokens: when the minutes
are over, the page is made from what was measured.

The defaults take some 40 minutes of one core. 280 questions make an interval of a method's mean over tasks of about
five points either way; these are several times as many. Methods are compared question by question, which gives narrower
intervals of their differences.

Tables and sentences with figures stand between markers of the page and come from files in demos/bench/results alone.
Those of `reducer_load`, `reducer_speed`, `pixelprune` and `tuning` are only read here. Plots are beside the page.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from demos.bench import pixelprune
from demos.bench.method_pages import official_table
from demos.bench.reducer_figures import plot, put_into, report, report_beside
from demos.bench.reducer_load import report_load
from demos.bench.reducer_results import Results
from demos.bench.reducer_speed import report_select
from demos.bench.tuning import report_tuning
from serve.evaluation.items import read_test_set

RESULTS, PAGE = Path("demos/bench/results"), Path("docs/reducers.md")
KINDS = ("image", "video")
MODEL, PLAIN = "tiny", "tiny_plain"
"""What is measured, and its twin that was trained without the loss on attention."""

PLAIN_METHODS = ("none", "divprune", "pyramiddrop", "fastv", "mustdrop", "uniform")
"""Those that rank by the decoder's attention, and what they are compared with."""

PLAIN_RATIOS, PLAIN_SHARE = (0.25, 0.1, 0.05), 0.3
"""Ratios at which the twin is measured, and its share of the minutes."""


def path_of(kind: str, model: str = MODEL) -> Path:
    return RESULTS / f"reducers-{model}-{kind}.jsonl"


def measure(args: argparse.Namespace, model: str) -> None:
    """Runs of both kinds.

    Raises:
        SystemExit: One of them failed.
    """
    share = 1.0 if args.only_plain else PLAIN_SHARE if model == PLAIN else 1 - PLAIN_SHARE
    end = time.monotonic() + 60 * args.minutes * share
    left, running = list(KINDS), list[subprocess.Popen]()
    while left or running:
        while left and len(running) < args.jobs:
            # With one job, each kind has its part of the time that is left.
            minutes = (end - time.monotonic()) / 60 / (len(left) if args.jobs == 1 else 1)
            kind = left.pop(0)
            running.append(subprocess.Popen(command(model, kind, args.limit[KINDS.index(kind)], minutes)))
        if running.pop(0).wait():
            raise SystemExit("a run failed; see above")


def command(model: str, kind: str, limit: int, minutes: float) -> list[str]:
    run = [sys.executable, "-m", "demos.bench.reducers", "--model", model, "--kind", kind]
    run += ["--out", str(path_of(kind, model)), "--limit", str(limit), "--minutes", f"{minutes:.2f}"]
    some = ["--methods", *PLAIN_METHODS, "--ratios", *map(str, PLAIN_RATIOS)]
    return run + some if model == PLAIN else run


def last_record(name: str) -> dict[str, Any]:
    """The JSON of a result whose last line it is."""
    return json.loads((RESULTS / name).read_text().strip().splitlines()[-1])


def write_page(page: Path) -> None:
    items = read_test_set().by_id()
    for kind in KINDS:
        results = Results(path_of(kind), items)
        plot(results, page.parent / f"{results.name}.png")
        put_into(page, results.name, report(results))
        plain = Results(path_of(kind, PLAIN), items)
        put_into(page, plain.name, report_beside(results, plain))
    put_into(page, "official", official_table())
    put_into(page, "tuning-tiny", report_tuning(last_record("tuning-tiny.json")))
    for kind in KINDS:
        put_into(page, f"reducer-load-tiny-{kind}", report_load(last_record(f"reducer-load-tiny-{kind}-2core.txt")))
    pages = last_record("pixelprune-2core.txt")
    put_into(page, "pixelprune", pixelprune.report(pages["rows"], pages["answers"]))
    put_into(page, "reducer-select-256m", report_select(last_record("reducer-select-256m-epyc-2core.txt")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--restart", action="store_true", help="forget what was measured before")
    parser.add_argument("--minutes", type=float, default=40, help="minutes after which no method is started")
    parser.add_argument("--jobs", type=int, default=1, choices=(1, 2), help="processes of one thread each")
    parser.add_argument(
        "--limit", type=int, nargs=2, default=(60, 40), help="pictures' and clips' questions of each task and wording"
    )
    parser.add_argument("--only-plain", action="store_true", help=f"measure {PLAIN} and not {MODEL}")
    parser.add_argument("--no-measure", action="store_true", help="only write the page from the existing files")
    args = parser.parse_args()
    if not args.no_measure:
        for model in (PLAIN,) if args.only_plain else (MODEL, PLAIN):
            if args.restart:
                for kind in KINDS:
                    path_of(kind, model).unlink(missing_ok=True)
            measure(args, model)
    write_page(PAGE)


if __name__ == "__main__":
    main()
