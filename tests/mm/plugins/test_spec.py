"""The text form of reducers and drafters."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.config import ModelConfig
from mm.errors import BrokenPlugin, InvalidOption
from mm.plugins.spec import (
    RATIO_REDUCER,
    build_reducer,
    configured_reducer,
    drafter_spec,
    parse_spec,
    reducer_or_default,
    reducer_spec,
)
from pruning.pre_llm.divprune import DivPrune
from pruning.pre_llm.uniform import Uniform
from tests.helpers.distributions import registered


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("divprune", [("divprune", {})]),
        ("divprune:keep_ratio=0.25", [("divprune", {"keep_ratio": 0.25})]),
        (" random : seed=3 , keep_ratio=1 ", [("random", {"seed": 3, "keep_ratio": 1})]),
        ("uniform:keep_ratio=0.5 + divprune", [("uniform", {"keep_ratio": 0.5}), ("divprune", {})]),
        ("x:a=true,b=None,c=word", [("x", {"a": True, "b": None, "c": "word"})]),
        ("x:a=[1,2],b=[]", [("x", {"a": [1, 2], "b": []})]),
    ],
)
def test_specifications_are_read(spec, parts):
    assert list(parse_spec(spec)) == parts


@pytest.mark.parametrize(
    "spec", ["", " ", "+", "divprune +", ":keep_ratio=1", "divprune:keep_ratio", "divprune:=1", "x:a=1,a=2"]
)
def test_what_is_no_specification_is_refused(spec):
    with pytest.raises(InvalidOption):
        parse_spec(spec)


@pytest.mark.parametrize(
    ("spec", "canonical", "before_decoder"),
    [
        ("none", "none", "none"),
        ("uniform", "uniform:keep_ratio=0.25", "uniform:keep_ratio=0.25"),
        ("random : seed=7,keep_ratio=1", "random:keep_ratio=1.0,seed=7", "random:keep_ratio=1.0,seed=7"),
        ("fastv", "fastv:joint=false,keep_ratio=0.5,layer=2", "none"),
        (
            "uniform:keep_ratio=0.5 + pyramiddrop:at_layers=[2,4],num_stages=2",
            "uniform:keep_ratio=0.5 + pyramiddrop:at_layers=[2,4],keep_ratio=0.125,num_stages=2",
            "uniform:keep_ratio=0.5",
        ),
        ("none + fastv:layer=3", "none + fastv:joint=false,keep_ratio=0.5,layer=3", "none"),
    ],
)
def test_canonical_forms(spec, canonical, before_decoder):
    found = reducer_spec(spec)
    assert (found.canonical, found.before_decoder) == (canonical, before_decoder)
    assert reducer_spec(canonical).canonical == canonical
    assert build_reducer(canonical) == found.plugin


def test_a_drafter_s_canonical_form():
    found = drafter_spec("copy:min_match=3 + recycle")
    assert found.canonical.startswith("copy:factor=0.0,max_match=0,min_match=3,")
    assert drafter_spec(found.canonical).plugin == found.plugin
    assert [part.name for part in found.parts] == ["copy", "recycle"]


@given(st.floats(0.01, 1))
def test_a_budget_beside_the_text_replaces_the_one_in_it(ratio):
    assert reducer_spec("uniform:keep_ratio=0.5", ratio).plugin == Uniform(keep_ratio=ratio)
    assert reducer_spec("uniform:keep_ratio=0.5").plugin == Uniform(keep_ratio=0.5)


@pytest.mark.parametrize("spec", ["none", "pool2", "uniform + fastv"])
def test_a_budget_that_nothing_has_is_refused(spec):
    with pytest.raises(InvalidOption, match="keep_ratio"):
        reducer_spec(spec, 0.5)


@pytest.mark.parametrize(
    ("named", "default", "expected"),
    [
        (None, "none", DivPrune(keep_ratio=0.5)),
        (None, "pool2", DivPrune(keep_ratio=0.5)),
        (None, "uniform + divprune", DivPrune(keep_ratio=0.5)),
        (None, "uniform:keep_ratio=0.1", Uniform(keep_ratio=0.5)),
        ("uniform", "divprune", Uniform(keep_ratio=0.5)),
    ],
)
def test_a_budget_alone_is_for_the_default_or_for_divprune(named, default, expected):
    assert reducer_or_default(named, default, 0.5).plugin == expected
    with pytest.raises(InvalidOption, match="keep_ratio"):
        reducer_or_default("none", default, 0.5)


def test_every_encoder_supplies_what_the_reducer_of_a_budget_needs():
    capabilities = reducer_spec(RATIO_REDUCER).capabilities
    assert not capabilities.needs
    assert not capabilities.needs_grid
    assert capabilities.kinds == {"image", "video"}


@pytest.mark.parametrize("reducer", ["none", "uniform"])
def test_a_configured_budget_is_that_of_requests_that_name_nothing(reducer):
    found = configured_reducer(ModelConfig(reducer=reducer, keep_ratio=0.5)).plugin
    assert found == (Uniform(keep_ratio=0.5) if reducer == "uniform" else DivPrune(keep_ratio=0.5))


def test_true_is_no_budget_even_when_one_was_asked_for_before():
    assert reducer_spec("uniform", 1.0).plugin == Uniform(keep_ratio=1.0)
    with pytest.raises(InvalidOption, match="keep_ratio"):
        reducer_spec("uniform", True)


@dataclass(frozen=True, kw_only=True)
class Brittle(Uniform):
    """Fails when it is built."""

    size: int = 4

    def __post_init__(self) -> None:
        _ = [0][self.size]


def test_a_plugin_that_cannot_be_built_is_named(tmp_path):
    with registered(tmp_path / "more", "reducer", {"brittle": "tests.mm.plugins.test_spec:Brittle"}):
        with pytest.raises(BrokenPlugin, match="'brittle' cannot be used: building it raised IndexError"):
            reducer_spec("brittle")
        assert reducer_spec("brittle:size=0").canonical == "brittle:keep_ratio=0.25,size=0"
