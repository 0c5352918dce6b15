"""The journey of a request: what it promises to callers, whatever the model answers."""

import io
import threading
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import mm
from mm.api import build_request
from mm.data.outputs import Delta, Summary
from mm.encode.pipeline import encode
from mm.errors import ContextTooLong, IncompatiblePlugin, InvalidOption, InvalidRequest, MediaError, UnknownPlugin
from mm.models.checkpoint import BadCheckpoint
from mm.plugins.capabilities import check_compatible
from mm.plugins.reducer import Stage
from tests.helpers.checkpoints import random_llava


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return mm.load(random_llava(tmp_path_factory.mktemp("llava"), video=True), dtype="float32")


def png(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_streamed_text_adds_up_to_the_answer(model):
    events = list(model.stream("What?", images=[png()], max_new_tokens=12, ignore_eos=True))
    assert isinstance(events[-1], Summary)
    deltas = [event for event in events if isinstance(event, Delta)]
    answer = model.generate("What?", images=[png()], max_new_tokens=12, ignore_eos=True)
    assert "".join(d.text for d in deltas) == answer.text
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason in ("stop", "length")
    assert answer.usage.num_completion_tokens == len(answer.token_ids[0]) == 12


def test_an_answer_ends_at_the_models_end_token(model):
    free = model.generate("What?", max_new_tokens=6, ignore_eos=True).token_ids[0]
    samplers = model.engine.inputs._samplers
    before, samplers._eos_token_ids = samplers._eos_token_ids, frozenset([free[3]])
    try:
        answer = model.generate("What?", max_new_tokens=6)
        assert answer.token_ids[0] == free[: free.index(free[3]) + 1]
        assert answer.finish_reasons == ("stop",)
        assert len(model.generate("What?", max_new_tokens=6, ignore_eos=True).token_ids[0]) == 6
    finally:
        samplers._eos_token_ids = before


def test_stop_strings_end_an_answer_and_are_not_part_of_it(model):
    whole = model.generate("What?", max_new_tokens=20).text
    stop = whole[5:8]
    answer = model.generate("What?", max_new_tokens=20, stop=stop)
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reasons == ("stop",)


def test_a_seed_repeats_an_answer_and_choices_differ(model):
    one = model.generate("What?", images=[png()], max_new_tokens=10, temperature=1.0, seed=7, n=3)
    two = model.generate("What?", images=[png()], max_new_tokens=10, temperature=1.0, seed=7, n=3)
    assert one.token_ids == two.token_ids
    assert len(set(one.token_ids)) == 3
    alone = model.generate("What?", images=[png()], max_new_tokens=10, temperature=1.0, seed=7)
    assert alone.token_ids[0] == one.token_ids[0]
    assert one.usage.num_completion_tokens == sum(map(len, one.token_ids))
    unseeded = {model.generate("What?", max_new_tokens=10, temperature=1.0).token_ids for _ in range(3)}
    assert len(unseeded) > 1


def test_usage_and_map_say_what_was_kept(model):
    answer = model.generate("What?", images=[png(0), png(1)], max_new_tokens=1, reducer="uniform", keep_ratio=0.25)
    assert answer.usage.num_visual_tokens_in == 2 * 16
    assert answer.usage.num_visual_tokens_kept == 2 * 4
    assert [len(item.kept) for item in answer.kept] == [4, 4]
    assert answer.kept[0].kept == (2, 6, 10, 14)
    full = model.generate("What?", images=[png(0), png(1)], max_new_tokens=1)
    assert full.usage.num_prompt_tokens - answer.usage.num_prompt_tokens == 2 * 12
    assert answer.reducer == "uniform:keep_ratio=0.25"


def test_closing_a_stream_frees_the_decoder(model):
    stream = model.stream("What?", max_new_tokens=50)
    next(stream)
    assert model.engine.stats.num_running == 1
    stream.close()
    assert model.engine.stats.num_running == 0
    assert model.engine.cache.num_free_seqs == model.config.max_num_seqs
    model.engine.cache.check(model.engine.prefix_cache.held)
    assert model.generate("What?", max_new_tokens=1).text is not None


def test_requests_from_several_threads_answer_as_if_alone(model):
    prompts = [f"Question {i}?" for i in range(4)]
    alone = [model.generate(p, max_new_tokens=8).token_ids for p in prompts]
    together: dict[str, tuple] = {}

    def ask(prompt: str) -> None:
        together[prompt] = model.generate(prompt, max_new_tokens=8).token_ids

    threads = [threading.Thread(target=ask, args=(p,)) for p in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[p] for p in prompts] == alone


def test_the_same_picture_is_encoded_once(model, monkeypatch):
    calls = []
    encode = model.encode_parts.encoder.encode
    monkeypatch.setattr(
        model.encode_parts.encoder, "encode", lambda items, needs: calls.append(len(items)) or encode(items, needs)
    )
    image = png(99)
    first = model.generate("What?", images=[image, image], max_new_tokens=4)
    second = model.generate("What?", images=[image, image], max_new_tokens=4)
    assert calls == [1]
    assert first.token_ids == second.token_ids
    model.generate("What?", images=[image], max_new_tokens=1, reducer="uniform:keep_ratio=0.5")
    assert calls == [1, 1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reducer": "divprun"}, UnknownPlugin, "did you mean 'divprune'"),
        ({"reducer": "divprune:keep_rato=0.5"}, InvalidOption, "did you mean 'keep_ratio'"),
        ({"reducer": "divprune:keep_ratio=0"}, InvalidOption, "keep_ratio"),
        ({"reducer": "divprune", "keep_ratio": 1.5}, InvalidOption, "1.5"),
        ({"reducer": "none", "keep_ratio": 0.5}, InvalidOption, "keep_ratio"),
        ({"reducer": "uniform + random", "keep_ratio": 0.5}, InvalidOption, "ambiguous"),
        ({"temperature": -1}, InvalidRequest, "temperature was -1"),
        ({"top_p": 0}, InvalidRequest, "top_p"),
        ({"n": 0}, InvalidRequest, "n was 0"),
        ({"max_new_tokens": 0}, InvalidRequest, "max_new_tokens"),
        ({"max_new_tokens": 5000}, ContextTooLong, "2048"),
        ({"stop": 5}, InvalidRequest, "stop was 5"),
        ({"tempreature": 1}, InvalidRequest, "unknown option 'tempreature'"),
        ({"images": [b"no picture"]}, MediaError, "image"),
        ({"images": [Path("absent.png")]}, MediaError, "does not exist"),
        ({"videos": [b"no clip"]}, MediaError, "video"),
    ],
)
def test_bad_input_is_refused_by_name(model, options, error, message):
    with pytest.raises(error, match=message):
        model.generate("What?", **options)


def test_media_errors_name_the_item(model):
    with pytest.raises(MediaError) as caught:
        model.generate("What?", images=[png(), b"broken"])
    assert caught.value.param == "images[1]"


def test_remote_media_are_off_by_default(model):
    with pytest.raises(MediaError, match="off"):
        model.generate("What?", images=["http://127.0.0.1:9/x.png"])


def test_an_encoder_that_lacks_the_features_refuses_the_reducer(model):
    class Hungry:
        acts_at = (Stage.PRE_LLM,)
        needs = frozenset({"moonlight"})

    with pytest.raises(IncompatiblePlugin, match="moonlight"):
        check_compatible(Hungry(), model.encode_parts.encoder, "this model")


def test_a_query_aware_reducer_gets_the_question_and_shares_no_answers_of_others(model):
    reducer = "cdpruner:keep_ratio=0.25"

    def kept(question: str, reducer: str = reducer) -> tuple[int, ...]:
        return (
            model.generate(question, images=[png(7)], reducer=reducer, return_map=True, max_new_tokens=1).kept[0].kept
        )

    questions = ["What is here?", "How many red circles?", "Read the text", "Is it left of the door?", "zzz 123"]
    maps = [kept(question) for question in questions]
    assert len(set(maps)) > 1
    assert [kept(question) for question in questions] == maps
    misses = model.encode_parts.cache.stats.misses
    assert kept(questions[0]) == maps[0]
    assert model.encode_parts.cache.stats.misses == misses
    for question in questions:
        kept(question, "visionzip:keep_ratio=0.25")
    assert model.encode_parts.cache.stats.misses == misses + 1


def test_openai_messages_are_taken_as_they_are(model):
    import base64

    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}],
        },
    ]
    answer = model.generate(messages, max_new_tokens=2)
    assert answer.usage.num_image_tokens_in == 16
    with pytest.raises(InvalidRequest, match="not both"):
        model.generate(messages, images=[png()])


def test_models_of_other_kinds_are_refused_by_type(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BadCheckpoint, match="'bert'"):
        mm.load(tmp_path)


def test_a_model_without_clips_says_so(tmp_path):
    stills = mm.load(random_llava(tmp_path / "stills"))
    with pytest.raises(MediaError, match="does not take video"):
        stills.generate("What?", videos=[b"x"])


def test_every_request_has_its_own_name():
    assert build_request("a").request_id != build_request("a").request_id


@pytest.mark.parametrize("text", ["word " * 5000, "a" * 5_000_000])
def test_a_text_that_is_too_long_is_refused_before_its_media_are_read(model, text):
    with pytest.raises(InvalidRequest) as refused:
        model.generate(text, images=[b"no picture"])
    assert refused.value.code == "context_length_exceeded"
    (of_batch,) = model.generate_batch([{"prompt": text, "images": [b"no picture"]}])
    assert of_batch.code == "context_length_exceeded"


def test_a_question_that_is_too_long_for_a_reducer_is_refused_before_its_media_are_read(model):
    request = build_request("word " * 5000, images=[b"no picture"], reducer="cdpruner:keep_ratio=0.5")
    with pytest.raises(InvalidRequest) as refused:
        encode(request, model.encode_parts)
    assert refused.value.code == "context_length_exceeded"
