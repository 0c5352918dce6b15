"""Over a thousand questions to the shipped model, every drafter under every reducer: the answers are those without.

One run without drafts and one with, in which each question has a drafter of its own. The runs differ in everything else
that may not matter too: order, slots, rows of a pass, room in the cache.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest

import mm
from demos.train.data.clips import draw_clip, sample_clip
from demos.train.data.scenes import draw_scene, sample_scene
from mm.api import build_request, collect
from mm.config import SpeculationLimits
from mm.data.media import Video
from mm.data.request import Request, SpeculationOptions
from mm.errors import MmError
from mm.models.checkpoint import find
from mm.plugins import registry as plugins
from tests.helpers.speculating import learn_truths

NUM_QUESTIONS = 520
"""Each is asked twice: greedily, and sampled."""
REFUSED = ("pipeline", "native")  # a pipeline needs parts, and tiny's pictures have one size
REDUCERS = [*(name for name in plugins.names("reducer") if name not in REFUSED), "divprune:keep_ratio=0.5 + fastv"]
OF_CLIPS = ("evs", "fastvid", "flashvid", "holitom", "infinipot", "vidcom2")
TRAINED = sorted(path.name for path in (find("tiny") / "drafters").iterdir() if path.is_dir())
CHAINS = [f"{name}:stop_below=0.05" for name in TRAINED]
TREES = [f"{name}:width=3,depth=4,stop_below=0.02" for name in TRAINED]
UNTRUE = "wild:truth=0.0,shape=tree"
WILD = [UNTRUE, "wild:truth=0.7,shape=tree", "wild:truth=0.6,shape=chain,seed=3"]
DRAFTERS = [*CHAINS, *TREES, *WILD, "copy:min_match=1", "recycle", f"copy + {TRAINED[0]}"]
PAIRS = list(itertools.product(DRAFTERS, REDUCERS))
SCHEDULES = (
    {"max_num_seqs": 5, "max_batch_tokens": 90},
    {"max_num_seqs": 16, "max_batch_tokens": 400, "kv_cache_gb": 0.006},
    {"max_num_seqs": 12, "prefix_caching": False},
)
GREEDY = tuple(
    {"temperature": 0.0} | more
    for more in ({}, {}, {"repetition_penalty": 1.2}, {"logprobs": True, "top_logprobs": 2}, {"stop": ["the"]})
)
SAMPLED = (
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20, "presence_penalty": 0.5},
    {"temperature": 0.7, "min_p": 0.05, "n": 2},
)
WORDS = ("Describe the picture.", "Describe the video.", "How many objects do you see?", "List all objects.")
SCENES = [draw_scene(sample_scene(seed)) for seed in (3, 4)]
CLIP = Video(
    frames=draw_clip(sample_clip(5)), timestamps_s=tuple(i / 8 for i in range(16)), duration_s=2.0, content_hash="clip"
)


def questions(seed: int) -> list[tuple[str, Request]]:
    """Drafter and request, each question greedy and sampled. The first ones go through all pairs with reducers."""
    rng = random.Random(seed)
    made = []
    for i, (drafter, reducer) in zip(range(NUM_QUESTIONS), itertools.cycle(PAIRS), strict=False):
        if reducer in OF_CLIPS:
            media = {"videos": [CLIP], "num_frames": 2}
        else:
            media = {"images": rng.sample(SCENES, 2 if i % 16 == 0 else 1)}
        options = {"max_new_tokens": rng.randint(5, 16), "ignore_eos": rng.random() < 0.5, "reducer": reducer, **media}
        for form in (rng.choice(GREEDY), rng.choice(SAMPLED) | {"seed": rng.randrange(10**6)}):
            made.append((drafter, build_request(f"{rng.choice(WORDS)} {i}", **options, **form)))
    return made


def answered(model: mm.Model, asked: list[Request]) -> list[mm.api.Answer]:
    found: dict[int, mm.api.Answer] = {}
    for number, outcome in model.run_batch(asked):
        assert not isinstance(outcome, MmError), outcome
        found[number] = collect(iter(outcome))
    model.engine.cache.check(model.engine.prefix_cache.held)
    return [found[i] for i in range(len(asked))]


def said(answer: mm.api.Answer) -> tuple:
    logprobs = tuple(tuple(one.token_id for one in choice) for choice in answer.logprobs)
    return answer.token_ids, answer.texts, answer.finish_reasons, logprobs


@pytest.mark.usefixtures("wild")
def test_every_drafter_under_every_reducer():
    asked = questions(seed=11)
    plain = mm.load("tiny", dtype="float32")
    expected = answered(plain, [request for _, request in asked])
    learn_truths(plain, [request for _, request in asked], [answer.token_ids for answer in expected])
    order = list(range(len(asked)))
    random.Random(12).shuffle(order)
    limits = SpeculationLimits(drafters=tuple(DRAFTERS), max_draft_tokens=10, control=False)
    compared, drafts, tokens = Counter[bool](), Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for part, schedule in enumerate(SCHEDULES):
        model = mm.load("tiny", dtype="float32", speculation=limits, **schedule)
        own = order[part :: len(SCHEDULES)]
        with_drafters = [replace(asked[i][1], speculation=SpeculationOptions(drafter=asked[i][0])) for i in own]
        for i, answer in zip(own, answered(model, with_drafters), strict=True):
            (drafter, request), usage = asked[i], answer.usage
            reducer = request.vision.reducer
            assert said(answer) == said(expected[i]), f"{drafter}, {reducer}, {request.sampling}, {schedule}"
            compared[request.sampling.temperature == 0] += 1
            drafts[drafter, reducer] += usage.num_drafts
            tokens[drafter, "accepted"] += usage.num_accepted_tokens
            tokens[drafter, "rejected"] += usage.num_rejected_tokens
        assert model.engine.stats.spec_decode.num_faults == 0
    assert compared == {True: NUM_QUESTIONS, False: NUM_QUESTIONS}
    assert NUM_QUESTIONS >= 500
    assert set(drafts) == set(PAIRS)
    undrafted = [pair for pair in PAIRS if not drafts[pair] and not pair[0].startswith(("copy:", "recycle"))]
    assert len(undrafted) <= len(PAIRS) // 100  # a pair has one or two short answers
    for drafter in DRAFTERS:
        accepted, rejected = tokens[drafter, "accepted"], tokens[drafter, "rejected"]
        assert rejected > 0, drafter
        assert accepted > 0 if drafter != UNTRUE else accepted < rejected / 20, drafter
