"""The published figures of encode-prefill-decode disaggregation, simulated from the published curves, with plots.

    python -m demos.bench.planning.published --out docs

The curves are those of one model (MiniCPM-V 2.6, pictures of 4032 x 3024, A100) of the EPD paper (arXiv:2501.05460):
0.45 s of a serial front end per request, 0.44 s per picture in the tower and 0.045 s per picture in prefill, fitted to
its ablation of sharding. A decoder's step takes 0.0205 s plus 0.0032 s per sequence: the paper's 0.025 s of requests
that decode alone, and the 0.12 s of its experiment without role switching. What switching gains is not fitted.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from serve.planning.curves import parse_curves
from serve.planning.figures import goodput
from serve.planning.layout import Fleet, Gpu, Layout
from serve.planning.policies import Policies, Switching
from serve.planning.simulate import Outcome, meets, simulate
from serve.planning.targets import Targets
from serve.planning.traffic import Shape, Traffic, random_traffic

FRONT_END_S, TOWER_S, PREFILL_S = 0.45, 0.44, 0.045
TOKENS = 640
"""Of a picture: ten slices of 64."""
STEP_S, SEQUENCE_S = 0.0205, 0.0032
PAPER_SHARDED = {2: 0.92, 4: 1.02, 6: 1.14, 8: 1.74}
PAPER_WHOLE = {2: 1.46, 4: 2.47, 6: 3.37, 8: 4.27}
"""TTFT in seconds by pictures of a request, with and without sharding, six encoders."""
NOT_PUBLISHED = float("nan")
PAPER_TARGETS = {2: (1.40, 0.04), 4: (2.60, 0.04), 6: (3.90, 0.06), 8: (5.10, 0.06)}
"""TTFT and TPOT in seconds that a request may take, by its pictures."""
PAPER_SWITCH = {"latency": (61.1, 28.0), "tpot": (0.12, 0.05), "ttft": (1.33, 1.42)}
"""Seconds without and with role switching, when answers become ten times as long."""

SHARED = Policies(routing="round_robin", sharding=True, encode_workers=1)
WHOLE = replace(SHARED, sharding=False)
EPD = Layout(split="epd", encode=("gpu",) * 6, prefill=("gpu",), decode=("gpu",))
DISTSERVE = Layout(split="pd", prefill=("gpu",) * 7, decode=("gpu",))
COLOCATED = Layout(split="none", decode=("gpu",) * 8)


def curves_of_paper(front_end_workers: int = 1) -> dict[str, Any]:
    """As `curves.json` has it."""
    return {
        "schema": 1,
        "encode": {"patches": [1], "batch": [0, 1], "seconds": [[0, TOWER_S]]},
        "prefill": {"tokens": [0, TOKENS], "cached": [0], "seconds": [[0], [PREFILL_S]]},
        "decode": {"batch": [0, 1], "context": [0], "seconds": [[STEP_S], [STEP_S + SEQUENCE_S]]},
        "hand_off": {"published": {"bytes": [0], "seconds": [0]}},
        "front_end": {"request_s": FRONT_END_S, "workers": front_end_workers},
        "picture": {"patches": 1, "tokens": TOKENS},
        "engine": {"max_num_seqs": 128, "max_batch_tokens": 49152},
        "about": {"model": "openbmb/MiniCPM-V-2_6", "source": "arXiv:2501.05460"},
    }


def fleet(num: int = 8, front_end_workers: int = 1) -> Fleet:
    curves = parse_curves(curves_of_paper(front_end_workers), "published")
    return Fleet(gpus={"gpu": Gpu(name="gpu", curves=curves)}, counts={"gpu": num})


def asked(pictures: int, rate: float, num: int = 400, output: int = 10, seed: int = 0) -> Traffic:
    """Requests as in the paper: 22 text tokens, 10 output tokens, Poisson arrivals."""
    shape = Shape(pictures=pictures, text_tokens=22, output_tokens=output)
    picture = fleet().gpus["gpu"].curves.picture
    return random_traffic(shape, picture, rate=rate, num_requests=num, seed=seed)


def ttft(layout: Layout, policies: Policies, pictures: int, rate: float = 0.1) -> float:
    """Mean seconds to the first token at a rate at which little waits."""
    return float(simulate(layout, fleet(), asked(pictures, rate), policies).ttft_s.mean())


def goodput_of(layout: Layout, policies: Policies, pictures: int) -> float:
    """Requests per second of which nine in ten keep the paper's targets."""
    targets = Targets(ttft_s=PAPER_TARGETS[pictures][0], tpot_s=PAPER_TARGETS[pictures][1])

    def is_met(rate: float) -> bool:
        return meets(layout, fleet(), asked(pictures, rate), policies, targets, 0.9)

    return goodput(is_met, 0.5, 8.0)


def longer_answers(*, switching: bool) -> Outcome:
    """The workload of the experiment with role switching: 10 requests for 50 tokens, then 90 for 500, 3 per second.

    A serial front end of 0.45 s could not take 3 requests per second, so it has two processes here.
    """
    traffic = asked(1, 3.0, num=100)
    outputs = np.where(np.arange(100) < 10, 50, 500)
    layout = Layout(split="epd", encode=("gpu",) * 5, prefill=("gpu",), decode=("gpu",) * 2)
    policies = replace(SHARED, switching=Switching() if switching else None)
    return simulate(layout, fleet(front_end_workers=2), replace(traffic, output_tokens=outputs), policies)


def plots(folder: Path) -> None:
    """Write the plots of docs/planning.md."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pictures = (1, 2, 4, 6, 8)
    rows = {
        "6E 1P 1D, sharded": [ttft(EPD, SHARED, num) for num in pictures],
        "6E 1P 1D": [ttft(EPD, WHOLE, num) for num in pictures],
        "7EP 1D (DistServe)": [ttft(DISTSERVE, WHOLE, num) for num in pictures],
        "8 x colocated": [ttft(COLOCATED, WHOLE, num) for num in pictures],
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for (name, values), style in zip(rows.items(), ("o-", "s-", "^--", "x:"), strict=True):
        axes[0].plot(pictures, values, style, label=name)
    axes[0].plot(PAPER_SHARDED.keys(), PAPER_SHARDED.values(), "k*", label="published, sharded")
    axes[0].plot(PAPER_WHOLE.keys(), PAPER_WHOLE.values(), "kP", label="published, whole")
    axes[0].set(title="Time to first token", xlabel="pictures per request", ylabel="seconds")
    ratios = [whole / shared for whole, shared in zip(rows["6E 1P 1D"], rows["6E 1P 1D, sharded"], strict=True)]
    axes[1].plot(pictures, ratios, "o-", label="simulated")
    axes[1].plot(
        PAPER_SHARDED.keys(), [PAPER_WHOLE[num] / PAPER_SHARDED[num] for num in PAPER_SHARDED], "k*", label="published"
    )
    axes[1].axhline(1, color="grey", linewidth=0.8)
    axes[1].set(title="Gain of sharding", xlabel="pictures per request", ylabel="times")
    still, switched = longer_answers(switching=False), longer_answers(switching=True)
    places, found = np.arange(2), [float(one.e2e_s.mean()) for one in (still, switched)]
    axes[2].bar(places - 0.2, found, 0.4, label="simulated")
    axes[2].bar(places + 0.2, PAPER_SWITCH["latency"], 0.4, color="k", label="published")
    axes[2].set(title="Answers become ten times as long", ylabel="mean seconds per request")
    axes[2].set_xticks(places, ["5E 1P 2D", "switching roles"])
    for one in axes:
        one.legend(fontsize=8)
    pyplot.rcParams["svg.hashsalt"] = "mm"
    figure.savefig(folder / "planning-published.svg", metadata={"Date": None})


def table() -> str:
    """The same figures as text."""
    lines = [
        f"{'pictures':<10}{'sharded':>9}{'published':>11}{'whole':>8}{'published':>11}{'gain':>7}{'published':>11}"
    ]
    for num in (1, 2, 4, 6, 8):
        shared, whole = ttft(EPD, SHARED, num), ttft(EPD, WHOLE, num)
        paper = (PAPER_SHARDED.get(num, NOT_PUBLISHED), PAPER_WHOLE.get(num, NOT_PUBLISHED))
        lines.append(
            f"{num:<10}{shared:>9.2f}{paper[0]:>11.2f}{whole:>8.2f}{paper[1]:>11.2f}{whole / shared:>6.2f}x"
            f"{paper[1] / paper[0]:>10.2f}x"
        )
    for is_switching in (False, True):
        one = longer_answers(switching=is_switching)
        name = "switching roles" if is_switching else "5E 1P 2D"
        means = [float(values.mean()) for values in (one.e2e_s, one.tpot_s, one.ttft_s)]
        paper_means = [PAPER_SWITCH[key][is_switching] for key in ("latency", "tpot", "ttft")]
        shown = ", ".join(f"{m:.3g} s (published {p:g})" for m, p in zip(means, paper_means, strict=True))
        lines.append(f"{name}: request, TPOT, TTFT: {shown}; {len(one.moves)} moves")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the plots")
    args = parser.parse_args()
    print(table())
    if args.out:
        plots(args.out)


if __name__ == "__main__":
    main()
