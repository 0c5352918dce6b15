"""What may be shared between prompts, what is evicted first, and what is counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mm.data.request import Request
from mm.data.tokens import Encoded, Prompt, VisualTokens
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.kv_cache.prefix_cache import BlockHasher, PrefixCache
from mm.engine.sequence import EngineRequest
from mm.models.kv_cache_spec import KVCacheSpec
from tests.helpers.engines import KeepEverySecond, Recorder

LAYERS, SIZE = 2, 4
SHAPE = KVCacheSpec(
    num_layers=LAYERS, num_heads=1, head_dim=2, dtype=torch.float32, device=torch.device("cpu"), block_size=SIZE
)


def hasher(**changes: Any) -> BlockHasher:
    """Twelve tokens: four of text, five of two visual items, three of text."""
    fields: dict[str, Any] = {
        "token_ids": np.array([1, 2, 3, 4, 9, 9, 9, 9, 9, 5, 6, 7]),
        "positions": np.arange(12)[None],
        "items": ["red", "blue"],
        "item_of_token": np.array([-1, -1, -1, -1, 0, 0, 0, 1, 1, -1, -1, -1]),
        "salt": "",
    }
    return BlockHasher(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "num_equal"),
    [
        ({}, 3),
        ({"salt": "another"}, 0),
        ({"items": ["green", "blue"]}, 1),
        ({"items": ["blue", "red"]}, 1),
        ({"items": ["red", "green"]}, 1),
        ({"item_of_token": np.array([-1] * 4 + [0] * 4 + [1] + [-1] * 3)}, 1),
        ({"token_ids": np.array([0, 2, 3, 4, 9, 9, 9, 9, 9, 5, 6, 7])}, 0),
        ({"token_ids": np.array([1, 2, 3, 4, 9, 9, 9, 9, 9, 5, 6, 8])}, 2),
        ({"positions": np.arange(12)[None] + 1}, 0),
        ({"positions": np.array([[0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]])}, 1),
        ({"positions": np.stack([np.arange(12)] * 2 + [np.arange(12) // 8 + np.arange(12)])}, 0),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else str(value),
)
def test_block_hashes_are_equal_up_to_the_first_difference(changes, num_equal):
    one, other = hasher().block_hashes(SIZE), hasher(**changes).block_hashes(SIZE)
    assert len(one) == len(other) == 3
    assert [a == b for a, b in zip(one, other, strict=True)] == [i < num_equal for i in range(3)]


def test_only_full_blocks_have_hashes():
    whole = hasher()
    for num_tokens in range(13):
        part = hasher(
            token_ids=whole.token_ids[:num_tokens],
            positions=whole.positions[:, :num_tokens],
            item_of_token=whole.item_of_token[:num_tokens],
        )
        assert part.block_hashes(SIZE) == whole.block_hashes(SIZE)[: num_tokens // SIZE]


def encoded(key: str, num_tokens: int) -> Encoded:
    tokens = VisualTokens.full(torch.zeros(num_tokens, 2), (1, 1, num_tokens), "image")
    return Encoded(tokens=tokens, key=key)


def request(num_before: int, items: list[Encoded], num_after: int, **fields: Any) -> EngineRequest:
    """A prompt of text, visual tokens, text."""
    num_visual = sum(item.tokens.num_tokens for item in items)
    length = num_before + num_visual + num_after
    is_visual = torch.zeros(length, dtype=torch.bool)
    is_visual[num_before : num_before + num_visual] = True
    prompt = Prompt(
        token_ids=torch.where(is_visual, 99, torch.arange(length)),
        embeddings=torch.zeros(length, 2),
        positions=torch.arange(length)[None],
        next_position=length,
        is_visual=is_visual,
    )
    plain = Request(request_id="a", messages=(), cache_salt=fields.pop("salt", ""))
    return EngineRequest(params=plain, media=items, prompt=prompt, sink=Recorder(), **fields)


def test_what_a_request_may_share():
    """The last token is always computed. Query-aware reducers and items without a key end the prefix at the media."""
    items = [encoded("red", 10)]
    plain = request(8, items, 6).block_hashes(SIZE)
    assert len(plain) == 5  # of 24 tokens, 23 without the last
    assert len(request(8, items, 7).block_hashes(SIZE)) == 6
    layers: Any = {1: SimpleNamespace()}
    assert request(8, items, 6, pruning_layers=layers).block_hashes(SIZE) == plain[:2]
    assert request(8, items, 6, cache_pruners=(KeepEverySecond(),)).block_hashes(SIZE) == plain[:2]
    assert request(8, [encoded("", 10)], 6).block_hashes(SIZE) == plain[:2]
    assert request(8, [encoded("blue", 10)], 6).block_hashes(SIZE)[:3] == [
        *plain[:2],
        request(8, [encoded("blue", 10)], 6).block_hashes(4)[2],
    ]
    assert not set(request(8, items, 6, salt="tenant").block_hashes(SIZE)) & set(plain)


def test_generated_tokens_extend_the_prompts_hashes():
    """A follow-up turn begins with the earlier prompt and its answer."""
    one = request(8, [], 0)
    longer = one.block_hashes(SIZE, [70, 71, 72, 73])
    assert longer[:1] == one.block_hashes(SIZE)
    assert len(longer) == 3
    ids = torch.cat([one.prompt.token_ids, torch.tensor([70, 71, 72, 73, 74])])
    follow_up = request(13, [], 0)
    object.__setattr__(follow_up.prompt, "token_ids", ids)
    assert follow_up.block_hashes(SIZE) == longer


class Filled:
    """A cache with one seq to make entries from."""

    def __init__(self, num_tokens: int = 40) -> None:
        self.cache = KVCache(SHAPE, num_blocks=LAYERS * SHAPE.num_blocks(num_tokens), max_num_seqs=4)
        self.prefixes = PrefixCache(self.cache)

    def put(self, *names: str, keep: bool = False) -> int:
        seq = self.cache.allocate()
        self.cache.append_slots(seq, SIZE * len(names))
        self.prefixes.put(seq, [name.encode() for name in names])
        if not keep:
            self.cache.free(seq)
        return seq

    def found(self, *names: str) -> int:
        return self.prefixes.match([name.encode() for name in names]).shape[1]

    @property
    def known(self) -> list[str]:
        return [name.decode() for name in self.prefixes._entries]


def test_the_longest_cached_prefix_is_found():
    filled = Filled()
    filled.put("a", "b", "c")
    assert filled.found("a", "b", "c", "d") == 3
    assert filled.found("a", "x", "c") == 1
    assert filled.found("b", "c") == 2  # by hash, not by place: a block hash covers all blocks before it
    assert filled.found("x") == 0
    assert filled.found() == 0
    filled.cache.check(filled.prefixes.held)


def test_the_least_recently_used_is_evicted_first_and_ends_before_beginnings():
    filled = Filled(num_tokens=6 * SIZE)
    filled.put("a", "b")
    filled.put("c", "d")
    assert filled.found("a", "b") == 2
    assert filled.known == ["d", "c", "b", "a"]
    assert filled.prefixes.make_room(filled.cache.num_free_blocks + 1)
    assert filled.known == ["c", "b", "a"]
    assert filled.prefixes.make_room(filled.cache.num_free_blocks + 2 * LAYERS)
    assert filled.known == ["a"]
    filled.cache.check(filled.prefixes.held)


def test_what_a_sequence_uses_is_not_evicted():
    filled = Filled(num_tokens=4 * SIZE)
    seq = filled.put("a", "b", keep=True)
    filled.put("c", "d")
    assert filled.cache.num_free_blocks == 0
    assert filled.prefixes.num_idle_bytes == 2 * LAYERS * SHAPE.block_bytes
    assert not filled.prefixes.make_room(2 * LAYERS + 1)
    assert len(filled.prefixes) == 4  # nothing was evicted in vain
    assert filled.prefixes.make_room(2 * LAYERS)
    assert set(filled.known) == {"a", "b"}
    filled.cache.free(seq)
    assert filled.prefixes.num_bytes == filled.prefixes.num_idle_bytes == 2 * LAYERS * SHAPE.block_bytes
    filled.prefixes.clear()
    filled.cache.check()
    assert filled.cache.num_used_bytes == filled.prefixes.num_idle_bytes == 0


def test_the_same_hash_is_stored_once():
    filled = Filled()
    filled.put("a", "b")
    used = filled.cache.num_used_bytes
    filled.put("a", "b")
    assert filled.cache.num_used_bytes == used
    filled.cache.check(filled.prefixes.held)


def test_switched_off_it_keeps_nothing():
    filled = Filled()
    filled.prefixes = PrefixCache(filled.cache, enabled=False)
    filled.put("a")
    assert filled.found("a") == 0
    assert filled.cache.num_used_bytes == 0


def test_counts_are_of_tokens():
    filled = Filled()
    filled.prefixes.count(30, 16)
    filled.prefixes.count(12, 0)
    assert (filled.prefixes.num_queries, filled.prefixes.num_hits) == (42, 16)
