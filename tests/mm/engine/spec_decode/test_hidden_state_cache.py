"""States beside what the prefix cache holds."""

from __future__ import annotations

import torch

from mm.engine.spec_decode.hidden_state_cache import StateCache

SIZE, WIDTH = 4, 3
NAMES = [bytes([i]) for i in range(8)]


def kept(first: int, stop: int, *names: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rows whose states are their numbers."""
    rows = torch.arange(first, stop)
    return rows, {name: rows.float().unsqueeze(1).expand(-1, WIDTH) + 100 * i for i, name in enumerate(names)}


def test_whole_blocks_are_remembered_whatever_chunks_they_came_in():
    cache = StateCache(1 << 20, SIZE)
    cache.put(NAMES, [kept(0, 6, "a", "b"), kept(6, 15, "a", "b")])
    found = cache.get(NAMES, {"a"})
    assert found is not None
    rows, states = found
    assert rows.tolist() == list(range(12)), "the last block is not whole"
    assert states.keys() == {"a"}
    assert states["a"][:, 0].tolist() == rows.tolist()
    assert cache.num_bytes == 3 * SIZE * WIDTH * 4 * 2


def test_the_longest_known_beginning_is_found():
    cache = StateCache(1 << 20, SIZE)
    cache.put(NAMES[:2], [kept(0, 8, "a")])
    cache.put(NAMES, [kept(10, 24, "a")])  # rows of block 2 are missing: it began in the middle
    rows, _ = cache.get(NAMES, {"a"}) or (torch.zeros(0), {})
    assert len(rows) == 8
    assert cache.get(NAMES[1:], {"b"}) is None, "nobody has asked for these states before"
    assert cache.get([b"other", *NAMES], {"a"}) is None
    cache.put(NAMES, [kept(8, 24, "a")])
    rows, _ = cache.get(NAMES, {"a"}) or (torch.zeros(0), {})
    assert len(rows) == 24


def test_states_of_two_drafters_lie_beside_each_other():
    cache = StateCache(1 << 20, SIZE)
    cache.put(NAMES, [kept(0, 4, "a")])
    cache.put(NAMES, [kept(0, 4, "b")])
    assert cache.get(NAMES, {"a", "b"}) is not None


def test_rows_that_a_reducer_took_out_are_nobodys():
    cache = StateCache(1 << 20, SIZE)
    rows, states = kept(0, 12, "a")
    stay = torch.tensor([0, 1, 2, 3, 6, 7, 8, 9, 10, 11])
    cache.put(NAMES, [(rows[stay], {"a": states["a"][stay]})])
    assert cache.get(NAMES, {"a"}) is None


def test_memory_is_bounded_and_the_oldest_ends_go_first():
    block = SIZE * WIDTH * 4
    cache = StateCache(3 * block, SIZE)
    cache.put(NAMES[:2], [kept(0, 8, "a")])
    cache.put(NAMES[4:6], [kept(0, 8, "a")])
    assert cache.num_bytes == 3 * block
    rows, _ = cache.get(NAMES[:2], {"a"}) or (torch.zeros(0), {})
    assert len(rows) == 4, "the end of the older prompt went"
    cache.put(NAMES[6:], [kept(0, 8, "a")])
    rows, _ = cache.get(NAMES[:2], {"a"}) or (torch.zeros(0), {})
    assert len(rows) == 4, "it was used since"
    StateCache(block - 1, SIZE).put(NAMES, [kept(0, 8, "a")])  # too small for one block: nothing is kept
