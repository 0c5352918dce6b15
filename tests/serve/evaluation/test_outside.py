"""Pictures that the generator did not draw: all there, small, and a third of the answers sensible."""

from __future__ import annotations

import pytest
from PIL import Image

import mm
from demos.samples.outside import ask

LINES = ask.lines()


def test_there_are_enough_small_pictures_and_each_is_asked_about():
    files = {file.name for file in ask.FOLDER.glob("*.png")}
    assert len(files) >= 30
    assert {line["file"] for line in LINES} == files
    assert {line["kind"] for line in LINES} == {"web page", "objects", "drawing", "chart"}
    for name in files:
        with Image.open(ask.FOLDER / name) as picture:
            assert picture.size == (224, 224)
        assert (ask.FOLDER / name).stat().st_size < 8_000


@pytest.mark.parametrize(
    ("answer", "line", "sensible"),
    [
        ("Red.", {"equals": ["red"]}, True),
        ("dark red", {"equals": ["red"]}, False),
        ("three", {"equals": ["3", "three"]}, True),
        ("A large red circle is at the center.", {"says": ["red circle", "center"], "at_most": 1}, True),
        ("A large red circle is at the top left.", {"says": ["red circle", "center"], "at_most": 1}, False),
        ("A red circle is at the center. A blue star is there.", {"says": ["red circle"], "at_most": 1}, False),
    ],
)
def test_what_is_sensible(answer, line, sensible):
    assert ask.is_sensible(answer, line) is sensible


def test_the_shipped_model_answers_a_third_sensibly():
    model = mm.load("tiny")
    options = {"temperature": 0.0, "max_new_tokens": 40}
    answers = [model.generate(line["question"], images=[ask.FOLDER / line["file"]], **options).text for line in LINES]
    asked = list(zip(LINES, answers, strict=True))
    assert sum(ask.is_sensible(answer, line) for line, answer in asked) >= len(LINES) / 3
    table = ask.table(asked).splitlines()
    assert len(table) == len(LINES) + 2
    assert len({len(row) for row in table}) == 1
    assert "41 pictures: every answer sensible on" in ask.shares(asked)
