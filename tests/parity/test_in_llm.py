"""Methods inside the decoder against a mask: same tokens hidden, nothing dropped, transformers' eager attention.

The rules here are the methods' equations once more, on full attention maps; the engine never has one.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import mm
from mm.data.sampling_params import SamplingParams
from mm.encode.pipeline import encode
from mm.models.checkpoint import find
from mm.plugins.spec import build_reducer
from tests.helpers.checkpoints import random_llava, random_qwen2_5_vl
from tests.helpers.masked import Masked, Seen
from tests.parity.test_generate import picture, png

NUM_LAYERS = 4
TOKENS = 8
SIZES = ([(224, 168)], [(224, 224), (60, 112)])


@pytest.fixture(scope="module", params=["tiny", "llava", "qwen2_5_vl"])
def folder(request, tmp_path_factory):
    if request.param == "tiny":
        return find("tiny")
    build = {"llava": random_llava, "qwen2_5_vl": random_qwen2_5_vl}[request.param]
    options = {"image_size": 112} if request.param == "llava" else {}
    return build(tmp_path_factory.mktemp(request.param), num_layers=NUM_LAYERS, num_kv_heads=2, **options)


@pytest.fixture(scope="module")
def ours(folder):
    return mm.load(folder, dtype="float32", num_threads=1)


@pytest.fixture(scope="module")
def theirs(folder):
    return Masked(folder)


def best(scores: torch.Tensor, k: int) -> torch.Tensor:
    return scores.sort(descending=True, stable=True).indices[:k].sort().values


def fastv(keep_ratio: float):
    def rule(seen: Seen) -> torch.Tensor:
        scores = seen.before.mean(0)[seen.num_rows - 1, seen.visual]
        return seen.visual[best(scores, round(len(seen.visual) * keep_ratio))]

    return rule


def pyramid(ratio: float, counts: list[int]):
    def rule(seen: Seen) -> torch.Tensor:
        stay = []
        for first, count in zip(seen.first, counts, strict=True):
            mine = seen.visual[(seen.visual >= first) & (seen.visual < first + count)]
            scores = seen.here.mean(0)[seen.num_rows - 1, mine]
            stay.append(mine[best(scores, max(1, math.floor(count * ratio)))])
        return torch.cat(stay)

    return rule


def request_of(reducer: str, sizes):
    images = [png(picture(i, size)) for i, size in enumerate(sizes)]
    return mm.api.build_request("Which colour has the circle, and where is it?", images=images, reducer=reducer)


def encode_for(ours, reducer: str, sizes):
    return encode(request_of(reducer, sizes), ours.encode_parts).items


def compare(ours, theirs, reducer, rules_of, sizes, later=lambda masks: masks):
    """The largest difference of log probabilities, and what each side kept of the items."""
    request = request_of(reducer, sizes)
    sampling = SamplingParams(max_new_tokens=TOKENS, temperature=0, ignore_eos=True, logprobs=True, top_logprobs=10)
    asked = replace(request, sampling=sampling, vision=replace(request.vision, return_map=True))
    answer = mm.api.collect(ours.run(asked))
    encoded = encode(request, ours.encode_parts).items
    prompt = ours.engine.family.splice(request.messages, [item.tokens for item in encoded])
    counts = [item.tokens.num_tokens for item in encoded]
    visual = prompt.is_visual.nonzero()[:, 0]
    first = tuple(int(visual[sum(counts[:i])]) for i in range(len(counts)))
    masks = theirs.prompt_masks(prompt, rules_of(counts), first)
    logits = theirs.logits(prompt, masks, later(masks), list(answer.token_ids[0]))
    expected = logits.log_softmax(-1)
    worst = max(
        abs(float(expected[i, one.token_id]) - one.logprob)
        for i, token in enumerate(answer.logprobs[0])
        for one in (token, *token.top)
    )
    left = [(masks[-1].nonzero()[:, 0] - at).tolist() for at in first]
    kept = [
        [int(item.tokens.indices[i]) for i in left_of if 0 <= i < count]
        for item, left_of, count in zip(encoded, left, counts, strict=True)
    ]
    scale = max(1.0, float(logits.abs().max()))
    return worst / scale, kept, [list(item.kept) for item in answer.kept]


@pytest.mark.parametrize("sizes", SIZES, ids=["one image", "two images"])
@pytest.mark.parametrize(("keep_ratio", "layer"), [(0.5, 2), (0.25, 1), (0.1, 3)])
def test_fastv(ours, theirs, keep_ratio, layer, sizes):
    reducer = f"fastv:keep_ratio={keep_ratio},layer={layer},joint=true"
    worst, expected, kept = compare(ours, theirs, reducer, lambda counts: {layer: fastv(keep_ratio)}, sizes)
    assert kept == expected
    assert worst < 1e-5


@pytest.mark.parametrize("sizes", SIZES, ids=["one image", "two images"])
@pytest.mark.parametrize(
    ("reducer", "ratios"),
    [
        ("pyramiddrop", {1: 0.5, 2: 0.25, 3: 0.125}),
        ("pyramiddrop:keep_ratio=0.09,num_stages=2,at_layers=[1,3]", {1: 0.3, 3: 0.09}),
    ],
)
def test_pyramiddrop(ours, theirs, reducer, ratios, sizes):
    worst, expected, kept = compare(
        ours, theirs, reducer, lambda counts: {layer: pyramid(r, counts) for layer, r in ratios.items()}, sizes
    )
    assert kept == expected
    assert worst < 1e-5


def test_the_comparison_notices_a_drop_one_layer_off(ours, theirs):
    worst, _, _ = compare(ours, theirs, "fastv:keep_ratio=0.25,layer=2", lambda counts: {3: fastv(0.25)}, SIZES[0])
    assert worst > 1e-5


def mustdrop(reducer: str, encoded):
    """The filter on full maps."""
    options = build_reducer(reducer)
    protected = torch.cat([item.tokens.protected for item in encoded]) if options.key_ratio else None

    def rule(seen: Seen) -> torch.Tensor:
        rows = seen.before.mean(0)[seen.behind :, seen.visual]
        stays = rows.amax(0) >= options.peak
        stays |= rows.sum(0) >= options.global_share * rows.sum()
        if protected is not None:
            stays |= protected[seen.origins]
        return seen.visual[stays]

    return rule


@pytest.mark.parametrize("sizes", SIZES, ids=["one image", "two images"])
@pytest.mark.parametrize(("share", "peak"), [(0.02, 0.02), (0.005, 0.5)])
def test_mustdrop(ours, theirs, share, peak, sizes):
    keys = 0.08 if "cls_attention" in ours.encode_parts.encoder.provides else 0
    reducer = f"mustdrop:global_share={share},peak={peak},key_ratio={keys},window=2,similarity=0.5,at_layers=[2,3]"
    encoded = encode_for(ours, reducer, sizes)

    def later(masks):
        """Generated rows see the last survivors in the layers in which tokens were filtered, and in the one before."""
        return [masks[0], masks[-1], masks[-1], masks[-1]]

    worst, expected, kept = compare(
        ours, theirs, reducer, lambda counts: dict.fromkeys((2, 3), mustdrop(reducer, encoded)), sizes, later
    )
    assert kept == expected
    assert sum(map(len, kept)) < sum(item.tokens.num_tokens for item in encoded)
    assert worst < 1e-5


def test_the_comparison_notices_a_cache_that_kept_everything(ours, theirs):
    reducer = "mustdrop:global_share=0.02,peak=0.02,key_ratio=0,at_layers=[2,3]"
    encoded = encode_for(ours, reducer, SIZES[0])
    worst, _, _ = compare(
        ours, theirs, reducer, lambda counts: dict.fromkeys((2, 3), mustdrop(reducer, encoded)), SIZES[0]
    )
    assert worst > 1e-5
