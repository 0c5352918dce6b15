"""The feature cache: never above its budget, least recently used out first, counts that add up."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.data.tokens import Encoded, VisualTokens
from mm.encode.feature_cache import FeatureCache, cache_key, encoded_bytes

WIDTH = 4


def item(num_tokens: int, fill: float = 0.0, dtype: torch.dtype = torch.float32) -> Encoded:
    embeddings = torch.full((num_tokens, WIDTH), fill, dtype=dtype)
    return Encoded(tokens=VisualTokens.full(embeddings, (1, 1, num_tokens), "image"))


def num_bytes(num_tokens: int) -> int:
    return num_tokens * (WIDTH * 4 + 3 * 8 + 4)


def test_counts_every_plane_in_bytes():
    assert encoded_bytes(item(10).tokens) == num_bytes(10)
    assert encoded_bytes(item(10, dtype=torch.bfloat16).tokens) == num_bytes(10) - 10 * WIDTH * 2


def test_a_hit_is_equal_and_marked():
    cache = FeatureCache(10_000)
    cache.put("a", item(3, 1.5))
    found = cache.get("a")
    assert found is not None
    assert found.cache_hit
    assert torch.equal(found.tokens.embeddings, item(3, 1.5).tokens.embeddings)
    assert (found.tokens.grid, found.tokens.kind) == ((1, 1, 3), "image")
    assert cache.get("b") is None
    assert (cache.stats.hits, cache.stats.misses, cache.stats.num_items) == (1, 1, 1)


def test_the_least_recently_used_leaves_first():
    cache = FeatureCache(num_bytes(2))
    cache.put("a", item(1))
    cache.put("b", item(1))
    assert cache.get("a") is not None
    cache.put("c", item(1))
    assert cache.get("b") is None
    assert cache.get("a") is not None
    assert cache.get("c") is not None
    assert cache.stats.evictions == 1


def test_an_item_above_the_budget_passes_by():
    cache = FeatureCache(num_bytes(2))
    cache.put("small", item(1))
    cache.put("large", item(3))
    assert cache.get("large") is None
    assert cache.get("small") is not None
    assert (cache.stats.bypassed, cache.stats.evictions) == (1, 0)
    off = FeatureCache(0)
    off.put("a", item(1))
    assert off.get("a") is None
    assert off.stats.num_bytes == 0


def test_stored_tensors_do_not_hold_their_batch():
    batch = torch.randn(16, 8, WIDTH)
    aux_features = {"cls_attention": torch.rand(2, 8)}
    cache = FeatureCache(10_000)
    cache.put("a", Encoded(tokens=VisualTokens.full(batch[3], (1, 2, 4), "image", aux_features)))
    found = cache.get("a")
    assert found is not None
    assert found.tokens.embeddings.untyped_storage().nbytes() == 8 * WIDTH * 4
    assert dict(found.tokens.aux_features) == {}
    expected = batch[3].clone()
    batch.zero_()
    assert torch.equal(found.tokens.embeddings, expected)


def test_clear_drops_entries_and_keeps_counts():
    cache = FeatureCache(num_bytes(1))
    cache.put("a", item(1))
    cache.put("b", item(1))
    cache.clear()
    assert cache.get("b") is None
    assert (cache.stats.num_items, cache.stats.num_bytes, cache.stats.evictions) == (0, 0, 1)


operations = st.lists(st.tuples(st.sampled_from(["get", "put"]), st.integers(0, 6), st.integers(1, 12)), max_size=60)


@settings(deadline=None, max_examples=60)
@given(operations, st.integers(0, 20))
def test_follows_the_plain_model(steps, budget_tokens):
    """Against a dict in order of use."""
    budget = num_bytes(budget_tokens)
    cache, model, evictions, hits, gets = FeatureCache(budget), {}, 0, 0, 0
    for action, key, size in steps:
        name = str(key)
        if action == "get":
            gets += 1
            found = cache.get(name)
            assert (found is not None) == (name in model)
            if found is not None:
                hits += 1
                model[name] = model.pop(name)
                assert found.tokens.num_tokens == model[name]
        elif size <= budget_tokens:
            cache.put(name, item(size))
            model.pop(name, None)
            model[name] = size
            while sum(model.values()) > budget_tokens:
                model.pop(next(iter(model)))
                evictions += 1
        else:
            cache.put(name, item(size))
        assert cache.stats.num_bytes == num_bytes(sum(model.values())) <= budget
        assert cache.stats.num_items == len(model)
    assert (cache.stats.hits, cache.stats.misses) == (hits, gets - hits)
    assert cache.stats.evictions == evictions


def test_replacing_an_entry_evicts_no_other():
    cache = FeatureCache(num_bytes(3))
    cache.put("a", item(1))
    cache.put("b", item(1))
    cache.put("b", item(2))
    assert cache.get("a") is not None
    assert cache.stats.evictions == 0


def test_threads_share_it():
    cache = FeatureCache(num_bytes(30))
    problems = []

    def work(seed: int) -> None:
        for step in range(300):
            key = (seed * 7 + step) % 9
            found = cache.get(str(key))
            if found is not None and not (found.tokens.embeddings == key).all():
                problems.append(key)
            cache.put(str(key), item(1 + key, float(key)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    stats = cache.stats
    assert stats.hits + stats.misses == 6 * 300
    assert stats.num_bytes <= num_bytes(30)


text = st.text(max_size=8)


@given(st.tuples(text, text, text, text), st.tuples(text, text, text, text))
def test_keys_are_equal_only_for_equal_parts(first, second):
    assert (cache_key(*first) == cache_key(*second)) == (first == second)


@pytest.mark.parametrize("parts", [("ab", "c", "d"), ("a", "bc", "d"), ("a", "b", "cd"), ("", "ab", "cd")])
def test_text_does_not_move_between_parts(parts):
    assert cache_key(*parts) != cache_key("abc", "d", "")
    assert cache_key(*parts) != cache_key(*parts, tenant="t")
    assert len(cache_key(*parts)) == 64
