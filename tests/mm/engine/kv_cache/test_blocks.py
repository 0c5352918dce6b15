"""The block cache against a plain model of it: dicts of lists of row stamps."""

import random

import numpy as np
import pytest
import torch

from mm.engine.kv_cache.blocks import KVCache, OutOfBlocks
from mm.engine.kv_cache.prefix_cache import PrefixCache
from mm.models.kv_cache_spec import KVCacheSpec

LAYERS, SIZE = 4, 4
SHAPE = KVCacheSpec(
    num_layers=LAYERS, num_heads=1, head_dim=2, dtype=torch.float32, device=torch.device("cpu"), block_size=SIZE
)


class Twin:
    """A cache and what it should hold. Every row bears a stamp that is used once."""

    def __init__(self, *, num_blocks: int, num_slots: int) -> None:
        self.cache = KVCache(SHAPE, num_blocks=num_blocks, num_slots=num_slots)
        self.prefixes = PrefixCache(self.cache)
        self.rows: dict[int, list[list[int]]] = {}
        self.entries: dict[bytes, list[list[int]]] = {}
        self._stamp = 0

    def open(self) -> int:
        slot = self.cache.allocate()
        self.rows[slot] = [[] for _ in range(LAYERS)]
        return slot

    def close(self, slot: int) -> None:
        self.cache.free(slot)
        del self.rows[slot]

    def grow(self, slot: int, count: int, start: int = 0, stop: int = LAYERS) -> None:
        self.cache.append_slots(slot, count, start, stop)
        for layer in range(start, stop):
            self._write(slot, layer, count)

    def grow_each(self, slots: list[int]) -> None:
        self.cache.append_slot_each(np.array(slots))
        for slot in slots:
            for layer in range(LAYERS):
                self._write(slot, layer, 1)

    def _write(self, slot: int, layer: int, count: int) -> None:
        stamps = list(range(self._stamp, self._stamp + count))
        self._stamp += count
        held = self.rows[slot][layer]
        places = torch.from_numpy(self.cache.slot_mapping(layer, slot, len(held)))
        values = torch.tensor(stamps, dtype=torch.float32)[:, None, None].expand(-1, 1, 2)
        self.cache.keys.flatten(0, 1)[places] = values
        self.cache.values.flatten(0, 1)[places] = -values
        held.extend(stamps)

    def shrink(self, slot: int, layer: int, length: int) -> None:
        self.cache.truncate(slot, layer, length)
        del self.rows[slot][layer][length:]

    def keep_rows(self, slot: int, layer: int, rows: list[int]) -> None:
        self.cache.keep_tokens(slot, layer, torch.tensor(rows, dtype=torch.int64))
        self.rows[slot][layer] = [self.rows[slot][layer][i] for i in rows]

    def keep_path(self, slot: int, count: int, path: list[int]) -> None:
        self.cache.keep_accepted(slot, count, path)
        for rows in self.rows[slot]:
            rows[len(rows) - count :] = [rows[len(rows) - count + i] for i in path]

    def fork(self, slot: int) -> int:
        copy = self.cache.fork(slot)
        self.rows[copy] = [list(layer) for layer in self.rows[slot]]
        return copy

    def put(self, slot: int, name: bytes) -> None:
        """Remember a slot's first block, as the engine does for blocks that are full in every layer."""
        self.prefixes.put(slot, [name])
        self.entries[name] = [layer[:SIZE] for layer in self.rows[slot]]

    def adopt(self, slot: int, name: bytes) -> None:
        self.cache.share(slot, self.prefixes.match([name]))
        self.rows[slot] = [list(layer) for layer in self.entries[name]]

    def contents(self, slot: int, layer: int) -> tuple[list[int], list[int]]:
        places = torch.from_numpy(self.cache.slot_mapping(layer, slot))
        keys, values = self.cache.keys.flatten(0, 1)[places], self.cache.values.flatten(0, 1)[places]
        return keys[:, 0, 1].int().tolist(), (-values[:, 0, 0]).int().tolist()

    def compare(self) -> None:
        self.cache.check(self.prefixes.held)
        for slot, layers in self.rows.items():
            for layer, stamps in enumerate(layers):
                assert self.contents(slot, layer) == (stamps, stamps)
        for name, layers in self.entries.items():
            ids = self.prefixes.match([name])
            for layer, stamps in enumerate(layers):
                assert self.cache.keys[int(ids[layer, 0]), :, 0, 0].int().tolist() == stamps
        held = {int(i) for slot in self.rows for layer in range(LAYERS) for i in self.cache.blocks(layer, slot)}
        held |= set(self.prefixes.held.tolist())
        assert self.cache.num_used_bytes == len(held) * SIZE * 2 * 2 * 4
        assert self.cache.num_free_blocks == self.cache.num_blocks - len(held)


def snapshot(cache: KVCache) -> tuple:
    free = cache._free[: cache.num_free_blocks].tolist()
    tables = [cache.blocks(layer, slot).tolist() for layer in range(LAYERS) for slot in range(cache.lengths.shape[1])]
    memory = (part.view(torch.int32).clone() for part in (cache.keys, cache.values))  # bits: memory may hold NaN
    return free, tables, cache.lengths.tolist(), cache.references.tolist(), *memory


def assert_unchanged(before: tuple, after: tuple) -> None:
    assert before[:4] == after[:4]
    assert torch.equal(before[4], after[4])
    assert torch.equal(before[5], after[5])


def act(twin: Twin, rng: random.Random) -> str:
    """One random operation; its name. One that finds no room has to leave everything as it was."""
    cache, slots = twin.cache, sorted(twin.rows)
    kinds = ["open", "grow", "grow", "grow", "each", "range", "shrink", "keep", "fork", "put", "adopt", "room", "close"]
    kind = rng.choice(kinds)
    slot = rng.choice(slots) if slots else None
    layer = rng.randrange(LAYERS)
    before = snapshot(cache)
    try:
        if kind == "open" and cache.num_free_slots:
            twin.open()
        elif kind == "adopt" and twin.entries and cache.num_free_slots:
            twin.adopt(twin.open(), rng.choice(sorted(twin.entries)))
        elif kind == "room":
            if rng.random() < 0.1:
                twin.prefixes.make_room(rng.randrange(cache.num_blocks))
                twin.entries = {name: rows for name, rows in twin.entries.items() if name in twin.prefixes._entries}
        elif slot is None:
            return "nothing"
        elif kind == "grow":
            count = rng.choice([0, 1, 1, 2, 3, 5, 9, 17])
            if cache.num_blocks_for(slot, count) <= cache.num_free_blocks:
                twin.grow(slot, count)  # as `blocks_for` promises
            else:
                with pytest.raises(OutOfBlocks):
                    twin.grow(slot, count)
                raise OutOfBlocks
        elif kind == "each":
            some = rng.sample(slots, rng.randint(1, len(slots)))
            if cache.num_blocks_for_each(np.array(some)) <= cache.num_free_blocks:
                twin.grow_each(some)
            else:
                with pytest.raises(OutOfBlocks):
                    twin.grow_each(some)
                raise OutOfBlocks
        elif kind == "range":
            start = rng.randrange(LAYERS)
            twin.grow(slot, rng.randrange(12), start, rng.randrange(start, LAYERS) + 1)
        elif kind == "shrink":
            twin.shrink(slot, layer, rng.randint(0, len(twin.rows[slot][layer])))
        elif kind == "keep":
            held = len(twin.rows[slot][layer])
            twin.keep_rows(slot, layer, sorted(rng.sample(range(held), rng.randint(0, held))))
        elif kind == "fork" and cache.num_free_slots:
            twin.fork(slot)
        elif kind == "put" and len(twin.entries) < 6 and min(map(len, twin.rows[slot])) >= SIZE:
            twin.put(slot, f"{twin._stamp}-{rng.random()}".encode())
        elif kind == "close":
            twin.close(slot)
        else:
            return "nothing"
    except OutOfBlocks:
        assert_unchanged(before, snapshot(cache))
        return "out of blocks"
    return kind


def test_ten_thousand_operations_equal_a_plain_model():
    seen: dict[str, int] = {}
    for seed in range(10):
        rng = random.Random(seed)
        twin = Twin(num_blocks=rng.choice([24, 60, 150]), num_slots=6)
        for _ in range(1000):
            kind = act(twin, rng)
            seen[kind] = seen.get(kind, 0) + 1
            twin.compare()
        for slot in list(twin.rows):
            twin.close(slot)
        twin.prefixes.clear()
        twin.cache.check()
        assert twin.cache.num_used_bytes == 0
        assert twin.cache.num_free_slots == 6
    assert (
        min(seen.get(kind, 0) for kind in ("grow", "each", "range", "shrink", "keep", "fork", "put", "adopt", "close"))
        > 50
    )
    assert seen["out of blocks"] > 100


def test_writing_behind_a_fork_leaves_the_other_alone():
    twin = Twin(num_blocks=40, num_slots=4)
    one = twin.open()
    twin.grow(one, 6)
    other = twin.fork(one)
    used = twin.cache.num_used_bytes
    assert used == LAYERS * 2 * SHAPE.block_bytes
    assert twin.cache.held_bytes(other) == used
    assert twin.cache.num_blocks_for(other, 1) == LAYERS  # a copy of each layer's last block
    twin.grow(other, 1)
    twin.grow(one, 2)
    twin.compare()
    assert twin.contents(one, 0)[0][:6] == twin.contents(other, 0)[0][:6]
    assert twin.contents(one, 0)[0][6] != twin.contents(other, 0)[0][6]
    shared = np.intersect1d(twin.cache.blocks(2, one), twin.cache.blocks(2, other))
    assert len(shared) == 1  # the whole block stays shared, the last one is each one's own


def test_evicting_from_a_fork_leaves_the_other_alone():
    twin = Twin(num_blocks=40, num_slots=4)
    one = twin.open()
    twin.grow(one, 14)
    other = twin.fork(one)
    twin.keep_rows(other, 1, [0, 1, 2, 3, 4, 6, 13])
    twin.compare()
    assert len(twin.contents(one, 1)[0]) == 14
    assert twin.cache.blocks(1, one)[0] == twin.cache.blocks(1, other)[0]  # nothing moved in it
    assert twin.cache.num_used_bytes == (LAYERS * 4 + 1) * SHAPE.block_bytes


def test_rows_that_find_no_room_are_not_lost():
    """Both hold the same four blocks: keeping rows of one needs copies, and there is no block left for them."""
    twin = Twin(num_blocks=LAYERS * 4, num_slots=2)
    one = twin.open()
    twin.grow(one, 16)
    other = twin.fork(one)
    before = snapshot(twin.cache)
    with pytest.raises(OutOfBlocks):
        twin.keep_rows(other, 0, [1, 2, 3])
    assert_unchanged(before, snapshot(twin.cache))
    twin.keep_rows(other, 0, list(range(9)))  # a beginning needs none
    twin.compare()


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_dropping_three_quarters_frees_what_arithmetic_says(layer):
    num_text, num_visual = 8, 64
    whole, less = num_text + num_visual, num_text + num_visual // 4
    twin = Twin(num_blocks=2 * LAYERS * whole // SIZE, num_slots=3)
    full, cut = twin.open(), twin.open()
    twin.grow(full, whole)
    twin.grow(cut, whole, 0, layer)
    twin.grow(cut, less, layer, LAYERS)
    token_bytes = 2 * 2 * 4
    assert twin.cache.held_bytes(full) == LAYERS * whole * token_bytes
    saved = (LAYERS - layer) * (num_visual * 3 // 4) * token_bytes
    assert twin.cache.held_bytes(full) - twin.cache.held_bytes(cut) == saved
    assert twin.cache.num_free_blocks * SHAPE.block_bytes == saved
    # One pool: what the layers above do not use serves the layers below, down to the last block.
    third = twin.open()
    twin.grow(third, saved // token_bytes, 0, 1)
    assert twin.cache.num_free_blocks == 0
    twin.compare()


def test_tables_grow_with_the_longest_sequence():
    twin = Twin(num_blocks=200, num_slots=2)
    one, two = twin.open(), twin.open()
    twin.grow(one, 5)
    twin.grow(two, 120)
    twin.grow(one, 3)
    twin.compare()


def test_the_check_notices_a_leak_and_a_double_hold():
    twin = Twin(num_blocks=20, num_slots=2)
    slot = twin.open()
    twin.grow(slot, 5)
    twin.cache.add_reference(twin.cache.blocks(0, slot)[:1])
    with pytest.raises(AssertionError, match="references"):
        twin.cache.check()
    twin.cache.drop_reference(twin.cache.blocks(0, slot)[:1].copy())
    twin.cache.check()
    twin.cache._num_free -= 1
    with pytest.raises(AssertionError, match="free list"):
        twin.cache.check()


@pytest.mark.parametrize(
    ("held", "count", "paths"),
    [
        ((11,), 8, ([0, 2, 5],)),
        ((11,), 8, ([0, 1, 3, 6],)),
        ((11,), 8, ([0],)),
        ((10, 7, 12), 4, ([0, 1, 3], [0], [0, 2])),
        ((8, 8), 9, (list(range(9)), [0, 8])),
    ],
)
def test_of_drafted_rows_those_on_the_accepted_path_stay(held, count, paths):
    """Each answer has its own length and path; one layer holds fewer rows, as where a reducer dropped some."""
    twin = Twin(num_blocks=80, num_slots=4)
    slots = [twin.open() for _ in held]
    for slot, length in zip(slots, held, strict=True):
        twin.grow(slot, length)
        twin.keep_rows(slot, 2, list(range(0, length, 2)))
    for slot in slots:
        twin.grow(slot, count)
    for slot, path in zip(slots, paths, strict=True):
        twin.keep_path(slot, count, path)
    for slot, length, path in zip(slots, held, paths, strict=True):
        kept = [length, length, -(-length // 2), length]
        assert twin.cache.lengths[:, slot].tolist() == [rows + len(path) for rows in kept]
    twin.compare()


def test_accepted_paths_between_all_else():
    """Rounds of random trees on growing slots, one of which begins with shared blocks."""
    rng = random.Random(3)
    twin = Twin(num_blocks=400, num_slots=4)
    first = twin.open()
    twin.grow(first, SIZE)
    twin.put(first, b"shared")
    second = twin.open()
    twin.adopt(second, b"shared")
    for _ in range(60):
        slot, count = rng.choice([first, second]), rng.randint(1, 9)
        twin.grow(slot, count)
        twin.keep_path(slot, count, [0, *sorted(rng.sample(range(1, count), rng.randint(0, count - 1)))])
        twin.compare()
