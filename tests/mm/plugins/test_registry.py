"""The registry: strangers' plugins come in by the same road, and what is wrong with one is told by name."""

import importlib.metadata

import pytest

from mm.errors import InvalidOption, MissingPackage, PluginError, UnknownPlugin
from mm.plugins import registry as plugins
from mm.plugins.registry import create, describe, get, names
from mm.plugins.spec import build_reducer, canonical_spec, parse_spec


@pytest.fixture
def registered(monkeypatch):
    """Registers entry points for one test."""

    def register(*points: tuple[str, str]) -> None:
        found = [importlib.metadata.EntryPoint(name, value, "mm.reducers") for name, value in points]
        monkeypatch.setattr(plugins.importlib.metadata, "entry_points", lambda group: found)
        plugins._entry_points.cache_clear()

    yield register
    monkeypatch.undo()
    plugins._entry_points.cache_clear()


def test_a_missing_package_is_told_and_listing_goes_on(registered, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registered(("stranger", "stranger:Reducer"), ("uniform", "pruning.pre_llm.uniform:Uniform"))
    with pytest.raises(MissingPackage, match="no_such_package_anywhere"):
        get("reducer", "stranger")
    rows = {row["name"]: row for row in describe("reducer")}
    assert "no_such_package_anywhere" in rows["stranger"]["unavailable"]
    assert rows["uniform"]["stage"] == "pre_llm"


def test_listing_names_imports_nothing(registered):
    registered(("stranger", "no_such_module_at_all:Reducer"))
    assert names("reducer") == ["stranger"]


def test_two_plugins_of_one_name_are_an_error(registered):
    registered(("uniform", "pruning.pre_llm.uniform:Uniform"), ("uniform", "stranger:Uniform"))
    with pytest.raises(PluginError, match="two reducers are named 'uniform'"):
        names("reducer")


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("divprune", [("divprune", {})]),
        ("divprune:keep_ratio=0.25", [("divprune", {"keep_ratio": 0.25})]),
        (" random : seed=3 , keep_ratio=1 ", [("random", {"seed": 3, "keep_ratio": 1})]),
        ("uniform:keep_ratio=0.5 + divprune", [("uniform", {"keep_ratio": 0.5}), ("divprune", {})]),
        ("x:a=true,b=None,c=word", [("x", {"a": True, "b": None, "c": "word"})]),
    ],
)
def test_specifications_are_read(spec, parts):
    assert parse_spec(spec) == parts


@pytest.mark.parametrize(
    "spec", ["", " ", "+", "divprune +", ":keep_ratio=1", "divprune:keep_ratio", "divprune:=1", "x:a=1,a=2"]
)
def test_what_is_no_specification_is_refused(spec):
    with pytest.raises(InvalidOption):
        parse_spec(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "none",
        "uniform:keep_ratio=0.3",
        "random:keep_ratio=0.5,seed=7",
        "uniform:keep_ratio=0.5 + divprune:keep_ratio=0.5",
    ],
)
def test_canonical_specifications_read_back_to_equal_reducers(spec):
    reducer = build_reducer(spec)
    assert build_reducer(canonical_spec(reducer)) == reducer
    assert canonical_spec(build_reducer(canonical_spec(reducer))) == canonical_spec(reducer)


def test_mistakes_name_the_nearest():
    with pytest.raises(UnknownPlugin, match="did you mean 'uniform'"):
        create("reducer", "unifrom")
    with pytest.raises(InvalidOption, match="did you mean 'keep_ratio'"):
        create("reducer", "uniform", keepratio=0.5)
    with pytest.raises(InvalidOption, match="options: none"):
        build_reducer("none:keep_ratio=0.5")
