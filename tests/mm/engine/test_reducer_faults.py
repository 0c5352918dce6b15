"""A reducer that is at fault costs its own request, and nobody else's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import mm
from mm.config import OnError, ReducerPolicy
from mm.data.tokens import VisualTokens
from mm.encode.pipeline import encode
from mm.encode.policy import check_budget, resolve_reducer
from mm.engine.input_processor import with_positions
from mm.errors import ContextTooLong, InvalidRequest, ReducerFault, ReducerNotAllowed
from mm.models.family import splice
from mm.plugins.apply import reduce_tokens
from mm.plugins.spec import build_reducer, reducer_spec
from pruning.in_vit.tome import ToMe
from tests.helpers.checkpoints import random_qwen2_5_vl
from tests.helpers.distributions import registered
from tests.helpers.faulty import ENTRY_POINTS, HOWS
from tests.parity.test_generate import picture, png

QUESTION = {"prompt": "What is it?", "images": [png(picture(0, (90, 70)))]}
FAULTS = [(name, how) for name in ("outer", "inner", "late") for how in HOWS]
OPTIONS = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True, "logprobs": True}


@pytest.fixture(scope="module", autouse=True)
def strangers(tmp_path_factory):
    """Registers the reducers of tests/helpers/faulty.py beside ours."""
    with registered(tmp_path_factory.mktemp("strangers"), "reducer", ENTRY_POINTS):
        yield


def load(on_error: OnError = "fail"):
    return mm.load("tiny", dtype="float32", num_threads=1, reducers=ReducerPolicy(on_error=on_error), max_num_seqs=4)


def same(answer, alone) -> bool:
    close = [abs(a.logprob - b.logprob) < 1e-4 for a, b in zip(answer.logprobs[0], alone.logprobs[0], strict=True)]
    return answer.token_ids == alone.token_ids and all(close)


@pytest.mark.parametrize("on_error", ["fail", "keep_all"])
def test_the_fault_is_reported_and_neighbours_are_not_touched(on_error):
    model = load(on_error)
    whole = model.generate(**QUESTION, **OPTIONS)
    good = {**QUESTION, "reducer": "fastv:keep_ratio=0.3"}
    alone = model.generate(**good, **OPTIONS)
    faulty = [{**QUESTION, "reducer": f"{name}:how={how}"} for name, how in FAULTS]
    first, *results, last = model.generate_batch([good, *faulty, good], **OPTIONS)
    assert same(first, alone)
    assert same(last, alone)
    assert not first.reducer_faults
    for (name, how), result in zip(FAULTS, results, strict=True):
        report = " ".join(result.reducer_faults) if on_error == "keep_all" else str(result)
        assert report.lower().startswith(f"{name}: "), (name, how, report)
        assert "secret" not in report
        if on_error == "keep_all":
            assert same(result, whole), (name, how)
            assert len(result.reducer_faults) == 1
            assert result.usage.num_visual_tokens_kept == whole.usage.num_visual_tokens_in
        else:
            assert isinstance(result, ReducerFault), (name, how)
    assert not model.engine.stats.num_running
    assert model.engine.stats.kv_usage == 0


def test_a_fault_in_the_tower(monkeypatch):
    def fail(self, keys, count, num_prefix):
        raise RuntimeError("a secret of the plugin")

    monkeypatch.setattr(ToMe, "match", fail)
    with pytest.raises(ReducerFault, match=r"^tome: failed in the tower: RuntimeError$"):
        load().generate(**QUESTION, reducer="tome", max_new_tokens=1)
    answer = load("keep_all").generate(**QUESTION, reducer="tome", max_new_tokens=1)
    assert answer.reducer_faults == ("tome: failed in the tower: RuntimeError",)
    assert answer.usage.num_visual_tokens_kept == 256


def test_what_a_faulty_reducer_left_is_not_cached():
    model = load("keep_all")
    for _ in range(2):
        assert model.generate(**QUESTION, reducer="outer", max_new_tokens=1).reducer_faults


def test_the_operator_s_limits():
    model = load()
    parts = model.encode_parts
    model.encode_parts = replace(parts, policy=ReducerPolicy(allowed=("uniform", "fastv"), min_keep_ratio=0.3))

    def ask(**options):
        return model.generate(**QUESTION, max_new_tokens=1, **options)

    assert ask().reducer == "none"
    assert ask(reducer="uniform:keep_ratio=0.3").usage.num_visual_tokens_kept == 77
    with pytest.raises(ReducerNotAllowed, match="'divprune'; allowed: uniform, fastv"):
        ask(reducer="divprune:keep_ratio=0.5")
    with pytest.raises(ReducerNotAllowed, match=r"keeps 0\.25 .* below 0\.3"):
        ask(reducer="uniform:keep_ratio=0.5 + fastv:keep_ratio=0.5")
    with pytest.raises(ReducerNotAllowed, match="'none'"):
        ask(reducer="none")


@pytest.mark.parametrize(("spec", "least"), [("none", "1"), ("pyramiddrop", "0.125"), ("mustdrop", "an unknown share")])
def test_the_least_share_a_reducer_may_keep(spec, least):
    reducer = reducer_spec(spec)
    check_budget(reducer, ReducerPolicy())
    if spec != "none":
        with pytest.raises(ReducerNotAllowed, match=f"keeps {least} of"):
            check_budget(reducer, ReducerPolicy(min_keep_ratio=0.2))


def spliced(model, **options):
    request = mm.api.build_request(QUESTION["prompt"], images=QUESTION["images"], **options)
    encoded = encode(request, model.encode_parts).items
    spec = resolve_reducer(request.vision, model.encode_parts)
    prompt = model.engine.family.splice(request.messages, [item.tokens for item in encoded])
    return with_positions(prompt, request.vision.positions or spec.capabilities.positions)


def test_compact_positions_count_what_is_left():
    model = load()
    kept = spliced(model, reducer="uniform:keep_ratio=0.25")
    compact = spliced(model, reducer="uniform:keep_ratio=0.25", positions="compact")
    assert compact.positions.tolist() == [list(range(compact.length))]
    assert compact.next_position == compact.length == kept.length == kept.next_position - 192
    assert spliced(model, reducer="compact").next_position == kept.next_position - 128
    assert spliced(model, reducer="compact", positions="kept").next_position == kept.next_position
    chain = spliced(model, reducer="compact + uniform:keep_ratio=0.5")
    assert chain.next_position == chain.length
    reduced = model.generate(**QUESTION, **OPTIONS, reducer="uniform:keep_ratio=0.25")
    counted = model.generate(**QUESTION, **OPTIONS, reducer="uniform:keep_ratio=0.25", positions="compact")
    assert reduced.logprobs != counted.logprobs


def test_positions_as_a_methods_authors_had_them(tmp_path):
    """DivPrune's count anew, FastV's stay; where positions are a grid they stay; PyramidDrop's change in each stage."""
    model = load()
    asked = {**QUESTION, **OPTIONS, "reducer": "divprune:keep_ratio=0.25"}
    published = model.generate(**asked, positions="as_published")
    assert same(published, model.generate(**asked, positions="compact"))
    assert not same(published, model.generate(**asked))
    asked |= {"reducer": "fastv:layer=1"}
    assert same(model.generate(**asked, positions="as_published"), model.generate(**asked))
    asked |= {"reducer": "divprune + pyramiddrop:num_stages=1"}
    assert not same(model.generate(**asked, positions="as_published"), model.generate(**asked, positions="compact"))
    asked |= {"reducer": "divprune + pyramiddrop:num_stages=1,keep_ratio=1.0"}
    assert same(model.generate(**asked, positions="as_published"), model.generate(**asked, positions="compact"))
    qwen = mm.load(random_qwen2_5_vl(tmp_path), dtype="float32")
    asked = {**QUESTION, "reducer": "divprune:keep_ratio=0.5", "max_new_tokens": 2}
    assert qwen.generate(**asked, positions="as_published").token_ids == qwen.generate(**asked).token_ids


def test_the_context_has_to_hold_what_is_left_only():
    model = load()
    room = spliced(model).length + 10
    model.engine.family.max_context_tokens = room
    asked = {**QUESTION, "reducer": "uniform:keep_ratio=0.25", "max_new_tokens": 60, "ignore_eos": True}
    with pytest.raises(ContextTooLong):
        model.generate(**asked)
    assert len(model.generate(**asked, positions="compact").token_ids[0]) == 60


def test_positions_on_a_grid_are_not_counted_through(tmp_path):
    model = mm.load(random_qwen2_5_vl(tmp_path), dtype="float32")
    asked = {**QUESTION, "reducer": "uniform:keep_ratio=0.5", "max_new_tokens": 2}
    with pytest.raises(InvalidRequest, match="time, height and width") as caught:
        model.generate(**asked, positions="compact")
    assert caught.value.param == "vision.positions"
    assert model.generate(**asked, positions="kept").text is not None
    assert model.generate("Hello", positions="compact", max_new_tokens=2).text is not None


def test_decode_goes_on_behind_the_unreduced_grid(tmp_path):
    """Three text tokens, a 2 x 3 grid, two text tokens: half of the grid gone, the next token still stands at 8."""
    family = mm.load(random_qwen2_5_vl(tmp_path), dtype="float32").engine.family
    embeddings = family.language.embed(torch.zeros(6, dtype=torch.int64))
    whole = VisualTokens.full(embeddings, (1, 2, 3), "image")
    half = reduce_tokens(build_reducer("uniform:keep_ratio=0.5"), whole)
    image = family.config.image_token_id
    for tokens, length in ((whole, 11), (half, 8)):
        prompt = splice(
            [25, 26, 27, image, 28, 29], frozenset({image}), [tokens], family.language.embed, family.place, 3
        )
        assert (prompt.length, prompt.next_position) == (length, 8)
        assert prompt.positions[:, -2:].tolist() == [[6, 7]] * 3
        assert prompt.positions[:, 3:-2].amin(dim=1).tolist() == [3, 3, 3]
