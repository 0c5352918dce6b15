"""A visit to the page in a browser: what is there at first, links, files, mistakes, code to copy, and programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client as GradioClient
from gradio_client import handle_file
from gradio_client.exceptions import AppError

from serve.page.client import Client
from serve.page.launch import DemoConfig, mounted, serving
from serve.page.page import build_page
from serve.page.samples import load_samples
from tests.serve.page.browsing import (
    FIRST,
    FULL,
    MARKS,
    answered,
    ask,
    choose,
    needs_samples,
    take_away,
    upload,
    write_methods,
)
from tests.serve.page.fake_server import FRAME_GRID

pytestmark = MARKS
CHECK_AND_ASK = """() => {
  document.querySelector("#mm-methods input[value=uniform]").click();
  document.querySelector("#mm-ask").click();
}"""
NAMED = "title => title.innerText === 'uniform'"


def test_a_broken_file_is_explained_on_the_page(open_page: Any, tiny_url: str, broken: Path) -> None:
    page = open_page(tiny_url)
    upload(page, broken)
    assert "cannot be decoded" in page.inner_text("#mm-shown .mm-error")
    ask(page, "What is this?")
    for card in (FULL, FIRST):
        assert "The image cannot be decoded" in page.inner_text(card)
        assert "status 400, media_undecodable" in page.inner_text(card)


def test_a_wrong_option_is_explained_and_the_full_answer_stays(open_page: Any, tiny_url: str, picture: Path) -> None:
    page = open_page(tiny_url)
    upload(page, picture)
    write_methods(page, "divprune:keep_rato=0.5")
    ask(page, "What is this?")
    assert page.locator(FULL).locator(".mm-answer").inner_text().strip()
    assert "did you mean 'keep_ratio'" in page.locator(FIRST).locator(".mm-error").inner_text()


@needs_samples
def test_a_sample_brings_its_question_and_its_answer(open_page: Any, fake_url: str) -> None:
    page = open_page(fake_url)
    samples = load_samples()
    clip = next(i for i, sample in enumerate(samples) if sample.path.suffix == ".mp4")
    page.locator("#mm-samples .thumbnail-item").nth(clip).click()
    page.wait_for_selector("#mm-shown figure >> nth=7")
    assert page.input_value("#mm-question textarea") == samples[clip].question
    choose(page, "uniform")
    answered(page)
    assert f"The right answer: {samples[clip].answer}" in page.inner_text(FULL)
    cells = FRAME_GRID[0] * FRAME_GRID[1]
    assert page.locator(FIRST).locator(f"figcaption:has-text('{cells // 4}/{cells}')").count() == 8


def test_what_a_model_writes_stays_text_and_differing_words_are_marked(open_page, fake_url, picture) -> None:
    page = open_page(fake_url)
    upload(page, picture)
    choose(page, "uniform")
    text = "![a](http://example.org/a.png) <img src=http://example.org/b.png onerror=alert(1)> ${1 + 1} {{ 1 }}"
    ask(page, text)
    assert page.locator(FULL).locator(".mm-answer").inner_text() == f"none: {text}"
    assert page.locator("#mm-answers img").count() == 0
    assert page.locator(FULL).locator(".mm-differs").count() == 0
    differing = page.locator(FIRST).locator(".mm-differs")
    assert differing.all_inner_texts() == ["uniform:"]
    assert "wavy" in differing.evaluate("e => getComputedStyle(e).textDecorationStyle")


def test_a_server_that_is_not_there_is_explained(open_page: Any, picture: Path) -> None:
    client = Client("http://127.0.0.1:9")
    config = DemoConfig(url=client.url)
    with serving(mounted(build_page(client, samples=()), config)) as url:
        page = open_page(url)
        assert "No server can be reached at http://127.0.0.1:9" in page.inner_text(".mm-server")
        upload(page, picture)
        ask(page, "What?")
        assert "mm serve" in page.inner_text("#mm-status .mm-error")
        assert page.locator("#mm-samples").count() == 0
    client.close()


def test_nothing_chosen_is_explained(open_page: Any, fake_url: str) -> None:
    page = open_page(fake_url)
    take_away(page)
    page.click("#mm-ask")
    page.wait_for_selector("#mm-status .mm-error")
    assert "Choose a picture or a clip first" in page.inner_text("#mm-status")


def test_options_of_the_chosen_methods_are_offered_and_sent(open_page: Any, fake_url: str, picture: Path) -> None:
    page = open_page(fake_url)
    upload(page, picture)
    choose(page, "random")
    page.get_by_text("Options of the methods").click()
    page.wait_for_selector("#mm-options-random")
    assert page.locator("#mm-keep-ratio").is_visible()
    assert not page.locator("#mm-option-mustdrop-window").is_visible()
    page.fill("#mm-option-random-seed input", "5")
    ask(page, "What?")
    assert "random:seed=5" in page.inner_text(FIRST)


def test_code_is_copied_with_one_click(open_page: Any, fake_url: str, picture: Path) -> None:
    page = open_page(fake_url)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    upload(page, picture)
    choose(page, "uniform")
    ask(page, "What?")
    card = page.locator(FIRST)
    card.get_by_text("Copy as curl, Python, JavaScript").click()
    for language, sign in (("curl", "curl -sS"), ("Python", "import OpenAI"), ("JavaScript", "await fetch")):
        card.get_by_role("button", name=f"Copy as {language}").click()
        copied = page.evaluate("navigator.clipboard.readText()")
        assert sign in copied
        assert "a bright picture.png" in copied
        assert "uniform" in copied


@needs_samples
def test_a_sample_is_chosen_and_answered_at_first_view(open_page: Any, tiny_url: str) -> None:
    page = open_page(tiny_url)
    page.wait_for_selector(".mm-dim")
    sample = load_samples()[0]
    assert page.input_value("#mm-question textarea") == sample.question
    assert f"The right answer: {sample.answer}" in page.inner_text(FULL)
    assert page.locator(".mm-card h2").all_inner_texts() == ["Every token", "divprune"]
    assert page.evaluate("scrollY") == 0


@needs_samples
def test_the_settings_are_in_the_link(open_page: Any, tiny_url: str) -> None:
    page = open_page(tiny_url)
    page.wait_for_selector(".mm-dim")
    page.locator("#mm-samples .thumbnail-item").nth(1).click()
    page.wait_for_function("document.querySelector('#mm-question textarea').value.includes('green')")
    choose(page, "random", "pool2")
    page.fill("#mm-written textarea", "divprune:keep_ratio=0.1")
    page.fill("#mm-keep-ratio input[type=number]", "0.5")
    page.get_by_text("Options of the methods").click()
    page.fill("#mm-option-random-seed input", "5")
    ask(page, "How many are there?")
    page.wait_for_function("location.search.includes('random.seed=5')")
    cards = page.locator(".mm-card header").all_inner_texts()
    answers = page.locator(".mm-answer").all_inner_texts()
    other = open_page(page.url)
    other.wait_for_selector(".mm-dim")
    titles = [[line for line in card.splitlines() if not line.endswith("ms")] for card in cards]
    assert [
        [line for line in card.splitlines() if not line.endswith("ms")]
        for card in other.locator(".mm-card header").all_inner_texts()
    ] == titles
    assert other.locator(".mm-answer").all_inner_texts() == answers
    assert other.input_value("#mm-question textarea") == "How many are there?"
    wrong = open_page(f"{tiny_url}?keep_ratio=7")
    assert "keep_ratio was '7'" in wrong.inner_text("#mm-head .mm-error")


def test_programs_compare_through_named_endpoints(
    tiny_url: str, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)  # the client's own, not the page's
    client = GradioClient(tiny_url, verbose=False)
    methods = client.predict(api_name="/methods")
    assert {"divprune", "fastv"} <= {method["name"] for method in methods}
    asked = handle_file(str(picture)), "Which colour?"
    rows = client.predict(*asked, ["divprune", "random:keep_ratio=0.5", "x"], 0.1, api_name="/compare")
    assert [row["reducer"] for row in rows] == ["none", "divprune", "random:keep_ratio=0.5", "x"]
    assert [row.get("visual_tokens_kept") for row in rows] == [256, 26, 128, None]
    assert all(row["answer"] and row["kv_bytes"] and row["timings_s"]["prefill"] for row in rows[:3])
    assert "unknown_plugin" in rows[3]["error"]
    with pytest.raises(AppError, match="Give a picture or a clip, and a question"):
        client.predict(handle_file(str(picture)), " ", [], api_name="/compare")
    client.close()


def test_a_box_that_was_checked_just_before_counts(open_page: Any, fake_url: str, picture: Path) -> None:
    page = open_page(fake_url)
    upload(page, picture)
    page.fill("#mm-question textarea", "What?")
    for is_chosen in (True, False, True):
        page.locator("#mm-methods input[value=uniform]").set_checked(not is_chosen)
        answered(page)
        page.evaluate(CHECK_AND_ASK)
        page.wait_for_function("() => !document.querySelector('.mm-busy, .mm-growing')")
        page.wait_for_function(
            f"() => [...document.querySelectorAll('.mm-card h2')].some({NAMED}) === {str(is_chosen).lower()}"
        )
