"""Drafting as clients see it: the same answers, what of them was drafted, what is refused, and what is counted."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from mm.config import ModelConfig, SpeculationLimits
from serve.api.routes import create_app
from serve.config import ServeConfig
from serve.stages import build_local_runtime

PATH = "/v1/chat/completions"
SAMPLE = Path(__file__).parents[2] / "demos" / "samples" / "many_shapes.png"
LIMITS = SpeculationLimits(drafter="flash", drafters=("copy", "recycle"), max_draft_tokens=6, control=False)
MODEL = ModelConfig(dtype="float32", num_threads=1, speculation=LIMITS)
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def drafting() -> AsyncIterator[httpx.AsyncClient]:
    config = ServeConfig(model=MODEL)
    runtime = build_local_runtime(config)
    transport = httpx.ASGITransport(app=create_app(runtime, config))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=600) as client:
        yield client
    runtime.close()


@pytest.fixture
def describe(ask) -> Any:
    """A body that asks for a caption of a sample."""
    from tests.journey.conftest import data_url

    url = data_url(SAMPLE.read_bytes())
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Describe the picture."}]

    def body(**fields: Any) -> dict[str, Any]:
        return ask(content, **{"max_tokens": 40, "temperature": 0, "seed": 5} | fields)

    return body


async def posted(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    response = await client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = await client.post(PATH, json=body | options)
    assert response.text.endswith("data: [DONE]\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]


def drafted(answer: dict[str, Any]) -> tuple[int, int]:
    """Tokens accepted and rejected."""
    details = answer["usage"]["completion_tokens_details"]
    return details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1, "n": 2}, {"stop": ["."]}, {"logprobs": True}])
async def test_a_drafter_changes_nothing_of_an_answer(drafting, describe, sampling) -> None:
    none = {"drafter": "none"}
    plain = await posted(drafting, describe(speculation=none, **sampling))
    assert drafted(plain) == (0, 0)
    asked = [None, {"max_draft_tokens": 2}, {"drafter": "copy"}, {"drafter": "recycle"}, none]
    bodies = [describe(**sampling, **({"speculation": one} if one else {})) for one in asked]
    answers = await asyncio.gather(*(posted(drafting, body) for body in bodies))
    for answer in answers:
        assert [c["message"] for c in answer["choices"]] == [c["message"] for c in plain["choices"]]
        assert [c["finish_reason"] for c in answer["choices"]] == [c["finish_reason"] for c in plain["choices"]]
        assert answer["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
    assert drafted(answers[0])[0] > 0
    assert sum(drafted(answers[-1])) == 0


async def test_it_says_which_text_was_drafted(drafting, describe) -> None:
    body = describe(speculation={"return_accepted": True}, temperature=1, n=2)
    whole, chunks = await asyncio.gather(posted(drafting, body), streamed(drafting, body))
    reported, last = whole["speculation"], chunks[-1]["speculation"]
    assert set(reported) == {"drafts", "mean_acceptance_length", "pieces"}
    for choice, runs in zip(whole["choices"], reported["pieces"], strict=True):
        assert "".join(run["text"] for run in runs) == choice["message"]["content"]
        kinds = [run["accepted_tokens"] == run["tokens"] for run in runs]
        assert kinds == [run["accepted_tokens"] > 0 for run in runs], "a run of both kinds"
        assert all(a != b for a, b in itertools.pairwise(kinds)), "two runs of one kind side by side"
    runs = [run for runs in reported["pieces"] for run in runs]
    accepted, rejected = drafted(whole)
    assert sum(run["tokens"] for run in runs) == whole["usage"]["completion_tokens"]
    assert sum(run["accepted_tokens"] for run in runs) == accepted > 0
    assert reported["mean_acceptance_length"] == pytest.approx(1 + accepted / reported["drafts"], abs=1e-4)
    assert reported["drafts"] <= accepted + rejected
    # the same, piece by piece
    assert last == {name: reported[name] for name in ("drafts", "mean_acceptance_length")}
    assert drafted(chunks[-1]) == (accepted, rejected)
    for choice, runs in enumerate(reported["pieces"]):
        own = [c for c in chunks if c["choices"] and c["choices"][0]["index"] == choice and "speculation" in c]
        tokens = [token for run in runs for token in [run["accepted_tokens"] > 0] * run["tokens"]]
        assert [bool(chunk["speculation"]["accepted_tokens"]) for chunk in own] == tokens
        text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in own)
        assert text == whole["choices"][choice]["message"]["content"]


async def test_accepted_tokens_are_sent_only_on_request(drafting, describe) -> None:
    assert "speculation" not in await posted(drafting, describe(max_tokens=4))
    assert not any("speculation" in chunk for chunk in await streamed(drafting, describe(max_tokens=4)))
    reported = await posted(drafting, describe(speculation={"drafter": "none", "return_accepted": True}, max_tokens=4))
    assert reported["speculation"]["mean_acceptance_length"] is None
    assert [[run["accepted_tokens"] for run in runs] for runs in reported["speculation"]["pieces"]] == [[0]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("speculation", "param", "text"),
    [
        ({"drafter": "eagle"}, "speculation.drafter", "this server allows: none, flash, copy, recycle"),
        ({"drafter": "copy:min_match=7"}, "speculation.drafter", "this server allows"),
        ({"drafter": "coppy"}, "speculation.drafter", "did you mean 'copy'"),
        ({"drafter": ""}, "speculation.drafter", "at least 1 character"),
        ({"max_draft_tokens": 7}, "speculation.max_draft_tokens", "up to 6"),
        ({"max_draft_tokens": -1}, "speculation.max_draft_tokens", "greater than or equal to 0"),
        ({"max_draft_tokens": 2.5}, "speculation.max_draft_tokens", "integer"),
        ({"drafer": "copy"}, "speculation.drafer", "did you mean 'drafter'"),
        ("copy", "speculation", "dictionary"),
    ],
)
async def test_what_the_operator_does_not_allow_is_refused(drafting, describe, speculation, param, text, stream):
    response = await drafting.post(PATH, json=describe(speculation=speculation, stream=stream))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert text in error["message"]


async def test_the_metrics_count_what_was_drafted(drafting, describe) -> None:
    async def figures() -> dict[str, float]:
        lines = (await drafting.get("/metrics")).text.splitlines()
        found = (line.rpartition(" ") for line in lines if "spec_decode" in line and not line.startswith("#"))
        return {name.replace('model_name="tiny"', "").replace("{}", ""): float(value) for name, _, value in found}

    before = await figures()
    answer = await posted(drafting, describe(speculation={"return_accepted": True}))
    moved = {name: value - before[name] for name, value in (await figures()).items()}
    accepted, rejected = drafted(answer)
    assert moved["vllm:spec_decode_num_drafts_total"] == answer["speculation"]["drafts"] > 0
    assert moved["vllm:spec_decode_num_draft_tokens_total"] == accepted + rejected
    assert moved["vllm:spec_decode_num_accepted_tokens_total"] == accepted > 0
    by_depth = [moved[f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{,position="{i}"}}'] for i in range(6)]
    assert sum(by_depth) == accepted
    assert by_depth == sorted(by_depth, reverse=True)
    assert moved["mm:spec_decode_emitted_tokens_total"] == answer["usage"]["completion_tokens"]
    assert moved["mm:spec_decode_target_steps_total"] == answer["usage"]["completion_tokens"] - accepted
    assert moved["mm:spec_decode_draft_seconds_total"] > 0
    assert moved["mm:spec_decode_verify_seconds_total"] > 0
    assert moved["mm:spec_decode_faults_total"] == 0


async def test_the_model_card_names_the_drafters(drafting) -> None:
    card = (await drafting.get("/v1/models/tiny")).json()
    assert card["default_drafter"] == "flash"
    assert card["drafters"] == ["none", "flash", "copy", "recycle"]
