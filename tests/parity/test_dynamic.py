"""Dynamic-LLaVA as it serves against a mask: nothing dropped, transformers' eager attention over the whole sequence.

Whatever the way, every token sees what it would have seen alone: beside other requests, in drafts, after a preemption,
behind a cached prefix.
"""

from __future__ import annotations

import base64
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import mm
from mm.config import ReducerPolicy, SpeculationLimits
from mm.data.sampling_params import SamplingParams
from mm.encode.pipeline import encode
from mm.errors import BadWeights, InvalidOption, ReducerFault
from mm.plugins.spec import bind, reducer_spec
from pruning.learned.dynamic import Dynamic
from tests.helpers.checkpoints import random_llava
from tests.helpers.engines import Recorder, assert_idle
from tests.helpers.learned import write_weights
from tests.helpers.masked import Masked, causal
from tests.parity.test_generate import picture, png

TOKENS = 24
SIZES = ([(112, 112)], [(112, 112), (60, 112)])
WIDTH, NUM_LAYERS = 48, 4


def decoder_of(folder, seed: int) -> dict[str, torch.Tensor]:
    """Changed tensors of the decoder, as a training with a reducer leaves them."""
    rng, key = torch.Generator().manual_seed(seed), "language_model.model."
    weights = load_file(folder / "model.safetensors")
    named = {name.split(key)[-1].split("model.language_model.")[-1]: tensor for name, tensor in weights.items()}
    layers = {name: tensor.float() for name, tensor in named.items() if name.startswith("layers.")}
    return {name: tensor + 0.05 * torch.randn(tensor.shape, generator=rng) for name, tensor in layers.items()}


def checkpoint(path, image_layer: int, text_layer: int):
    """A checkpoint with a reducer that drops visual and generated tokens at these layers, and has its own decoder."""
    made = random_llava(path, width=WIDTH, num_layers=NUM_LAYERS, image_size=112)
    layers = {"image_layer": image_layer, "text_layer": text_layer, "keep_first": 3}
    write_weights(made / "reducers/dynamic", Dynamic, made, WIDTH, decoder=decoder_of(made, 3), **layers)
    return made


@pytest.fixture(scope="module", params=[(0, 1), (2, 1), (1, 3)], ids=lambda layers: f"layers {layers}")
def folder(request, tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("llava"), *request.param)


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("llava"), 2, 1)


@pytest.fixture(scope="module")
def alone(one_folder):
    """Requests and the tokens that each gets alone."""
    model = mm.load(one_folder, dtype="float32", num_threads=1)
    longer = [replace(one, sampling=replace(one.sampling, max_new_tokens=60)) for one in eight(one_folder)]
    requests = [replace(one, sampling=replace(one.sampling, n=1 + 2 * (i == 4))) for i, one in enumerate(longer)]
    return requests, [tokens_of(list(model.run(request))) for request in requests]


@pytest.fixture(scope="module")
def ours(folder):
    return mm.load(folder, dtype="float32", num_threads=1)


def request_of(reducer: str, sizes, *, prompt="Which colour has the circle, and where is it?", seed=0, **sampling):
    images = [png(picture(seed + i, size)) for i, size in enumerate(sizes)]
    request = mm.api.build_request(prompt, images=images, reducer=reducer)
    params = SamplingParams(**{"max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **sampling})
    return replace(request, sampling=params, vision=replace(request.vision, return_map=True))


def text_of(folder) -> str:
    """A threshold at which about half of the generated tokens go: the median of what the predictor says."""
    return f"dynamic:keep_ratio=0.3,text_threshold={THRESHOLD}"


THRESHOLD = 2.0


class Reference:
    """The decoder of the reducer, with masks."""

    def __init__(self, folder) -> None:
        self.masked = Masked(folder)
        changed = load_file(folder / "reducers/dynamic/decoder.safetensors")
        self.masked.text.load_state_dict(changed, strict=False)
        self.reducer = bind(reducer_spec(text_of(folder)), folder).plugin

    @torch.no_grad()
    def logits(self, prompt, sizes: list[int], tokens: list[int]) -> tuple[torch.Tensor, list[bool]]:
        """(T, vocab) at each token, and which generated tokens were kept."""
        shape, predictors = self.reducer.network.shape, self.reducer.network
        ids = torch.tensor(tokens[:-1], dtype=torch.int64)
        hidden = torch.cat([prompt.embeddings, self.masked.text.embed_tokens(ids)])
        behind = prompt.next_position + torch.arange(len(ids))
        positions = torch.cat([prompt.positions, behind.expand(1, -1)], dim=1)
        alive, kept = torch.ones(len(hidden), dtype=torch.bool), torch.ones(len(ids), dtype=torch.bool)
        for index in range(NUM_LAYERS):
            if index == shape.image_layer:
                for item in prompt.is_visual.nonzero()[:, 0].split(sizes):
                    score = predictors.image(hidden[item]).log_softmax(-1)[:, 0]
                    order = score.sort(descending=True, stable=True).indices
                    alive[item] = False
                    alive[item[order[: int(len(item) * 0.3)]]] = True
            if index == shape.text_layer:
                difference = predictors.text(hidden[prompt.length :]).diff(dim=-1)[:, 0].neg()
                kept = (difference > THRESHOLD) | (torch.arange(len(ids)) < shape.keep_first)
                alive[prompt.length :] = kept
            hidden, _ = self.masked.layer(index, hidden, positions, causal(alive))
        return self.masked.head(self.masked.text.norm(hidden))[prompt.length - 1 :], kept.tolist()


@pytest.fixture(scope="module")
def reference(folder):
    return Reference(folder)


@pytest.mark.parametrize("sizes", SIZES, ids=["one image", "two images"])
def test_serving_equals_a_mask_in_which_nothing_is_dropped(folder, ours, reference, sizes):
    request = request_of(text_of(folder), sizes, logprobs=True, top_logprobs=10)
    answer = mm.api.collect(ours.run(request))
    encoded = encode(request, ours.encode_parts).items
    prompt = ours.engine.family.splice(request.messages, [item.tokens for item in encoded])
    counts = [item.tokens.num_tokens for item in encoded]
    logits, kept = reference.logits(prompt, counts, list(answer.token_ids[0]))
    assert 2 < sum(kept) < len(kept) - 2, "neither all nor none, or nothing is shown"
    expected = logits.log_softmax(-1)
    worst = max(
        abs(float(expected[i, one.token_id]) - one.logprob)
        for i, token in enumerate(answer.logprobs[0])
        for one in (token, *token.top)
    )
    assert worst / max(1.0, float(logits.abs().max())) < 1e-5
    assert [len(item.kept) for item in answer.kept] == [int(0.3 * count) for count in counts]
    assert answer.usage.num_image_tokens_prompt == sum(counts)


def test_dropped_tokens_hold_no_memory(folder, ours):
    """In the middle of an answer, every layer holds what it has to and no more; at its end nothing is left."""
    engine, shape = ours.engine, bind(reducer_spec("dynamic"), folder).plugin.network.shape
    lengths, blocks = [], []
    for delta in ours.run(request_of(text_of(folder), SIZES[0], max_new_tokens=60)):
        running = engine._scheduler.running
        if isinstance(delta, mm.data.outputs.Delta) and running:
            lengths.append((engine.cache.lengths[:, running[0].seq_index].copy(), list(running[0].kept_tokens)))
            blocks.append(engine.cache.num_used_bytes)
    held, kept = lengths[-1]
    before = held - lengths[0][0]
    for layer in range(NUM_LAYERS):
        assert before[layer] == (sum(kept) if layer >= shape.text_layer else len(kept))
    assert held[shape.image_layer] < held[shape.image_layer - 1] or shape.image_layer == 0
    assert sum(kept) < 0.8 * len(kept)
    everything = 4 * -(-(49 + 40 + len(kept)) // 16) * engine.cache.shape.block_bytes
    assert blocks[-1] < everything
    engine.cache.check(engine.prefix_cache.held)


def eight(folder) -> list:
    """Different prompts, lengths, reducers and numbers of images."""
    reducers = [text_of(folder), "none", "dynamic:keep_ratio=0.6,text_threshold=2", "uniform:keep_ratio=0.5"] * 2
    return [
        request_of(reducer, SIZES[i % 2], prompt=f"{'What ' * i}is {i}?", seed=3 * i, max_new_tokens=TOKENS + i)
        for i, reducer in enumerate(reducers)
    ]


def tokens_of(events) -> tuple:
    assert not isinstance(events, Exception), events
    return mm.api.collect(iter(events)).token_ids


def test_a_batch_of_eight_equals_each_alone(folder, ours):
    alone = [tokens_of(list(ours.run(request))) for request in eight(folder)]
    assert len(set(alone)) == 8
    together = {at: tokens_of(outcome) for at, outcome in ours.run_batch(eight(folder))}
    assert [together[i] for i in range(8)] == alone
    ours.engine.cache.check(ours.engine.prefix_cache.held)


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch_tokens": 7},
        {"prefix_caching": False},
        {"speculation": SpeculationLimits(drafter="copy + recycle", max_draft_tokens=6, control=False)},
    ],
    ids=["steps of 7 tokens", "no prefix cache", "drafts"],
)
def test_the_way_does_not_matter(one_folder, alone, options):
    """Chunks, drafts, cached beginnings and several answers of one prompt change no token."""
    requests, expected = alone
    other = mm.load(one_folder, dtype="float32", num_threads=1, **options)
    for _ in range(2):
        together = {at: tokens_of(outcome) for at, outcome in other.run_batch(requests)}
        assert [together[i] for i in range(8)] == expected
    if "speculation" in options:
        assert other.engine.spec_decoder.stats.num_accepted_tokens
    other.engine.cache.check(other.engine.prefix_cache.held)


@pytest.mark.parametrize("max_batch_tokens", [9, 512])
def test_preempted_answers_go_on_as_they_were(one_folder, alone, max_batch_tokens):
    """Tokens are computed again in chunks of several, and what was dropped stays dropped."""
    requests, expected = alone
    model = mm.load(one_folder, dtype="float32", num_threads=1, max_batch_tokens=max_batch_tokens)
    feeds = [Recorder() for _ in requests]
    for request, feed in zip(requests, feeds, strict=True):
        model.engine.submit(request, encode(request, model.encode_parts), feed)
    count, scheduler = 0, model.engine._scheduler
    while model.engine.step():
        count += 1
        if count % 6 == 0 and scheduler.running and scheduler.num_preemptions < 40:
            scheduler.preempt(scheduler.running[count % len(scheduler.running)])
    assert scheduler.num_preemptions >= 8
    assert [tuple(map(tuple, feed.token_ids().values())) for feed in feeds] == expected
    assert_idle(model.engine)


def test_a_prompt_never_starts_with_blocks_of_another_decoder(one_folder):
    """The text before the picture has other keys and values in the decoder that was trained with the reducer."""
    long = "Look closely at what you are shown and think before you say anything about it. " * 2
    url = "data:image/png;base64," + base64.b64encode(png(picture(1, (112, 112)))).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "system", "content": long}, {"role": "user", "content": parts}]
    fresh, shared = (mm.load(one_folder, dtype="float32", num_threads=1) for _ in range(2))
    for reducer in ("none", "dynamic", "none", "dynamic"):
        options = {"reducer": reducer, "max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
        fresh.engine.prefix_cache.clear()
        answer = shared.generate(messages, **options)
        assert answer.token_ids == fresh.generate(messages, **options).token_ids
        hits = answer.usage.num_cached_tokens
    assert hits >= 16, "the second request with the same decoder starts from the first one's blocks"


def test_a_text_budget_becomes_the_measured_threshold(one_folder):
    """Between two measured points by a straight line; 1 keeps all; beyond what was measured it is refused."""

    def threshold(text: str) -> float:
        return bind(reducer_spec(text), one_folder).plugin.text_threshold

    assert threshold("dynamic:text_keep_ratio=0.3") == 0.5
    assert threshold("dynamic:text_keep_ratio=0.6") == pytest.approx(-0.75)
    assert threshold("dynamic:text_keep_ratio=1") < -1e8
    assert threshold("dynamic") == 0.0
    with pytest.raises(InvalidOption, match=r"was 0\.2; these weights were measured from 0\.3 to 0\.9"):
        threshold("dynamic:text_keep_ratio=0.2")
    with pytest.raises(InvalidOption, match="takes the place of text_keep_ratio"):
        reducer_spec("dynamic:text_keep_ratio=0.5,text_threshold=1")


def test_a_decoder_that_does_not_fit_is_refused_before_anything_is_computed(one_folder, tmp_path):
    wrong = {"layers.0.self_attn.q_proj.weight": torch.zeros(3, 3)}
    write_weights(tmp_path / "shape", Dynamic, one_folder, WIDTH, decoder=wrong)
    write_weights(tmp_path / "name", Dynamic, one_folder, WIDTH, decoder={"norm.weight": torch.zeros(WIDTH)})
    image = png(picture(1, (112, 112)))
    for name, words in (("shape", "other shapes than this model's decoder"), ("name", "in no layer of this model")):
        model = mm.load(one_folder, dtype="float32", num_threads=1, reducer=f'dynamic:weights="{tmp_path / name}"')
        with pytest.raises(BadWeights, match=words):
            model.generate("What?", images=[image], max_new_tokens=1)
        assert model.generate("What?", images=[image], reducer="none", max_new_tokens=1).token_ids


def test_two_reducers_that_decide_about_the_same_tokens_are_refused(one_folder):
    with pytest.raises(InvalidOption, match="take one reducer with a decoder of its own, not dynamic and dynamic"):
        bind(reducer_spec("dynamic + dynamic:keep_ratio=0.5"), one_folder)


class Failing(Dynamic):
    """Decides nothing."""

    def keep_tokens(self, hidden, indices):
        return indices


@pytest.mark.parametrize("on_error", ["fail", "keep_all"])
def test_a_reducer_that_fails_about_a_token_ends_its_own_request_or_keeps_everything(one_folder, on_error):
    model = mm.load(one_folder, dtype="float32", num_threads=1, reducers=ReducerPolicy(on_error=on_error))
    weights = bind(reducer_spec("dynamic"), one_folder).plugin.loaded
    requests = [request_of("none", SIZES[0], max_new_tokens=6), request_of("none", SIZES[1], max_new_tokens=6)]
    feeds = [Recorder(), Recorder()]
    for request, feed, reducer in zip(requests, feeds, [Failing().bind(weights), None], strict=True):
        model.engine.submit(request, encode(request, model.encode_parts), feed, reducer)
    while model.engine.step():
        pass
    assert tuple(feeds[1].token_ids()[0]) == tokens_of(list(model.run(requests[1])))[0]
    if on_error == "fail":
        assert isinstance(feeds[0].error, ReducerFault)
        assert "Failing: has to return a bool for each of 1 tokens" in str(feeds[0].error)
    else:
        assert len(feeds[0].token_ids()[0]) == 6
        assert feeds[0].summary is not None
        assert len(feeds[0].summary.reducer_faults) == 1
    assert_idle(model.engine)
