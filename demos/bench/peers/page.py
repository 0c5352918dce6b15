"""The page: ratios with quartiles, what each engine took, and the machine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from demos.bench.peers.rounds import Measured


@dataclass(frozen=True)
class Row:
    """A figure of the table.

    Attributes:
        key: Its name in `Measured`.
        scale: What a figure is multiplied by to be in `unit`.
        is_rate: More is better, so that ratios are turned round.
    """

    key: str
    what: str
    unit: str
    scale: float = 1.0
    is_rate: bool = False


ROWS = (
    Row("first", "first token", "ms", 1e3),
    Row("token", "per token, one request", "ms", 1e3),
    Row("whole", "whole request", "ms", 1e3),
    Row("second", "second question about a picture, first token", "ms", 1e3),
    Row("many", "requests at once", "tokens/s", is_rate=True),
    Row("ready", "start, until loaded", "s"),
    Row("start", "start and first answer", "s"),
    Row("resident", "resident memory after the first answer", "MB"),
)


@dataclass(frozen=True)
class Ratio:
    """Our figure over the peer's, in time: below 1 we are ahead. Quartiles over the rounds."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def quartiles(values: Sequence[float]) -> Ratio:
    """Quartiles of values, with linear interpolation; one value is all three.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("quartiles of no values; measure at least one round")
    if len(values) == 1:
        return Ratio(values[0], values[0], values[0])
    return Ratio(*statistics.quantiles(values, n=4, method="inclusive"))


def ratio(ours: Sequence[float], theirs: Sequence[float], is_rate: bool = False) -> Ratio:
    """Our time over theirs, round by round.

    Raises:
        ValueError: The two were not measured in the same rounds.
    """
    pairs = zip(ours, theirs, strict=True)
    return quartiles([b / a if is_rate else a / b for a, b in pairs])


def best_peer(row: Row, measured: Mapping[str, Measured]) -> str:
    """The peer with the best median; the first of equal ones."""
    medians = {name: statistics.median(one.cpu[row.key]) for name, one in measured.items()}
    return (max if row.is_rate else min)(medians, key=lambda name: medians[name])


def ratio_table(ours: Measured, peers: Mapping[str, Measured]) -> list[str]:
    """Lines of Markdown: ours / peer by processor time, the best peer of each row in bold."""
    lines = [f"| ours / peer | {' | '.join(peers)} |", "|---|" + "---|" * len(peers)]
    for row in ROWS:
        best = best_peer(row, peers)
        cells: list[str] = []
        for name, peer in peers.items():
            text = str(ratio(ours.cpu[row.key], peer.cpu[row.key], row.is_rate))
            cells.append(f"**{text}**" if name == best else text)
        lines.append(f"| {row.what} | {' | '.join(cells)} |")
    return lines


def figure_table(measured: Mapping[str, Measured], clock: str) -> list[str]:
    """Lines of Markdown: each engine's median by one clock, "cpu" or "wall"."""
    rows = [row for row in ROWS if all(row.key in getattr(one, clock) for one in measured.values())]
    lines = [f"| | unit | {' | '.join(measured)} |", "|---|---|" + "---|" * len(measured)]
    for row in rows:
        medians = [row.scale * statistics.median(getattr(one, clock)[row.key]) for one in measured.values()]
        lines.append(f"| {row.what} | {row.unit} | {' | '.join(f'{x:.4g}' for x in medians)} |")
    return lines


def agreement(ours: Measured, name: str, theirs: Measured) -> str:
    """How many greedy answers are the same, and where the first one parts."""
    pairs = list(zip(ours.answers + ours.many, theirs.answers + theirs.many, strict=True))
    equal = sum(a == b for a, b in pairs)
    line = f"{name}: {equal} of {len(pairs)} answers have our tokens"
    for number, (a, b) in enumerate(pairs):
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if at is not None:
            return f"{line}; the first difference is token {at} of answer {number}: ours {a[at]}, theirs {b[at]}"
    return line


def page(title: str, about: Mapping[str, Any], sections: Sequence[str]) -> str:
    """The whole page: what was run and where, then a section for each number of threads."""
    facts = "\n".join(f"- {name}: {value}" for name, value in about.items())
    return f"# {title}\n\n{facts}\n\n" + "\n\n".join(sections) + "\n"


def section(title: str, measured: Mapping[str, Measured], absent: Mapping[str, str], limits: str) -> str:
    """The tables of one number of threads. `absent` says why a peer is missing."""
    ours, peers = measured["ours"], {name: one for name, one in measured.items() if name != "ours"}
    lines = [f"## {title}", "", limits, ""]
    if peers:
        lines += [
            "Ours / peer in processor time (memory in MB; for rates the peer's / ours), so below 1 we are ahead.",
            "Median and quartiles over the rounds, the best peer of a row in bold.",
            "",
            *ratio_table(ours, peers),
            "",
        ]
    lines += ["Medians by processor time:", "", *figure_table(measured, "cpu"), ""]
    lines += ["Medians by wall time, which holds the load of others too:", "", *figure_table(measured, "wall"), ""]
    lines += [f"- {agreement(ours, name, peer)}." for name, peer in peers.items()]
    lines += [f"- {name} is missing: {why}" for name, why in absent.items()]
    return "\n".join(lines).rstrip()
