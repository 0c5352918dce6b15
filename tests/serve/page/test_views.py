"""Fragments say what the reply says, and nothing a model writes becomes markup."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from mm.data.outputs import KeptMap
from serve.page import cards, views
from serve.page.cards import Shown, Stopped
from serve.page.choices import ReducerChoice
from serve.page.figures import kibibytes, milliseconds, percent_less, signed_saving
from serve.page.form import FULL, Side
from serve.page.media import Preview
from serve.page.methods import misfits, picker
from serve.page.pictures import kept_pictures, shared_frames
from serve.page.reply import Partial, Piece, Reply, ServerProblem
from serve.page.request import Turn, Upload
from serve.page.words import marked

REPLY = Reply(
    text="a cat",
    finish_reason="stop",
    num_prompt_tokens=270,
    num_completion_tokens=7,
    wall_s=0.21,
    num_visual_tokens_in=256,
    num_visual_tokens_kept=64,
    kv_bytes=64 * 2**10,
    timings_s={"decode": 0.03, "load": 0.004, "queue": 0.00001, "encode": 0.06, "reduce": 0.0, "prefill": 0.0064},
)
DRAFTED = Piece(text="<img src=x>", num_tokens=1, is_drafted=True)


def widths(html: str) -> list[float]:
    return [float(width) for width in re.findall(r"width:([\d.]+)%", html)]


REDUCED = Side(reducer="divprune", keep_ratio=0.25)


def card(reply: object, side: Side = REDUCED, **more: object) -> str:
    return cards.cards([Shown(side=side, result=reply, **more)], [])


def test_stages_stand_in_the_order_a_request_meets_them() -> None:
    assert [stage for stage, _ in cards.stages_of(REPLY)] == ["load", "encode", "reduce", "prefill", "decode"]


def test_prompt_tokens_from_the_cache_are_shown() -> None:
    assert "270 prompt (256 of them cached) + 7 answer tokens" in card(replace(REPLY, num_cached_tokens=256))


def test_a_reducer_that_failed_is_shown() -> None:
    failed = replace(REPLY, reducer_faults=("X: raised <b>",))
    assert "All tokens were kept: X: raised &lt;b&gt;" in card(failed)
    assert "All tokens were kept" not in card(REPLY)


def test_a_queue_that_was_waited_in_is_shown() -> None:
    waited = replace(REPLY, timings_s={**REPLY.timings_s, "queue": 0.5})
    assert ("queue", 0.5) in cards.stages_of(waited)


def test_bars_of_all_cards_share_one_scale() -> None:
    slower = replace(REPLY, timings_s={"encode": 0.12})
    html = cards.cards([Shown(side=FULL, result=REPLY), Shown(side=REDUCED, result=slower)], [])
    # kept share, load, encode, prefill, decode; a stage of no time has no bar; then kept share and encode
    assert widths(html) == [25.0, 3.33, 50.0, 5.33, 25.0, 25.0, 100.0]


def test_a_card_counts_tokens_bytes_and_time_with_the_total_in_its_headline() -> None:
    html = card(REPLY, expected="a cat")
    assert "<b>64</b> <span>of 256 visual tokens (25%)</span>" in html
    assert "KV cache <b>64 KiB</b>" in html
    assert "270 prompt + 7 answer tokens, 210 ms round trip" in html
    assert "The right answer: a cat" in html
    assert '<header><h2>divprune</h2><span>keep 25%</span><b class="mm-headline">100 ms</b></header>' in html


def test_what_every_method_saved_is_in_one_table() -> None:
    full = replace(
        REPLY, num_visual_tokens_kept=256, kv_bytes=256 * 2**10, timings_s={"prefill": 0.026, "decode": 0.03}
    )
    slow = replace(REPLY, timings_s={"decode": 0.06}, text="a dog")
    shown = [Shown(side=FULL, result=full), Shown(side=REDUCED, result=replace(REPLY, timings_s={"decode": 0.04}))]
    html = cards.savings([*shown, Shown(side=Side(reducer="slow"), result=slow), Shown(side=REDUCED)])
    rows = [re.sub("<.*?>", "|", row) for row in re.findall("<tr>.*?</tr>", html)[1:]]
    assert [re.split(r"\|+", row.strip("|")) for row in rows] == [
        ["divprune ", "keep 25%", "192", "192 KiB", "16 ms", "the same"],
        ["slow ", "192", "192 KiB", "−4.0 ms", "differs"],
    ]
    assert "saved <b>75%</b>" in cards.cards(shown, [])
    assert cards.savings(shown[1:]) == cards.savings(shown[:1]) == ""


def test_a_cached_item_is_said_to_be_cached() -> None:
    cached = replace(REPLY, timings_s={"load": 0.0, "encode": 0.0, "prefill": 0.1})
    assert "in its cache" in card(cached)
    assert "in its cache" not in card(REPLY)


def test_drafted_text_is_marked_and_counted() -> None:
    pieces = (
        Piece(text="a <b", num_tokens=2, is_drafted=False),
        Piece(text="> c", num_tokens=3, is_drafted=True),
        Piece(text="", num_tokens=1, is_drafted=True),
        Piece(text="at", num_tokens=2, is_drafted=False),
    )
    drafted = replace(REPLY, text="a <b> cat", pieces=pieces, mean_acceptance_length=2.333, num_completion_tokens=8)
    html = card(drafted, FULL)
    assert '<p class="mm-answer">a &lt;b<mark class="mm-drafted">&gt; c</mark>at</p>' in html
    assert "4 of 8 tokens; mean accepted length 2.33" in html
    assert "mm-drafted" not in card(REPLY)


def test_pieces_that_are_not_the_text_mark_nothing() -> None:
    other = (Piece(text="<img src=x>", num_tokens=1, is_drafted=True),)
    assert '<p class="mm-answer">a cat</p>' in card(replace(REPLY, pieces=other))


@pytest.mark.parametrize(
    ("text", "other", "expected"),
    [
        ("a red cat", "a blue cat", 'a <mark class="mm-differs">red</mark> cat'),
        ("a cat", "a cat", "a cat"),
        ("a cat", "a black cat", "a cat"),
        ("one big <b>", "one", 'one <mark class="mm-differs">big &lt;b&gt;</mark>'),
        ("  ", "x", "<em>(an empty answer)</em>"),
    ],
)
def test_words_that_differ_from_the_full_answer_are_marked(text: str, other: str, expected: str) -> None:
    assert marked(text, (), other) == expected


def test_drafted_words_that_differ_have_both_marks() -> None:
    pieces = (Piece(text="a re", num_tokens=1, is_drafted=True), Piece(text="d", num_tokens=1, is_drafted=False))
    expected = '<mark class="mm-drafted">a </mark><mark class="mm-drafted mm-differs">re</mark>'
    assert marked("a red", pieces, "a dog") == f'{expected}<mark class="mm-differs">d</mark>'


def test_an_answer_that_was_stopped_keeps_what_came_of_it() -> None:
    assert "Stopped before an answer came" in card(Stopped())
    assert ">half</p>" in card(Partial(text="half"))
    assert "Stopped." in card(Partial(text="half"))
    assert "Stopped" not in card(Partial(text="half"), is_busy=True)


def test_earlier_turns_stand_above_the_answer() -> None:
    turn = Turn(text="Which <b>?", answer="red", upload=Upload(name="a.png", mime="image/png", data=b""))
    html = card(REPLY, turns=(turn,))
    assert html.index("Which &lt;b&gt;? <i>(a.png)</i>") < html.index(">red<") < html.index("mm-answer")


CHOICES = (
    ReducerChoice(name="evs", kinds=("video",), stage="temporal"),
    ReducerChoice(name="router", kinds=("image",)),
    ReducerChoice(name="pool2"),
    ReducerChoice(name="uniform", summary="at <even> steps"),
)


def test_methods_that_do_not_fit_are_greyed_with_the_reason_in_their_stage() -> None:
    reasons = misfits(CHOICES, {"pool2": "pool2 needs a <grid>."}, "image")
    assert reasons == {"evs": "For clips only", "pool2": "pool2 needs a <grid>"}
    assert misfits(CHOICES, {}, "video") == {"router": "For pictures only"}
    assert misfits(CHOICES, {}, None) == {}
    time, between = re.findall("<fieldset.*?</fieldset>", picker(CHOICES, reasons, {"uniform", "pool2"}))
    assert "Along a clip&#x27;s time" in time
    assert "For clips only: evs." in time
    assert "pool2 needs a &lt;grid&gt;." in between
    assert re.findall('value="([^"]*)"[^>]* disabled', time + between) == ["evs", "pool2"]
    assert re.findall('value="([^"]*)"[^>]* checked', time + between) == ["uniform"]


def test_a_cut_answer_is_said_to_be_cut() -> None:
    assert "Cut off" in card(replace(REPLY, finish_reason="length"))


def test_a_server_that_reports_nothing_is_said_to() -> None:
    bare = replace(REPLY, num_visual_tokens_in=None, num_visual_tokens_kept=None, timings_s={})
    assert "does not report visual tokens" in card(bare)
    assert "does not report stage times" in card(bare)


@pytest.mark.parametrize(
    "html",
    [
        card(replace(REPLY, text="<img src=x>"), expected="<img src=x>"),
        card(replace(REPLY, text="<img src=x>", pieces=(DRAFTED,))),
        card(ServerProblem("<img src=x>", "<img src=x>"), Side(reducer="<b>x")),
        card(REPLY, snippets={"curl": "<img src=x>"}),
        views.server_line("<img src=x>", "<img src=x>"),
        views.server_down("<img src=x>"),
        views.status("<img src=x>"),
    ],
)
def test_texts_from_outside_are_escaped(html: str) -> None:
    assert "<img" not in html
    assert "&lt;img src=x&gt;" in html


def test_a_clip_has_one_map_per_frame_with_its_time_and_count() -> None:
    preview = Preview(urls=("data:a", "data:b"), aspect_ratio=1.5, timestamps_s=(0.25, 0.75))
    html = kept_pictures([preview], [KeptMap(kind="video", grid=(2, 2, 2), kept=(0, 1, 2, 7))])
    shown = re.findall(r"background-image:var\((.*?)\)", html)
    assert shared_frames([preview]) == f"<style>:root{{{shown[0]}:url(data:a);{shown[1]}:url(data:b);}}</style>"
    assert re.findall(r'title="(.*?)"><b style="height:(.*?)"', html) == [
        ("0.2 s: 75% kept", "75.0%"),
        ("0.8 s: 25% kept", "25.0%"),
    ]
    assert re.findall(r"<figcaption>(.*?)</figcaption>", html) == ["0.2 s · 3/4", "0.8 s · 1/4"]
    assert re.findall(r'class="mm-dropped"[^>]* d="([^"]*)"', html) == ["M1 1h1v1h-1z", "M0 0h2v1h-2zM0 1h1v1h-1z"]


def test_tokens_without_a_place_are_not_drawn() -> None:
    preview = Preview(urls=("data:a",), aspect_ratio=1.0)
    html = kept_pictures([preview], [KeptMap(kind="image", grid=(1, 1, 577), kept=(0,))])
    assert "does not say where" in html
    assert "<svg" not in html


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0 ms"), (0.00042, "0.4 ms"), (0.0383, "38 ms"), (1.2399, "1,240 ms")]
)
def test_milliseconds(seconds: float, text: str) -> None:
    assert milliseconds(seconds) == text


def test_sizes_and_savings_are_short() -> None:
    assert [kibibytes(size) for size in (0, 98_304, 13_107_200, -2048)] == ["0 KiB", "96 KiB", "12.5 MiB", "-2 KiB"]
    assert [percent_less(4, 1), percent_less(100, 103)] == ["75%", "−3%"]
    assert [signed_saving(0.02, 0.01), signed_saving(0.01, 0.04)] == ["10 ms", "−30 ms"]
