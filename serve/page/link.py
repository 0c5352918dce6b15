"""The page's settings in its address, so that a comparison can be sent as a link.

A file of one's own is not in a link, only its name. What a link says that cannot be followed is named.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from serve.page.choices import DEFAULT_REDUCER, ReducerChoice, written
from serve.page.form import Form, option_keys
from serve.page.samples import Sample

MAX_FRAMES = 32


@dataclass(frozen=True, kw_only=True)
class Range:
    """A number of the form: its name in a link, its default and what it may be."""

    name: str
    default: float
    low: float
    high: float
    is_whole: bool = False

    def read(self, text: str) -> float:
        """Raises: ValueError."""
        value = int(text) if self.is_whole else float(text)
        if not self.low <= value <= self.high:
            raise ValueError(text)
        return value

    @property
    def allowed(self) -> str:
        return f"{'a whole number' if self.is_whole else 'a number'} from {self.low:g} to {self.high:g}"


RANGES = {
    "keep_ratio": Range(name="keep_ratio", default=0.25, low=0.01, high=1),
    "num_frames": Range(name="frames", default=8, low=1, high=MAX_FRAMES, is_whole=True),
    "seed": Range(name="seed", default=0, low=0, high=2**31 - 1, is_whole=True),
    "temperature": Range(name="temperature", default=0, low=0, high=2),
    "max_tokens": Range(name="max_tokens", default=64, low=1, high=512, is_whole=True),
}
"""By the field of `Form`."""


def to_query(form: Form, choices: Sequence[ReducerChoice], samples: Sequence[Sample], drafter: str | None) -> str:
    """The query of an address that opens the page with these settings.

    Args:
        drafter: The default, which a link leaves out.
    """
    name = form.path and form.path.rpartition("/")[2]
    pairs = [("q", form.question.strip())]
    if name:
        pairs.append(("sample" if any(sample.path.name == name for sample in samples) else "file", name))
    pairs += [("method", method) for method in form.names or [""]]
    pairs += [("other", spec) for spec in form.specs]
    for field, numbers in RANGES.items():
        value = getattr(form, field)
        if value is not None and value != numbers.default:
            pairs.append((numbers.name, str(int(value) if value == int(value) else value)))
    if form.drafter and form.drafter != drafter:
        pairs.append(("drafter", form.drafter))
    for choice in choices:
        for option, default in choice.other_options.items():
            value = form.options.get((choice.name, option))
            if choice.name in form.names and written(value) not in ("", written(default)):
                pairs.append((f"{choice.name}.{option}", written(value)))
    return urlencode(pairs)


class LinkReader:
    """Reads the query of an address.

    Attributes:
        problems: What cannot be followed, one sentence each.
        is_answerable: Whether its question is about a sample, so that it can be asked at once.
    """

    def __init__(self, choices: Sequence[ReducerChoice], samples: Sequence[Sample], drafters: Sequence[str]) -> None:
        self._choices, self._samples, self._drafters = choices, samples, drafters
        self.problems: list[str] = []
        self.is_answerable = False

    def read(self, pairs: Sequence[tuple[str, str]]) -> Form:
        """The form; where the address says nothing, the first sample and the defaults."""
        own = [(name, value) for name, value in pairs if not name.startswith("__")]  # Gradio's, such as __theme
        given = dict(own)
        path, question = self._asked(given)
        return Form(
            path=path,
            question=given.get("q", question),
            chosen=json.dumps(self._methods(own)),
            written="\n".join(value for name, value in own if name == "other"),
            drafter=self._drafter(given),
            options=self._options(own),
            **{field: self._number(numbers, given) for field, numbers in RANGES.items()},
        )

    def _asked(self, given: dict[str, str]) -> tuple[str | None, str]:
        if "file" in given:
            self.problems.append(f"It was made with {given['file']}, which is not in it. Choose that file, and ask.")
            return None, ""
        name = given.get("sample")
        found = [sample for sample in self._samples if name is None or sample.path.name == name]
        if not found:
            if name is not None:
                self.problems.append(f"This page has no sample {name!r}.")
            return None, ""
        self.is_answerable = True
        return str(found[0].path), found[0].question

    def _methods(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        names = [choice.name for choice in self._choices]
        asked = [value for name, value in pairs if name == "method"]
        if not any(name == "method" for name, _ in pairs):
            return [DEFAULT_REDUCER] if DEFAULT_REDUCER in names else []
        self.problems += [f"This page has no method {value!r}." for value in asked if value and value not in names]
        return [value for value in asked if value in names]

    def _number(self, numbers: Range, given: dict[str, str]) -> float:
        text = given.get(numbers.name)
        try:
            return numbers.default if text is None else numbers.read(text)
        except ValueError:
            self.problems.append(f"{numbers.name} was {text!r}; it has to be {numbers.allowed}.")
            return numbers.default

    def _drafter(self, given: dict[str, str]) -> str | None:
        name = given.get("drafter")
        if name is not None and name not in self._drafters:
            self.problems.append(f"This server has no drafter {name!r}.")
            name = None
        return name or next(iter(self._drafters), None)

    def _options(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Any]:
        defaults = {(c.name, option): value for c in self._choices for option, value in c.other_options.items()}
        found = {key: value if isinstance(value, bool | int | float) else written(value)
                 for key, value in defaults.items()}  # fmt: skip
        known = {"q", "file", "sample", "method", "other", "drafter", *(numbers.name for numbers in RANGES.values())}
        for name, text in pairs:
            key = (name.partition(".")[0], name.partition(".")[2])
            if name in known:
                continue
            if key not in defaults:
                self.problems.append(f"It has {name!r}, which is no setting of this page.")
                continue
            try:
                found[key] = _value(text, defaults[key])
            except ValueError:
                self.problems.append(f"{name} was {text!r}; it has to be like {written(defaults[key])}.")
        return found


def _value(text: str, default: Any) -> Any:
    """Raises: ValueError."""
    if isinstance(default, bool):
        return {"true": True, "false": False}[text] if text in ("true", "false") else _value(text, 0.5)
    if isinstance(default, int | float):
        return type(default)(text)
    return text


DRAFTER = 5
"""Its place among `values_of`."""


def values_of(form: Form, choices: Sequence[ReducerChoice]) -> list[object]:
    """The values of the inputs, in the order of `Inputs.form`."""
    plain = [form.path, form.question, form.chosen, form.written, form.keep_ratio, form.drafter]
    numbers = [form.num_frames, form.seed, form.temperature, form.max_tokens]
    return [*plain, *numbers, *(form.options[key] for key in option_keys(choices))]
