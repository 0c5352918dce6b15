"""Fragments say what the reply says, and nothing a model writes becomes markup."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from mm.data.outputs import KeptMap
from serve.page import views
from serve.page.client import Piece, Reply
from serve.page.media import Preview

REPLY = Reply(
    text="a cat",
    finish_reason="stop",
    num_prompt_tokens=270,
    num_completion_tokens=7,
    wall_s=0.21,
    num_visual_tokens_in=256,
    num_visual_tokens_kept=64,
    kept=(KeptMap(kind="image", grid=(1, 16, 16), kept=tuple(range(64))),),
    timings_s={"decode": 0.03, "load": 0.004, "queue": 0.00001, "encode": 0.06, "reduce": 0.0, "prefill": 0.0064},
)
DRAFTED = Piece(text="<img src=x>", num_tokens=1, is_drafted=True)


def widths(html: str) -> list[float]:
    return [float(width) for width in re.findall(r"width:([\d.]+)%", html)]


def test_stages_stand_in_the_order_a_request_meets_them() -> None:
    assert [stage for stage, _ in views.stages_of(REPLY)] == ["load", "encode", "reduce", "prefill", "decode"]


def test_prompt_tokens_from_the_cache_are_shown() -> None:
    card = views.answer_card(views.FULL, "", replace(REPLY, num_cached_tokens=256), 0.1)
    assert "270 prompt (256 of them cached) + 7 answer tokens" in card


def test_a_reducer_that_failed_is_shown() -> None:
    card = views.answer_card(views.FULL, "", replace(REPLY, reducer_faults=("X: raised <b>",)), 0.1)
    assert "All tokens were kept: X: raised &lt;b&gt;" in card
    assert "All tokens were kept" not in views.answer_card(views.FULL, "", REPLY, 0.1)


def test_a_queue_that_was_waited_in_is_shown() -> None:
    waited = replace(REPLY, timings_s={**REPLY.timings_s, "queue": 0.5})
    assert ("queue", 0.5) in views.stages_of(waited)


def test_bars_of_both_cards_share_one_scale() -> None:
    slower = replace(REPLY, timings_s={"encode": 0.12})
    scale_s = views.longest_stage_s(REPLY, slower, None)
    assert scale_s == 0.12
    assert widths(views.answer_card("full", "", slower, scale_s)) == [25.0, 100.0]
    # kept share, load, encode, prefill, decode; a stage of no time has no bar
    expected = [25.0, 3.33, 50.0, 5.33, 25.0]
    assert widths(views.answer_card("full", "", REPLY, scale_s)) == expected


def test_a_card_counts_tokens_and_time() -> None:
    card = views.answer_card("reduced", "divprune", REPLY, 0.06, expected="a cat")
    assert "<b>64</b> <span>of 256 visual tokens (25%)</span>" in card
    assert "270 prompt + 7 answer tokens, 210 ms round trip" in card
    assert "The right answer: a cat" in card
    assert '<dd class="mm-ms mm-total">100 ms</dd>' in card


def test_a_cached_item_is_said_to_be_cached() -> None:
    cached = replace(REPLY, timings_s={"load": 0.0, "encode": 0.0, "prefill": 0.1})
    assert "in its cache" in views.answer_card("full", "", cached, 0.1)
    assert "in its cache" not in views.answer_card("full", "", REPLY, 0.1)


def test_drafted_text_is_marked_and_counted() -> None:
    pieces = (
        Piece(text="a <b", num_tokens=2, is_drafted=False),
        Piece(text="> c", num_tokens=3, is_drafted=True),
        Piece(text="", num_tokens=1, is_drafted=True),
        Piece(text="at", num_tokens=2, is_drafted=False),
    )
    drafted = replace(REPLY, text="a <b> cat", pieces=pieces, mean_acceptance_length=2.333, num_completion_tokens=8)
    card = views.answer_card("full", "", drafted, 0.1)
    assert '<p class="mm-answer">a &lt;b<mark class="mm-drafted">&gt; c</mark>at</p>' in card
    assert ": 4 of 8 tokens" in card
    assert "<b>2.33</b> tokens per step with a draft" in card
    assert "mm-drafted" not in views.answer_card("full", "", REPLY, 0.1)


def test_pieces_that_are_not_the_text_mark_nothing() -> None:
    other = (Piece(text="<img src=x>", num_tokens=1, is_drafted=True),)
    assert '<p class="mm-answer">a cat</p>' in views.answer_card("full", "", replace(REPLY, pieces=other), 0.1)


def test_a_cut_answer_is_said_to_be_cut() -> None:
    assert "Cut off" in views.answer_card("full", "", replace(REPLY, finish_reason="length"), 0.1)


def test_a_server_that_reports_nothing_is_said_to() -> None:
    bare = replace(REPLY, num_visual_tokens_in=None, num_visual_tokens_kept=None, timings_s={})
    card = views.answer_card("full", "", bare, 0.0)
    assert "does not report visual tokens" in card
    assert "does not report stage times" in card


@pytest.mark.parametrize(
    "html",
    [
        views.answer_card("full", "<b>", replace(REPLY, text="<img src=x>"), 1.0, expected="<img src=x>"),
        views.answer_card("full", "", replace(REPLY, text="<img src=x>", pieces=(DRAFTED,)), 1.0),
        views.error_card("full", "<b>x", "<img src=x>", "<img src=x>"),
        views.server_line("<img src=x>", "<img src=x>"),
        views.server_down("<img src=x>"),
        views.waiting_card("full", "<img src=x>"),
    ],
)
def test_texts_from_outside_are_escaped(html: str) -> None:
    assert "<img" not in html
    assert "&lt;img src=x&gt;" in html


def test_comparison_names_what_changed() -> None:
    full = replace(REPLY, num_visual_tokens_kept=256, timings_s={"prefill": 0.026, "decode": 0.03})
    line = views.comparison(full, REPLY)
    assert "Visual tokens <b>256 → 64</b>" in line
    assert "Prefill <b>26 ms → 6.4 ms</b>" in line
    assert "Same answer" in line
    assert "The answers differ" in views.comparison(full, replace(REPLY, text="a dog"))


def test_a_clip_has_one_map_per_frame_with_its_time_and_count() -> None:
    preview = Preview(urls=("data:a", "data:b"), aspect_ratio=1.5, timestamps_s=(0.25, 0.75))
    html = views.kept_pictures(preview, KeptMap(kind="video", grid=(2, 2, 2), kept=(0, 1, 2, 7)), "title")
    assert re.findall(r'<img src="([^"]*)"', html) == ["data:a", "data:b"]
    assert re.findall(r"<figcaption>(.*?)</figcaption>", html) == ["0.2 s · 3 of 4 kept", "0.8 s · 1 of 4 kept"]
    assert re.findall(r'class="mm-dropped"[^>]* d="([^"]*)"', html) == ["M1 1h1v1h-1z", "M0 0h2v1h-2zM0 1h1v1h-1z"]


def test_tokens_without_a_place_are_not_drawn() -> None:
    preview = Preview(urls=("data:a",), aspect_ratio=1.0)
    html = views.kept_pictures(preview, KeptMap(kind="image", grid=(1, 1, 577), kept=(0,)), "title")
    assert "does not say where" in html
    assert "<svg" not in html


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0 ms"), (0.00042, "0.4 ms"), (0.0383, "38 ms"), (1.2399, "1,240 ms")]
)
def test_milliseconds(seconds: float, text: str) -> None:
    assert views.milliseconds(seconds) == text
