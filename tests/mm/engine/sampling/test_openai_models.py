"""Every kind of model that OpenAI's documentation of structured outputs shows: its answers are taken, and no others."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Any, Literal

import pytest
from openai.lib._parsing._completions import type_to_response_format_param
from pydantic import BaseModel, ConfigDict, Field

from mm.engine.sampling.structured_output import GrammarMatcher, compile_matcher
from mm.engine.sampling.vocabulary import Vocabulary
from mm.errors import SchemaNotFulfilled
from tests.helpers.checkpoints import tokenizer
from tests.mm.engine.sampling.test_structured_output import EOS, form


class CalendarEvent(BaseModel):
    name: str
    date: str
    participants: list[str]


class Step(BaseModel):
    explanation: str
    output: str


class MathReasoning(BaseModel):
    steps: list[Step]
    final_answer: str


class ResearchPaperExtraction(BaseModel):
    title: str
    authors: list[str]
    abstract: str
    keywords: list[str]


class UIType(StrEnum):
    div = "div"
    button = "button"
    header = "header"


class Attribute(BaseModel):
    name: str
    value: str


class UI(BaseModel):
    type: UIType
    label: str
    children: list[UI]
    attributes: list[Attribute]


class Response(BaseModel):
    ui: UI


class Category(StrEnum):
    violence = "violence"
    sexual = "sexual"
    self_harm = "self_harm"


class ContentCompliance(BaseModel):
    is_violating: bool
    category: Category | None
    explanation_if_violating: str | None


class Table(StrEnum):
    orders = "orders"
    customers = "customers"


class Operator(StrEnum):
    eq = "="
    gt = ">"
    ne = "!="


class DynamicValue(BaseModel):
    column_name: str


class Condition(BaseModel):
    column: str
    operator: Operator
    value: str | int | DynamicValue


class Query(BaseModel):
    table_name: Table
    columns: list[str]
    conditions: list[Condition]
    order_by: Literal["asc", "desc"]


class LinkedListNode(BaseModel):
    value: float
    next: LinkedListNode | None


class LinkedList(BaseModel):
    linked_list: LinkedListNode


class Bounds(BaseModel):
    """The keywords that the documentation lists for strings, numbers and arrays."""

    model_config = ConfigDict(extra="forbid")
    username: str = Field(pattern=r"^@[a-zA-Z0-9_]+$", description="The username of the user. Must start with @")
    unit: Literal["F", "C"]
    temperature: float = Field(ge=-130, le=130)
    count: int = Field(gt=0, lt=10, multiple_of=3)
    tags: list[str] = Field(min_length=1, max_length=2)


class User(BaseModel):
    name: str
    age: int


class Address(BaseModel):
    number: str
    street: str
    city: str


class Item(BaseModel):
    item: User | Address


class Entities(BaseModel):
    attributes: list[str]
    colors: list[str]
    animals: list[str]


EVENT = {"name": "Science fair", "date": "Friday", "participants": ["Alice", "Bob"]}
LEAF = {"type": "button", "label": "Go", "children": [], "attributes": []}
TREE = {"type": "div", "label": "", "children": [LEAF], "attributes": [{"name": "id", "value": "a"}]}
QUERY = {"table_name": "orders", "columns": ["id"], "conditions": [], "order_by": "asc"}
BOUNDS = {"username": "@a_1", "unit": "C", "temperature": -12.5, "count": 6, "tags": ["a"]}


def with_(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in (document | changes).items() if value is not ...}


CASES: dict[type[BaseModel], tuple[list[Any], list[Any]]] = {
    CalendarEvent: ([EVENT, with_(EVENT, participants=[])], [with_(EVENT, date=...), with_(EVENT, more=1), [], "x"]),
    MathReasoning: (
        [{"steps": [{"explanation": "8x = -30", "output": "x = -3.75"}], "final_answer": "x = -15/4"}],
        [{"steps": [{"explanation": "8x = -30"}], "final_answer": "x"}, {"steps": [], "final_answer": 1}],
    ),
    ResearchPaperExtraction: (
        [{"title": "T", "authors": ["A"], "abstract": 'a "quoted" line\n', "keywords": ["k"]}],
        [{"title": "T", "authors": "A", "abstract": "", "keywords": []}],
    ),
    Response: (
        [{"ui": TREE}, {"ui": with_(TREE, children=[TREE, with_(LEAF, type="header")])}],
        [{"ui": with_(TREE, children=[with_(LEAF, type="img")])}, {"ui": with_(LEAF, children=[{}])}],
    ),
    ContentCompliance: (
        [
            {"is_violating": True, "category": "violence", "explanation_if_violating": "It shows a fight."},
            {"is_violating": False, "category": None, "explanation_if_violating": None},
        ],
        [
            {"is_violating": "no", "category": None, "explanation_if_violating": None},
            {"is_violating": True, "category": "other", "explanation_if_violating": ""},
        ],
    ),
    Query: (
        [
            with_(QUERY, conditions=[{"column": "a", "operator": "!=", "value": value}])
            for value in ("x", 3, {"column_name": "b"})
        ],
        [with_(QUERY, order_by="up"), with_(QUERY, conditions=[{"column": "a", "operator": "<", "value": 1}])],
    ),
    LinkedList: (
        [{"linked_list": {"value": 1, "next": {"value": 2.5, "next": None}}}],
        [{"linked_list": {"value": 1}}, {"linked_list": {"value": 1, "next": {"value": "2", "next": None}}}],
    ),
    Bounds: (
        [BOUNDS, with_(BOUNDS, temperature=130, tags=["a", "b"])],
        [
            with_(BOUNDS, username="a"),
            with_(BOUNDS, unit="K"),
            with_(BOUNDS, temperature=131),
            with_(BOUNDS, count=5),
            with_(BOUNDS, count=12),
            with_(BOUNDS, tags=[]),
            with_(BOUNDS, tags=["a", "b", "c"]),
        ],
    ),
    Item: (
        [{"item": {"name": "Jo", "age": 9}}, {"item": {"number": "1", "street": "s", "city": "c"}}],
        [{"item": {"name": "Jo", "city": "c"}}, {"item": None}],
    ),
    Entities: ([{"attributes": [], "colors": ["red"], "animals": ["fox"]}], [{"attributes": [], "colors": []}]),
}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    fast = tokenizer().backend_tokenizer
    return Vocabulary(fast, fast.get_vocab_size() + 7, [EOS])


def is_taken(matcher: GrammarMatcher, text: str, vocabulary: Vocabulary) -> bool:
    """Whether a model may answer with this text, token after token, and then end."""
    for token in vocabulary.tokenizer.encode(text, add_special_tokens=False).ids:
        if not matcher.allowed(vocabulary.size)[token]:
            return False
        matcher.consume(token)
    if not (matcher.is_stopped or matcher.allowed(vocabulary.size)[EOS]):
        return False
    try:
        matcher.check(text)
    except SchemaNotFulfilled:
        return False
    return True


@pytest.mark.parametrize("model", CASES, ids=lambda model: model.__name__)
def test_answers_of_the_documentations_models_are_taken_and_no_others(vocabulary, model: Any) -> None:
    sent: Any = type_to_response_format_param(model)
    matcher = compile_matcher(form(sent["json_schema"]["schema"]), vocabulary)
    right, wrong = CASES[model]
    for document in right:
        text = json.dumps(document)
        assert is_taken(matcher.copy(), text, vocabulary), text
        assert model.model_validate_json(text).model_dump(mode="json") == document
    for document in wrong:
        assert not is_taken(matcher.copy(), json.dumps(document), vocabulary), document
