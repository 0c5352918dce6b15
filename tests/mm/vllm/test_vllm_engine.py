"""vLLM's engine behind ours: the same answers as the native engine's, and what it cannot do is refused by name."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

import mm
from mm.data.media import Video
from mm.data.outputs import Delta, Summary
from mm.engine.sequence import PrefillOnly
from mm.errors import (
    CapacityError,
    DeadlineExceeded,
    EngineError,
    IncompatiblePlugin,
    InvalidOption,
    InvalidRequest,
)
from mm.models.families.qwen2_vl import Qwen2VL
from serve.cli.app import app
from tests.helpers import fake_vllm
from tests.helpers.checkpoints import random_llava, random_qwen2_5_vl

GREEDY = {"temperature": 0.0, "max_new_tokens": 12}
QUESTION = "what colour is the circle?"
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {
            "type": "object",
            "properties": {"a": {"enum": ["red", "blue"]}, "b": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


def pictures(*sides: tuple[int, int]) -> list[PIL.Image.Image]:
    rng = np.random.default_rng(7)
    return [PIL.Image.fromarray(rng.integers(0, 256, (*side, 3), dtype=np.uint8)) for side in sides]


TWO = pictures((90, 60), (112, 84))


@pytest.fixture(scope="module")
def monkey():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return str(random_llava(tmp_path_factory.mktemp("llava"), video=True))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return str(random_qwen2_5_vl(tmp_path_factory.mktemp("qwen"), model_type="qwen2_vl"))


@pytest.fixture(scope="module")
def native(llava):
    with mm.load(llava, dtype="float32") as model:
        yield model


@pytest.fixture(scope="module")
def ours(llava, monkey):
    fake_vllm.install(monkey)
    with mm.load(llava, dtype="float32", engine="vllm", max_num_seqs=8, max_waiting=4) as model:
        yield model


@pytest.fixture(scope="module")
def grids(qwen, monkey):
    fake_vllm.install(monkey)
    with mm.load(qwen, dtype="float32", engine="vllm") as model:
        yield model


def core(model):
    return model.engine._core.engine


OPTIONS = {
    "plain": {},
    "pictures": {"images": TWO},
    "stop": {"images": TWO, "stop": ["e"]},
    "min_tokens": {"images": TWO, "min_tokens": 6},
    "ignore_eos": {"ignore_eos": True},
    "logit_bias": {"logit_bias": {40: 4.0, 41: -50.0}},
    "reduced": {"images": TWO, "reducer": "divprune:keep_ratio=0.25", "positions": "compact"},
    "budget": {"images": TWO, "max_visual_tokens": 6, "positions": "compact"},
    "schema": {"images": TWO, "response_format": SCHEMA, "max_new_tokens": 60},
    "object": {"response_format": {"type": "json_object"}, "max_new_tokens": 20, "ignore_eos": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_greedy_answers_equal_the_native_engines(native, ours, options):
    asked = GREEDY | options
    expected = _outcome(native, asked)
    found = _outcome(ours, asked)
    assert found == expected


def _outcome(model, asked):
    try:
        answer = model.generate(QUESTION, **asked)
    except mm.errors.SchemaNotFulfilled as error:
        return str(error)
    usage = answer.usage
    return answer.texts, answer.token_ids, answer.finish_reasons, usage.num_prompt_tokens, answer.kept


def test_a_reducer_whose_positions_are_left_open_gets_compact_ones(ours):
    asked = GREEDY | {"images": TWO, "reducer": "divprune:keep_ratio=0.25"}
    answer = ours.generate(QUESTION, **asked)
    assert answer.usage.num_visual_tokens_kept == 8
    assert answer.token_ids == ours.generate(QUESTION, positions="compact", **asked).token_ids


def test_pictures_with_grids_answer_as_the_native_engine_does(qwen, grids):
    with mm.load(qwen, dtype="float32") as native:
        for images in ([], TWO[:1], TWO):
            expected = native.generate(QUESTION, images=images, **GREEDY)
            found = grids.generate(QUESTION, images=images, **GREEDY)
            assert found.token_ids == expected.token_ids
            assert found.usage == dataclasses.replace(expected.usage, num_cached_tokens=0)
    given = core(grids).prompts[-1]
    assert given["prompt_token_ids"].count(grids.engine.family.config.image_token_id) == 2


def test_log_probabilities_are_those_of_the_native_engine(native, ours):
    asked = GREEDY | {"logprobs": True, "top_logprobs": 3, "max_new_tokens": 4}
    expected, found = (model.generate(QUESTION, **asked).logprobs[0] for model in (native, ours))
    for one, other in zip(expected, found, strict=True):
        assert (one.token_id, one.token, one.utf8) == (other.token_id, other.token, other.utf8)
        assert other.logprob == pytest.approx(one.logprob, abs=1e-4)
        assert [top.token_id for top in other.top] == [top.token_id for top in one.top]


def test_choices_have_seeds_of_their_own(ours):
    asked = {"n": 3, "temperature": 1.0, "seed": -1, "max_new_tokens": 8}
    texts = ours.generate(QUESTION, **asked).texts
    assert len(set(texts)) == 3
    assert texts == ours.generate(QUESTION, **asked).texts


def test_a_stream_gives_a_delta_per_token_and_a_summary_last(ours):
    *deltas, summary = ours.stream(QUESTION, images=TWO, **GREEDY)
    assert all(isinstance(delta, Delta) for delta in deltas)
    assert isinstance(summary, Summary)
    assert deltas[0].num_prompt_tokens == summary.usage.num_prompt_tokens
    assert summary.timings.prefill_s > 0


def test_thirty_two_requests_in_flight(llava, native, monkey):
    fake_vllm.install(monkey)
    prompts = [{"prompt": f"{i} circles", "images": TWO[: i % 3]} for i in range(32)]
    with mm.load(llava, dtype="float32", engine="vllm", max_num_seqs=16, max_waiting=64) as model:
        found = model.generate_batch(prompts, temperature=0.0, max_new_tokens=4)
        assert not model.engine.has_work
        assert not core(model).running
    expected = native.generate_batch(prompts, temperature=0.0, max_new_tokens=4)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


def test_closing_a_stream_aborts_the_request_in_vllm(ours):
    stream = ours.stream(QUESTION, ignore_eos=True, max_new_tokens=1000, n=2)
    next(stream)
    assert len(core(ours).running) == 2
    stream.close()
    assert not core(ours).running
    assert not ours.engine.has_work


def test_a_stop_string_ends_the_request_in_vllm_too(ours):
    before = len(core(ours).aborted)
    text = ours.generate(QUESTION, images=TWO, **GREEDY).text
    ours.generate(QUESTION, images=TWO, stop=[text[1:3]], **GREEDY)
    assert len(core(ours).aborted) == before + 1
    assert not core(ours).running


def test_a_deadline_ends_a_request(ours):
    with pytest.raises(DeadlineExceeded):
        ours.generate(QUESTION, timeout_s=0.02, ignore_eos=True, max_new_tokens=1500, temperature=0.0)
    assert not core(ours).running


def test_too_many_waiting_requests_are_refused(ours):
    def submit():
        request = mm.api.build_request(QUESTION, ignore_eos=True, max_new_tokens=100)
        return ours.loop.submit(request, ours._encode(request))

    streams = [submit() for _ in range(8 + 4)]  # some run at once, and some wait
    for _ in range(2):
        with pytest.raises(CapacityError, match="4 requests are waiting already"):
            submit()
        ours.loop.step()
    ours.loop.abort(streams.pop())
    streams.append(submit())
    for stream in streams:
        ours.loop.abort(stream)
    assert not ours.engine.has_work


REFUSED = {
    "inside the decoder": ({"images": TWO, "reducer": "fastv"}, "fastv.*acts inside the decoder.*in_prefill"),
    "in a pipeline": (
        {"images": TWO, "reducer": "divprune:keep_ratio=0.5 + pyramiddrop"},
        "divprune \\+ pyramiddrop.*acts inside the decoder",
    ),
    "kept positions": (
        {"images": TWO, "reducer": "divprune:keep_ratio=0.25", "positions": "kept"},
        "positions was 'kept'.*send \"compact\"",
    ),
    "a drafter": ({"speculation": "copy"}, "does not use the drafter 'copy'"),
    "a temperature that vLLM would raise": ({"temperature": 0.005}, "temperature was 0.005.*from 0.01 on"),
    "what vLLM itself refuses": ({"logit_bias": {302: 1.0}}, "vLLM refuses the request: token_id"),
    "a too long answer": ({"max_new_tokens": 5000}, "context holds"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_request_is_refused_by_name(ours, options, message):
    with pytest.raises(InvalidRequest, match=message):
        ours.generate(QUESTION, **(GREEDY | options))
    assert not ours.engine.has_work


def test_whole_pictures_may_keep_their_positions(ours):
    asked = GREEDY | {"images": TWO}
    kept = ours.generate(QUESTION, positions="kept", **asked)
    assert kept.token_ids == ours.generate(QUESTION, **asked).token_ids


def test_reduced_pictures_with_grids_are_refused(grids):
    with pytest.raises(InvalidRequest, match=r"divprune.*positions in time, height and width"):
        grids.generate(QUESTION, images=TWO, reducer="divprune:keep_ratio=0.25", **GREEDY)
    with pytest.raises(InvalidRequest, match="places this model's visual tokens by whole grids"):
        grids.generate(QUESTION, images=TWO, max_visual_tokens=4, **GREEDY)


def test_clips_whose_positions_vllm_would_get_wrong_are_refused(qwen, monkey):
    fake_vllm.install(monkey)
    frames = np.random.default_rng(3).integers(0, 256, (24, 56, 56, 3), dtype=np.uint8)
    clip = Video(frames=frames, timestamps_s=tuple(range(24)), duration_s=24.0, content_hash="clip")
    settings = {"engine": "vllm", "dtype": "float32", "num_frames": 24}
    with (
        mm.load(qwen, text_after_clip="longer_side", **settings) as model,
        pytest.raises(InvalidRequest, match="elsewhere in time, or the text after them"),
    ):
        model.generate(QUESTION, videos=[clip], **GREEDY)
    with mm.load(qwen, **settings) as model:
        assert model.generate(QUESTION, videos=[clip], **GREEDY).usage.num_video_tokens_kept == 48


STARTS = {
    "a drafter": ({"drafter": "copy"}, InvalidOption, "does not use the drafter 'copy'.*speculative_config"),
    "a further drafter": ({"drafters": ("recycle",)}, InvalidOption, "does not use the drafter 'recycle'"),
    "a default reducer": ({"reducer": "fastv"}, InvalidOption, "fastv.*acts inside the decoder"),
    "our quantisation": ({"quantize": "int8"}, InvalidOption, "quantize.*engine_args"),
    "no JSON": ({"engine_args": "a=b"}, InvalidOption, "give a JSON object"),
    "an unknown argument": ({"engine_args": '{"tensor_paralel": 2}'}, InvalidOption, "'tensor_paralel'.*does not have"),
    "what a setting says": ({"engine_args": '{"max_num_seqs": 2}'}, InvalidOption, "the setting max_num_seqs says"),
    "what has to stay": ({"engine_args": '{"max_model_len": 2}'}, InvalidOption, "cannot be changed here"),
}


@pytest.mark.parametrize(("settings", "kind", "message"), STARTS.values(), ids=STARTS)
def test_a_start_is_refused_by_name(llava, monkey, settings, kind, message):
    fake_vllm.install(monkey)
    with pytest.raises(kind, match=message):
        mm.load(llava, dtype="float32", engine="vllm", **settings)


def test_arguments_reach_vllm(llava, monkey):
    fake_vllm.install(monkey)
    settings = {"engine_args": json.dumps({"quantization": "fp8"}), "tensor_parallel": 2, "kv_cache_gb": 0.01}
    with mm.load(llava, dtype="float32", engine="vllm", **settings) as model:
        args = core(model).args
    assert (args.quantization, args.tensor_parallel_size, args.kv_cache_memory_bytes) == (
        "fp8",
        2,
        int(0.01 * (1 << 30)),
    )
    assert args.limit_mm_per_prompt == {"image": 0, "video": 0}
    assert core(model).is_shut


@pytest.mark.parametrize(("version", "warns"), [("0.32.1", False), ("0.40.0", True)])
def test_another_version_of_vllm_is_named_in_the_log(llava, monkeypatch, caplog, version, warns):
    library = fake_vllm.install(monkeypatch)
    monkeypatch.setattr(library, "__version__", version)
    mm.load(llava, dtype="float32", engine="vllm").close()
    assert (f"vLLM {version} is installed" in caplog.text) is warns


def test_engine_args_belong_to_vllm(llava):
    with pytest.raises(InvalidOption, match="belongs to vLLM"):
        mm.load(llava, engine_args="{}")


def test_a_vllm_for_another_device_is_refused(llava, monkey):
    fake_vllm.install(monkey, device="cuda")
    with pytest.raises(InvalidOption, match="runs on 'cuda'"):
        mm.load(llava, engine="vllm")


def test_without_vllm_the_error_names_the_package(llava, monkeypatch):
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidOption, match=r"'vllm', which is not installed"):
        mm.load(llava, engine="vllm")


def test_a_model_that_vllm_cannot_load_says_so(llava, monkey, tmp_path):
    fake_vllm.install(monkey)
    folder = tmp_path / "cannot"
    folder.symlink_to(llava)
    with pytest.raises(EngineError, match=r"vLLM cannot serve this model.*not supported"):
        mm.load(str(folder), engine="vllm")


def test_other_families_with_positions_in_three_dimensions_are_refused(qwen, monkey):
    fake_vllm.install(monkey)
    monkey.setattr("mm.vllm.capabilities.GRID_FAMILIES", frozenset({"another"}))
    try:
        with pytest.raises(IncompatiblePlugin, match=r"qwen2_vl.*time, height and width"):
            mm.load(qwen, engine="vllm")
    finally:
        monkey.undo()


def test_a_step_that_fails_ends_requests_and_makes_the_engine_unhealthy(llava, monkeypatch):
    fake_vllm.install(monkeypatch)
    with mm.load(llava, dtype="float32", engine="vllm") as model:
        monkeypatch.setattr(fake_vllm.LLMEngine, "fails_after", 2)
        with pytest.raises(EngineError, match="a step of vLLM failed: RuntimeError"):
            model.generate(QUESTION, ignore_eos=True, max_new_tokens=50)
        assert model.loop.status().problems == ("vLLM: a step failed: RuntimeError",)
        with pytest.raises(EngineError, match="cannot go on"):
            model.generate(QUESTION)


def test_no_prompt_is_computed_ahead(ours):
    request = mm.api.build_request(QUESTION, images=TWO)
    assert not ours.engine.prefills_ahead
    with pytest.raises(InvalidRequest, match="nobody wants"):
        ours.engine.submit(request, ours._encode(request), PrefillOnly())


def test_the_family_loads_no_decoder_weights(ours, grids):
    assert not hasattr(ours.engine.family.language, "layers")
    assert isinstance(grids.engine.family, Qwen2VL)


def test_what_only_the_native_engine_has_is_refused(ours):
    with pytest.raises(InvalidOption, match="needs the layers of the native engine"):
        _ = ours.native_engine


def test_mm_serve_refuses_before_it_loads_anything(monkeypatch):
    def serve(*options):
        command = ["serve", "--in-process", "--port", "0", "--engine", "vllm", *options]
        done = CliRunner().invoke(app, command)
        assert done.exit_code
        return str(done.exception) + done.output

    monkeypatch.setattr("serve.cli.serve._run", lambda *_: pytest.fail("it was started"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "vllm" else True)
    assert "'vllm', which is not installed" in serve()
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: True)
    assert "fastv, which acts inside the decoder" in serve("--reducer", "fastv")
    assert "does not use the drafter 'copy'" in serve("--drafter", "copy")
