"""What bodies may hold, against Python's own parser."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.errors import InvalidRequest
from serve.api import json_text
from serve.api.json_text import parse_json
from tests.serve.api.test_schema import JSON

TEXTS = st.text(alphabet='\\"{}[],: aé\n', max_size=40)
TRICKY = st.recursive(
    TEXTS | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=9
)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 18])
@given(value=JSON | TRICKY, indent=st.none() | st.just(1), ascii_only=st.booleans())
def test_every_json_text_is_parsed_as_python_parses_it(
    chunk: int, value: Any, indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "CHUNK_BYTES", chunk)
        assert parse_json(text.encode()) == value


def repeats_a_key(text: str) -> bool:
    found = []
    json.loads(text, object_pairs_hook=lambda pairs: found.append(len({key for key, _ in pairs}) < len(pairs)))
    return any(found)


PAIRS = st.recursive(
    st.integers().map(str) | TEXTS.map(json.dumps),
    lambda inner: (
        st.lists(st.tuples(st.sampled_from('ab"\\').map(json.dumps), inner), max_size=3).map(
            lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
        )
        | st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
    ),
    max_leaves=8,
)


@given(PAIRS)
def test_a_key_that_stands_twice_is_refused(text: str) -> None:
    if repeats_a_key(text):
        with pytest.raises(InvalidRequest, match="twice"):
            parse_json(text.encode())
    else:
        assert parse_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize("one", ["1,", "{},", "[],", '{"a":1},', '"x",'])
def test_the_number_of_values_is_bounded(one: str) -> None:
    few, many = (("[" + one * count + "1]").encode() for count in (json_text.MAX_VALUES // 3, json_text.MAX_VALUES))
    assert len(parse_json(few)) == json_text.MAX_VALUES // 3 + 1
    with pytest.raises(InvalidRequest, match="limit of 100000 values"):
        parse_json(many)


def test_commas_inside_a_text_are_no_values() -> None:
    text = '{"a":[1,2]},\\"' * json_text.MAX_VALUES
    assert parse_json(json.dumps({"x": text}).encode()) == {"x": text}
