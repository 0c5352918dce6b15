"""A link brings back what it was made of, and says what it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest

from serve.page.choices import ReducerChoice
from serve.page.form import Form
from serve.page.link import LinkReader, to_query
from serve.page.samples import Sample

CHOICES = (
    ReducerChoice(name="divprune", options={"keep_ratio": 0.25, "joint": False}),
    ReducerChoice(name="deep", options={"keep_ratio": 0.5, "at_layers": (1, 2), "alpha": 1.0, "count": 3}),
)
SAMPLES = tuple(Sample(path=Path(f"/s/{name}"), question=f"What is {name}?", answer="x") for name in ("a.png", "b.png"))
DEFAULTS: dict[tuple[str, str], Any] = {
    ("divprune", "joint"): False,
    ("deep", "at_layers"): "[1,2]",
    ("deep", "alpha"): 1.0,
    ("deep", "count"): 3,
}
FORM: dict[str, Any] = {
    "path": "/s/b.png",
    "question": "And & this = é?",
    "chosen": '["divprune", "deep"]',
    "written": "a:keep_ratio=0.5 + b\nc",
    "keep_ratio": 0.4,
    "drafter": "copy",
    "num_frames": 12,
    "seed": 123_456_789,
    "temperature": 0.5,
    "max_tokens": 9,
    "options": DEFAULTS | {("divprune", "joint"): True, ("deep", "at_layers"): "[3]", ("deep", "count"): 4},
}


def read(query: str) -> tuple[Form, LinkReader]:
    reader = LinkReader(CHOICES, SAMPLES, ("flash", "copy"))
    return reader.read(parse_qsl(query, keep_blank_values=True)), reader


@pytest.mark.parametrize(
    "changes", [{}, {"chosen": "[]", "written": "", "options": DEFAULTS}, {"drafter": "flash", "options": DEFAULTS}]
)
def test_a_link_brings_every_setting_back(changes: dict[str, Any]) -> None:
    form = Form(**FORM | changes)
    back, reader = read(to_query(form, CHOICES, SAMPLES, "flash"))
    assert back == form
    assert (reader.problems, reader.is_answerable) == ([], True)


def test_a_page_without_a_link_asks_about_the_first_sample() -> None:
    form, reader = read("__theme=dark")
    assert (form.path, form.question, json.loads(form.chosen)) == ("/s/a.png", "What is a.png?", ["divprune"])
    assert (form.keep_ratio, form.num_frames, form.drafter, dict(form.options)) == (0.25, 8, "flash", DEFAULTS)
    assert (reader.problems, reader.is_answerable) == ([], True)


def test_a_file_of_ones_own_is_asked_for() -> None:
    query = to_query(Form(**FORM | {"path": "/tmp/x/own.png"}), CHOICES, SAMPLES, "flash")
    form, reader = read(query)
    assert (form.path, form.question, reader.is_answerable) == (None, FORM["question"], False)
    assert reader.problems == ["It was made with own.png, which is not in it. Choose that file, and ask."]


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("keep_ratio=7", "keep_ratio was '7'; it has to be a number from 0.01 to 1."),
        ("keep_ratio=nan", "keep_ratio was 'nan'"),
        ("frames=2.5", "frames was '2.5'; it has to be a whole number from 1 to 32."),
        ("method=nonesuch", "This page has no method 'nonesuch'."),
        ("sample=c.png", "This page has no sample 'c.png'."),
        ("drafter=x", "This server has no drafter 'x'."),
        ("colour=red", "It has 'colour', which is no setting of this page."),
        ("deep.beta=1", "It has 'deep.beta', which is no setting"),
        ("deep.count=x", "deep.count was 'x'; it has to be like 3."),
        ("divprune.joint=maybe", "divprune.joint was 'maybe'; it has to be like false."),
    ],
)
def test_what_cannot_be_followed_is_named(query: str, problem: str) -> None:
    form, reader = read(query)
    assert len(reader.problems) == 1
    assert reader.problems[0].startswith(problem)
    assert (form.keep_ratio, form.num_frames, dict(form.options)) == (0.25, 8, DEFAULTS)
