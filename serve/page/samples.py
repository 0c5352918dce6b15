"""Ready-made questions: the pictures and clips of `demos/samples`, where the repository is at hand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

SAMPLES_FOLDER = Path(__file__).parents[2] / "demos" / "samples"
"""Beside the packages in a clone; absent where they were installed from a wheel."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A file, a question about it and the right answer."""

    path: Path
    question: str
    answer: str


def load_samples(folder: Path = SAMPLES_FOLDER) -> tuple[Sample, ...]:
    """The samples listed in the folder's `samples.json`; none when there is no such list."""
    listing = folder / "samples.json"
    if not listing.is_file():
        return ()
    return tuple(
        Sample(path=(folder / row["file"]).resolve(), question=row["question"], answer=row["answer"])
        for row in json.loads(listing.read_text(encoding="utf-8"))
    )
