"""A decoder that is spread over processes gives the tokens of one process, whatever a request asks for.

Weights and biases are random. Tokens are compared in float32 with those that a request gets alone in one process. The
sums of the members differ from one sum in the last bits, which flips no token here.
"""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

import numpy as np
import pytest
import torch

import mm
from mm.config import SpeculationLimits
from mm.data.outputs import Delta
from mm.encode.pipeline import encode
from mm.engine.engine import LLMEngine
from mm.engine.scheduler import SchedulerConfig
from mm.engine.spec_decode.drafters.eagle.head import DraftConfig, DraftHead, fingerprint
from mm.engine.spec_decode.proposer import SpecDecoder
from mm.engine.tensor_parallel.gang import Gang, GangError
from mm.models.families.llava import Llava
from mm.plugins.cache_view import CacheView
from mm.plugins.reducer import Stage
from mm.plugins.spec import build_reducer
from pruning.base import BaseReducer
from tests.helpers.decoders import WIDTH, random_llava_with
from tests.helpers.engines import KeepEverySecond, Question, Recorder, answer_alone, assert_idle, run_until

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
KINDS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 128, "num_key_value_heads": 1},
    "qwen2": {"tie_word_embeddings": True},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"attention_bias": True, "num_key_value_heads": 2},
}
"""With one key/value head, every member holds it. Qwen2 has biases of its own. Answers go beyond the window."""
SLOW = {"mistral": pytest.mark.slow, "qwen2": pytest.mark.slow}
LENGTH = 10
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["one", "two"]}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": {**SCHEMA, "additionalProperties": False}}}
SYSTEM = "You see pictures and answer questions about them, briefly and to the point, in one word or two."


class KeepLargest:
    """Evicts the half of the visual entries whose keys and values of all heads are shortest."""

    acts_at, needs, query_aware, count = (Stage.IN_DECODE,), frozenset(), False, "fixed"

    def prefill_done(self, view: CacheView):
        kept = {}
        for layer, length in enumerate(view.lengths):
            keys, values = view.read(layer)
            sizes = keys.flatten(1).norm(dim=1) * values.flatten(1).norm(dim=1)
            stays = torch.ones(length, dtype=torch.bool)
            visual = view.visual[layer]
            stays[visual[sizes[visual].argsort()[: len(visual) // 2]]] = False
            kept[layer] = stays.nonzero().squeeze(1)
        return kept


class ForgetEveryThird(BaseReducer):
    """Of generated tokens, every third is seen by no later one from layer 2 on."""

    acts_at = (Stage.PER_TOKEN,)

    def token_layer(self, num_layers: int) -> int:
        return 2

    def keep_tokens(self, hidden, indices):
        return indices % 3 != 1


ASKED: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": ("none", {}),
    "before the decoder": ("divprune:keep_ratio=0.5", {}),
    "at a layer, by scores": ("fastv:keep_ratio=0.5,layer=1", {}),
    "at two layers, by scores": ("pyramiddrop:num_stages=2,at_layers=[1,3]", {}),
    "at layers, by scores of the one before": ("mustdrop:key_ratio=0,at_layers=[1,2],global_share=0.02,peak=0.05", {}),
    "at two layers, with positions anew": (
        "pyramiddrop:num_stages=2,at_layers=[1,3]",
        {"positions": "published", "speculation": "copy"},
    ),
    "behind the prompt": (KeepEverySecond(1), {"n": 2, "temperature": 1.0, "seed": 3}),
    "behind the prompt, by keys and values": (KeepLargest(), {}),
    "about generated tokens": (ForgetEveryThird(), {}),
    "about drafted tokens": (ForgetEveryThird(), {"speculation": "copy"}),
    "several choices": ("none", {"n": 3, "temperature": 1.0, "seed": 5}),
    "penalties": ("none", {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3}),
    "log probabilities": ("none", {"logprobs": True, "top_logprobs": 3}),
    "a schema": ("none", {"response_format": FORMAT, "ignore_eos": False}),
    "copied drafts": ("none", {"speculation": "copy"}),
    "drafted trees": ("fastv:keep_ratio=0.5,layer=2", {"speculation": "msd"}),
    "sampled drafts": ("none", {"speculation": "msd", "temperature": 0.7, "seed": 9, "n": 2}),
}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def gang(request):
    found = Gang(request.param, "cpu", 1)
    yield found
    found.close()


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=SLOW.get(kind, ())) for kind in KINDS])
def single(request, tmp_path_factory):
    """The model in one process, with a drafter."""
    folder = random_llava_with(tmp_path_factory.mktemp(request.param), request.param, **HEADS | KINDS[request.param])
    limits = SpeculationLimits(drafters=("copy",), control=False)
    with mm.load(folder, dtype="float32", num_threads=1, speculation=limits) as model:
        language = model.engine.family.language
        torch.manual_seed(0)
        config = DraftConfig(
            width=48,
            vocab_size=language.vocab_size,
            num_heads=4,
            num_kv_heads=2,
            head_dim=12,
            intermediate_size=48,
            vision_adapter="msd",
            vision_adapter_options={},
            feature_layers=(),
            num_ahead=1,
            target=fingerprint(language.head_weight),
        )
        head = DraftHead(config, language.model.get_input_embeddings().weight.detach(), language.head_weight.detach())
        head.save(folder / "drafters" / "msd", torch.float32)
        yield model


@pytest.fixture(scope="module")
def family(single, gang):
    found = Llava(single.engine.family.folder, load=gang.load)
    found.language.prepack()
    return found


@pytest.fixture(autouse=True)
def _without_measuring(monkeypatch):
    """What steps cost matters only where it decides how much is drafted."""
    monkeypatch.setattr(SpecDecoder, "calibrate", lambda *_: None)


def engine_of(family, gang: Gang | None, num_rows: int, **limits: int) -> LLMEngine:
    shape = family.language.kv_cache_spec
    return LLMEngine(
        family,
        config=SchedulerConfig(**limits),
        kv_bytes=shape.num_blocks(num_rows) * shape.num_layers * shape.block_bytes,
        speculation=SpeculationLimits(drafters=("copy", "msd"), control=False, max_draft_tokens=6),
        gang=gang,
    )


def questions(model: mm.Model) -> list[Question]:
    found = []
    for i, (reducer, options) in enumerate(ASKED.values()):
        pixels = np.random.default_rng(i % 2).integers(0, 256, (56, 56, 3), dtype=np.uint8)
        plain = {"temperature": 0, "max_new_tokens": LENGTH, "ignore_eos": True, "speculation": "none"}
        text = f"{SYSTEM} What is this, what is this? Say it."
        request = mm.api.build_request(text, images=[pixels], **plain | options)
        made = build_reducer(reducer) if isinstance(reducer, str) else reducer
        found.append(Question(request=request, encoded=encode(request, model.encode_parts).items, reducer=made))
    return found


def logprobs_of(sink: Recorder) -> list[float]:
    return [one.logprob for delta in sink.events if isinstance(delta, Delta) for one in delta.logprobs]


def test_tokens_equal_those_of_one_process(single, family, gang):
    """All at once, with preemptions and beginnings that others left, each as it is alone in one process."""
    asked = questions(single)
    alone = engine_of(single.engine.family, None, 2048, max_num_seqs=4)
    expected = [answer_alone(alone, question) for question in asked]
    engine = engine_of(family, gang, 600, max_num_seqs=8, max_num_batched_tokens=64)
    sinks = [question.put_to(engine)[1] for question in asked]
    rng = random.Random(0)
    while engine.has_work:
        engine.step()
        if engine.stats.num_running and rng.random() < 0.1:
            engine._scheduler.preempt(rng.choice(engine._scheduler.running))
    for name, sink, tokens in zip(ASKED, sinks, expected, strict=True):
        assert (name, sink.error, sink.token_ids()) == (name, None, tokens)
    stats = engine.stats
    assert stats.num_preemptions > 0
    assert stats.prefix_hits > 0
    assert engine.spec_decoder.stats.num_draft_tokens > engine.spec_decoder.stats.num_accepted_tokens
    assert_idle(engine)
    ours, theirs = (Recorder(), Recorder())
    at = list(ASKED).index("log probabilities")
    for one, sink in ((engine, ours), (alone, theirs)):
        _, found = asked[at].put_to(one)
        run_until(one, lambda found=found: bool(found.num_ends))
        sink.events = found.events
    assert len(logprobs_of(ours)) == LENGTH
    np.testing.assert_allclose(logprobs_of(ours), logprobs_of(theirs), atol=1e-4)


def test_each_member_holds_its_share(single, family, gang):
    """But for norms, biases behind the sums, and key/value heads of which there are too few."""
    config = single.engine.family.config.get_text_config()
    language, kv_heads = single.engine.family.language, config.num_key_value_heads
    kv_weights = config.num_hidden_layers * 2 * WIDTH * language.head_dim * kv_heads
    own = kv_weights * max(1, kv_heads // gang.size) / kv_heads
    share = 4 * ((language.num_layer_weights - kv_weights) / gang.size + own)
    assert len(gang.weight_bytes) == gang.size
    for found in gang.weight_bytes:
        assert share <= found <= 1.05 * share


def test_a_closed_or_broken_gang_says_so(single, family, gang):
    """Last in this file: a member is killed while requests are computed."""
    if single.engine.family.config.text_config.model_type != list(KINDS)[-1]:
        pytest.skip("once is enough")
    engine = engine_of(family, gang, 600, max_num_seqs=4)
    _, sink = questions(single)[0].put_to(engine)
    engine.step()
    gone = [child.process.pid for child in gang._children]
    os.kill(gone[-1], signal.SIGKILL)
    start = time.monotonic()
    run_until(engine, lambda: not engine.has_work)
    assert time.monotonic() - start < 10
    assert isinstance(sink.error, GangError)
    assert f"member {gang.size - 1} of {gang.size} ended with status -9" in str(sink.error)
    assert engine.problems == (str(sink.error),)
    with pytest.raises(GangError, match="start it again"):
        questions(single)[0].put_to(engine)
    gang.close()
    for pid in gone:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
