"""The values of the page's inputs, and the sides of the comparison that they mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from serve.page.choices import ReducerChoice, reducer_spec
from serve.page.request import Question, Turn, Upload


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to answer.

    Attributes:
        reducer: The specification that is sent.
        keep_ratio: Sent beside it; None sends none.
    """

    reducer: str
    keep_ratio: float | None = None

    @property
    def is_full(self) -> bool:
        return self.reducer == "none"

    @property
    def title(self) -> str:
        return "Every token" if self.is_full else self.reducer

    @property
    def detail(self) -> str:
        return "" if self.keep_ratio is None else f"keep {self.keep_ratio:.0%}"


FULL = Side(reducer="none")


@dataclass(frozen=True, kw_only=True)
class Form:
    """The values of the page's inputs, in the order in which Gradio hands them over; the options come last.

    Attributes:
        chosen: Names of reducers as JSON.
        written: Further specifications, one a line.
        options: (reducer, option) to value, of all reducers.
    """

    path: str | None
    question: str
    chosen: str
    written: str
    keep_ratio: float
    drafter: str | None
    num_frames: float
    seed: float | None
    temperature: float
    max_tokens: float
    options: Mapping[tuple[str, str], Any]

    @classmethod
    def of(cls, values: Sequence[object], choices: Sequence[ReducerChoice]) -> Form:
        """From what Gradio hands over: `Inputs.form`."""
        names = [field.name for field in fields(cls) if field.name != "options"]
        form: dict[str, Any] = dict(zip(names, values, strict=False))
        return cls(**form, options=dict(zip(option_keys(choices), values[len(names) :], strict=True)))

    @property
    def names(self) -> list[str]:
        """The chosen reducers."""
        return [str(name) for name in json.loads(self.chosen or "[]")]

    @property
    def specs(self) -> list[str]:
        """Those that were written out."""
        return [line.strip() for line in self.written.splitlines() if line.strip()]

    def sides(self, choices: Sequence[ReducerChoice]) -> tuple[Side, ...]:
        """All tokens first, then each chosen method once, in the order of the page, then what was written out."""
        found = [FULL]
        for name in self.names:
            options = {option: value for (reducer, option), value in self.options.items() if reducer == name}
            spec, keep_ratio = reducer_spec(name, self.keep_ratio, options, choices)
            found.append(Side(reducer=spec, keep_ratio=keep_ratio))
        found += [Side(reducer=spec) for spec in self.specs]
        return tuple(dict.fromkeys(found))

    def asked(self, side: Side, upload: Upload | None, turns: tuple[Turn, ...] = ()) -> Question:
        """The question of one side; all sides' are the same in everything else than the reduction."""
        return Question(
            text=self.question.strip(),
            upload=upload,
            turns=turns,
            reducer=side.reducer,
            keep_ratio=side.keep_ratio,
            drafter=self.drafter or None,
            num_frames=int(self.num_frames),
            seed=int(self.seed or 0),
            temperature=float(self.temperature),
            max_tokens=int(self.max_tokens),
        )


def option_keys(choices: Sequence[ReducerChoice]) -> list[tuple[str, str]]:
    """(reducer, option) of every input for an option, in their order on the page."""
    return [(choice.name, option) for choice in choices for option in choice.other_options]
