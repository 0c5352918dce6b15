"""Weights of learned reducers: found in three places, tied to one checkpoint, part of every key, refused in words."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mm
from mm.config import ReducerPolicy
from mm.data.request import VisionOptions
from mm.encode.pipeline import load
from mm.encode.policy import resolve_reducer
from mm.errors import BadWeights, InvalidOption, ReducerNotAllowed
from mm.models.checkpoint import find
from mm.plugins.spec import bind, reducer_spec, refresh
from mm.plugins.weights import CARD, TENSORS, checkpoint_fingerprint, names_beside
from pruning.learned.router import Router
from tests.helpers.checkpoints import random_llava
from tests.helpers.learned import write_weights

WIDTH = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_llava(tmp_path_factory.mktemp("model"), width=WIDTH)


@pytest.fixture
def model(folder, tmp_path):
    """A copy of the checkpoint that has weights for the router beside it."""
    copy = shutil.copytree(folder, tmp_path / "model")
    write_weights(copy / "reducers/router", Router, copy, WIDTH)
    refresh()
    return copy


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8)


def request_with(reducer: str):
    return mm.api.build_request("What is it?", images=[image()], reducer=reducer)


def test_weights_are_found_beside_the_model_in_a_folder_and_on_the_hub(model, tmp_path, monkeypatch):
    elsewhere = shutil.copytree(model / "reducers/router", tmp_path / "else where")
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(elsewhere)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    beside, given, hub = (
        bind(reducer_spec(text), model)
        for text in ("router", f'router:weights="{elsewhere}"', "router:weights=someone/router")
    )
    prints = {spec.plugin.loaded.fingerprint for spec in (beside, given, hub)}
    assert len(prints) == 1, "equal files have equal fingerprints, wherever they lie"
    assert asked == [("someone/router", [CARD, "*.safetensors"])], "nothing but JSON and safetensors"
    assert names_beside(model) == ["router"]


def test_the_canonical_text_has_the_fingerprint_and_what_the_weights_decide(model):
    spec = bind(reducer_spec("router"), model)
    print_ = spec.plugin.loaded.fingerprint
    assert spec.canonical == f'router:keep_ratio=0.4,threshold=null,weights="router@{print_}"'
    assert spec.before_decoder == spec.canonical, "encoded features depend on it"
    again = bind(reducer_spec(spec.canonical), model)
    assert again.canonical == spec.canonical
    assert again.plugin == spec.plugin
    assert again.plugin.network is spec.plugin.network, "one network however often it is named"


def test_a_fingerprint_that_is_not_there_is_refused(model):
    with pytest.raises(BadWeights, match=r"have the fingerprint [0-9a-f]{16} here and not 0123"):
        bind(reducer_spec('router:weights="router@0123"'), model)


def test_other_weights_are_another_key_of_the_feature_cache(model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    write_weights(other / "reducers/router", Router, other, WIDTH, seed=8)
    keys = set()
    for each in (model, other):
        parts = mm.load(each, dtype="float32", num_threads=1).encode_parts
        keys.add(load(request_with("router"), parts).items[0].key)
        assert load(request_with("router"), parts).items[0].key in keys
    assert len(keys) == 2


def cut(folder):
    path = folder / TENSORS
    path.write_bytes(path.read_bytes()[:-9])


def change(folder, **card):
    path = folder / CARD
    path.write_text(json.dumps({**json.loads(path.read_text()), **card}))


def edit(folder, change):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


DAMAGE = {
    "no card": (lambda folder: (folder / CARD).unlink(), "do not lie beside the model"),
    "a card that is no JSON": (lambda folder: (folder / CARD).write_text("{"), "no readable config.json"),
    "a card that is a list": (lambda folder: (folder / CARD).write_text("[]"), "no JSON object"),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), "model.safetensors is absent"),
    "cut tensors": (cut, "are damaged: model.safetensors"),
    "pickled tensors": (lambda folder: torch.save({}, folder / TENSORS), "no safetensors file"),
    "another reducer": (lambda folder: change(folder, reducer="dynamic"), "those of the reducer 'dynamic'"),
    "another checkpoint": (lambda folder: change(folder, base="ab" * 32), "trained for another checkpoint"),
    "no checkpoint": (lambda folder: change(folder, base=None), "trained for another checkpoint"),
    "another width": (lambda folder: change(folder, width=64), "other shapes than their card says"),
    "a width in words": (lambda folder: change(folder, width="wide"), "'width' is 'wide' and not a number"),
    "a width of zero": (lambda folder: change(folder, width=0), "not a whole number from 1 on"),
    "a tensor too few": (lambda folder: edit(folder, lambda t: t.pop("mlp.0.bias")), "mlp.0.bias is missing"),
    "a tensor too many": (lambda folder: edit(folder, lambda t: t.update(x=torch.ones(1))), "x is missing or left"),
    "not a number": (lambda folder: edit(folder, lambda t: t["mlp.0.bias"].fill_(torch.nan)), "not finite"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_broken_weights_are_refused_in_words_and_harm_nobody_else(model, damage):
    act, words = DAMAGE[damage]
    act(model / "reducers/router")
    with pytest.raises(BadWeights, match=words) as caught:
        bind(reducer_spec("router"), model)
    assert str(model) not in str(caught.value), "what callers of a server read has no paths"
    loaded = mm.load(model, dtype="float32", num_threads=1)
    answer = loaded.generate("What is it?", images=[image()], reducer="uniform", max_new_tokens=2)
    assert len(answer.token_ids[0]) == 2
    with pytest.raises(BadWeights):
        loaded.generate("What is it?", images=[image()], reducer="router", max_new_tokens=2)


def test_a_model_without_weights_says_what_to_do(folder):
    with pytest.raises(BadWeights, match=r"trained for it: none\).*docs/reducers.md.*weights=FOLDER"):
        bind(reducer_spec("router"), folder)
    with pytest.raises(BadWeights, match="this encoder belongs to no model"):
        bind(reducer_spec("router"), None)


def test_a_reducer_that_was_given_no_weights_says_so(folder):
    model = mm.load(folder, dtype="float32", num_threads=1)
    with pytest.raises(InvalidOption, match=r"has to be bound to a model.*mm\.plugins\.spec\.bind"):
        reducer_spec("router").plugin.network  # noqa: B018
    assert model.generate("What?", max_new_tokens=1).token_ids, "text alone needs no weights"


def test_requests_may_name_only_weights_that_the_operator_allows(model, tmp_path):
    elsewhere = str(shutil.copytree(model / "reducers/router", tmp_path / "elsewhere"))
    text = f'router:weights="{elsewhere}"'
    parts = mm.load(model, dtype="float32", num_threads=1).encode_parts
    with pytest.raises(ReducerNotAllowed, match=r"may not give 'router' the weights .*allowed: those beside the model"):
        resolve_reducer(VisionOptions(reducer=text), parts)
    with pytest.raises(ReducerNotAllowed):
        resolve_reducer(VisionOptions(reducer="none + router:weights=someone/else"), parts)
    allowing = mm.load(model, dtype="float32", num_threads=1, reducers=ReducerPolicy(weights=(elsewhere,)))
    assert resolve_reducer(VisionOptions(reducer=text), allowing.encode_parts).plugin.loaded is not None
    default = mm.load(model, dtype="float32", num_threads=1, reducer=text)
    answer = default.generate("What is it?", images=[image()], max_new_tokens=2)
    assert answer.usage.num_visual_tokens_kept < answer.usage.num_visual_tokens_in


def test_a_fingerprint_covers_the_weights_of_a_checkpoint_and_nothing_below_it(model):
    before = checkpoint_fingerprint(model)
    (model / "reducers/router/more.safetensors").write_bytes(b"x")
    (model / "notes.txt").write_text("x")
    assert checkpoint_fingerprint(model) == before
    edited = load_file(model / "model.safetensors")
    next(iter(edited.values())).add_(1)
    save_file(edited, model / "model.safetensors")
    assert checkpoint_fingerprint(model) != before


def test_the_shipped_weights_fit_the_shipped_model():
    tiny = find("tiny")
    assert names_beside(tiny)
    for name in names_beside(tiny):
        assert bind(reducer_spec(name), tiny).plugin.loaded.reducer == name
