"""Positions that begin anew in each layer where tokens leave, against transformers' Llama layers run by hand.

As PyramidDrop and MustDrop were published: in a layer, a token's position is its place among those that the layer
holds, in prefill and for each generated token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import mm
from mm.api import build_request, collect
from mm.data.request import Request
from mm.encode.pipeline import encode
from mm.errors import InvalidRequest
from mm.models.checkpoint import find
from pruning.in_llm.mustdrop import MustDrop, filtered
from pruning.in_llm.pyramiddrop import PyramidDrop
from tests.helpers.checkpoints import random_qwen2_5_vl
from tests.parity.test_generate import picture, png

NEW_TOKENS = 8


@dataclass
class ByHand:
    """A Llama whose layers hold what a method leaves them.

    Attributes:
        keys, values: Of each layer, (heads, tokens, width), rotated.
    """

    text: object
    head: object
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def layer(self, index: int, hidden: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The output (n, D) and the attention (heads, n, all) of tokens whose positions begin at `first`."""
        layer = self.text.layers[index]
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        width, count = attention.head_dim, len(hidden)
        states = [
            project(normed).view(count, -1, width).transpose(0, 1)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        cos, sin = self.text.rotary_emb(hidden[None], torch.arange(first, first + count)[None])
        query, key = (one[0] for one in apply_rotary_pos_emb(states[0][None], states[1][None], cos, sin))
        if index == len(self.keys):
            self.keys.append(key[:, :0])
            self.values.append(key[:, :0])
        self.keys[index] = torch.cat([self.keys[index], key], dim=1)
        self.values[index] = torch.cat([self.values[index], states[2]], dim=1)
        keys, values = (held[index].repeat_interleave(len(query) // len(key), 0) for held in (self.keys, self.values))
        scores = query @ keys.mT / width**0.5
        hidden_from = torch.ones(count, keys.shape[1], dtype=torch.bool).triu(1 + keys.shape[1] - count)
        weights = scores.masked_fill(hidden_from, -torch.inf).softmax(-1)
        hidden = hidden + attention.o_proj((weights @ values).transpose(0, 1).reshape(count, -1))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), weights

    def forget(self, index: int, keep: Tensor) -> None:
        self.keys[index], self.values[index] = self.keys[index][:, keep], self.values[index][:, keep]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(self.text.norm(hidden[-1:]))[0].log_softmax(-1)


Choose = Callable[[ByHand, int, Tensor, Tensor, list[Tensor], int], tuple[Tensor, Tensor]]


def pyramid(method: PyramidDrop) -> Choose:
    def choose(llama, index, hidden, visual, weights, num_in):
        if index not in method.layers(4):
            return torch.arange(len(hidden)), visual
        trial = replace(llama, keys=[*llama.keys], values=[*llama.values])
        _, ranked = trial.layer(index, hidden, 0)  # at the positions of the layer below
        k = int(num_in * method.ratio(1 + method.layers(4).index(index)) + 1e-9)
        return _kept(ranked[:, -1].mean(0)[visual].topk(k).indices.sort().values, visual, len(hidden))

    return choose


def must(method: MustDrop) -> Choose:
    def choose(llama, index, hidden, visual, weights, num_in):
        if index not in method.layers(4):
            return torch.arange(len(hidden)), visual
        text = weights[-1].mean(0)[int(visual[-1]) + 1 :, visual]
        flags = filtered(text.sum(0), text.amax(0), method.global_share, method.peak)
        return _kept(flags.nonzero().squeeze(1), visual, len(hidden))

    return choose


def _kept(chosen: Tensor, visual: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which of `count` tokens stay, and where the visual ones then are."""
    stays = torch.ones(count, dtype=torch.bool)
    stays[visual] = False
    stays[visual[chosen]] = True
    return stays.nonzero().squeeze(1), (stays.cumsum(0) - 1)[visual[chosen]]


@torch.no_grad()
def by_hand(model: mm.Model, asked: Request, choose: Choose, *, cuts: bool) -> tuple[list[int], list[float], list[int]]:
    """Greedy tokens with their log-probabilities, and how many tokens each layer holds of the prompt.

    Args:
        cuts: Whether the layers below the last one at which tokens leave forget them after the prompt.
    """
    items = encode(replace(asked, vision=replace(asked.vision, reducer="none")), model.encode_parts).items
    prompt = model.engine.family.splice(asked.messages, [item.tokens for item in items])
    whole = LlavaForConditionalGeneration.from_pretrained(find("tiny"), dtype=torch.float32)
    llama = ByHand(whole.model.language_model, whole.lm_head)
    hidden, visual = prompt.embeddings.clone(), prompt.is_visual.nonzero().squeeze(1)
    num_in, weights, left, origins = len(visual), [], [], torch.arange(len(hidden))
    for index in range(4):
        keep, visual = choose(llama, index, hidden, visual, weights, num_in)
        hidden, origins = hidden[keep], origins[keep]
        hidden, ranked = llama.layer(index, hidden, 0)
        weights.append(ranked)
        left.append(origins)
    if cuts:
        for index in range(4):
            llama.forget(index, torch.isin(left[index], left[-1]).nonzero().squeeze(1))
    lengths = [keys.shape[1] for keys in llama.keys]
    tokens, found = [], []
    for _ in range(NEW_TOKENS):
        logprobs = llama.logits(hidden)
        tokens.append(int(logprobs.argmax()))
        found.append(float(logprobs.max()))
        hidden = whole.get_input_embeddings()(torch.tensor(tokens[-1:]))
        for index in range(4):
            hidden, _ = llama.layer(index, hidden, llama.keys[index].shape[1])
    return tokens, found, lengths


CASES = {
    "pyramiddrop:keep_ratio=0.1": (pyramid(PyramidDrop(keep_ratio=0.1)), False),
    "pyramiddrop:keep_ratio=0.3,num_stages=2": (pyramid(PyramidDrop(keep_ratio=0.3, num_stages=2)), False),
    "mustdrop:window=1,key_ratio=0,at_layers=[1,2]": (
        must(MustDrop(window=1, key_ratio=0, at_layers=(1, 2))),
        True,
    ),
}


def asking(reducer: str, positions: str = "as_published", number: int = 0) -> Request:
    image = png(picture(number, (90, 70)))
    return build_request(
        "What is it, and where?",
        images=[image],
        reducer=reducer,
        positions=positions,
        max_new_tokens=NEW_TOKENS,
        temperature=0,
        ignore_eos=True,
        logprobs=True,
    )


@pytest.fixture(scope="module")
def model():
    found = mm.load("tiny", dtype="float32", num_threads=1)
    yield found
    found.close()


@pytest.mark.parametrize("reducer", CASES)
def test_as_published_is_what_transformers_layers_give_by_hand(model, reducer):
    choose, cuts = CASES[reducer]
    asked = asking(reducer)
    tokens, logprobs, lengths = by_hand(model, asked, choose, cuts=cuts)
    assert len(set(lengths)) > 1 or cuts
    answer = collect(model.run(asked))
    assert list(answer.token_ids[0]) == tokens
    assert [token.logprob for token in answer.logprobs[0]] == pytest.approx(logprobs, abs=2e-4)
    kept = collect(model.run(asking(reducer, "kept")))
    assert [token.logprob for token in kept.logprobs[0]] != pytest.approx(logprobs, abs=2e-4)


@pytest.mark.parametrize("options", [{"drafter": "copy"}, {"prefix_caching": False}])
def test_drafts_neighbours_and_caches_change_nothing(model, options):
    reducers = [*CASES, "fastv:layer=1", "none"]
    alone = [collect(model.run(asking(reducer, number=i))) for i, reducer in enumerate(reducers)]
    other = mm.load("tiny", dtype="float32", num_threads=1, **options)
    requests = [asking(reducer, number=i) for i, reducer in enumerate(reducers)]
    together = {index: collect(iter(events)) for index, events in other.run_batch(requests)}
    assert [together[index].token_ids for index in sorted(together)] == [one.token_ids for one in alone]
    other.close()


def test_where_it_cannot_be_it_is_refused(model, tmp_path):
    qwen = mm.load(random_qwen2_5_vl(tmp_path), dtype="float32")
    for one, reducer in ((qwen, "pyramiddrop:num_stages=1"), (model, "pyramiddrop + dynamic")):
        with pytest.raises(InvalidRequest, match="anew in each layer") as caught:
            collect(one.run(asking(reducer)))
        assert caught.value.param == "vision.positions"
