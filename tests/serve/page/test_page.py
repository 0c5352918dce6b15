"""The page's logic without a browser, and what its server gives away."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mm.config import ModelConfig, SpeculationLimits
from mm.errors import InvalidOption
from mm.plugins.registry import create, get, names, options_of
from serve.page.choices import ReducerChoice, installed_reducers, option_help, reducer_spec, with_drafters, written
from serve.page.client import Client
from serve.page.form import Form, option_keys
from serve.page.handlers import Handlers, Session
from serve.page.launch import DemoConfig, run_demo, serving
from serve.page.media import NotMedia, preview, read_upload, thumbnail
from serve.page.samples import load_samples
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
    "chosen": '["uniform"]',
    "written": "",
    "keep_ratio": 0.25,
    "drafter": "other",
    "num_frames": 8,
    "seed": 7,
    "temperature": 0.5,
    "max_tokens": 9,
}
OPTIONS = {("random", "seed"): 0, ("deep", "at_layers"): "[]", ("deep", "joint"): False, ("deep", "alpha"): 1.0}


@pytest.fixture
def app() -> Any:
    return fake_app()


@pytest.fixture
def handlers(app: Any) -> Any:
    with serving(app) as url:
        client = Client(url)
        yield Handlers(client, load_samples(), CHOICES)
        client.close()


def ask(handlers: Handlers, options: dict | None = None, session: Session | None = None, **values: Any) -> list[tuple]:
    """What the page shows, step by step; with a session that has answers, as a follow-up."""
    session = session or Session()
    handler = handlers.follow_up if session.exchanges else handlers.ask
    given = [*(FORM | values).values(), *(OPTIONS | (options or {})).values()]

    async def collected() -> list[tuple]:
        return [step async for step in handler(session, *given)]

    return asyncio.run(collected())


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


def test_options_of_the_chosen_reducers_are_sent(handlers: Handlers, app: Any, picture: Path) -> None:
    ask(handlers, {("random", "seed"): 3, ("deep", "alpha"): 9.0}, path=str(picture), chosen='["random","uniform"]')
    assert [body["vision"]["reducer"] for body in app.state.requests] == ["none", "random:seed=3", "uniform"]


def test_only_the_chosen_reducers_options_are_shown(handlers: Handlers) -> None:
    assert option_keys(CHOICES) == list(OPTIONS)
    shown = {
        names: [update["visible"] for update in handlers.show_options(json.dumps(names.split()))]
        for names in ("random", "uniform", "fixed", "random deep")
    }
    # the budget, all options, those of random, those of deep
    assert shown == {
        "random": [True, True, True, False],
        "uniform": [True, False, False, False],
        "fixed": [False, False, False, False],
        "random deep": [True, True, True, True],
    }


def test_installed_reducers_are_offered_with_their_budget() -> None:
    choices = {choice.name: choice for choice in installed_reducers()}
    assert choices["divprune"].has_keep_ratio
    assert "none" not in choices
    assert "pipeline" not in choices


def test_all_questions_differ_in_the_reduction_only(picture: Path) -> None:
    values = FORM | {"chosen": '["uniform", "fixed"]', "written": "random:seed=2\n\n uniform:keep_ratio=0.5 \n"}
    form = Form(**values, options=OPTIONS)
    bodies = [form.asked(side, read_upload(picture)).body("m") for side in form.sides(CHOICES)]
    vision = [body.pop("vision") for body in bodies]
    assert [(one["reducer"], one.get("keep_ratio")) for one in vision] == [
        ("none", None),
        ("uniform", 0.25),
        ("fixed", None),
        ("random:seed=2", None),
        ("uniform:keep_ratio=0.5", None),
    ]
    assert all(body == bodies[0] for body in bodies)
    assert bodies[0]["speculation"]["drafter"] == "other"
    assert (bodies[0]["seed"], bodies[0]["temperature"], bodies[0]["max_tokens"]) == (7, 0.5, 9)


def test_a_method_is_asked_once(picture: Path) -> None:
    form = Form(**FORM | {"chosen": '["fixed"]', "written": "fixed\nnone"}, options=OPTIONS)
    assert [side.reducer for side in form.sides(CHOICES)] == ["none", "fixed"]


def test_the_servers_drafters_can_be_chosen(handlers: Handlers) -> None:
    head, _, *values = handlers.load([])
    drafter = values[5]
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


def busy_and_done(step: tuple) -> list[str]:
    """Per card, what it says."""
    return ["busy" if "mm-busy" in card or "mm-growing" in card else card for card in step[3].split("<section")[1:]]


def test_answers_come_one_after_the_other(handlers: Handlers, picture: Path) -> None:
    steps = [busy_and_done(step) for step in ask(handlers, path=str(picture), chosen='["uniform","random"]')]
    assert steps[0][0] == "busy"
    assert "Next" in steps[0][1]
    done = [step for step in steps if ">none: " in step[0] and step[1] == "busy"]
    assert done
    assert "Next" in done[0][2]
    assert ["none: " in steps[-1][0], ">uniform:<" in steps[-1][1], ">random:<" in steps[-1][2]] == [True, True, True]
    assert all("<svg" in card and "curl" in card for card in steps[-1])


def test_every_side_is_cold_also_when_a_question_is_repeated(handlers: Handlers, app: Any, picture: Path) -> None:
    for _ in range(2):
        ask(handlers, path=str(picture))
    salts = [body["cache_salt"] for body in app.state.requests]
    assert len(set(salts)) == 4


def test_copied_code_has_the_very_request(handlers: Handlers, app: Any, picture: Path) -> None:
    cards = ask(handlers, path=str(picture))[-1][3].split("<section")[1:]
    for card, body in zip(cards, app.state.requests, strict=True):
        assert card.count(body["cache_salt"]) == 3


def test_a_refused_reduction_leaves_the_other_answers(handlers: Handlers, picture: Path) -> None:
    full, refused, uniform = busy_and_done(
        ask(handlers, path=str(picture), written="nonesuch\nuniform:x", chosen="")[-1]
    )
    assert "none: " in full
    assert "No reducer named &#x27;nonesuch&#x27;" in refused
    assert "uniform:" in uniform


def test_a_stopped_answer_closes_its_request_and_asks_no_further_side(
    handlers: Handlers, app: Any, picture: Path
) -> None:
    session = Session()

    async def asked() -> list[tuple]:
        values = [*(FORM | {"path": str(picture), "question": "Go on slowly"}).values(), *OPTIONS.values()]
        steps = []
        async for step in handlers.ask(session, *values):
            steps.append(step)
            if "on on" in step[3]:
                handlers.stop(session)
        return steps

    full, reduced = busy_and_done(asyncio.run(asked())[-1])
    assert "on on" in full
    assert "Stopped." in full
    assert "Stopped before an answer came" in reduced
    assert len(app.state.requests) == 1
    deadline = time.monotonic() + 10
    while app.state.open and time.monotonic() < deadline:
        time.sleep(0.01)
    assert app.state.open == 0
    assert session.exchanges == []


def test_a_follow_up_has_the_turns_and_media_of_each_side(handlers: Handlers, app: Any, picture: Path) -> None:
    session = Session()
    ask(handlers, session=session, path=str(picture))
    last = ask(handlers, session=session, path=str(picture), question="And?", chosen='["uniform","random"]')[-1]
    full, uniform, random = (body["messages"] for body in app.state.requests[2:])
    assert [len(message["content"]) for message in uniform[::2]] == [2, 1]
    assert [full[1]["content"], uniform[1]["content"]] == ["none: What?", "uniform: What?"]
    assert random[1]["content"] == "none: What?"
    assert last[3].count("Its earlier answers are those with every token.") == 1
    assert ">uniform: What?<" in busy_and_done(last)[1]


def test_a_follow_up_may_be_asked_as_soon_as_all_answers_are_seen(handlers: Handlers, picture: Path) -> None:
    session, noted = Session(), []
    values = [*(FORM | {"path": str(picture)}).values(), *OPTIONS.values()]

    async def look() -> None:
        async for step in handlers.ask(session, *values):
            noted.append(("answers." in step[0], len(session.exchanges)))

    asyncio.run(look())
    assert noted[-1] == (True, 1)
    assert set(noted[:-1]) == {(False, 0)}


def test_a_follow_up_with_another_file_brings_it(handlers: Handlers, app: Any, picture: Path, tmp_path: Path) -> None:
    session = Session()
    Image.new("RGB", (64, 64)).save(tmp_path / "other.png")
    ask(handlers, session=session, path=str(picture), chosen="")
    ask(handlers, session=session, path=str(tmp_path / "other.png"), chosen="")
    ask(handlers, session=session, path=str(tmp_path / "other.png"), chosen="")
    messages = app.state.requests[-1]["messages"]
    assert [len(message["content"]) for message in messages[::2]] == [2, 2, 1]
    asked_anew = Session(exchanges=[])
    ask(handlers, session=asked_anew, path=str(picture), chosen="")
    assert len(app.state.requests[-1]["messages"]) == 1


def test_a_follow_up_needs_a_first_answer(handlers: Handlers) -> None:
    async def first() -> tuple:
        return await anext(handlers.follow_up(Session(), *FORM.values(), *OPTIONS.values()))

    assert "no answer yet to follow up on" in asyncio.run(first())[0]


def test_methods_that_do_not_fit_are_no_longer_chosen(handlers: Handlers, picture: Path) -> None:
    choices = [ReducerChoice(name="evs", kinds=("video",)), ReducerChoice(name="pool2"), ReducerChoice(name="uniform")]
    fitting = Handlers(handlers._client, (), choices)
    html, chosen = fitting.fit(str(picture), '["evs", "pool2", "uniform"]')
    assert json.loads(chosen) == ["uniform"]
    assert "For clips only: evs." in html
    assert "pool2 cannot be used with fake, which does not supply: a grid." in html
    assert json.loads(fitting.fit(None, '["evs"]')[1]) == ["evs"]


@pytest.mark.parametrize(
    ("values", "text"), [({}, "Choose a picture"), ({"path": "x.png", "question": " "}, "Write a question")]
)
def test_what_is_missing_is_named(handlers: Handlers, values: dict, text: str) -> None:
    (only,) = ask(handlers, **values)
    assert text in only[0]


def test_the_right_answer_is_shown_for_a_sample_and_its_own_question(handlers: Handlers, picture: Path) -> None:
    samples = load_samples()
    if not samples:
        pytest.skip("demos/samples is not here")
    sample = next(sample for sample in samples if sample.path.suffix == ".png")
    shown = f"The right answer: {sample.answer}"
    assert shown in ask(handlers, path=str(sample.path), question=sample.question)[-1][3]
    assert shown not in ask(handlers, path=str(sample.path), question="Else?")[-1][3]
    assert shown not in ask(handlers, path=str(picture), question=sample.question)[-1][3]


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
