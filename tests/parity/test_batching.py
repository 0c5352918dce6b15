"""Whatever else the engine does, a request's float32 tokens are those it gives alone.

Requests of every kind arrive at random over an engine whose cache is too small for all of them: chunks of odd sizes,
preemptions, beginnings that others left, cancellations, several answers each, reducers before, in and behind the
prefill. Alone means an engine of its own with room for everything, one request at a time and nothing shared.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import mm
from mm.data.request import Request
from mm.encode.pipeline import encode
from mm.engine.engine import LLMEngine
from mm.engine.sequence import EngineRequest
from mm.errors import IncompatiblePlugin
from mm.models.checkpoint import find
from mm.plugins.capabilities import check_compatible
from mm.plugins.registry import get, names, options_of
from mm.plugins.spec import build_reducer
from tests.helpers.checkpoints import random_llava, random_qwen2_5_vl
from tests.helpers.engines import KeepEverySecond, Question, Recorder, answer_alone, assert_idle, build

MODELS = {
    "tiny": lambda folder: find("tiny"),
    "llava": lambda folder: random_llava(folder, num_layers=4),
    "qwen2.5-vl": lambda folder: random_qwen2_5_vl(folder, num_layers=4),
}
NUM_QUESTIONS = {"tiny": 18, "llava": 24, "qwen2.5-vl": 24}
REDUCERS = [
    "none",
    "divprune:keep_ratio=0.5",
    "uniform:keep_ratio=0.3",
    "random:keep_ratio=0.6",
    "fastv:keep_ratio=0.5,layer=1",
    "fastv:keep_ratio=0.25,layer=2",
    "divprune:keep_ratio=0.7 + fastv:keep_ratio=0.4,layer=1",
    "pyramiddrop:num_stages=2,at_layers=[1,2]",
    "mustdrop:key_ratio=0,at_layers=[1,2],global_share=0.02,peak=0.05",
    "uniform:keep_ratio=0.8 + divprune:keep_ratio=0.5",
]
MOST_TOKENS = 60
SCENARIOS = [(7, 8, 1.0), (64, 16, 1.3), (48, 5, 1.8), (512, 16, 2.5)]
"""Rows of a pass, answers at a time, and room in the cache: how many of the longest requests."""
EVICTS = "evicts behind the prefill"
TEXTS = ["What is this?", "What is this, and where does it stand? Say it in a few words.", "Hello", "Why?"]
SYSTEM = {"role": "system", "content": "You see pictures and answer questions about them, briefly and to the point."}


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name, tmp_path_factory):
    return mm.load(MODELS[name](tmp_path_factory.mktemp("model")), dtype="float32")


def picture(seed: int) -> np.ndarray:
    size = [(56, 56), (84, 56), (112, 140)][seed % 3]
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def sampling(rng: random.Random) -> dict[str, Any]:
    """Fields of one request; every law is deterministic."""
    fields: dict[str, Any] = {
        "max_new_tokens": rng.choice([1, 5, 20, 40, MOST_TOKENS, MOST_TOKENS]),
        "ignore_eos": rng.random() < 0.8,
    }
    if rng.random() < 0.5:
        fields |= {"temperature": rng.choice([0.7, 1.0, 2.0]), "seed": rng.randrange(1000), "n": rng.choice([1, 2, 3])}
        fields |= rng.choice([{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.01}])
    else:
        fields |= {"temperature": 0, "n": rng.choice([1, 1, 2])}
    if rng.random() < 0.4:
        fields |= rng.choice(
            [
                {"repetition_penalty": 1.3},
                {"presence_penalty": 0.8, "frequency_penalty": 0.4},
                {"logit_bias": {5: 4.0, 9: -100}},
            ]
        )
    if rng.random() < 0.2:
        fields |= {"stop": ["e", "a"], "min_tokens": rng.choice([0, 1])}
    return fields


def request(rng: random.Random, reducer: str) -> Request:
    """A question about none, one or two of few pictures, so that many begin alike."""
    images = [picture(rng.choice([1, 2, 2])) for _ in range(rng.choice([0, 1, 1, 1, 2]))]
    options: dict[str, Any] = {"reducer": "none" if reducer == EVICTS else reducer}
    options |= {"priority": rng.choice([0, 0, 0, -1, 2]), "cache_salt": rng.choice(["", "", "", "other"])}
    text = rng.choice(TEXTS) + (f" {rng.randrange(3)}" * rng.choice([0, 1, 1, 1, 20]))
    if not images and rng.random() < 0.5:
        return mm.api.build_request([SYSTEM, {"role": "user", "content": text}], **options, **sampling(rng))
    return mm.api.build_request(text, images=images, **options, **sampling(rng))


def question(rng: random.Random, model: mm.Model) -> Question:
    spec = rng.choice([*REDUCERS, *["none"] * 4, EVICTS])
    asked = request(rng, spec)
    reducer: Any = KeepEverySecond(rng.choice([0, 1])) if spec == EVICTS else build_reducer(spec)
    return Question(request=asked, encoded=encode(asked, model.encode_parts).items, reducer=reducer)


@dataclass
class Traffic:
    """Questions on their way into an engine, and out of it."""

    engine: LLMEngine
    rng: random.Random
    left: list[int]
    jobs: dict[int, EngineRequest] = field(default_factory=dict)
    sinks: dict[int, Recorder] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    seen: Counter[str] = field(default_factory=Counter)

    def run(self, questions: list[Question]) -> None:
        while self.left or self.engine.has_work:
            while self.left and self.rng.random() < 0.7:
                number = self.left.pop()
                self.jobs[number], self.sinks[number] = questions[number].put_to(self.engine)
            open_ones = [number for number, sink in self.sinks.items() if not sink.num_ends]
            if open_ones and self.rng.random() < 0.02:
                self.cancel(self.rng.choice(open_ones))
            if self.rng.random() < 0.02:
                self.preempt()
            self.engine.step()
            self.seen["most running"] = max(self.seen["most running"], self.engine.stats.num_running)
            self.seen["steps"] += 1
            assert self.seen["steps"] < 10_000, self.engine.stats

    def cancel(self, number: int) -> None:
        self.seen["cancelled in mid-answer"] += bool(self.sinks[number].deltas)
        self.cancelled.add(number)
        self.engine.abort(self.jobs[number])
        assert self.sinks[number].num_ends == 1  # nobody else runs the engine, so at once

    def preempt(self) -> None:
        """As when blocks run out, which in these small scenarios comes too seldom, and never in mid-prompt."""
        if running := self.engine._scheduler.running:
            self.engine._scheduler.preempt(self.rng.choice(running))


def check(number: int, traffic: Traffic, alone: dict[int, list[int]]) -> None:
    sink, asked = traffic.sinks[number], traffic.jobs[number].params
    assert sink.num_ends == 1
    assert sink.error is None
    given = sink.token_ids()
    if number in traffic.cancelled and sink.summary is None:
        assert all(alone[choice][: len(ids)] == ids for choice, ids in given.items())
        return
    assert given == alone, asked
    assert sink.summary is not None
    assert sink.summary.usage.num_completion_tokens == sum(map(len, alone.values()))


def test_tokens_are_those_of_each_request_alone(model, name):
    family, seen = model.engine.family, Counter()
    rng = random.Random(f"questions for {name}")
    questions = [question(rng, model) for _ in range(NUM_QUESTIONS[name])]
    single = build(family, sharing=False, max_num_seqs=3)
    alone = [answer_alone(single, one) for one in questions]
    longest = max(family.splice(q.request.messages, [e.tokens for e in q.encoded]).length for q in questions)
    for seed, (max_num_batched_tokens, max_num_seqs, room) in enumerate(SCENARIOS):
        order = list(range(len(questions)))
        random.Random(seed).shuffle(order)
        limits = {"max_num_batched_tokens": max_num_batched_tokens, "max_num_seqs": max_num_seqs}
        engine = build(family, num_rows=int((longest + MOST_TOKENS) * room), **limits)
        traffic = Traffic(engine, random.Random(seed), order)
        traffic.run(questions)
        for number, tokens in enumerate(alone):
            check(number, traffic, tokens)
        most = max(seen["most running"], traffic.seen.pop("most running"))
        seen.update(traffic.seen)
        seen.update({"preempted": engine.stats.num_preemptions, "rows found": engine.stats.prefix_hits})
        seen["most running"] = most
        assert_idle(engine)
    # What the scenario is about did happen.
    assert seen["most running"] >= 6, seen
    assert seen["preempted"] >= 10, seen
    assert seen["rows found"] >= 48, seen
    assert seen["cancelled in mid-answer"] >= 1, seen


def reducers_with_a_ratio() -> list[str]:
    specs = ["none"]
    plain = [name for name in names("reducer") if not getattr(get("reducer", name), "trained", False)]
    specs += [f"{name}:keep_ratio=1" for name in plain if "keep_ratio" in options_of(get("reducer", name))]
    return [*specs, "uniform:keep_ratio=1 + fastv:keep_ratio=1,layer=1"]


def fits(spec: str, model: mm.Model) -> bool:
    try:
        check_compatible(build_reducer(spec), model.encode_parts.encoder, "the test's model")
    except IncompatiblePlugin:
        return False
    return True


def reference(folder: Path, images: list[np.ndarray], text: str) -> list[int]:
    """Tokens of transformers' `generate`."""
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pictures = [PIL.Image.fromarray(image) for image in images]
    inputs = processor(images=pictures, text=prompt, return_tensors="pt", add_special_tokens=False)
    out = theirs.generate(**inputs, max_new_tokens=16, do_sample=False)
    return out[0, inputs.input_ids.shape[1] :].tolist()


def test_reducers_that_keep_all_answer_as_generate_does(model):
    """All of them in one batch, the same prompt each: with and without what earlier ones left in the cache."""
    images, text = [picture(1), picture(2)], "What colour is the circle, and where?"
    tokens = reference(Path(find(model.config.model)), images, text)
    specs = [spec for spec in reducers_with_a_ratio() if fits(spec, model)]
    assert len(specs) >= 5
    asked = [{"prompt": text, "images": images, "reducer": spec} for spec in specs]
    for _ in range(2):
        answers = model.generate_batch(asked, max_new_tokens=16, temperature=0)
        assert {spec: list(answer.token_ids[0]) for spec, answer in zip(specs, answers, strict=True)} == dict.fromkeys(
            specs, tokens
        )
