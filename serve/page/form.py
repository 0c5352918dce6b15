"""The values of the page's inputs, and the two questions that they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from serve.page.choices import ReducerChoice, reducer_spec
from serve.page.client import Question, Upload


@dataclass(frozen=True, kw_only=True)
class Form:
    """The values of the page's inputs, in the order in which Gradio hands them over; the options come last.

    Attributes:
        options: Of the chosen reducer, beside its budget.
    """

    path: str | None
    question: str
    reducer: str
    keep_ratio: float
    drafter: str | None
    num_frames: float
    seed: float | None
    temperature: float
    max_tokens: float
    options: Mapping[str, Any]

    @classmethod
    def of(cls, values: Sequence[object], choices: Sequence[ReducerChoice]) -> Form:
        """From what Gradio hands over: `Inputs.form`."""
        names = [field.name for field in fields(cls) if field.name != "options"]
        form: dict[str, Any] = dict(zip(names, values, strict=False))
        given = zip(option_keys(choices), values[len(names) :], strict=True)
        chosen = {option: value for (reducer, option), value in given if reducer == form["reducer"].strip()}
        return cls(**form, options=chosen)

    def questions(self, upload: Upload, choices: Sequence[ReducerChoice]) -> tuple[Question, Question]:
        """The full and the reduced question; the same in everything else."""
        spec, keep_ratio = reducer_spec(self.reducer, self.keep_ratio, self.options, choices)
        full = Question(
            text=self.question.strip(),
            upload=upload,
            drafter=self.drafter or None,
            num_frames=int(self.num_frames),
            seed=int(self.seed or 0),
            temperature=float(self.temperature),
            max_tokens=int(self.max_tokens),
        )
        return full, replace(full, reducer=spec, keep_ratio=keep_ratio)


def option_keys(choices: Sequence[ReducerChoice]) -> list[tuple[str, str]]:
    """(reducer, option) of every input for an option, in their order on the page."""
    return [(choice.name, option) for choice in choices for option in choice.other_options]
