"""The backends against sums in float64, over ragged batches: blocks out of order, masks, every group of heads."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from mm.engine.attention import cpu
from mm.engine.attention.cpu import MAX_QUERY_LEN, CpuAttention
from mm.engine.attention.cpu_kernels import attend_kernel
from mm.engine.attention.gather import GatherAttention
from mm.engine.kv_cache.blocks import KVCache
from mm.models.attention import PLAIN, AttentionMetadata, AttentionVariant, rotate
from mm.models.kv_cache_spec import KVCacheSpec

HEADS = [(4, 2, 16), (3, 3, 8), (8, 1, 64), (9, 3, 64)]
"""Query heads, key/value heads, width of a head."""
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
NUM_LAYERS = 2


class Case:
    """Sequences of random lengths in a cache whose blocks are given out in no order, and new rows for some of them."""

    def __init__(self, seed: int, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
        rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.num_heads, self.num_kv, self.dim = heads
        size = rng.choice([4, 16])
        self.shape = KVCacheSpec(
            num_layers=NUM_LAYERS,
            num_heads=self.num_kv,
            head_dim=self.dim,
            dtype=dtype,
            device=torch.device("cpu"),
            block_size=size,
        )
        held = [rng.choice([0, 1, size - 1, size, size + 1, 37]) for _ in range(rng.randint(1, 6))]
        self.counts = [rng.choice([1, 1, 1, 2, 5, MAX_QUERY_LEN, MAX_QUERY_LEN + 1, 40]) for _ in held]
        self.held, self.order = held, rng.sample(range(len(held)), len(held))
        self.masks = {i: self.tree(n) for i, n in enumerate(self.counts) if n > 1 and rng.random() < 0.5}
        self.past = [self.draw(n, 2 * self.num_kv) for n in held]
        self.rows = self.draw(sum(self.counts), self.num_heads + 2 * self.num_kv)
        angles = torch.rand(len(self.rows), self.dim // 2, generator=self.generator).repeat(1, 2) * 6
        self.rotary = angles.cos(), angles.sin()

    def draw(self, num_rows: int, num_heads: int) -> Tensor:
        return torch.randn(num_rows, num_heads, self.dim, generator=self.generator).to(self.shape.dtype)

    def tree(self, count: int) -> Tensor:
        """Each token sees itself and the ancestors of a random earlier token."""
        mask = torch.eye(count, dtype=torch.bool)
        for row in range(1, count):
            parent = int(torch.randint(-1, row, (1,), generator=self.generator))
            if parent >= 0:
                mask[row] |= mask[parent]
        return mask

    def cache(self, layer: int) -> tuple[KVCache, AttentionMetadata]:
        """One layer that holds the past tokens, with slots for the new ones. Everything else is NaN."""
        blocks = NUM_LAYERS * sum(self.shape.num_blocks(n + m) + 1 for n, m in zip(self.held, self.counts, strict=True))
        cache = KVCache(self.shape, num_blocks=blocks, max_num_seqs=len(self.held))
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
        np.random.default_rng(len(self.rows)).shuffle(cache._free)
        seqs = {i: cache.allocate() for i in self.order}
        for i in self.order:
            cache.append_slots(seqs[i], self.held[i])
            slots = torch.from_numpy(cache.slot_mapping(layer, seqs[i]))
            cache.keys.flatten(0, 1)[slots] = self.past[i][:, : self.num_kv]
            cache.values.flatten(0, 1)[slots] = self.past[i][:, self.num_kv :]
        for i in reversed(self.order):
            cache.append_slots(seqs[i], self.counts[i])
        return cache, AttentionMetadata.of([seqs[i] for i in range(len(self.held))], self.counts, self.masks)

    def expected(self, rotary: bool, variant: AttentionVariant = PLAIN) -> Tensor:
        """(T, H, d) by definition, one token and one head at a time."""
        query, key, value = self.rows.split([self.num_heads, self.num_kv, self.num_kv], dim=1)
        if rotary:
            query, key = (turned(states, *self.rotary).to(self.shape.dtype) for states in (query, key))
        output, first = torch.zeros(len(self.rows), self.num_heads, self.dim, dtype=torch.float64), 0
        for i, count in enumerate(self.counts):
            mine = slice(first, first + count)
            keys = torch.cat([self.past[i][:, : self.num_kv], key[mine]]).double()
            values = torch.cat([self.past[i][:, self.num_kv :], value[mine]]).double()
            mask = self.masks.get(i, torch.ones(count, count, dtype=torch.bool).tril())
            places = [*range(self.held[i]), *(self.held[i] + len(ancestors(mask, row)) for row in range(count))]
            for row in range(count):
                seen = torch.cat([torch.ones(self.held[i], dtype=torch.bool), mask[row]])
                if variant.window is not None:
                    seen &= places[self.held[i] + row] - torch.tensor(places) < variant.window
                for head in range(self.num_heads):
                    group = head // (self.num_heads // self.num_kv)
                    scores = keys[seen, group] @ query[first + row, head].double() * (variant.scale or self.dim**-0.5)
                    if variant.softcap is not None:
                        scores = variant.softcap * torch.tanh(scores / variant.softcap)
                    output[first + row, head] = scores.softmax(0) @ values[seen, group]
            first += count
        return output


def ancestors(mask: Tensor, row: int) -> list[int]:
    """The earlier tokens of a chunk that a token sees."""
    return [other for other in range(row) if mask[row, other]]


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (j, j + d / 2) as complex numbers, turned by their angles (RoFormer, eq. 12)."""
    half = states.shape[-1] // 2
    pairs = torch.complex(states[..., :half].double(), states[..., half:].double())
    pairs = pairs * torch.complex(cos[:, :half].double(), sin[:, :half].double())[:, None]
    return torch.cat([pairs.real, pairs.imag], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("backend", [GatherAttention, CpuAttention])
def test_ragged_batches_equal_plain_sums(backend, heads, dtype):
    for seed in range(4):
        case = Case(seed, heads, dtype)
        for layer, rotary in ((0, None), (NUM_LAYERS - 1, case.rotary)):
            cache, batch = case.cache(layer)
            given = backend(cache).attend(layer, case.rows.clone(), batch, rotary)
            expected = case.expected(rotary is not None)
            assert given.dtype == dtype
            assert float((given.double() - expected).abs().max()) < TOLERANCE[dtype]


def test_a_process_finds_the_kernels_that_another_one_compiled(monkeypatch):
    """A copy on disk that no process finds again costs each start some seconds."""
    case = Case(0, HEADS[0], torch.float32)
    for _ in range(2):  # as two processes would
        kernel = attend_kernel.__wrapped__(case.dim, case.shape.block_size, False)
        monkeypatch.setattr(cpu, "attend_kernel", lambda *_, kernel=kernel: kernel)
        cache, batch = case.cache(0)
        CpuAttention(cache).attend(0, case.rows.clone(), batch, None)
    assert sum(kernel.stats.cache_hits.values()) == 1
    assert not kernel.stats.cache_misses


VARIANTS = [
    AttentionVariant(window=1),
    AttentionVariant(window=3),
    AttentionVariant(window=20, scale=0.3),
    AttentionVariant(softcap=0.5),
    AttentionVariant(window=7, softcap=2.0, scale=0.7),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("backend", [GatherAttention, CpuAttention])
def test_windows_scales_and_bounds_equal_plain_sums(backend, variant):
    for seed in range(6):
        case = Case(seed, HEADS[seed % len(HEADS)], torch.float32)
        cache, batch = case.cache(1)
        given = backend(cache).attend(1, case.rows.clone(), batch, case.rotary, variant)
        assert float((given.double() - case.expected(True, variant)).abs().max()) < TOLERANCE[torch.float32]
        if variant.window == 1:
            assert float((given.double() - case.expected(True)).abs().max()) > 1e-2, "the window changes nothing"


@pytest.mark.parametrize("backend", [GatherAttention, CpuAttention])
def test_the_comparison_notices_a_wrong_mask(backend):
    case = Case(3, HEADS[0], torch.float32)
    case.counts, case.masks = [5] * len(case.held), {}
    case.rows = case.draw(5 * len(case.held), case.num_heads + 2 * case.num_kv)
    cache, batch = case.cache(0)
    batch.masks = {0: torch.ones(5, 5, dtype=torch.bool)}
    wrong = backend(cache).attend(0, case.rows.clone(), batch, None)
    assert float((wrong.double() - case.expected(False)).abs().max()) > 1e-2


@pytest.mark.parametrize("backend", [GatherAttention, CpuAttention])
def test_keys_and_values_are_written_where_the_tables_say(backend):
    case = Case(5, HEADS[0], torch.bfloat16)
    cache, batch = case.cache(1)
    before = cache.keys.clone()
    backend(cache).attend(1, case.rows.clone(), batch, None)
    _, key, value = case.rows.split([case.num_heads, case.num_kv, case.num_kv], dim=1)
    touched = []
    for seq, first, count in zip(
        batch.seq_indices.tolist(), batch.query_starts.tolist(), batch.query_lens.tolist(), strict=True
    ):
        length = int(cache.lengths[1, seq])
        slots = torch.from_numpy(cache.slot_mapping(1, seq, length - count, length))
        assert torch.equal(cache.keys.flatten(0, 1)[slots], key[first : first + count])
        assert torch.equal(cache.values.flatten(0, 1)[slots], value[first : first + count])
        touched.append(slots)
    rest = torch.ones(before.flatten(0, 1).shape[0], dtype=torch.bool)
    rest[torch.cat(touched)] = False
    assert torch.equal(cache.keys.flatten(0, 1)[rest].view(torch.int16), before.flatten(0, 1)[rest].view(torch.int16))


def test_several_threads_give_what_one_gives():
    """Enough tokens that the kernel shares them between threads."""
    shape = KVCacheSpec(
        num_layers=1, num_heads=2, head_dim=16, dtype=torch.float32, device=torch.device("cpu"), block_size=16
    )
    num, length = 6, 1500
    cache = KVCache(shape, num_blocks=num * shape.num_blocks(length), max_num_seqs=num)
    generator = torch.Generator().manual_seed(0)
    cache.keys.normal_(generator=generator)
    cache.values.normal_(generator=generator)
    seqs = [cache.allocate() for _ in range(num)]
    for seq in seqs:
        cache.append_slots(seq, length)
    rows = torch.randn(num, 8, 16, generator=generator)
    attention, batch = CpuAttention(cache), AttentionMetadata.of(seqs, [1] * num)
    one = attention.attend(0, rows.clone(), batch, None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(attention.attend(0, rows.clone(), batch, None), one)
    finally:
        torch.set_num_threads(before)


def test_a_partly_turned_head_keeps_its_rest():
    states = torch.randn(3, 2, 12)
    angles = torch.rand(3, 4).repeat(1, 2)
    out = rotate(states, angles.cos(), angles.sin())
    torch.testing.assert_close(out[..., :8].double(), turned(states[..., :8], angles.cos(), angles.sin()).double())
    assert torch.equal(out[..., 8:], states[..., 8:])


def test_a_prompt_equals_transformers_attention():
    """Projections, rotary and a whole prompt through transformers' own layer and through ours."""
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    layer, num_rows = LlamaAttention(config, 0).eval(), 23
    hidden, positions = torch.randn(1, num_rows, 32), torch.arange(3, 3 + num_rows)[None]
    cos, sin = LlamaRotaryEmbedding(config)(hidden, positions)
    mask = torch.full((num_rows, num_rows), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        theirs = layer(hidden, (cos, sin), mask)[0]
        parts = [part(hidden[0]) for part in (layer.q_proj, layer.k_proj, layer.v_proj)]
        rows = torch.cat([part.view(num_rows, -1, 8) for part in parts], dim=1)
        shape = KVCacheSpec(num_layers=1, num_heads=2, head_dim=8, dtype=torch.float32, device=torch.device("cpu"))
        for backend in (GatherAttention, CpuAttention):
            cache = KVCache(shape, num_blocks=4, max_num_seqs=1)
            seq = cache.allocate()
            cache.append_slots(seq, num_rows)
            out = backend(cache).attend(0, rows.clone(), AttentionMetadata.of([seq], [num_rows]), (cos[0], sin[0]))
            torch.testing.assert_close(layer.o_proj(out.flatten(1)), theirs[0], atol=1e-5, rtol=1e-5)
