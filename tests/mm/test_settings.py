"""Settings: one declaration, one range check, and flat names for what lies in nested dataclasses."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mm
from mm.config import ModelConfig, SpeculationLimits, model_config
from mm.errors import InvalidOption
from mm.settings import build, check_settings, setting, settings_of
from serve.config import ServeConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = setting(4, min=1, max=9, help="Size.")
    share: float | None = setting(None, above=0, help="Share.", cli="inner_share")

    def __post_init__(self) -> None:
        check_settings(self, "test")


@dataclass(frozen=True, kw_only=True)
class Outer:
    mode: Literal["a", "b"] = setting("a", help="Mode.")
    names: tuple[str, ...] = setting((), help="Names.")
    inner: Inner = Inner()

    def __post_init__(self) -> None:
        check_settings(self, "test")


@given(st.integers())
def test_a_range_is_checked_wherever_the_value_comes_from(size: int) -> None:
    made = [outcome(lambda: Inner(size=size)), outcome(lambda: build(Outer, {"size": size}, "test").inner)]
    expected = Inner() if size == 4 else None
    if 1 <= size <= 9:
        assert made == [dataclasses.replace(expected or Inner(), size=size)] * 2
    else:
        assert made == [f"test: option 'size' was {size}; it has to be 1 to 9"] * 2


def outcome(make: Any) -> Any:
    try:
        return make()
    except InvalidOption as error:
        return str(error)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": "4"}, "test: option 'size' was '4'; it has to be a whole number, 1 to 9"),
        ({"size": True}, "test: option 'size' was True; it has to be a whole number, 1 to 9"),
        ({"inner_share": 0}, "test: option 'share' was 0; it has to be above 0"),
        ({"inner_share": float("nan")}, "test: option 'share' was nan; it has to be above 0"),
        ({"mode": "c"}, "test: option 'mode' was 'c'; allowed: a, b"),
        ({"names": "a"}, "test: option 'names' was 'a'; it has to be a list of texts"),
        ({"sise": 4}, "test: option 'sise' is unknown; did you mean 'size'?"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    assert outcome(lambda: build(Outer, values, "test")) == message


def test_flat_names_reach_nested_dataclasses() -> None:
    made = build(Outer, {"names": ["x"], "size": 2, "share": 0.5}, "test")
    assert made == Outer(names=("x",), inner=Inner(size=2, share=0.5))
    assert build(Outer, {"inner_share": 0.5}, "test") == build(Outer, {"share": 0.5}, "test")


def test_a_whole_dataclass_and_single_settings_of_it_go_together() -> None:
    limits = SpeculationLimits(control=False, max_draft_tokens=3)
    config = model_config(speculation=limits, drafter="copy", allow_drafter=["recycle"])
    assert config.speculation == dataclasses.replace(limits, drafter="copy", drafters=("recycle",))


def test_two_settings_of_one_name_are_refused() -> None:
    @dataclass(frozen=True)
    class Twice:
        size: int = setting(1, help="Size.")
        inner: Inner = Inner()

    with pytest.raises(TypeError, match="two settings named size"):
        settings_of(Twice)


@pytest.mark.parametrize("cls", [ModelConfig, ServeConfig])
def test_every_field_is_a_setting_or_holds_some(cls: type) -> None:
    """So that help, ranges, the file and the environment know all of them."""
    known = {one.path[0] for one in settings_of(cls)}
    assert known == {one.name for one in dataclasses.fields(cls)}
    for one in settings_of(cls):
        assert one.bounds.help.endswith(".")
        assert one.problem(one.default) is None


def test_load_names_the_nearest_setting() -> None:
    with pytest.raises(InvalidOption, match="'max_num_sqs' is unknown; did you mean 'max_num_seqs'"):
        mm.load("tiny", max_num_sqs=4)


def test_values_are_refused_before_torch_is_imported() -> None:
    code = (
        "import sys\nfrom serve.cli.app import main\nsys.argv = ['mm', 'serve', '--max-num-seqs', '0']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.stdout, run.stderr) == (
        "1 False\n",
        "mm: model: option 'max_num_seqs' was 0; it has to be at least 1\n",
    )
