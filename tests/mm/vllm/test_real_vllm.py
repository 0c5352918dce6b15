"""The installed vLLM against the native engine, on a CPU. It runs where vLLM is: `pytest -m slow tests/mm/vllm`."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json

import httpx
import numpy as np
import PIL.Image
import pytest

import mm
from mm.api import build_request
from mm.config import model_config
from mm.data.tokens import EncodedMedia
from mm.errors import InvalidRequest
from serve.api.routes import create_app
from serve.config import ServeConfig
from serve.stages import build_local_runtime
from tests.helpers.checkpoints import random_llava, random_qwen2_5_vl

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own
]
SETTINGS = {"dtype": "float32", "num_threads": 1}
VLLM = SETTINGS | {"engine": "vllm", "kv_cache_gb": 0.25, "max_num_seqs": 32}
GREEDY = {"temperature": 0.0, "max_new_tokens": 24}
QUESTION = "what colour is the circle?"
NEAR_TIE = 1e-3
"""Difference of log-probabilities at which two engines may choose differently in float32."""


def pictures(*sides: tuple[int, int]) -> list[PIL.Image.Image]:
    rng = np.random.default_rng(11)
    return [PIL.Image.fromarray(rng.integers(0, 256, (*side, 3), dtype=np.uint8)) for side in sides]


PICTURES = pictures((112, 168), (84, 84))
WIDE = {"width": 128, "num_heads": 4, "num_kv_heads": 2}
"""vLLM's attention on a CPU wants heads of 32 at least."""


@pytest.fixture(scope="module", params=["tiny", "llava", "qwen2_vl", "qwen2_5_vl"])
def pair(request, tmp_path_factory):
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    if kind == "tiny":
        folder = "tiny"
    elif kind == "llava":
        random_llava(folder, **WIDE)
    else:
        random_qwen2_5_vl(folder, model_type=kind, **WIDE)
    with mm.load(folder, **SETTINGS) as native, mm.load(folder, **VLLM) as ours:
        yield native, ours


def is_line(model) -> bool:
    return model.engine.family.num_position_rows == 1


def assert_equal_or_near_tie(native, ours, **asked) -> None:
    """Equal tokens, or the first other one is one that the native engine found as probable."""
    expected, found = (model.generate(QUESTION, **GREEDY | asked) for model in (native, ours))
    for one, other in zip(expected.token_ids, found.token_ids, strict=True):
        if one == other:
            continue
        at = next(i for i in range(len(one)) if one[i] != other[i])
        again = native.generate(QUESTION, **GREEDY | asked, logprobs=True, top_logprobs=5).logprobs[0][at]
        values = {top.token_id: top.logprob for top in again.top}
        assert abs(values[one[at]] - values.get(other[at], -99.0)) < NEAR_TIE


ASKED = {
    "text": {},
    "pictures": {"images": PICTURES},
    "again": {"images": PICTURES},
    "n": {"images": PICTURES, "n": 3},
    "stop": {"images": PICTURES, "stop": ["e"]},
    "min_tokens": {"images": PICTURES, "min_tokens": 8},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "bias": {"images": PICTURES, "logit_bias": {40: 5.0, 41: -100}},
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_greedy_answers_are_equal(pair, asked):
    assert_equal_or_near_tie(*pair, **asked)


def test_a_reduced_request_answers_or_is_refused_by_name(pair):
    native, ours = pair
    asked = GREEDY | {"images": PICTURES, "reducer": "divprune:keep_ratio=0.25"}
    if is_line(ours):
        assert_equal_or_near_tie(native, ours, positions="compact", **asked)
        usage = ours.generate(QUESTION, **asked).usage
        assert usage.num_visual_tokens_kept * 4 == usage.num_visual_tokens_in
    else:
        with pytest.raises(InvalidRequest, match="positions in time, height and width"):
            ours.generate(QUESTION, **asked)


def test_schemas_are_kept(pair):
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}, "n": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["color", "n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = pair[1].generate(QUESTION, images=PICTURES, response_format=form, temperature=0.0, max_new_tokens=60)
    found = json.loads(answer.text)
    assert found["color"] in ("red", "blue")
    assert 1 <= found["n"] <= 9


def test_log_probabilities_agree(pair):
    asked = GREEDY | {"images": PICTURES, "logprobs": True, "top_logprobs": 3, "max_new_tokens": 1}
    one, other = (model.generate(QUESTION, **asked).logprobs[0][0] for model in pair)
    assert other.logprob == pytest.approx(one.logprob, abs=1e-3)
    assert [top.token_id for top in other.top] == [top.token_id for top in one.top]


def test_thirty_two_requests_in_flight_and_cancelling(pair):
    ours = pair[1]
    prompts = [{"prompt": f"{i}?", "images": PICTURES[: i % 3]} for i in range(32)]
    expected, found = (model.generate_batch(prompts, **GREEDY) for model in pair)
    num_equal = sum(one.token_ids == other.token_ids for one, other in zip(expected, found, strict=True))
    assert num_equal >= 30, "more than near-ties differ"
    streams = [ours.loop.submit(build_request(QUESTION, ignore_eos=True, max_new_tokens=500), EncodedMedia())]
    ours.loop.step()
    ours.loop.abort(streams[0])
    assert not ours.engine.has_work
    assert not ours.engine._core.engine.has_unfinished_requests()


async def test_the_api_serves_it():
    config = ServeConfig(model=model_config(model="tiny", **VLLM))
    runtime = build_local_runtime(config)
    transport = httpx.ASGITransport(create_app(runtime, config))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "What color is it?"}], "max_tokens": 8}
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=60) as client:
            ask = functools.partial(client.post, "/v1/chat/completions")
            answers = await asyncio.gather(*(ask(json=body | {"n": 1 + i % 2}) for i in range(32)))
            assert {answer.status_code for answer in answers} == {200}
            assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1
            whole = answers[0].json()["choices"][0]["message"]["content"]
            events = [
                line[6:] for line in (await ask(json=body | {"stream": True})).text.splitlines() if line[:6] == "data: "
            ]
            deltas = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
            assert "".join(deltas) == whole
            refused = await ask(json=body | {"vision": {"reducer": "fastv"}})
            assert refused.status_code == 400
            assert "acts inside the decoder" in refused.json()["error"]["message"]
            metrics = (await client.get("/metrics")).text
            assert "vllm:prompt_tokens_total" in metrics
    finally:
        runtime.close()
