"""With any drafter the answer is the answer without: token for token, greedy and sampled, whatever else is asked.

Prompts, reducers, shapes of drafts and schedules are drawn at random; drafters say what is true or false, or fail.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

import mm
from mm.api import build_request
from mm.config import SpeculationLimits
from mm.data.outputs import Delta, Summary
from mm.data.request import Request, SpeculationOptions
from mm.errors import InvalidRequest, MmError
from mm.plugins import registry as plugins
from tests.helpers.checkpoints import random_llava, random_qwen2_5_vl
from tests.helpers.drafters import TRUTH
from tests.helpers.speculating import draft_at_random, learn_truths

STAGES = ("pre_llm", "in_prefill", "in_decode")
REDUCERS = [
    name
    for name in plugins.names("reducer")
    if name != "pipeline"
    and plugins.get("reducer", name).acts_at[0].value in STAGES
    and not getattr(plugins.get("reducer", name), "trained", False)  # tests/parity/test_dynamic.py drafts under those
]
QUESTIONS = (
    "Describe the picture.",
    "red blue red blue red blue red",
    "What is left of it? left left",
    "1 2 3 1 2 3 1 2",
)


pytestmark = pytest.mark.usefixtures("wild")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_llava(tmp_path_factory.mktemp("llava"), width=48, num_layers=4, num_heads=4, num_kv_heads=2)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)


FORMS = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.2, "top_k": 20, "frequency_penalty": 0.4, "presence_penalty": 0.3},
    {"repetition_penalty": 1.4, "logprobs": True, "top_logprobs": 3},
    {"temperature": 0.7, "n": 3},
    {"stop": ["e"], "min_tokens": 3},
    {"temperature": 1.0, "logit_bias": {5: 8.0, 7: -100.0}},
    {"response_format": {"type": "json_object"}},
)


def requests(count: int, seed: int, forms=FORMS, reducers=REDUCERS, length: int = 16) -> list[Request]:
    rng = random.Random(seed)
    made = []
    for i in range(count):
        options = {"temperature": 0.0, "max_new_tokens": rng.randint(1, length), "seed": rng.randrange(10**6)}
        options |= rng.choice(forms)
        options["max_new_tokens"] = max(options["max_new_tokens"], options.get("min_tokens", 1))
        images = [picture(rng.randrange(4)) for _ in range(rng.randint(0, 2))]
        made.append(
            build_request(
                rng.choice(QUESTIONS) + " " + str(i),
                images=images,
                reducer=rng.choice(reducers),
                ignore_eos="response_format" not in options and rng.random() < 0.8,
                **options,
            )
        )
    return made


def answers(model: mm.Model, asked: list[Request]) -> list[tuple]:
    """Tokens, text, log-probabilities and reasons of every answer; the cache is in order afterwards."""
    found: dict[int, tuple] = {}
    for number, outcome in model.run_batch(asked):
        assert not isinstance(outcome, MmError), outcome
        answer = mm.api.collect(iter(outcome))
        logprobs = tuple(tuple(one.token_id for one in choice) for choice in answer.logprobs)
        found[number] = (answer.token_ids, answer.texts, answer.finish_reasons, logprobs)
        assert answer.usage.num_completion_tokens == sum(map(len, answer.token_ids))
    model.engine.cache.check(model.engine.prefix_cache.held)
    return [found[i] for i in range(len(asked))]


def load(folder, spec: str = "none", **options) -> mm.Model:
    limits = {name: options.pop(name) for name in ("control", "max_draft_tokens", "drafters") if name in options}
    return mm.load(folder, dtype="float32", speculation=SpeculationLimits(drafter=spec, **limits), **options)


WILD = (
    "wild:truth=0.0,shape=tree",
    "wild:truth=0.0,shape=chain",
    "wild:truth=1.0,shape=chain",
    "wild:truth=0.7,shape=tree",
    "wild:truth=0.6,shape=any,seed=3",
)


def test_no_drafter_changes_an_answer(folder):
    asked = requests(60, seed=0)
    plain = load(folder)
    expected = answers(plain, asked)
    learn_truths(plain, asked, [tokens for tokens, *_ in expected])
    for spec in (*WILD, "copy", "recycle", "copy + recycle"):
        drafted = load(folder, spec, control=spec == "copy + recycle", max_draft_tokens=12)
        assert answers(drafted, asked) == expected, spec
        stats = drafted.engine.stats.spec_decode
        assert stats.num_faults == 0
        assert stats.num_draft_tokens > 0 or spec == "copy + recycle", spec  # control may say that it does not pay
        if spec == "wild:truth=1.0,shape=chain":
            assert stats.mean_acceptance_length > 3
        if "truth=0.0" in spec:
            assert stats.acceptance_rate < 0.1
        for session_count in (getattr(s.loaded, "num_open", 0) for s in drafted.engine.spec_decoder._drafters.active):
            assert session_count == 0, "a session was never closed"


def test_a_drafter_that_fails_costs_its_drafts_and_nothing_else(folder):
    asked = requests(20, seed=1)
    expected = answers(load(folder), asked)
    drafted = load(folder, "wild:failing=0.3", control=False, max_num_seqs=2)
    assert answers(drafted, asked) == expected
    assert drafted.engine.stats.spec_decode.num_faults > 3


@pytest.mark.parametrize("tight", [{"max_batch_tokens": 24}, {"max_num_seqs": 3}, {"kv_cache_gb": 0.0001}])
def test_no_schedule_changes_an_answer(folder, tight):
    """Small passes, few slots, and a cache so small that answers are pushed out and come back."""
    asked = requests(24, seed=2, length=40, reducers=["none", "uniform"])
    plain = load(folder)
    expected = answers(plain, asked)
    learn_truths(plain, asked, [tokens for tokens, *_ in expected])
    drafted = load(folder, "wild:truth=0.6,shape=any", control=False, **tight)
    assert answers(drafted, asked) == expected
    if "kv_cache_gb" in tight:
        assert drafted.engine.stats.num_preemptions > 0, "nobody was pushed out: the cache is too large for this test"
    if "max_batch_tokens" in tight:
        assert max(i for i, n in enumerate(drafted.engine.stats.step_tokens.counts) if n) <= 5, "a pass was too large"


def test_multi_axis_positions_with_trees(tmp_path):
    folder = random_qwen2_5_vl(tmp_path / "qwen")
    asked = requests(16, seed=4, reducers=["none", "uniform"])
    expected = answers(load(folder), asked)
    assert answers(load(folder, "wild:truth=0.6,shape=tree", control=False), asked) == expected


def test_cancelling_in_the_middle_frees_everything(folder):
    model = load(folder, "copy + recycle", control=False)
    asked = requests(12, seed=5, length=40)
    for i, request in enumerate(asked):
        stream = model.run(request)
        for _ in itertools.islice(stream, i % 5):
            pass
        stream.close()
    model.engine.prefix_cache.clear()
    model.engine.cache.check()
    assert model.engine.cache.num_used_bytes == 0


def test_drafters_see_the_states_they_ask_for(folder):
    """Rows in order, none twice, with the state that transformers has there; and the last one gave the last token."""
    num_whole = 0
    names = "hidden:1|last_hidden|top_ids:4"
    asked = [
        build_request(
            f"red blue red blue {i}",
            images=[picture(i)],
            reducer=reducer,
            temperature=0.0,
            max_new_tokens=12,
            ignore_eos=True,
        )
        for i, reducer in enumerate(("none", "fastv", "none", "uniform:keep_ratio=0.5"))
    ]
    model = load(
        folder, f"wild:states={names},truth=0.8,shape=tree", control=False, max_batch_tokens=64, prefix_caching=False
    )
    learn_truths(model, asked, [tokens for tokens, *_ in answers(load(folder), asked)])
    answers(model, asked)
    loaded = next(s.loaded for s in model.engine.spec_decoder._drafters.active if s.spec.startswith("wild"))
    head = model.engine.family.language.head_weight
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).model.language_model
    for prompt in {id(prompt): prompt for prompt, _ in loaded.seen}.values():
        seen = [observation for other, observation in loaded.seen if other is prompt]
        assert seen[0].is_prompt
        assert not any(one.is_prompt for one in seen[1:])
        rows = torch.cat([one.token_indices for one in seen])
        assert (rows[1:] > rows[:-1]).all()
        assert rows[-1] < prompt.length + 12
        text = (~prompt.is_visual).nonzero().squeeze(1)
        assert set(text.tolist()) <= set(rows.tolist())
        for one in seen:
            count = len(one.token_ids)
            states = one.hidden["last_hidden"][-count:]
            assert (states @ head.T).argmax(-1).tolist() == list(one.token_ids)
            assert (
                one.hidden["hidden:1"].shape
                == one.hidden["last_hidden"].shape
                == (len(one.token_indices), head.shape[1])
            )
            assert one.step_top_ids is not None
            assert one.step_top_ids[-count:, 0].tolist() == list(one.token_ids)
            assert one.num_accepted == (0 if one.is_prompt else count - 1)
        said = torch.tensor([token for one in seen for token in one.token_ids])[:-1]
        whole = torch.cat([prompt.embeddings, reference.get_input_embeddings()(said)]).unsqueeze(0)
        behind = torch.arange(prompt.next_position, prompt.next_position + len(said))
        places = torch.cat([prompt.positions[0], behind]).unsqueeze(0)
        with torch.no_grad():
            expected = reference(inputs_embeds=whole, position_ids=places, output_hidden_states=True)
        early = torch.cat([one.hidden["hidden:1"] for one in seen])
        torch.testing.assert_close(early, expected.hidden_states[1][0, rows], atol=1e-4, rtol=1e-4)
        if len(rows) == whole.shape[1]:  # FastV drops later, so there only the first layers see all
            last = torch.cat([one.hidden["last_hidden"] for one in seen])
            torch.testing.assert_close(last, expected.last_hidden_state[0, rows], atol=1e-4, rtol=1e-4)
            num_whole += 1
    assert num_whole == 3


def test_states_are_those_of_their_rows_however_late_a_drafter_is_asked(folder, monkeypatch):
    asked = [
        build_request(f"red blue {i}", images=[picture(i % 2)], temperature=0.0, max_new_tokens=40, ignore_eos=True)
        for i in range(12)
    ]
    truths = [tokens for tokens, *_ in answers(load(folder), asked)]
    draft_at_random(monkeypatch)
    model = load(folder, "wild:states=last_hidden,truth=0.5,shape=chain", prefix_caching=False)
    learn_truths(model, asked, truths)
    assert [tokens for tokens, *_ in answers(model, asked)] == truths
    loaded = next(s.loaded for s in model.engine.spec_decoder._drafters.active if s.spec.startswith("wild"))
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).model.language_model
    num_late = 0
    for prompt in {id(prompt): prompt for prompt, _ in loaded.seen}.values():
        seen = [observation for other, observation in loaded.seen if other is prompt]
        said = TRUTH[tuple(prompt.token_ids.tolist())][0]
        whole = torch.cat([prompt.embeddings, reference.get_input_embeddings()(torch.tensor(said))]).unsqueeze(0)
        places = torch.arange(whole.shape[1]).unsqueeze(0)
        with torch.no_grad():
            expected = reference(inputs_embeds=whole, position_ids=places).last_hidden_state[0]
        assert seen[0].is_prompt
        assert seen[0].token_indices.tolist() == list(range(len(seen[0].token_indices)))
        assert len(seen[0].token_indices) >= prompt.length
        rows = torch.cat([one.token_indices for one in seen])
        assert (rows[1:] > rows[:-1]).all()
        num_late += len(rows) < prompt.length + sum(len(one.token_ids) for one in seen) - 1
        torch.testing.assert_close(
            torch.cat([one.hidden["last_hidden"] for one in seen]), expected[rows], atol=1e-4, rtol=1e-4
        )
    assert num_late > 3, "too few were asked when tokens had come that nothing was kept of"


def test_drafters_pay_for_being_asked_and_for_the_states_they_watch(folder, monkeypatch):
    """By the engine's clock a question takes a second, a pass ten, and nothing else takes any time."""
    model = load(folder, "wild:states=last_hidden,truth=0.0")
    now, asked, watched, bills = [0.0], [], [], []
    (source,) = (one for one in model.engine.spec_decoder._drafters.active if one.spec != "none")

    def timed(function, seconds: float, calls: list):
        def slow(*args, **more):
            now[0] += seconds
            calls.append(1)
            return function(*args, **more)

        return slow

    monkeypatch.setattr(model.engine.spec_decoder, "clock", lambda: now[0])
    monkeypatch.setattr(source, "clock", lambda: now[0])
    runner = model.engine._decoders._runners[""]
    monkeypatch.setattr(runner, "forward", timed(runner.forward, 10.0, []))
    monkeypatch.setattr(source.controller, "should_propose", timed(source.controller.should_propose, 1.0, asked))
    monkeypatch.setattr(source.controller, "record_capture", timed(source.controller.record_capture, 0.0, watched))
    monkeypatch.setattr(source.controller, "record_cost", lambda seconds, **of_what: bills.append(seconds))
    answers(model, requests(6, seed=3, forms=({},)))
    assert sum(bills) == len(asked) > 0
    assert len(watched) > 6


def test_a_request_chooses_within_what_is_allowed(folder):
    model = load(folder, "wild", drafters=("copy:min_match=1",), control=False, max_draft_tokens=6)
    question = {"prompt": "red blue red blue red", "temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True}

    def drafted(**speculation) -> int:
        before = model.engine.stats.spec_decode.num_draft_tokens
        events = list(model.run(build_request(**question, speculation=SpeculationOptions(**speculation))))
        after = model.engine.stats.spec_decode.num_draft_tokens
        usage = next(event.usage for event in events if isinstance(event, Summary))
        assert usage.num_accepted_tokens + usage.num_rejected_tokens == after - before
        assert sum(e.num_drafted for e in events if isinstance(e, Delta)) == usage.num_accepted_tokens
        return after - before

    assert drafted(drafter="none") == 0
    assert drafted(max_draft_tokens=0) == 0
    assert drafted() > 0
    assert drafted(drafter="copy:min_match=1") != drafted(drafter="wild")
    assert 0 < drafted(max_draft_tokens=1) <= 12
    for wrong in (
        {"drafter": "hybrid"},
        {"drafter": "copy:min_match=9"},
        {"max_draft_tokens": 7},
        {"drafter": "nothing"},
    ):
        with pytest.raises(InvalidRequest, match="speculation"):
            drafted(**wrong)
    with pytest.raises(InvalidRequest, match="max_draft_tokens was -1"):
        SpeculationOptions(max_draft_tokens=-1)


def test_control_leaves_short_answers_alone_where_the_first_draft_costs_a_prompt(folder):
    def drafts(num_tokens: int, spec: str, **options) -> int:
        model = load(folder, spec, **options)
        request = build_request("red blue", max_new_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        answers(model, [request])
        return model.engine.stats.spec_decode.num_drafts

    reads_states = "wild:states=last_hidden,truth=0.5,shape=chain"
    short = 3
    assert drafts(short, reads_states) == 0
    assert drafts(short, reads_states, control=False) > 0
    assert drafts(16, reads_states) > 0


def test_with_control_true_drafts_are_verified_and_change_nothing(folder):
    """One answer at a time and many together; what is true pays even for a model this small."""
    asked = requests(24, seed=8, length=40)
    plain = load(folder)
    expected = answers(plain, asked)
    learn_truths(plain, asked, [tokens for tokens, *_ in expected])
    drafted = load(folder, "wild:truth=1.0,shape=chain", max_draft_tokens=12)
    assert [found for one in asked for found in answers(drafted, [one])] == expected
    assert drafted.engine.stats.spec_decode.mean_acceptance_length > 3
    assert answers(drafted, asked) == expected
