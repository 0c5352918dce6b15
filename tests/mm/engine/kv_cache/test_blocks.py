"""The KV cache against a plain model of it: dicts of lists of token stamps."""

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
    """A cache and what it should hold. Every token has a stamp of its own."""

    def __init__(self, *, num_blocks: int, max_num_seqs: int) -> None:
        self.cache = KVCache(SHAPE, num_blocks=num_blocks, max_num_seqs=max_num_seqs)
        self.prefixes = PrefixCache(self.cache)
        self.tokens: dict[int, list[list[int]]] = {}
        self.entries: dict[bytes, list[list[int]]] = {}
        self._stamp = 0

    def allocate(self) -> int:
        seq = self.cache.allocate()
        self.tokens[seq] = [[] for _ in range(LAYERS)]
        return seq

    def free(self, seq: int) -> None:
        self.cache.free(seq)
        del self.tokens[seq]

    def append(self, seq: int, count: int, start: int = 0, stop: int = LAYERS) -> None:
        self.cache.append_slots(seq, count, start, stop)
        for layer in range(start, stop):
            self._write(seq, layer, count)

    def append_each(self, seqs: list[int]) -> None:
        self.cache.append_slot_each(np.array(seqs))
        for seq in seqs:
            for layer in range(LAYERS):
                self._write(seq, layer, 1)

    def _write(self, seq: int, layer: int, count: int) -> None:
        stamps = list(range(self._stamp, self._stamp + count))
        self._stamp += count
        held = self.tokens[seq][layer]
        slots = torch.from_numpy(self.cache.slot_mapping(layer, seq, len(held)))
        values = torch.tensor(stamps, dtype=torch.float32)[:, None, None].expand(-1, 1, 2)
        self.cache.keys.flatten(0, 1)[slots] = values
        self.cache.values.flatten(0, 1)[slots] = -values
        held.extend(stamps)

    def truncate(self, seq: int, layer: int, length: int) -> None:
        self.cache.truncate(seq, layer, length)
        del self.tokens[seq][layer][length:]

    def keep_tokens(self, seq: int, layer: int, rows: list[int]) -> None:
        self.cache.keep_tokens(seq, layer, torch.tensor(rows, dtype=torch.int64))
        self.tokens[seq][layer] = [self.tokens[seq][layer][i] for i in rows]

    def keep_accepted(self, seq: int, count: int, path: list[int]) -> None:
        self.cache.keep_accepted(seq, count, path)
        for rows in self.tokens[seq]:
            rows[len(rows) - count :] = [rows[len(rows) - count + i] for i in path]

    def fork(self, seq: int) -> int:
        copy = self.cache.fork(seq)
        self.tokens[copy] = [list(layer) for layer in self.tokens[seq]]
        return copy

    def put(self, seq: int, name: bytes) -> None:
        """Store a sequence's first block, as the engine does for blocks that are full in every layer."""
        self.prefixes.put(seq, [name])
        self.entries[name] = [layer[:SIZE] for layer in self.tokens[seq]]

    def share(self, seq: int, name: bytes) -> None:
        self.cache.share(seq, self.prefixes.match([name]))
        self.tokens[seq] = [list(layer) for layer in self.entries[name]]

    def contents(self, seq: int, layer: int) -> tuple[list[int], list[int]]:
        slots = torch.from_numpy(self.cache.slot_mapping(layer, seq))
        keys, values = self.cache.keys.flatten(0, 1)[slots], self.cache.values.flatten(0, 1)[slots]
        return keys[:, 0, 1].int().tolist(), (-values[:, 0, 0]).int().tolist()

    def held_bytes(self, seq: int) -> int:
        """Bytes of all blocks in a sequence's tables, shared ones included."""
        return sum(len(self.cache.blocks(layer, seq)) for layer in range(LAYERS)) * SHAPE.block_bytes

    def compare(self) -> None:
        self.cache.check(self.prefixes.held)
        for seq, layers in self.tokens.items():
            for layer, stamps in enumerate(layers):
                assert self.contents(seq, layer) == (stamps, stamps)
        for name, layers in self.entries.items():
            ids = self.prefixes.match([name])
            for layer, stamps in enumerate(layers):
                assert self.cache.keys[int(ids[layer, 0]), :, 0, 0].int().tolist() == stamps
        held = {int(i) for seq in self.tokens for layer in range(LAYERS) for i in self.cache.blocks(layer, seq)}
        held |= set(self.prefixes.held.tolist())
        assert self.cache.num_used_bytes == len(held) * SIZE * 2 * 2 * 4
        assert self.cache.num_free_blocks == self.cache.num_blocks - len(held)


def snapshot(cache: KVCache) -> tuple:
    free = cache._free[: cache.num_free_blocks].tolist()
    tables = [cache.blocks(layer, seq).tolist() for layer in range(LAYERS) for seq in range(cache.lengths.shape[1])]
    memory = (part.view(torch.int32).clone() for part in (cache.keys, cache.values))  # bits: memory may hold NaN
    return free, tables, cache.lengths.tolist(), cache.references.tolist(), *memory


def assert_unchanged(before: tuple, after: tuple) -> None:
    assert before[:4] == after[:4]
    assert torch.equal(before[4], after[4])
    assert torch.equal(before[5], after[5])


def act(twin: Twin, rng: random.Random) -> str:
    """One random operation; its name. One that runs out of blocks has to leave everything as it was."""
    cache, seqs = twin.cache, sorted(twin.tokens)
    kinds = [
        "allocate",
        "append",
        "append",
        "append",
        "each",
        "range",
        "truncate",
        "keep",
        "fork",
        "put",
        "share",
        "room",
        "free",
    ]
    kind = rng.choice(kinds)
    seq = rng.choice(seqs) if seqs else None
    layer = rng.randrange(LAYERS)
    before = snapshot(cache)
    try:
        if kind == "allocate" and cache.num_free_seqs:
            twin.allocate()
        elif kind == "share" and twin.entries and cache.num_free_seqs:
            twin.share(twin.allocate(), rng.choice(sorted(twin.entries)))
        elif kind == "room":
            if rng.random() < 0.1:
                twin.prefixes.make_room(rng.randrange(cache.num_blocks))
                twin.entries = {name: rows for name, rows in twin.entries.items() if name in twin.prefixes._entries}
        elif seq is None:
            return "nothing"
        elif kind == "append":
            count = rng.choice([0, 1, 1, 2, 3, 5, 9, 17])
            if cache.num_blocks_for(seq, count) <= cache.num_free_blocks:
                twin.append(seq, count)  # as `num_blocks_for` promises
            else:
                with pytest.raises(OutOfBlocks):
                    twin.append(seq, count)
                raise OutOfBlocks
        elif kind == "each":
            some = rng.sample(seqs, rng.randint(1, len(seqs)))
            if cache.num_blocks_for_each(np.array(some)) <= cache.num_free_blocks:
                twin.append_each(some)
            else:
                with pytest.raises(OutOfBlocks):
                    twin.append_each(some)
                raise OutOfBlocks
        elif kind == "range":
            start = rng.randrange(LAYERS)
            twin.append(seq, rng.randrange(12), start, rng.randrange(start, LAYERS) + 1)
        elif kind == "truncate":
            twin.truncate(seq, layer, rng.randint(0, len(twin.tokens[seq][layer])))
        elif kind == "keep":
            held = len(twin.tokens[seq][layer])
            twin.keep_tokens(seq, layer, sorted(rng.sample(range(held), rng.randint(0, held))))
        elif kind == "fork" and cache.num_free_seqs:
            twin.fork(seq)
        elif kind == "put" and len(twin.entries) < 6 and min(map(len, twin.tokens[seq])) >= SIZE:
            twin.put(seq, f"{twin._stamp}-{rng.random()}".encode())
        elif kind == "free":
            twin.free(seq)
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
        twin = Twin(num_blocks=rng.choice([24, 60, 150]), max_num_seqs=6)
        for _ in range(1000):
            kind = act(twin, rng)
            seen[kind] = seen.get(kind, 0) + 1
            twin.compare()
        for seq in list(twin.tokens):
            twin.free(seq)
        twin.prefixes.clear()
        twin.cache.check()
        assert twin.cache.num_used_bytes == 0
        assert twin.cache.num_free_seqs == 6
    assert (
        min(
            seen.get(kind, 0)
            for kind in ("append", "each", "range", "truncate", "keep", "fork", "put", "share", "free")
        )
        > 50
    )
    assert seen["out of blocks"] > 100


def test_appending_to_a_fork_leaves_the_other_alone():
    twin = Twin(num_blocks=40, max_num_seqs=4)
    one = twin.allocate()
    twin.append(one, 6)
    other = twin.fork(one)
    used = twin.cache.num_used_bytes
    assert used == LAYERS * 2 * SHAPE.block_bytes
    assert twin.held_bytes(other) == used
    assert twin.cache.num_blocks_for(other, 1) == LAYERS  # a copy of each layer's last block
    twin.append(other, 1)
    twin.append(one, 2)
    twin.compare()
    assert twin.contents(one, 0)[0][:6] == twin.contents(other, 0)[0][:6]
    assert twin.contents(one, 0)[0][6] != twin.contents(other, 0)[0][6]
    shared = np.intersect1d(twin.cache.blocks(2, one), twin.cache.blocks(2, other))
    assert len(shared) == 1  # the full block stays shared, and each has a last block of its own


def test_evicting_from_a_fork_leaves_the_other_alone():
    twin = Twin(num_blocks=40, max_num_seqs=4)
    one = twin.allocate()
    twin.append(one, 14)
    other = twin.fork(one)
    twin.keep_tokens(other, 1, [0, 1, 2, 3, 4, 6, 13])
    twin.compare()
    assert len(twin.contents(one, 1)[0]) == 14
    assert twin.cache.blocks(1, one)[0] == twin.cache.blocks(1, other)[0]  # nothing moved in it
    assert twin.cache.num_used_bytes == (LAYERS * 4 + 1) * SHAPE.block_bytes


def test_tokens_are_not_lost_when_blocks_run_out():
    """Both hold the same four blocks. Keeping tokens of one needs copies, and there is no block left for them."""
    twin = Twin(num_blocks=LAYERS * 4, max_num_seqs=2)
    one = twin.allocate()
    twin.append(one, 16)
    other = twin.fork(one)
    before = snapshot(twin.cache)
    with pytest.raises(OutOfBlocks):
        twin.keep_tokens(other, 0, [1, 2, 3])
    assert_unchanged(before, snapshot(twin.cache))
    twin.keep_tokens(other, 0, list(range(9)))  # a prefix needs no copy
    twin.compare()


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_dropping_three_quarters_frees_what_arithmetic_says(layer):
    num_text, num_visual = 8, 64
    whole, less = num_text + num_visual, num_text + num_visual // 4
    twin = Twin(num_blocks=2 * LAYERS * whole // SIZE, max_num_seqs=3)
    full, cut = twin.allocate(), twin.allocate()
    twin.append(full, whole)
    twin.append(cut, whole, 0, layer)
    twin.append(cut, less, layer, LAYERS)
    token_bytes = 2 * 2 * 4
    assert twin.held_bytes(full) == LAYERS * whole * token_bytes
    saved = (LAYERS - layer) * (num_visual * 3 // 4) * token_bytes
    assert twin.held_bytes(full) - twin.held_bytes(cut) == saved
    assert twin.cache.num_free_blocks * SHAPE.block_bytes == saved
    # One pool: what the layers above do not use serves the layers below, down to the last block.
    third = twin.allocate()
    twin.append(third, saved // token_bytes, 0, 1)
    assert twin.cache.num_free_blocks == 0
    twin.compare()


def test_tables_grow_with_the_longest_sequence():
    twin = Twin(num_blocks=200, max_num_seqs=2)
    one, two = twin.allocate(), twin.allocate()
    twin.append(one, 5)
    twin.append(two, 120)
    twin.append(one, 3)
    twin.compare()


def test_the_check_notices_a_leak_and_a_double_hold():
    twin = Twin(num_blocks=20, max_num_seqs=2)
    seq = twin.allocate()
    twin.append(seq, 5)
    twin.cache.add_reference(twin.cache.blocks(0, seq)[:1])
    with pytest.raises(AssertionError, match="reference counts"):
        twin.cache.check()
    twin.cache.drop_reference(twin.cache.blocks(0, seq)[:1].copy())
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
def test_of_drafted_tokens_those_on_the_accepted_path_stay(held, count, paths):
    """Each sequence has its own length and path. One layer holds fewer tokens, as where a reducer dropped some."""
    twin = Twin(num_blocks=80, max_num_seqs=4)
    seqs = [twin.allocate() for _ in held]
    for seq, length in zip(seqs, held, strict=True):
        twin.append(seq, length)
        twin.keep_tokens(seq, 2, list(range(0, length, 2)))
    for seq in seqs:
        twin.append(seq, count)
    for seq, path in zip(seqs, paths, strict=True):
        twin.keep_accepted(seq, count, path)
    for seq, length, path in zip(seqs, held, paths, strict=True):
        kept = [length, length, -(-length // 2), length]
        assert twin.cache.lengths[:, seq].tolist() == [rows + len(path) for rows in kept]
    twin.compare()


def test_accepted_paths_between_all_else():
    """Random trees on growing sequences, one of which begins with shared blocks."""
    rng = random.Random(3)
    twin = Twin(num_blocks=400, max_num_seqs=4)
    first = twin.allocate()
    twin.append(first, SIZE)
    twin.put(first, b"shared")
    second = twin.allocate()
    twin.share(second, b"shared")
    for _ in range(60):
        seq, count = rng.choice([first, second]), rng.randint(1, 9)
        twin.append(seq, count)
        twin.keep_accepted(seq, count, [0, *sorted(rng.sample(range(1, count), rng.randint(0, count - 1)))])
        twin.compare()
