"""Traces of requests: recordings of `mm serve --record-trace`, and the columns of the public Azure LMM trace.

The public trace has TIMESTAMP, NumImages, ContextTokens (text and pictures) and GeneratedTokens; it is described in
"ModServe" (SoCC 2025) and published under CC-BY. It does not say how large pictures are, so they are taken to be of
one size.
"""

from __future__ import annotations

import csv
import gzip
import itertools
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import numpy as np

from mm.errors import nearest, shown
from serve.planning.curves import Picture, PlanError
from serve.planning.traffic import Counts, Traffic

RECORDED = ("timestamp", "prompt_tokens", "images", "patches", "visual_tokens", "output_tokens")
"""Columns of a recording. `visual_tokens` are part of `prompt_tokens`, after reduction. Times are seconds or dates."""
AZURE = ("TIMESTAMP", "NumImages", "ContextTokens", "GeneratedTokens")


def read_trace(path: Path, picture: Picture | None, limit: int | None = None) -> Traffic:
    """The requests of a CSV file, also of a gzipped one, in order of arrival.

    Args:
        picture: Taken for pictures whose size the file does not say.
        limit: Take only the first requests.

    Raises:
        PlanError: Names the file, the line and what is wrong.
    """
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8-sig") as file
        ):
            return _read(file, path, picture, limit)
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, EOFError, csv.Error) as error:
        raise PlanError(f"{path} is no CSV file: {error}") from None


def _read(file: IO[str], path: Path, picture: Picture | None, limit: int | None) -> Traffic:
    lines = csv.reader(file)
    header = [name.strip() for name in next(lines, [])]
    columns = _columns(header, path)
    rows = [row for row in itertools.islice(lines, limit) if row]
    if len(rows) < 2:
        raise PlanError(f"{path} has {len(rows)} request(s); a plan needs at least 2")
    short = next((i for i, row in enumerate(rows) if len(row) != len(header)), None)
    if short is not None:
        raise PlanError(f"{path}, line {short + 2}: {len(rows[short])} values for {len(header)} columns")
    by_name = dict(zip(header, zip(*rows, strict=True), strict=True))
    times = _times(by_name[columns[0]], path)
    counts = {name: _counts(by_name[name], name, path) for name in columns[1:]}
    order = np.argsort(times, kind="stable")
    arrival = times[order] - times[order[0]]
    if arrival[-1] <= 0:
        raise PlanError(f"{path}: all requests have the same {columns[0]}, so there is no rate")
    found = {name: values[order] for name, values in counts.items()}
    return (_recorded if columns is RECORDED else _azure)(arrival, found, picture, path)


def _columns(header: Sequence[str], path: Path) -> tuple[str, ...]:
    """Which of the two forms a file has."""
    form = AZURE if set(header) & set(AZURE) else RECORDED
    if unknown := next((name for name in header if name not in form), None):
        known = f"it has to have {', '.join(RECORDED)}; or {', '.join(AZURE)}"
        raise PlanError(f"{path}: the column {shown(unknown)} is unknown{nearest(unknown, sorted(form))}; {known}")
    if missing := [name for name in form if name not in header]:
        raise PlanError(f"{path}: the column(s) {', '.join(missing)} are missing")
    if len(set(header)) != len(header):
        raise PlanError(f"{path}: a column is there twice: {', '.join(header)}")
    return form


def _times(values: Sequence[str], path: Path) -> np.ndarray:
    """Seconds; of dates since 1970, taken as UTC where they name no zone."""

    def seconds(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            at = datetime.fromisoformat(text.strip())
            return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()

    times = np.empty(len(values))
    for i, text in enumerate(values):
        try:
            times[i] = seconds(text)
        except ValueError:
            times[i] = np.nan
        if not np.isfinite(times[i]):
            raise PlanError(f"{path}, line {i + 2}: {shown(text)} is no time; give seconds, or a date in ISO 8601")
    return times


def _counts(values: Sequence[str], name: str, path: Path) -> Counts:
    least = 1 if name in ("output_tokens", "GeneratedTokens", "prompt_tokens", "ContextTokens") else 0
    for i, value in _wrong(values, least):
        raise PlanError(
            f"{path}, line {i + 2}: {name} is {shown(value)}; it has to be a whole number, at least {least}"
        )
    return np.array([int(float(value)) for value in values], dtype=np.int64)


def _wrong(values: Sequence[str], least: int) -> Iterator[tuple[int, str]]:
    for i, value in enumerate(values):
        try:
            number = float(value)
        except ValueError:
            yield i, value
            continue
        if not (least <= number < 2**53) or number != int(number):
            yield i, value


def _recorded(arrival: np.ndarray, found: dict[str, Counts], _: Picture | None, path: Path) -> Traffic:
    if (found["visual_tokens"] > found["prompt_tokens"]).any():
        raise PlanError(f"{path}: a request has more visual_tokens than prompt_tokens, of which they are part")
    if ((found["images"] > 0) != (found["patches"] > 0)).any():
        raise PlanError(f"{path}: a request has images without patches, or patches without images")
    return Traffic(
        arrival_s=arrival,
        prompt_tokens=found["prompt_tokens"],
        pictures=found["images"],
        patches=found["patches"],
        visual_tokens=found["visual_tokens"],
        output_tokens=found["output_tokens"],
        has_sizes=True,
    )


def _azure(arrival: np.ndarray, found: dict[str, Counts], picture: Picture | None, path: Path) -> Traffic:
    images, context = found["NumImages"], found["ContextTokens"]
    if picture is None and images.any():
        raise PlanError(f"{path} does not say how large pictures are; give --patches and --tokens-per-image")
    patches, tokens = (picture.patches, picture.tokens) if picture else (0, 0)
    visual = images * tokens
    too_many = int((visual > context).sum())
    notes = [f"every picture is taken to have {patches} patches and {tokens} tokens"] if images.any() else []
    if too_many:
        what = f"{too_many} of {len(context)} requests have fewer ContextTokens than their pictures would have"
        notes.append(f"{what}; their prompts are taken to have ContextTokens, all of them visual")
    return Traffic(
        arrival_s=arrival,
        prompt_tokens=context,
        pictures=images,
        patches=images * patches,
        visual_tokens=np.minimum(visual, context),
        output_tokens=found["GeneratedTokens"],
        notes=tuple(notes),
    )
