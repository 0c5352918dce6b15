"""The comparison in a real headless browser: ask, compare, look at the maps; and nothing leaves the machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from serve.page.samples import load_samples
from tests.serve.page.browsing import (
    DIM,
    FIRST,
    FULL,
    MARKS,
    answered,
    ask,
    cell_centres,
    choose,
    needs_samples,
    pixels,
    set_dimming,
    take_away,
    upload,
    write_methods_beside,
)
from tests.serve.page.fake_server import GRID, kept_indices

pytestmark = MARKS


def test_any_number_of_methods_stand_beside_every_token(open_page: Any, tiny_url: str, picture: Path) -> None:
    page = open_page(tiny_url)
    assert "tiny at http://127.0.0.1:" in page.inner_text(".mm-server")
    upload(page, picture)
    choose(page, "divprune", "fastv", "pool2")
    write_methods_beside(page, "divprune:keep_ratio=0.1")
    ask(page, "What colour is the picture?")
    assert page.locator(".mm-card h2").all_inner_texts() == [
        "Every token",
        "divprune",
        "pool2",
        "fastv",
        "divprune:keep_ratio=0.1",
    ]
    assert all(text.strip() for text in page.locator(".mm-card .mm-answer").all_inner_texts())
    kept = [
        re.search(r"(\d+)\s+of 256 visual", text)[1] for text in page.locator(".mm-card .mm-meter").all_inner_texts()
    ]
    assert kept == ["256", "64", "64", "64", "26"]
    assert page.locator(".mm-savings tbody tr").count() == 4
    cells = page.locator(".mm-savings tbody tr >> nth=0").locator("td").all_inner_texts()
    assert cells[0] == "192"
    assert re.fullmatch(r"[1-9]\d* KiB", cells[1])
    assert re.fullmatch(r"−?[\d.,]+ ms", cells[2])
    for stage in ("load", "encode", "reduce", "prefill", "decode"):
        assert page.locator(FIRST).locator(f"dt:text-is('{stage}')").is_visible()
    bars = sum(
        float(text.split()[0].replace(",", "")) for text in page.locator(FIRST).locator(".mm-ms").all_inner_texts()
    )
    total = float(page.locator(FIRST).locator(".mm-headline").inner_text().split()[0].replace(",", ""))
    assert abs(bars - total) < 4  # each is rounded to a millisecond
    shown = page.locator(FIRST).locator(".mm-pic")
    dimmed = pixels(shown)
    set_dimming(page, 0)
    assert np.abs(pixels(shown) - dimmed).mean() > 30


def test_a_repeated_question_is_cold_on_all_sides(open_page: Any, tiny_url: str, picture: Path) -> None:
    page = open_page(tiny_url)
    upload(page, picture)
    for _ in range(2):
        ask(page, "Which colour?")
        for card in (FULL, FIRST):
            text = page.inner_text(card)
            assert "cached" not in text
            assert "in its cache" not in text


@needs_samples
def test_drafted_text_has_a_colour_and_the_answer_is_the_same_without(open_page: Any, tiny_url: str) -> None:
    page = open_page(tiny_url)
    sample = next(sample for sample in load_samples() if sample.path.name == "many_shapes.png")
    upload(page, sample.path)
    page.get_by_text("Drafting and sampling").click()
    assert page.input_value("#mm-drafter input") == "flash"
    ask(page, "Describe the picture.")
    answer = page.locator(FULL).locator(".mm-answer")
    marked = answer.locator("mark.mm-drafted")
    assert marked.count() > 0
    colour = "e => getComputedStyle(e).backgroundColor"
    assert marked.first.evaluate(colour) != answer.evaluate(colour)
    reported = page.locator(FULL).locator(".mm-drafting").inner_text()
    found = re.search(r"(\d+) of (\d+) tokens; mean accepted length (\d+\.\d+)", reported)
    assert found, reported
    assert 0 < int(found[1]) < int(found[2])
    assert 1 < float(found[3]) < 16
    text = answer.inner_text()
    page.click("#mm-drafter input")
    page.get_by_role("option", name="none", exact=True).click()
    answered(page)
    assert page.locator("mark.mm-drafted").count() == 0
    assert answer.inner_text() == text


@needs_samples
def test_a_clip_has_its_kept_tokens_per_frame_on_a_time_line(open_page: Any, tiny_url: str) -> None:
    page = open_page(tiny_url)
    clip = next(sample for sample in load_samples() if sample.path.suffix == ".mp4")
    upload(page, clip.path)
    assert page.locator("#mm-shown figure").count() == 8
    assert page.locator("#mm-frames").is_visible()
    choose(page, "evs", "cubes")
    ask(page, clip.question)
    cubes, evs = page.locator(".mm-card").nth(1), page.locator(".mm-card").nth(2)
    assert evs.locator("figure").count() == 8
    captions = evs.locator("figcaption").all_inner_texts()
    kept = [int(caption.split("·")[1].split("/")[0]) for caption in captions]
    assert sum(kept) == 128
    assert "128 of 512 visual tokens" in evs.inner_text()
    line = [bar.bounding_box()["height"] for bar in evs.locator(".mm-shares b").all()]
    assert np.corrcoef(line, kept)[0, 1] > 0.99
    borders = cubes.locator(".mm-timeline i")
    assert borders.count() > 1
    assert borders.nth(0).bounding_box()["x"] < borders.nth(1).bounding_box()["x"]
    assert "· cube 1" in cubes.inner_text()


def test_the_map_dims_the_dropped_cells_and_no_other(open_page: Any, fake_url: str, picture: Path) -> None:
    page = open_page(fake_url)
    upload(page, picture)
    choose(page, "uniform")
    ask(page, "What?")
    shown = page.locator(FIRST).locator(".mm-pic")
    set_dimming(page, 0.5)
    dimmed = cell_centres(pixels(shown), GRID)
    set_dimming(page, 0)
    plain = cell_centres(pixels(shown), GRID)
    assert plain.min() > 100
    kept = np.zeros(len(plain), bool)
    kept[kept_indices(len(plain), 0.25)] = True
    assert np.abs(dimmed[kept] - plain[kept]).max() < 2
    assert np.abs(dimmed[~kept] - (plain[~kept] + DIM) / 2).max() < 3


def test_answers_stream_and_stop_ends_them(open_page: Any, fake_url: str, picture: Path) -> None:
    page = open_page(fake_url)
    upload(page, picture)
    choose(page, "uniform")
    page.fill("#mm-question textarea", "Go on slowly")
    page.click("#mm-ask")
    growing = page.locator(".mm-growing")
    page.wait_for_function("document.querySelector('.mm-growing')?.innerText.includes('on on')")
    before = len(growing.inner_text())
    page.wait_for_function(f"document.querySelector('.mm-growing').innerText.length > {before}")
    page.click("#mm-stop")
    page.wait_for_selector(".mm-card >> nth=1 >> text=Stopped before an answer came")
    assert "on on" in page.inner_text(FULL)
    assert page.locator(".mm-busy, .mm-growing").count() == 0


def test_a_conversation_goes_on_about_earlier_media(open_page: Any, tiny_url: str, picture: Path) -> None:
    page = open_page(tiny_url)
    upload(page, picture)
    ask(page, "Which colour?")
    first = [card.locator(".mm-answer").inner_text() for card in page.locator(".mm-card").all()]
    ask(page, "Describe the picture.", click="#mm-follow-up")
    page.wait_for_selector(".mm-turn")
    for card, said in zip(page.locator(".mm-card").all(), first, strict=True):
        assert card.locator(".mm-asked").inner_text() == "Which colour? (a bright picture.png)"
        assert card.locator(".mm-said").inner_text().strip() == said.strip()
        assert card.locator(".mm-answer").inner_text().strip()
        assert card.locator(".mm-pic").count() == 1
    assert "256 of 256 visual tokens" in page.inner_text(FULL)


def test_methods_are_grouped_by_stage_and_greyed_where_they_do_not_fit(open_page, fake_url, picture) -> None:
    page = open_page(fake_url)
    groups = page.get_by_role("group", name="Along a clip's time")
    take_away(page)
    page.wait_for_selector("#mm-methods input[value=evs]:enabled")
    upload(page, picture)
    page.wait_for_selector("#mm-methods input[value=evs]:disabled")
    assert "For clips only: cubes, evs" in groups.inner_text()
    between = page.get_by_role("group", name="Between tower and decoder")
    assert between.get_by_role("checkbox", name="pool2").is_disabled()
    assert "pool2 cannot be used with fake, which does not supply: a grid." in between.inner_text()
    uniform = between.get_by_role("checkbox", name="uniform")
    uniform.focus()
    page.keyboard.press("Space")
    assert uniform.is_checked()
    ask(page, "What?")
    assert "uniform" in page.locator(".mm-card h2").all_inner_texts()
