"""JSON schemas beyond the grammar: what OpenAI's clients send is taken, and every answer fulfils the whole schema."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from openai.lib._parsing._completions import type_to_response_format_param
from pydantic import AnyUrl as Url
from pydantic import BaseModel, Field, TypeAdapter
from pydantic.dataclasses import dataclass

import mm
from mm.engine.sampling.resolved_params import ResolvedSamplingParams
from mm.engine.sampling.sampler import Sampler
from mm.engine.sampling.schema_check import SchemaCheck, relaxed
from mm.engine.sampling.structured_output import compile_matcher
from mm.engine.sampling.vocabulary import Vocabulary
from mm.errors import InvalidRequest, SchemaNotFulfilled
from tests.helpers.checkpoints import tokenizer
from tests.mm.engine.sampling.test_structured_output import EOS, form, random_answer


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    fast = tokenizer().backend_tokenizer
    return Vocabulary(fast, fast.get_vocab_size() + 7, [EOS])


Short = Annotated[str, Field(max_length=3)]
Digit = Annotated[int, Field(ge=0, le=9)]


class Colour(StrEnum):
    red = "red"
    blue = "blue"


class Step(BaseModel):
    """A step of a proof, as in OpenAI's guide."""

    explanation: Short
    output: Short


class Reasoning(BaseModel):
    steps: Annotated[list[Step], Field(max_length=2)]
    final_answer: Short


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Digit


class Dog(BaseModel):
    kind: Literal["dog"]
    name: Short


class Owner(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    other: Cat | Dog | None = None


class Palette(BaseModel):
    colours: Annotated[set[Colour], Field(max_length=2)]
    grid: Annotated[list[Annotated[list[Digit], Field(max_length=2)]], Field(max_length=2)]
    pair: tuple[Digit, bool]


class Leaf(BaseModel):
    type: Literal["leaf"]
    value: Digit


class Branch(BaseModel):
    type: Literal["branch"]
    parts: Annotated[list[Annotated[Leaf | Branch, Field(discriminator="type")]], Field(max_length=1)]


class Ui(BaseModel):
    """A tree that refers to itself, as in OpenAI's guide."""

    label: Short
    children: Annotated[list[Ui], Field(max_length=1)]


class Price(BaseModel):
    amount: Digit
    note: Annotated[str, Field(max_length=3, pattern="^[a-f]*$")] | None = Field(default=None, description="any note")


@dataclass
class Point:
    x: Digit
    y: Digit


MODELS = [Step, Reasoning, Owner, Palette, Branch, Ui, Price, Point]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_the_sdk_s_parse_works_with_a_model(vocabulary, model: Any) -> None:
    schema = type_to_response_format_param(model)["json_schema"]["schema"]  # type: ignore[index]
    matcher = compile_matcher(form(schema), vocabulary)
    num_parsed = 0
    for seed in range(40):
        params = ResolvedSamplingParams(temperature=1.0, seed=seed, ending_token_ids=frozenset({EOS}))
        copy = matcher.copy()
        ids = random_answer(Sampler(params, matcher=copy), vocabulary.size, torch.Generator().manual_seed(seed))
        if ids is None:
            continue
        text = vocabulary.tokenizer.decode(ids)
        try:
            copy.check(text)
        except SchemaNotFulfilled:
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(json.loads(text), schema)
            continue
        TypeAdapter(model).validate_json(text)
        num_parsed += 1
    assert num_parsed > 5


INTEGER, TEXT = {"type": "integer"}, {"type": "string"}
BEYOND: dict[str, tuple[dict[str, Any], str, str]] = {
    "not": ({"type": "integer", "not": {"const": 3}}, "4", "3"),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, "[1, 2, true]", "[1, 2, 1.0]"),
    "nested uniqueItems": (
        {"type": "array", "uniqueItems": True},
        '[{"a": 1}, {"a": 2}]',
        '[{"a":1,"b":2},{"b":2,"a":1}]',
    ),
    "if": ({"type": "integer", "if": {"minimum": 5}, "then": {"multipleOf": 5}}, "10", "7"),
    "else": ({"type": "integer", "if": {"minimum": 5}, "else": {"const": 1}}, "1", "3"),
    "dependentRequired": ({"type": "object", "dependentRequired": {"a": ["b"]}}, '{"b": 1}', '{"a": 1}'),
    "dependentSchemas": ({"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}}, "{}", '{"a": 1}'),
    "propertyNames": ({"type": "object", "propertyNames": {"maxLength": 1}}, '{"a": 1}', '{"ab": 1}'),
    "contains": ({"type": "array", "contains": INTEGER}, '["a", 1]', '["a"]'),
    "maxContains": ({"type": "array", "contains": INTEGER, "maxContains": 1}, "[1]", "[1, 2]"),
    "oneOf that overlaps": ({"oneOf": [{"type": "number"}, INTEGER]}, "1.5", "1"),
    "minProperties": (
        {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}, "minProperties": 1},
        '{"a": 1}',
        "{}",
    ),
    "look-ahead": ({"type": "string", "pattern": "^(?!x)"}, '"a"', '"x"'),
    "unevaluatedProperties": (
        {"type": "object", "allOf": [{"properties": {"a": INTEGER}}], "unevaluatedProperties": False},
        '{"a": 1}',
        '{"b": 1}',
    ),
    "inside another": ({"type": "array", "items": {"not": {"const": 0}}}, "[1]", "[1, 0]"),
    "inside a definition": ({"$defs": {"x": {"not": {"const": 0}}}, "items": {"$ref": "#/$defs/x"}}, "[1]", "[0]"),
    "additionalProperties": (
        {"properties": {"a": {}}, "patternProperties": {"^b": {}}, "additionalProperties": False, "not": {"const": 1}},
        '{"a": 1, "b2": 1}',
        '{"c": 1}',
    ),
}


@pytest.mark.parametrize(("schema", "right", "wrong"), BEYOND.values(), ids=BEYOND.keys())
def test_what_the_grammar_lacks_is_checked_at_the_end(vocabulary, schema, right, wrong) -> None:
    matcher = compile_matcher(form(schema), vocabulary)
    matcher.check(right)
    with pytest.raises(SchemaNotFulfilled, match="does not fulfil"):
        matcher.check(wrong)
    matcher.check(wrong[: len(wrong) - 1] if len(wrong) > 1 else "")  # cut by max_tokens: nothing to check


@pytest.mark.parametrize("name", ["not", "uniqueItems", "if", "$ref", "pattern"])
def test_names_of_properties_and_values_are_no_keywords(name) -> None:
    schema = {"type": "object", "properties": {name: {"enum": [{name: {"not": 1}}]}}, "required": [name]}
    assert relaxed(schema) == (schema, False)


@pytest.mark.parametrize("format_", ["binary", "password", "decimal", "uri-reference", "made-up"])
def test_formats_that_are_not_enforced_are_annotations(vocabulary, format_) -> None:
    compile_matcher(form({"type": "string", "format": format_}), vocabulary)


@pytest.mark.parametrize(
    "schema",
    [
        {"not": 5},
        {"type": "array", "uniqueItems": "yes"},
        {"if": []},
        {"type": "string", "pattern": "(?=(", "not": {}},
        {"patternProperties": {"^a": {}}, "unevaluatedProperties": False},
        {"not": {"$ref": "http://127.0.0.1:1/x"}},
        {"not": {"$ref": "#/$defs/absent"}},
    ],
)
def test_what_cannot_be_checked_is_refused(vocabulary, schema) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compile_matcher(form(schema), vocabulary)
    assert caught.value.param == "response_format.json_schema.schema"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.sampled_from([0.0, 1.5, "a", "ab"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("schema", [schema for schema, _, _ in BEYOND.values()], ids=BEYOND.keys())
@given(value=VALUES)
def test_the_check_agrees_with_jsonschema(schema, value) -> None:
    is_valid = jsonschema.Draft202012Validator(schema).is_valid(value)
    try:
        SchemaCheck(schema).check(json.dumps(value))
    except SchemaNotFulfilled:
        assert not is_valid
    else:
        assert is_valid


@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        ({"$defs": {"n": {"oneOf": [{"items": {"$ref": "#/$defs/n"}}] * 2}}, "$ref": "#/$defs/n"},
         "[" * 60 + "]" * 60),
        ({"not": {"pattern": "^(a|aa)+$"}}, json.dumps("a" * 60 + "b")),
        ({"uniqueItems": True, "not": {}}, json.dumps([{"a": i} for i in range(30_000)])),
        ({"not": {"items": {"not": {"items": {}}}}}, "[" * 5000 + "]" * 5000),
    ],
)  # fmt: skip
def test_a_check_has_an_end(schema, answer) -> None:
    """Each of these would take hours, or the whole stack."""
    with pytest.raises(SchemaNotFulfilled):
        SchemaCheck(schema).check(answer)


@dataclasses.dataclass
class Size:
    width: int
    price: Decimal


@pytest.mark.parametrize("model", [Size, Decimal, Url, UUID, datetime, Path, set[int], dict[str, Size], Owner | Ui])
def test_other_types_of_pydantic_are_taken(vocabulary, model) -> None:
    compile_matcher(form(TypeAdapter(model).json_schema()), vocabulary)


def test_an_answer_that_breaks_the_schema_is_an_error_and_no_answer() -> None:
    schema = {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2, "uniqueItems": True}
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with mm.load("tiny") as model:
        with pytest.raises(SchemaNotFulfilled, match="uniqueItems"):
            model.generate("What?", max_new_tokens=50, response_format=response_format)
        schema["uniqueItems"] = False
        answer = model.generate("What?", max_new_tokens=50, response_format=response_format)
    assert json.loads(answer.text) == [1, 1]
