"""The GPU backend and its recorded steps on a CPU, with plain versions of torch's varlen kernel and CUDA graphs.

The tests cover slots and block tables, and that a recorded step reads nothing but its own tensors.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from mm.engine.attention import cuda as cuda_attention
from mm.engine.attention.cuda import VarlenAttention, varlen_works
from mm.engine.attention.cuda_graphs import DecodeGraphs, build_graphs
from mm.engine.attention.gather import GatherAttention
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.model_input import Chunk, DecodeBatch
from mm.engine.model_runner import ModelRunner
from mm.engine.prefill_pruning import PruneState
from mm.models.attention import AttentionMetadata
from mm.models.kv_cache_spec import KVCacheSpec

SHAPE = KVCacheSpec(
    num_layers=3, num_heads=2, head_dim=8, dtype=torch.float32, device=torch.device("cpu"), block_size=4
)


def varlen(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_start_loc: Tensor,
    starts_k: None,
    max_query_len: int,
    max_seq_len: int,
    *,
    window_size: tuple[int, int],
    scale: float | None,
    enable_gqa: bool,
    block_table: Tensor,
    seqused_k: Tensor,
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` promises, one sequence at a time, in float64."""
    left, right = window_size
    assert right == 0
    output = torch.empty_like(query)
    for i, length in enumerate(seqused_k.tolist()):
        first, stop = query_start_loc[i].item(), query_start_loc[i + 1].item()
        assert stop - first <= max_query_len
        assert length <= max_seq_len
        rows = query[first:stop].double().transpose(0, 1)
        group = query.shape[1] // keys.shape[2]
        assert enable_gqa == (group > 1)
        seen = [
            pool[block_table[i].long()].flatten(0, 1)[:length].double().transpose(0, 1).repeat_interleave(group, 0)
            for pool in (keys, values)
        ]
        scores = rows @ seen[0].mT * (keys.shape[3] ** -0.5 if scale is None else scale)
        place = torch.arange(length)
        own = place[length - (stop - first) :, None]
        scores.masked_fill_((place > own) | ((left >= 0) & (place < own - left)), -torch.inf)
        output[first:stop] = (scores.softmax(-1) @ seen[1]).transpose(0, 1).to(query.dtype)
    return output


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    module = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(module, "varlen_attn", varlen)


@pytest.mark.parametrize("seed", range(5))
def test_equals_gathering_for_ragged_batches(seed):
    rng = np.random.default_rng(seed)
    backends = [VarlenAttention(KVCache(SHAPE, num_blocks=400, max_num_seqs=6)) for _ in range(1)]
    backends.append(GatherAttention(KVCache(SHAPE, num_blocks=400, max_num_seqs=6)))  # type: ignore[arg-type]
    slots = [[backend.cache.allocate() for _ in range(5)] for backend in backends]
    for turn in range(6):
        chosen = rng.permutation(5)[: rng.integers(1, 6)]
        counts = [int(rng.choice([1, 1, 3, 9])) for _ in chosen]
        rows = torch.randn(sum(counts), 8, 8, generator=torch.Generator().manual_seed(10 * seed + turn))
        angles = torch.rand(sum(counts), 8)
        results = []
        for backend, mine in zip(backends, slots, strict=True):
            batch = AttentionMetadata.of([mine[i] for i in chosen], counts)
            for slot, count in zip(batch.seq_indices.tolist(), counts, strict=True):
                backend.cache.append_slots(slot, count)
            rotary = angles.cos(), angles.sin()
            results.append([backend.attend(layer, rows.clone(), batch, rotary) for layer in range(3)])
        for one, other in zip(*results, strict=True):
            assert float((one - other).abs().max()) < 1e-5


def test_the_trial_agrees_with_itself_and_notices_a_kernel_that_is_off(monkeypatch):
    varlen_works.cache_clear()
    assert varlen_works(SHAPE)
    varlen_works.cache_clear()
    module = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(module, "varlen_attn", lambda *args, **options: 1.1 * varlen(*args, **options))
    assert not varlen_works(SHAPE)
    varlen_works.cache_clear()


class DecoderLayers:
    """Three made-up layers that mix attention into their hidden states."""

    num_layers, vocab_size, reads_ids = 3, 11, False

    def running(self, *_: object):
        return nullcontext()

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.table = torch.randn(self.vocab_size, 16)
        self.into = torch.randn(3, 16, 8 * 8) / 4
        self.out = torch.randn(3, 4 * 8, 16) / 6

    def embed(self, ids: Tensor) -> Tensor:
        return self.table[ids]

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[0][:, None].float() * torch.arange(1, 9) / 50
        return angles.cos(), angles.sin()

    def layer(self, index, hidden, batch, rotary, attention):
        rows = (hidden @ self.into[index]).unflatten(-1, (8, 8))
        return torch.tanh(hidden + attention.attend(index, rows, batch, rotary).flatten(1) @ self.out[index])

    def norm(self, hidden: Tensor) -> Tensor:
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.table.T


def recorder():
    """As a CUDA graph: the function runs once to be recorded, then only its kernels, into the same result."""

    def record(run):
        result = run().clone()

        def replay() -> None:
            result.copy_(run())

        return replay, result

    return record


def prompts(layers: DecoderLayers) -> list[Tensor]:
    rng = torch.Generator().manual_seed(3)
    return [layers.embed(torch.randint(0, 11, (count,), generator=rng)) for count in (1, 4, 7, 15, 3)]


@pytest.mark.parametrize("max_num_seqs", [3, 4, 8])
def test_recorded_steps_equal_launched_ones(max_num_seqs):
    """Also for batches that are smaller than their bucket, and larger than the largest."""
    layers = DecoderLayers()
    caches = [KVCache(SHAPE, num_blocks=300, max_num_seqs=6) for _ in range(2)]
    graphs = DecodeGraphs(
        layers, VarlenAttention(caches[1]), max_num_seqs=max_num_seqs, max_num_blocks=10, record=recorder()
    )
    graphs.record_all()
    passes = [ModelRunner(layers, GatherAttention(caches[0])), ModelRunner(layers, VarlenAttention(caches[1]), graphs)]
    slots = [[cache.allocate() for _ in range(5)] for cache in caches]
    lengths = np.array([len(rows) for rows in prompts(layers)])
    for one, mine in zip(passes, slots, strict=True):
        for slot, rows in zip(mine, prompts(layers), strict=True):
            one.forward([Chunk(seq_index=slot, embeddings=rows, positions=torch.arange(len(rows))[None])])
    rng = np.random.default_rng(0)
    for turn in range(20):
        chosen = np.sort(rng.permutation(5)[: rng.integers(1, 6)])
        rows = layers.embed(torch.from_numpy(rng.integers(0, 11, len(chosen))))
        places = torch.from_numpy(lengths[chosen])[None]
        found = [
            one.forward([], DecodeBatch(seq_indices=np.array(mine)[chosen], embeddings=rows, positions=places)).clone()
            for one, mine in zip(passes, slots, strict=True)
        ]
        assert float((found[0] - found[1]).abs().max()) < 1e-5, turn
        lengths[chosen] += 1
    for mine in slots[1]:
        caches[1].free(mine)
    caches[1].check()
    assert caches[1].num_used_bytes == SHAPE.num_layers * SHAPE.block_bytes  # of the padding sequence


def test_padding_writes_to_its_own_sequence():
    """Tokens that pad a bucket leave every other sequence alone."""
    layers = DecoderLayers()
    cache = KVCache(SHAPE, num_blocks=60, max_num_seqs=6)
    graphs = DecodeGraphs(layers, VarlenAttention(cache), max_num_seqs=4, max_num_blocks=10, record=recorder())
    other = cache.allocate()
    cache.append_slots(other, 6)
    keys = cache.keys.flatten(0, 1)
    theirs = [torch.from_numpy(cache.slot_mapping(layer, other)) for layer in range(3)]
    for places in theirs:
        keys[places] = 7.0
    mine = cache.allocate()
    one = ModelRunner(layers, VarlenAttention(cache), graphs)
    for at in range(3):
        place = torch.tensor([[at]])
        one.forward(
            [], DecodeBatch(seq_indices=np.array([mine]), embeddings=layers.embed(torch.tensor([1])), positions=place)
        )
    for places in theirs:
        assert bool((keys[places] == 7.0).all())


class DropOdd:
    def in_prefill(self, layer, view):
        return torch.arange(0, view.visual.shape[0], 2)


def test_slots_are_looked_up_again_after_a_pruning_layer():
    layers = DecoderLayers()
    results = []
    for backend in (GatherAttention, VarlenAttention):
        cache = KVCache(SHAPE, num_blocks=60, max_num_seqs=2)
        nobody = torch.zeros(8, dtype=torch.bool)
        hooks: dict = {1: DropOdd()}
        drops = PruneState(
            reducers=hooks,
            visual=torch.arange(2, 10),
            origins=torch.arange(8),
            items=nobody.long(),
            kinds=("image",),
            protected=nobody,
        )
        rows = prompts(layers)[3]
        chunk = Chunk(
            seq_index=cache.allocate(),
            embeddings=rows,
            positions=torch.arange(15)[None],
            num_logits=1,
            prune_state=drops,
        )
        results.append(ModelRunner(layers, backend(cache)).forward([chunk]))
        assert drops.error is None
        assert cache.lengths[:, chunk.seq_index].tolist() == [15, 11, 11]
    assert float((results[0] - results[1]).abs().max()) < 1e-5


def test_no_graphs_without_a_kernel_that_reads_block_tables():
    cache = KVCache(SHAPE, num_blocks=60, max_num_seqs=2)
    assert build_graphs(DecoderLayers(), GatherAttention(cache), max_num_seqs=4, max_num_blocks=4) is None
    assert cuda_attention.TOLERANCE < 0.1
