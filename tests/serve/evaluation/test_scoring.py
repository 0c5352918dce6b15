"""When an answer is right, to the letter."""

from __future__ import annotations

import numpy as np
import pytest

from demos.train.data import questions as data
from demos.train.data.clips import sample_clip
from demos.train.data.scenes import HELD_OUT, sample_scene
from serve.evaluation.scoring import COLORS, SHAPES, content, is_right, plain


@pytest.mark.parametrize(
    ("answer", "right", "scoring", "expected"),
    [
        ("red", "red", "exact", True),
        (" Red.\n", "red", "exact", True),
        ('"red"', "red", "exact", True),
        ("ｒｅｄ", "red", "exact", True),
        ("top  left", "top left", "exact", True),
        ("The star is red.", "red", "exact", False),
        ("dark red", "red", "exact", False),
        ("", "red", "exact", False),
        ("3", "three", "exact", False),
        ("K7PX", "K7PX", "verbatim", True),
        ("“K7PX”.", "K7PX", "verbatim", True),
        ("k7px", "K7PX", "verbatim", False),
        ("K7P", "K7PX", "verbatim", False),
        ("", "", "content", False),
        ("It is a picture.", "It is a photo.", "content", False),
    ],
)
def test_one_right_answer(answer, right, scoring, expected):
    assert is_right(answer, [right], scoring) is expected


def test_any_of_several_is_right():
    assert is_right("Three", ["3", "three"], "exact")
    assert not is_right("four", ["3", "three"], "exact")


def test_plain_is_idempotent():
    for text in (' "A b." ', "x!!", "“q”", "...", "'"):
        assert plain(plain(text)) == plain(text)


SCENE = (
    'A small red star is at the top left. A large blue ring is at the center. The text "K7PX" is at the bottom center.'
)


@pytest.mark.parametrize(
    "same",
    [
        'At the top left is a small red star. At the center a large blue ring. At the bottom center it says "K7PX".',
        "It shows a small red star at the top left, a big blue ring in the centre and K7PX at the bottom center.",
        "A tiny red star in the upper left corner; in the middle center a large blue ring. Bottom center: “K7PX”",
    ],
)
def test_content_is_what_is_said_and_not_how(same):
    assert content(same) == ("small red star @ top left", "large blue ring @ center", '"K7PX" @ bottom center')
    assert is_right(same, [SCENE], "content")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("small", "large"),
        ("red", "pink"),
        ("star", "heart"),
        ("top left", "top right"),
        ("K7PX", "K7PZ"),
        ("K7PX", "k7px"),
        ("A large blue ring is at the center. ", ""),
        (
            "A small red star is at the top left. ",
            "A small red star is at the top left. A small red star is at the top left. ",
        ),
        (" is at the center", ""),
        ("small red", "red"),
    ],
)
def test_content_is_wrong_in_one_thing(old, new):
    assert old in SCENE
    assert not is_right(SCENE.replace(old, new), [SCENE], "content")


def test_the_order_of_things_counts():
    first, second, third = (f"{sentence}." for sentence in SCENE.removesuffix(".").split(". "))
    assert not is_right(" ".join((second, first, third)), [SCENE], "content")


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("The red star moves left. An orange ring appears.", ("red star | move left", "orange ring | appear")),
        ("First the red star goes away, then a ring shows up.", ("red star | disappear", "ring | appear")),
        ("The red star turns blue.", ("red star | turn blue",)),
        (
            "The red star changes to blue and the green ring moves upwards!",
            ("red star | turn blue", "green ring | move up"),
        ),
        ("red star, blue circle", ("red star", "blue circle")),
        ("two crosses", ("cross",)),
        ("The red star becomes a circle. The blue ring grows.", ("red star | turn circle", "blue ring | grow")),
        ('The text changes from "A7" to "STAR".', ('"A7" | turn', '"STAR"')),
        ("A bar chart shows red 7, blue 12.", ('red "7"', 'blue "12"')),
        ("The display shows 5.", ('"5"',)),
    ],
)
def test_events_and_lists(text, facts):
    assert content(text) == facts


def test_the_words_of_the_generator_are_known():
    assert set(data.COLORS) <= set(COLORS)
    assert set(data.SHAPES) <= set(SHAPES)


@pytest.mark.parametrize("seed", range(40))
def test_every_part_of_a_generated_answer_is_seen(seed):
    """Objects, texts and events of scenes and clips all come back from the answers that describe them."""
    rng = np.random.default_rng(seed)
    scene = sample_scene(HELD_OUT + seed)
    caption = content(data.SceneAsker(scene, rng).ask("caption").answer)
    for thing in scene.things:
        assert sum(thing.name in fact for fact in caption) == 1
    for text in scene.texts:
        assert sum(f'"{text.string}"' in fact for fact in caption) == 1
    clip = sample_clip(HELD_OUT + seed)
    reported = content(data.ClipAsker(clip, rng).ask("happens").answer)
    things = [clip.things[event.thing].name for event in clip.events if event.kind != "text"]
    texts = 2 * sum(event.kind == "text" for event in clip.events)  # from one to another
    assert len(reported) == len(things) + texts
    for event in clip.events:
        if event.kind != "text":
            fact = next(fact for fact in reported if clip.things[event.thing].name in fact)
            assert fact.split(" | ")[1].split()[-1] in (event.detail.removesuffix("s"), event.detail, event.kind)
