"""Every mode of the engine with every mechanism of a decoder: the answers stay those of transformers' `generate`.

One model per mechanism serves all tests: chunks of odd sizes, prefixes from the cache, sequences that are pushed out,
drafts that are partly right, and several choices.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest

from mm.api import Answer, collect
from mm.config import model_config
from mm.data.request import Request, SpeculationOptions
from mm.encode.pipeline import encode
from mm.errors import InvalidRequest
from serve.api.routes import create_app
from serve.config import ServeConfig
from serve.stages import build_local_runtime
from tests.helpers.distributions import registered
from tests.helpers.drafters import TRUTH
from tests.helpers.engines import Recorder, assert_idle
from tests.helpers.families import write
from tests.helpers.speculating import learn_truths
from tests.parity.test_families import NEW_TOKENS, PICTURES, Both, load, prompt_of, request

MECHANISMS = {
    "qwen3_vl": "DeepStack, positions in 3 axes",
    "cohere2_vision": "windows",
    "gemma3": "image blocks",
    "gemma4": "image blocks in windows, shared keys and values, inputs of each layer",
    "qwen3_vl_moe": "experts",
    "qwen3_5": "gated delta nets",
    "lfm2_vl": "short convolutions",
}
BLOCKS = {"gemma3", "gemma4"}
RECURRENT = {"qwen3_5", "lfm2_vl"}
DRAFTER = "wild:truth=0.6,shape=any,seed=3"
CASES = ("one", "three", "two turns", "repeats")
OPTIONS = {
    "max_batch_tokens": 7,
    "drafters": (DRAFTER, "copy:min_match=1"),
    "control": False,
    "max_draft_tokens": 6,
    "max_num_seqs": 8,
}


@pytest.fixture(scope="module", params=MECHANISMS)
def both(request, tmp_path_factory) -> Iterator[Both]:
    with registered(tmp_path_factory.mktemp("wild"), "drafter", {"wild": "tests.helpers.drafters:Wild"}):
        found = load(request.param, write(request.param, tmp_path_factory.mktemp("family")), **OPTIONS)
        yield found
        assert_idle(found.ours.engine)
        found.ours.close()
        TRUTH.clear()


@pytest.fixture(scope="module")
def expected(both) -> dict[str, list[int]]:
    return {case: both.expected(case) for case in (*CASES, "pictures", "same pictures")}


def drafted(asked: Request, drafter: str) -> Request:
    return replace(asked, speculation=SpeculationOptions(drafter=drafter))


def answers(both: Both, asked: Request) -> list[list[int]]:
    return [list(tokens) for tokens in collected(both, asked).token_ids]


def collected(both: Both, asked: Request) -> Answer:
    return collect(both.ours.run(asked))


def test_odd_chunks_and_prefixes_from_the_cache(both, expected):
    for case in CASES:
        for found in (False, True):
            answer = collected(both, request(case, cache_salt="prefixes"))
            assert list(answer.token_ids[0]) == expected[case], (case, found)
        assert answer.usage.num_cached_tokens > 0 or both.name in BLOCKS, case  # its text before pictures is short


def test_pictures_are_found_for_another_question(both, expected):
    first = collected(both, request("pictures", cache_salt="pictures"))
    again = collected(both, request("same pictures", cache_salt="pictures"))
    assert list(first.token_ids[0]) == expected["pictures"]
    assert list(again.token_ids[0]) == expected["same pictures"]
    if both.name not in BLOCKS:
        last = int(prompt_of(both, "pictures").is_visual.nonzero()[-1])
        assert again.usage.num_cached_tokens >= (last + 1) // 16 * 16 > 0


def test_drafts_change_nothing(both, expected):
    asked = [request(case, cache_salt="drafts") for case in CASES]
    learn_truths(both.ours, asked, [[expected[case]] for case in CASES])
    stats = both.ours.engine.stats.spec_decode
    before = stats.num_draft_tokens, stats.num_accepted_tokens
    for case, one in zip(CASES, asked, strict=True):
        for drafter in (DRAFTER, "copy:min_match=1"):
            assert answers(both, drafted(one, drafter)) == [expected[case]], (case, drafter)
    stats = both.ours.engine.stats.spec_decode
    num_drafted, num_accepted = stats.num_draft_tokens - before[0], stats.num_accepted_tokens - before[1]
    assert 0 < num_accepted < num_drafted


def test_choices_go_their_own_ways(both, expected):
    assert answers(both, request("one", n=2)) == [expected["one"]] * 2
    sampled = request("one", n=3, temperature=1.5, seed=11)
    apart = answers(both, sampled)
    assert len({*map(tuple, apart)}) == 3
    learn_truths(both.ours, [sampled], [apart])
    assert answers(both, drafted(sampled, DRAFTER)) == apart


def test_answers_that_are_pushed_out_go_on(both, expected):
    engine, asked = both.ours.engine, [request(case, cache_salt="pushed out") for case in CASES]
    learn_truths(both.ours, asked, [[expected[case]] for case in CASES])
    feeds = [Recorder() for _ in asked]
    for i, (one, feed) in enumerate(zip(asked, feeds, strict=True)):
        engine.submit(drafted(one, DRAFTER if i % 2 else "none"), encode(one, both.ours.encode_parts), feed)
    count, scheduler = 0, engine._scheduler
    before = scheduler.num_preemptions
    while engine.step():
        count += 1
        if count % 3 == 0 and scheduler.running and scheduler.num_preemptions < before + 20:
            scheduler.preempt(scheduler.running[count % len(scheduler.running)])
    assert scheduler.num_preemptions >= before + 5
    assert [feed.token_ids()[0] for feed in feeds] == [expected[case] for case in CASES]


def test_reducers_that_would_take_tokens_from_a_state_are_refused(both):
    if both.name not in RECURRENT:
        pytest.skip("its layers keep every token")
    for reducer in ("fastv:keep_ratio=0.5", "infinipot:keep_ratio=0.5"):
        with pytest.raises(InvalidRequest, match="a state that every token changes"):
            answers(both, request("one", reducer=reducer))


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_the_same_over_http(both, expected):
    """Asked twice, with two choices and with drafts: the texts are those of the tokens of `generate`."""
    settings = {**OPTIONS, "drafters": ("copy:min_match=1",), "dtype": "float32", "num_threads": 1}
    config = ServeConfig(model=model_config(model=str(both.folder), **settings))
    runtime = build_local_runtime(config)
    text = both.ours.engine.family.text_tokenizer.decode(expected["pictures"], skip_special_tokens=True)
    urls = ["data:image/png;base64," + base64.b64encode(encoded(PICTURES[i])).decode() for i in (0, 1)]
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    body = {
        "model": both.folder.name,
        "messages": [{"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "n": 2,
    }

    async def ask() -> list[Any]:
        transport = httpx.ASGITransport(app=create_app(runtime, config))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=100) as client:
            bodies = [body, body, body | {"speculation": {"drafter": "copy:min_match=1"}}]
            return [await client.post("/v1/chat/completions", json=one) for one in bodies]

    try:
        answers = asyncio.run(ask())
    finally:
        runtime.close()
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert [choice["message"]["content"] for choice in answer.json()["choices"]] == [text] * 2
    if both.name not in BLOCKS:
        assert answers[1].json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
