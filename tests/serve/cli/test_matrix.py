"""The support matrix says what a server would do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import serve.cli.matrix as matrix_module
from mm.errors import PluginError
from mm.plugins.capabilities import capabilities_of, check_compatible
from mm.plugins.registry import get, names
from mm.plugins.spec import ReducerSpec, build_reducer, reducer_spec
from serve.cli.matrix import aligned, matrix_table, support_matrix


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in support_matrix()}


def test_every_reducer_and_every_family_is_in_it(rows: dict[str, dict[str, Any]]) -> None:
    assert set(rows) == set(names("reducer")) - {"pipeline"}
    assert all(set(row["families"]) == set(names("family")) for row in rows.values())


@pytest.mark.parametrize("name", sorted(set(names("reducer")) - {"pipeline"}))
@pytest.mark.parametrize("family", names("family"))
def test_a_cell_is_what_the_check_before_a_request_says(name: str, family: str, rows: dict[str, dict]) -> None:
    reducer, encoder = build_reducer(name), get("encoder", family)
    try:
        check_compatible(reducer, encoder, family)
    except PluginError:
        kinds = set()
    else:
        kinds = set(encoder.kinds) & set(getattr(reducer, "kinds", ("image", "video")))
    cell = rows[name]["families"][family]
    assert set(cell["kinds"]) == kinds
    assert bool(cell["missing"]) == (not kinds)


def test_facts_that_are_known_otherwise(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["none"]["families"]["llava"] == {"kinds": ["image", "video"], "missing": []}
    assert rows["uniform"]["families"]["idefics3"]["kinds"] == ["image"]
    assert rows["fastv"]["query_aware"]
    assert not rows["divprune"]["query_aware"]
    assert rows["mustdrop"]["stages"] == ["pre_llm", "in_prefill", "in_decode"]
    assert rows["evs"]["kinds"] == ["video"]
    assert "text_embeddings" in rows["cdpruner"]["needs"]


def test_a_family_that_lacks_something_is_refused_by_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    blind = SimpleNamespace(provides=frozenset(), kinds=frozenset({"image"}))
    monkeypatch.setattr(matrix_module, "get", lambda kind, name: blind)
    found = {row["name"]: row for row in support_matrix()}
    assert found["visionzip"]["families"]["llava"] == {
        "kinds": [],
        "missing": sorted(build_reducer("visionzip").needs),
    }
    assert found["uniform"]["families"]["llava"]["kinds"] == ["image"]
    assert found["evs"]["families"]["llava"]["missing"] == ["input other than image"]
    assert "visionzip with llava: lacks attention_received, tower_keys" in matrix_table(list(found.values()))


def test_one_that_cannot_be_built_is_reported_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(name: str) -> ReducerSpec:
        if name == "divprune":
            raise PluginError("it needs a package")
        return reducer_spec(name)

    monkeypatch.setattr(matrix_module, "reducer_spec", resolve)
    table = matrix_table(support_matrix())
    assert "divprune: it needs a package" in table
    assert "\nuniform " in table


def test_stages_of_a_pipeline_are_those_of_its_parts() -> None:
    stages = capabilities_of(build_reducer("uniform + fastv")).stages
    assert [stage.value for stage in stages] == ["pre_llm", "in_prefill"]


def test_columns_line_up() -> None:
    assert aligned([["a", "bb", "c"], ["long", "b", ""]]) == ["a     bb  c", "long  b"]
