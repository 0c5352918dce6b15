"""The cache of prompts' hidden states."""

from __future__ import annotations

import torch

from mm.engine.spec_decode.hidden_state_cache import CapturedStates, HiddenStateCache

SIZE, WIDTH = 4, 3
HASHES = [bytes([i]) for i in range(8)]


def captured(first: int, stop: int, *names: str) -> CapturedStates:
    """Tokens whose states are filled with their indices."""
    indices = torch.arange(first, stop)
    states = {name: indices.float().unsqueeze(1).expand(-1, WIDTH) + 100 * i for i, name in enumerate(names)}
    return CapturedStates(indices, states)


def num_found(cache: HiddenStateCache, hashes: list[bytes]) -> int:
    """Tokens at the start of a prompt whose states are kept."""
    found = cache.get(hashes, {"a"})
    return 0 if found is None else len(found.token_indices)


def test_full_blocks_are_kept_whatever_chunks_they_came_in():
    cache = HiddenStateCache(1 << 20, SIZE)
    cache.put(HASHES, [captured(0, 6, "a", "b"), captured(6, 15, "a", "b")])
    found = cache.get(HASHES, {"a"})
    assert found is not None
    assert found.token_indices.tolist() == list(range(12)), "the last block is not full"
    assert (found.first, found.last) == (0, 11)
    assert found.states.keys() == {"a"}
    assert found.states["a"][:, 0].tolist() == found.token_indices.tolist()
    assert cache.num_bytes == 3 * SIZE * WIDTH * 4 * 2


def test_the_longest_kept_prefix_is_found():
    cache = HiddenStateCache(1 << 20, SIZE)
    cache.put(HASHES[:2], [captured(0, 8, "a")])
    cache.put(HASHES, [captured(10, 24, "a")])  # the states start in the middle of block 2, so it is not full
    assert num_found(cache, HASHES) == 8
    assert cache.get(HASHES[1:], {"b"}) is None, "no state of this name was kept"
    assert cache.get([b"other", *HASHES], {"a"}) is None
    cache.put(HASHES, [captured(8, 24, "a")])
    assert num_found(cache, HASHES) == 24


def test_a_block_holds_the_states_of_two_drafters():
    cache = HiddenStateCache(1 << 20, SIZE)
    cache.put(HASHES, [captured(0, 4, "a")])
    cache.put(HASHES, [captured(0, 4, "b")])
    assert cache.get(HASHES, {"a", "b"}) is not None


def test_nothing_is_kept_where_a_reducer_removed_tokens():
    cache = HiddenStateCache(1 << 20, SIZE)
    whole = captured(0, 12, "a")
    left = torch.tensor([0, 1, 2, 3, 6, 7, 8, 9, 10, 11])
    cache.put(HASHES, [CapturedStates(left, {"a": whole.states["a"][left]})])
    assert cache.get(HASHES, {"a"}) is None


def test_memory_is_bounded_and_the_end_of_the_oldest_prompt_is_evicted_first():
    block = SIZE * WIDTH * 4
    cache = HiddenStateCache(3 * block, SIZE)
    cache.put(HASHES[:2], [captured(0, 8, "a")])
    cache.put(HASHES[4:6], [captured(0, 8, "a")])
    assert cache.num_bytes == 3 * block
    assert num_found(cache, HASHES[:2]) == 4, "the last block of the older prompt was evicted"
    cache.put(HASHES[6:], [captured(0, 8, "a")])
    assert num_found(cache, HASHES[:2]) == 4, "it was used since"
    too_small = HiddenStateCache(block - 1, SIZE)
    too_small.put(HASHES, [captured(0, 8, "a")])
    assert too_small.num_bytes == 0
