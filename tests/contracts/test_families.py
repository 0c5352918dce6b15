"""What every registered model family promises. A new one is tested as soon as it has its entry point."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from mm.data.request import MediaPart, Message, TextPart
from mm.data.tokens import Prompt, VisualTokens
from mm.errors import MediaError
from mm.plugins.apply import reduce_tokens
from mm.plugins.registry import create, names
from mm.plugins.spec import build_reducer
from tests.contracts.test_encoders import image, video

NAMES = [*names("family"), "tiny"]


class Model:
    """Both sides of a checkpoint."""

    def __init__(self, name: str, folder: Any) -> None:
        model_type = "llava" if name == "tiny" else name
        self.family: Any = create("family", model_type, folder=folder)
        self.encoder: Any = create("encoder", model_type, folder=folder)

    def items(self, *kinds: str) -> list[VisualTokens]:
        media = [image(i, 60 + 80 * i, 90) if kind == "image" else video(i) for i, kind in enumerate(kinds)]
        return self.encoder.encode(media)

    def splice(self, items: list[VisualTokens], text: str = "What is it?") -> Prompt:
        return self.family.splice(messages(items, text), items)

    @property
    def combinations(self) -> list[tuple[str, ...]]:
        kinds = self.family.kinds & self.encoder.kinds
        found: list[tuple[str, ...]] = [("image",), ("video",), ("image", "image"), ("video", "image")]
        return [each for each in found if {*each} <= kinds]


def messages(items: list[VisualTokens], text: str) -> list[Message]:
    """Text and items by turns, text last."""
    parts: list[Any] = []
    for i, item in enumerate(items):
        parts += [TextPart(text=f"Item {i}: "), MediaPart(index=i, kind=item.kind)]
    return [Message(role="user", parts=(*parts, TextPart(text=text)))]


@pytest.fixture(scope="module", params=NAMES)
def model(request, checkpoint) -> Model:
    return Model(request.param, checkpoint(request.param))


def test_members_of_the_protocol(model):
    family = model.family
    vocab = range(family.language.vocab_size)
    assert family.max_context_tokens > 0
    assert family.folder.is_dir()
    assert family.eos_token_ids
    assert all(token in vocab for token in family.eos_token_ids | family.placeholder_ids)
    assert family.kinds == model.encoder.kinds, "its encoder takes other media than its prompts hold"
    assert isinstance(family.text_tokenizer, Tokenizer)
    assert {"temperature", "top_p"} <= family.default_sampling.keys()
    assert all(isinstance(value, float) for value in family.default_sampling.values())


def test_text_alone_is_a_prompt_without_visual_tokens(model):
    prompt = model.splice([])
    assert not prompt.is_visual.any()
    assert prompt.positions.tolist() == [list(range(prompt.length))] * prompt.positions.shape[0]
    assert prompt.next_position == prompt.length
    assert torch.equal(prompt.embeddings, model.family.language.embed(prompt.token_ids))


def test_every_item_is_spliced_once_in_order(model):
    """Visual tokens are the items' own, one after the other; all else is text, embedded as the decoder does it."""
    for kinds in model.combinations:
        items = model.items(*kinds)
        prompt = model.splice(items)
        shapes = {prompt.token_ids.shape[0], prompt.embeddings.shape[0], prompt.positions.shape[1]}
        assert shapes == {prompt.length} == {prompt.is_visual.shape[0]}
        assert torch.equal(prompt.embeddings[prompt.is_visual], torch.cat([item.embeddings for item in items]))
        assert set(prompt.token_ids[prompt.is_visual].tolist()) <= model.family.placeholder_ids
        text = ~prompt.is_visual
        assert not set(prompt.token_ids[text].tolist()) & model.family.placeholder_ids
        assert torch.equal(prompt.embeddings[text], model.family.language.embed(prompt.token_ids[text]))
        assert (prompt.token_ids.dtype, prompt.positions.dtype) == (torch.int64, torch.int64)
        assert prompt.next_position > int(prompt.positions[:, -1].max())


def test_dropping_visual_tokens_moves_nothing(model):
    """What is kept, visual or text, has the position that it has in the whole prompt; so has what is generated."""
    for kinds in model.combinations:
        items = model.items(*kinds)
        reducer = build_reducer("uniform:keep_ratio=0.5")
        whole, left = model.splice(items), model.splice([reduce_tokens(reducer, item) for item in items])
        starts = [sum(item.num_tokens for item in items[:i]) for i in range(len(items))]
        kept = torch.cat(
            [reduce_tokens(reducer, item).indices + start for item, start in zip(items, starts, strict=True)]
        )
        assert left.length == whole.length - int(whole.is_visual.sum()) + len(kept)
        assert torch.equal(left.positions[:, left.is_visual], whole.positions[:, whole.is_visual][:, kept])
        assert torch.equal(left.embeddings[left.is_visual], whole.embeddings[whole.is_visual][kept])
        assert torch.equal(left.positions[:, ~left.is_visual], whole.positions[:, ~whole.is_visual])
        assert torch.equal(left.token_ids[~left.is_visual], whole.token_ids[~whole.is_visual])
        assert left.next_position == whole.next_position


def test_what_a_user_writes_is_never_an_item(model):
    tokenizer = model.family.text_tokenizer
    for token in model.family.placeholder_ids:
        prompt = model.splice([], text=f"a {tokenizer.decode([token], skip_special_tokens=False)} b")
        assert not prompt.is_visual.any()


def test_kinds_that_it_does_not_take_are_refused(model):
    for kind in {"image", "video"} - model.family.kinds:
        width = model.family.language.embed(torch.zeros(1, dtype=torch.int64)).shape[1]
        tokens = VisualTokens.full(torch.zeros(4, width), (1, 2, 2), kind)
        with pytest.raises(MediaError, match=kind):
            model.splice([tokens])


def test_the_prompt_goes_through_the_decoder(model):
    """The engine's first demand: embeddings in the decoder's width and dtype, positions in rows that it rotates by."""
    prompt = model.splice(model.items(*model.combinations[0]))
    language = model.family.language
    assert prompt.embeddings.shape[1] == language.head_weight.shape[1]
    assert prompt.embeddings.dtype is language.dtype
    assert prompt.positions.shape[0] in (1, 3)
