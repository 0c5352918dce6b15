"""Answers of a given form: they parse, whatever the model would rather say."""

from __future__ import annotations

import json
import random
import threading
import time
from typing import Any

import jsonschema
import pytest
import torch

import mm
from mm.data.response_format import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH, ResponseFormat
from mm.data.sampling_params import SamplingParams
from mm.engine.sampling import structured_output as structured
from mm.engine.sampling.resolved_params import ResolvedSamplingParams
from mm.engine.sampling.sample import sample
from mm.engine.sampling.sampler import SampledToken, Sampler
from mm.engine.sampling.structured_output import GrammarCompiler, GrammarMatcher, compile_matcher
from mm.engine.sampling.vocabulary import Vocabulary
from mm.errors import CapacityError, EngineError, InvalidRequest
from tests.helpers.checkpoints import tokenizer

EOS = 2
BOUNDED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "bleu\u00e9"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "note": {"type": "string", "maxLength": 8},
        "sides": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        "code": {"type": "string", "pattern": "^[a-f]{2}[0-9]$"},
    },
    "required": ["colour", "count", "note", "sides", "code"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    fast = tokenizer().backend_tokenizer
    return Vocabulary(fast, fast.get_vocab_size() + 7, [EOS])


@pytest.fixture(scope="module")
def model() -> mm.Model:
    return mm.load("tiny")


def form(schema: Any) -> ResponseFormat:
    found = ResponseFormat.parse({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert found is not None
    return found


def matcher_of(schema: Any, vocabulary: Vocabulary) -> GrammarMatcher:
    return compile_matcher(form(schema), vocabulary)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_shipped_model_keeps_to_a_schema_it_never_saw(model, temperature):
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": BOUNDED}}
    texts = []
    for seed in range(1 if temperature == 0 else 3):
        answer = model.generate(
            "What?",
            temperature=temperature,
            seed=seed,
            n=1 if temperature == 0 else 4,
            max_new_tokens=400,
            response_format=response_format,
        )
        assert set(answer.finish_reasons) == {"stop"}
        texts += answer.texts
    for text in texts:
        jsonschema.validate(json.loads(text), BOUNDED)
    assert len(set(texts)) > (0 if temperature == 0 else 9)


def random_answer(sampler: Sampler, vocab: int, generator: torch.Generator, limit: int = 600) -> list[int] | None:
    """What a model of random logits answers; None if the limit cuts it."""
    ids: list[int] = []
    while not sampler.is_complete:
        (chosen,) = sample(torch.randn(1, vocab, generator=generator), [sampler], [len(ids)])
        assert isinstance(chosen, SampledToken)
        if sampler.ends(chosen.token_id):
            return ids
        sampler.observe(chosen.token_id)
        ids.append(chosen.token_id)
        if len(ids) == limit:
            return None
    return ids


SCHEMAS: dict[str, Any] = {
    "bounded": BOUNDED,
    "string": {"type": "string", "maxLength": 5},
    "number": {"type": "number", "minimum": -1, "maximum": 1},
    "choice": {"anyOf": [{"const": None}, {"const": "a\nb"}, {"type": "array", "maxItems": 2, "items": {"const": 1}}]},
    "own separators": {
        "x-guidance": {"item_separator": ";", "whitespace_pattern": "[ ]*"},
        "type": "array",
        "items": {"const": 1},
        "minItems": 2,
        "maxItems": 2,
    },
}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS.keys())
def test_random_logits_give_valid_json(vocabulary, schema):
    compiler = GrammarCompiler(vocabulary)
    for seed in range(25):
        params = ResolvedSamplingParams(temperature=1.0, seed=seed, ending_token_ids=frozenset({EOS}), min_tokens=seed)
        sampler = Sampler(params, matcher=compiler.matcher(form(schema)))
        ids = random_answer(sampler, vocabulary.size, torch.Generator().manual_seed(seed))
        assert ids is not None
        jsonschema.validate(json.loads(vocabulary.tokenizer.decode(ids)), schema)
    compiler.close()


def test_any_object_is_an_object(vocabulary):
    compiler = GrammarCompiler(vocabulary)
    finished = 0
    for seed in range(40):
        params = ResolvedSamplingParams(temperature=1.0, seed=seed, ending_token_ids=frozenset({EOS}))
        sampler = Sampler(params, matcher=compiler.matcher(ResponseFormat(kind="json_object")))
        ids = random_answer(sampler, vocabulary.size, torch.Generator().manual_seed(seed))
        if ids is not None:
            finished += 1
            assert isinstance(json.loads(vocabulary.tokenizer.decode(ids)), dict)
    assert finished > 3
    compiler.close()


def test_the_end_is_allowed_only_when_the_answer_is_complete(vocabulary):
    matcher = matcher_of({"type": "array", "items": {"type": "integer"}}, vocabulary)
    for token in "[12":
        assert not matcher.allowed(vocabulary.size)[EOS]
        assert not matcher.is_stopped
        matcher.consume(vocabulary.tokenizer.token_to_id(token))
    matcher.consume(vocabulary.tokenizer.token_to_id("]"))
    assert matcher.is_stopped
    assert matcher.allowed(vocabulary.size).nonzero()[0].tolist() == [EOS]


def test_special_tokens_and_rows_without_a_token_are_never_text(vocabulary):
    allowed = matcher_of({"type": "string"}, vocabulary).allowed(vocabulary.size)
    special = [i for i, token in vocabulary.tokenizer.get_added_tokens_decoder().items() if token.special]
    assert not allowed[special].any()
    assert not allowed[-7:].any()


def test_a_grammar_row_comes_out_alone_as_in_a_batch(vocabulary):
    compiler = GrammarCompiler(vocabulary)
    rng = random.Random(1)
    logits = torch.randn(12, vocabulary.size, generator=torch.Generator().manual_seed(1))
    all_params = [
        ResolvedSamplingParams(temperature=rng.choice([0.0, 1.0]), seed=i, ending_token_ids=frozenset({EOS}))
        for i in range(12)
    ]
    forms = [
        form(BOUNDED) if i % 3 == 0 else ResponseFormat(kind="json_object") if i % 3 == 1 else None for i in range(12)
    ]
    samplers = [Sampler(r, matcher=f and compiler.matcher(f)) for r, f in zip(all_params, forms, strict=True)]
    alone = [sample(logits[i : i + 1], [samplers[i]], [0])[0] for i in range(12)]
    order = rng.sample(range(12), 12)
    assert sample(logits[order], [samplers[i] for i in order], [0] * 12) == [alone[i] for i in order]
    compiler.close()


def test_a_new_matcher_that_observed_the_same_tokens_is_its_equal(vocabulary):
    compiler = GrammarCompiler(vocabulary)
    params = ResolvedSamplingParams(temperature=1.0, seed=7, ending_token_ids=frozenset({EOS}))
    ids = random_answer(Sampler(params, matcher=compiler.matcher(form(BOUNDED))), vocabulary.size, torch.Generator())
    assert ids is not None
    for cut in range(0, len(ids), 5):
        first, again = compiler.matcher(form(BOUNDED)), compiler.matcher(form(BOUNDED))
        for token_id in ids[:cut]:
            first.allowed(vocabulary.size)
            first.consume(token_id)
            again.consume(token_id)
        assert (first.allowed(vocabulary.size) == again.allowed(vocabulary.size)).all()
    compiler.close()


def test_a_token_that_is_not_allowed_costs_its_own_row(vocabulary):
    broken = Sampler(ResolvedSamplingParams(), matcher=matcher_of({"type": "integer"}, vocabulary))
    broken.observe(vocabulary.tokenizer.token_to_id("x"))
    logits = torch.zeros(2, vocabulary.size)
    bad, good = sample(logits, [broken, Sampler(ResolvedSamplingParams())], [1, 1])
    assert isinstance(bad, EngineError)
    assert good == SampledToken(0)


def test_min_tokens_gives_way_where_only_the_end_is_left(vocabulary):
    params = ResolvedSamplingParams(min_tokens=50, ending_token_ids=frozenset({EOS}))
    sampler = Sampler(params, matcher=matcher_of({"const": 7}, vocabulary))
    sampler.observe(vocabulary.tokenizer.token_to_id("7"))
    assert sample(torch.zeros(1, vocabulary.size), [sampler], [1]) == [SampledToken(EOS)]


def test_min_tokens_goes_on_where_the_grammar_can(vocabulary):
    params = ResolvedSamplingParams(min_tokens=5, ending_token_ids=frozenset({EOS}), logit_bias=((EOS, 100.0),))
    sampler = Sampler(params, matcher=matcher_of({"type": "string", "maxLength": 100}, vocabulary))
    ids = random_answer(sampler, vocabulary.size, torch.Generator().manual_seed(0))
    assert ids is not None
    number = Sampler(params, matcher=matcher_of({"type": "integer"}, vocabulary))
    assert len(random_answer(number, vocabulary.size, torch.Generator().manual_seed(0)) or ()) == 5


def refusal(schema: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        form(schema)
    assert caught.value.param == "response_format.json_schema.schema"
    return caught.value


def test_schemas_are_bounded_in_bytes_and_depth():
    nested: Any = True
    for _ in range(MAX_SCHEMA_DEPTH):
        nested = {"a": nested}
    assert str(MAX_SCHEMA_DEPTH) in str(refusal(nested))
    assert form(nested["a"]).kind == "json_schema"
    assert str(MAX_SCHEMA_BYTES) in str(refusal({"description": "x" * MAX_SCHEMA_BYTES}))
    assert str(MAX_SCHEMA_BYTES) in str(refusal({"enum": list(range(MAX_SCHEMA_BYTES))}))
    again: Any = {}
    for _ in range(30):
        again = {"a": again, "b": again}
    assert str(MAX_SCHEMA_BYTES) in str(refusal(again))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 999_983},
        {"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]},
        {"allOf": [{"multipleOf": 0.00001}, {"multipleOf": 7}]},
        {"multipleOf": 1e300},
        {"multipleOf": 10**400},
    ],
)
def test_multiples_that_would_fill_the_memory_are_refused(schema):
    assert "multipleOf" in str(refusal(schema))


@pytest.mark.parametrize("value", [0.01, 5, 1000, 1e-9])
def test_ordinary_multiples_are_taken(value):
    assert form({"multipleOf": value}).schema == json.dumps({"multipleOf": value}, separators=(",", ":"))


@pytest.mark.parametrize(
    "schema", [{"$ref": "#"}, {"$dynamicRef": "#a", "x-guidance": {"lenient": True}}, {"type": "objec"}]
)
def test_what_cannot_be_compiled_is_refused(vocabulary, schema):
    with pytest.raises(InvalidRequest, match="cannot be used") as caught:
        compile_matcher(form(schema), vocabulary)
    assert "\n" not in str(caught.value)


def test_a_slow_schema_is_refused_at_the_deadline_and_others_get_their_turn(vocabulary, monkeypatch):
    release = threading.Event()

    def slow(form: ResponseFormat, vocabulary: Vocabulary) -> Any:
        release.wait(20)
        return compile_matcher(form, vocabulary)

    monkeypatch.setattr(structured, "compile_matcher", slow)
    compiler = GrammarCompiler(vocabulary, deadline_s=0.2)
    start = time.monotonic()
    for i in range(structured.NUM_COMPILERS):
        with pytest.raises(InvalidRequest, match=r"limit of 0\.2 seconds") as caught:
            compiler.matcher(form({"const": i}))
        assert caught.value.param == "response_format.json_schema.schema"
    with pytest.raises(CapacityError):
        compiler.matcher(form({"const": "late"}))
    assert time.monotonic() - start < 5
    release.set()
    compiler.close()


def test_a_schema_is_compiled_once_and_the_least_used_are_forgotten(vocabulary, monkeypatch):
    compiled = []

    def counted(form: ResponseFormat, vocabulary: Vocabulary) -> Any:
        compiled.append(form)
        return compile_matcher(form, vocabulary)

    monkeypatch.setattr(structured, "compile_matcher", counted)
    monkeypatch.setattr(structured, "NUM_CACHED", 2)
    compiler = GrammarCompiler(vocabulary)
    for value in (1, 1, 2, 1, 3, 1, 2):
        compiler.matcher(form({"const": value}))
    assert [json.loads(f.schema or "")["const"] for f in compiled] == [1, 2, 3, 2]
    compiler.close()


@pytest.mark.parametrize("value", [None, {"type": "text"}])
def test_plain_text_is_no_form(value):
    assert SamplingParams(response_format=value).response_format is None
