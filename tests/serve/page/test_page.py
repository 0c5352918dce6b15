"""The page's logic without a browser, and what its server gives away."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from mm.config import ModelConfig, SpeculationLimits
from mm.errors import InvalidOption
from mm.plugins.registry import create, get, names, options_of
from serve.page.choices import ReducerChoice, installed_reducers, option_help, reducer_spec, with_drafters, written
from serve.page.client import Client
from serve.page.form import Form, option_keys
from serve.page.handlers import Handlers
from serve.page.launch import DemoConfig, demo_app, run_demo, serving
from serve.page.media import NotMedia, preview, read_upload, thumbnail
from serve.page.samples import SAMPLES_FOLDER, load_samples
from tests.serve.page.fake_server import fake_app

CHOICES = (
    ReducerChoice(name="uniform", options={"keep_ratio": 0.25}),
    ReducerChoice(name="random", options={"keep_ratio": 0.25, "seed": 0}),
    ReducerChoice(name="fixed", options={}),
    ReducerChoice(name="deep", options={"keep_ratio": 0.5, "at_layers": (), "joint": False, "alpha": 1.0}),
)
FORM: dict[str, Any] = {
    "path": None,
    "question": "What?",
    "reducer": "uniform",
    "keep_ratio": 0.25,
    "drafter": "other",
    "num_frames": 8,
    "seed": 7,
    "temperature": 0.5,
    "max_tokens": 9,
}
OPTIONS = {("random", "seed"): 0, ("deep", "at_layers"): "[]", ("deep", "joint"): False, ("deep", "alpha"): 1.0}


@pytest.fixture
def handlers() -> Any:
    with serving(fake_app()) as url:
        client = Client(url)
        yield Handlers(client, load_samples(), CHOICES)
        client.close()


def ask(handlers: Handlers, options: dict | None = None, **values: Any) -> list[tuple]:
    return list(handlers.ask(*(FORM | values).values(), *(OPTIONS | (options or {})).values()))


@pytest.mark.parametrize(
    ("reducer", "options", "expected"),
    [
        ("uniform", {}, ("uniform", 0.3)),
        ("uniform", {"left": "over"}, ("uniform", 0.3)),
        ("random", {"seed": 0}, ("random", 0.3)),
        ("random", {"seed": 4}, ("random:seed=4", 0.3)),
        ("random", {"seed": None}, ("random", 0.3)),
        ("fixed", {}, ("fixed", None)),
        ("deep", {"at_layers": "1, 3", "joint": True}, ("deep:at_layers=[1,3],joint=true", 0.3)),
        ("deep", {"at_layers": "", "joint": False, "alpha": 1}, ("deep", 0.3)),
        ("deep", {"alpha": 0.25}, ("deep:alpha=0.25", 0.3)),
        ("uniform:keep_ratio=0.5 + random", {}, ("uniform:keep_ratio=0.5 + random", None)),
        ("nonesuch", {}, ("nonesuch", None)),
    ],
)
def test_reducer_and_its_options_make_one_specification(reducer: str, options: dict, expected: tuple) -> None:
    assert reducer_spec(reducer, 0.3, options, CHOICES) == expected


def test_every_option_of_every_installed_reducer_is_offered_and_explained() -> None:
    choices = installed_reducers()
    offered = {(choice.name, option) for choice in choices for option in choice.options}
    installed = [name for name in names("reducer") if name not in ("none", "pipeline")]
    assert offered == {(name, option) for name in installed for option in options_of(get("reducer", name))}
    for choice in choices:
        assert {option for option in choice.options if not choice.help.get(option)} == set(), choice.name


@pytest.mark.parametrize("choice", installed_reducers(), ids=lambda choice: choice.name)
def test_options_at_their_defaults_are_what_the_reducer_has_anyway(choice: ReducerChoice) -> None:
    shown = {
        name: value if isinstance(value, bool | int | float) else written(value)
        for name, value in choice.options.items()
    }
    assert reducer_spec(choice.name, 0.25, shown, [choice])[0] == choice.name
    create("reducer", choice.name, **choice.options)


def test_help_reads_continued_lines_and_bases() -> None:
    help_ = option_help(get("reducer", "pyramiddrop"))
    assert help_["keep_ratio"].endswith("0.125 in three stages is 0.5, 0.25, 0.125.")
    assert "joint" in option_help(get("reducer", "scope"))


def test_options_of_the_chosen_reducer_are_sent(handlers: Handlers, picture: Path) -> None:
    last = ask(handlers, {("random", "seed"): 3, ("deep", "alpha"): 9.0}, path=str(picture), reducer="random")[-1]
    assert '"reducer": "random:seed=3"' in last[5]
    assert "alpha" not in last[5]


def test_only_the_chosen_reducers_options_are_shown(handlers: Handlers) -> None:
    assert option_keys(CHOICES) == list(OPTIONS)
    _, budget, random, deep = handlers.show_options("random")
    assert (budget["visible"], random["visible"], deep["visible"]) == (True, True, False)
    info, budget, random, deep = handlers.show_options("uniform + random")
    assert (budget["visible"], random["visible"], deep["visible"]) == (False, False, False)
    assert "as written" in info["info"]


def test_installed_reducers_are_offered_with_their_budget() -> None:
    choices = {choice.name: choice for choice in installed_reducers()}
    assert choices["divprune"].has_keep_ratio
    assert "none" not in choices
    assert "pipeline" not in choices


def test_both_questions_differ_in_the_reduction_only(picture: Path) -> None:
    full, reduced = Form(**FORM, options={}).questions(read_upload(picture), CHOICES)
    first, second = full.body("m"), reduced.body("m")
    assert first.pop("vision") == {"reducer": "none", "return_map": True, "return_timings": True}
    assert second.pop("vision")["reducer"] == "uniform"
    assert first == second
    assert first["speculation"]["drafter"] == "other"
    assert (first["seed"], first["temperature"], first["max_tokens"]) == (7, 0.5, 9)


def test_the_servers_drafters_can_be_chosen(handlers: Handlers) -> None:
    head, drafter = handlers.heading()
    assert "fake at <code>http" in head
    assert (drafter["choices"], drafter["value"], drafter["visible"]) == (["echo", "none", "other"], "echo", True)


def test_the_own_server_offers_the_models_drafters_by_default(tmp_path: Path) -> None:
    own = DemoConfig().server.model.speculation
    assert own.drafter == "flash"
    assert {"eagle", "msd", "vispec", "specvlm", "flash", "copy", "recycle"} <= set(own.offered)
    reported = ModelConfig(speculation=SpeculationLimits(drafter="none", drafters=("copy",)))
    assert with_drafters(reported) == reported
    (tmp_path / "config.json").write_text("{}")
    bare = with_drafters(ModelConfig(model=str(tmp_path))).speculation
    assert (bare.drafter, bare.drafters) == ("copy + recycle", ("copy", "recycle", "copy + recycle"))


def test_answers_come_one_after_the_other(handlers: Handlers, picture: Path) -> None:
    steps = ask(handlers, path=str(picture))
    full_cards, reduced_cards = [step[1] for step in steps], [step[2] for step in steps]
    assert "mm-busy" in full_cards[0]
    assert "none: What?" in full_cards[1]
    assert "mm-busy" in reduced_cards[1]
    assert "uniform: What?" in reduced_cards[-1]
    assert "<svg" in steps[-1][3]["value"]
    assert '"reducer": "uniform"' in steps[-1][5]


def test_a_refused_reduction_leaves_the_full_answer(handlers: Handlers, picture: Path) -> None:
    last = ask(handlers, path=str(picture), reducer="nonesuch")[-1]
    assert "none: What?" in last[1]
    assert "No reducer named &#x27;nonesuch&#x27;" in last[2]
    assert last[3] == {"value": "", "visible": False, "__type__": "update"}


@pytest.mark.parametrize(
    ("values", "text"), [({}, "Choose an image"), ({"path": "x.png", "question": " "}, "Write a question")]
)
def test_what_is_missing_is_named(handlers: Handlers, values: dict, text: str) -> None:
    (only,) = ask(handlers, **values)
    assert text in only[1]


def test_the_right_answer_is_shown_for_a_sample_and_its_own_question(handlers: Handlers, picture: Path) -> None:
    samples = load_samples()
    if not samples:
        pytest.skip("demos/samples is not here")
    sample = next(sample for sample in samples if sample.path.suffix == ".png")
    shown = f"The right answer: {sample.answer}"
    assert shown in ask(handlers, path=str(sample.path), question=sample.question)[-1][1]
    assert shown not in ask(handlers, path=str(sample.path), question="Else?")[-1][1]
    assert shown not in ask(handlers, path=str(picture), question=sample.question)[-1][1]


def test_a_folder_without_a_list_has_no_samples(tmp_path: Path) -> None:
    assert load_samples(tmp_path) == ()
    assert load_samples(tmp_path / "absent") == ()


def test_previews_are_small_and_keep_their_shape(picture: Path, tmp_path: Path) -> None:
    shown = preview(read_upload(picture), 8)
    assert shown.aspect_ratio == pytest.approx(320 / 240)
    assert shown.timestamps_s == ()
    Image.new("RGB", (2000, 500)).save(tmp_path / "wide.png")
    assert thumbnail(read_upload(tmp_path / "wide.png")).size == (192, 48)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(NotMedia, match=r"notes\.txt is neither an image nor a clip"):
        read_upload(tmp_path / "notes.txt")


def test_a_url_has_to_be_one() -> None:
    with pytest.raises(InvalidOption, match="http"):
        DemoConfig(url="localhost:8000")


def test_a_taken_port_is_named_before_anything_is_loaded() -> None:
    with serving(fake_app()) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(InvalidOption, match=f"{port} address already in use; choose another"):
            run_demo(DemoConfig(url="http://127.0.0.1:9", port=port))


@pytest.mark.usefixtures("no_outbound")
def test_the_page_gives_away_no_files_and_names_no_other_host(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    with demo_app(DemoConfig(url="http://127.0.0.1:9")) as app, serving(app) as url, httpx.Client(base_url=url) as http:
        html = http.get("/").text
        assert re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(?:https?:)?//", html) == []
        for path in (secret, Path("/etc/passwd"), Path(__file__), SAMPLES_FOLDER / "make.py"):
            response = http.get(f"/gradio_api/file={path}")
            assert response.status_code in (403, 404)
        for path in ("/", "/config", "/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/upload"):
            for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}):
                assert http.post(path, headers=headers, json={}).status_code == 403
                assert http.get(path, headers=headers).status_code == 403
        policy = http.get("/").headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "http:" not in policy
        config = json.dumps(http.get("/config").json())
        assert '"analytics_enabled": false' in config
