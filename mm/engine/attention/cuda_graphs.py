"""Decoding steps as CUDA graphs, one per bucket of batch sizes.

A decoding step of a large model launches hundreds of small kernels, and launching them takes the host longer than
running them takes the GPU. A graph launches them at once. What changes from step to step (embeddings, rotary angles,
block tables, slots) is copied into tensors that the graph reads. A batch smaller than its bucket is padded with tokens
of a dummy sequence, whose outputs nobody reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mm.data.arrays import IntArray
from mm.engine.attention.base import AttentionBackend
from mm.engine.attention.cuda import DeviceMetadata, VarlenAttention
from mm.engine.kv_cache.blocks import KVCache
from mm.models.attention import AttentionMetadata
from mm.models.layers import DecoderLayers

log = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
NUM_WARM_UPS = 2

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Takes a function without arguments. Returns what runs it again, and the tensor that then holds its result."""


class DecodeGraphs:
    """Graphs of the layers and the head over one token of each of many sequences.

    Args:
        layers: The language model.
        attention: A backend that needs no host between two layers.
        max_num_seqs: Largest batch.
        max_num_blocks: Blocks that the longest sequence may have in a layer.
        record: `Recorder` on a GPU.
    """

    def __init__(
        self,
        layers: DecoderLayers,
        attention: VarlenAttention,
        *,
        max_num_seqs: int,
        max_num_blocks: int,
        record: Record,
    ) -> None:
        self._layers, self._attention, self._record = layers, attention, record
        self._cache, self._max_num_blocks = attention.cache, max_num_blocks
        self._padding = self._cache.allocate()
        self._cache.append_slots(self._padding, 1)
        below = [size for size in BUCKETS if size < max_num_seqs]
        self._sizes = [*below, next((size for size in BUCKETS if size >= max_num_seqs), max_num_seqs)]
        self._graphs: dict[int, _Graph] = {}

    def record_all(self) -> None:
        """Record every bucket, the largest first: the others then use its memory."""
        for size in reversed(self._sizes):
            self._graph(size)

    def run(self, seq_indices: IntArray, embeddings: Tensor, positions: Tensor) -> Tensor | None:
        """Logits (B, vocab) of one new token of each sequence. None if the batch is larger than every bucket.

        Args:
            seq_indices: (B,) int64. The cache has allocated a slot for each.
            embeddings: (B, D).
            positions: (P, B).
        """
        count = len(seq_indices)
        size = next((size for size in self._sizes if size >= count), None)
        if size is None:
            return None
        graph = self._graph(size)
        graph.load(self._cache, np.concatenate([seq_indices, np.full(size - count, self._padding)]))
        graph.embeddings[:count] = embeddings
        for held, new in zip(graph.rotary, self._layers.rotary(positions), strict=True):
            held[:count] = new
        graph.replay()
        return graph.logits[:count].clone()

    def _graph(self, size: int) -> _Graph:
        if size not in self._graphs:
            padding = AttentionMetadata.of([self._padding] * size, [1] * size)
            self._graphs[size] = _Graph(self._layers, self._attention, padding, self._max_num_blocks, self._record)
        return self._graphs[size]


class _Graph:
    """The graph of one bucket, with the tensors that it reads and the logits that it writes."""

    def __init__(
        self,
        layers: DecoderLayers,
        attention: VarlenAttention,
        padding: AttentionMetadata,
        max_num_blocks: int,
        record: Record,
    ) -> None:
        shape, size = attention.cache.shape, padding.num_query_tokens
        found = DeviceMetadata.of(attention.cache, padding)
        tables = torch.zeros((shape.num_layers, size, max_num_blocks), dtype=torch.int32, device=shape.device)
        tables[:, :, :1] = found.block_tables
        self.metadata = DeviceMetadata(
            query_start_loc=found.query_start_loc,
            block_tables=tables,
            seq_lens=found.seq_lens,
            slot_mapping=found.slot_mapping,
            max_query_len=1,
            max_seq_len=max_num_blocks * shape.block_size,
        )
        padding.backend_state = self.metadata
        self.embeddings = layers.embed(torch.zeros(size, dtype=torch.int64, device=shape.device)).clone()
        cos, sin = layers.rotary(torch.zeros((1, size), dtype=torch.int64, device=shape.device))
        self.rotary = cos.clone(), sin.clone()

        def step() -> Tensor:
            hidden = self.embeddings
            for index in range(layers.num_layers):
                hidden = layers.layer(index, hidden, padding, self.rotary, attention)
            return layers.logits(hidden)

        self.replay, self.logits = record(step)

    def load(self, cache: KVCache, seq_indices: IntArray) -> None:
        """Let the graph read the block tables, lengths and slots that these sequences have now."""
        new = DeviceMetadata.of(cache, AttentionMetadata.of(seq_indices.tolist(), [1] * len(seq_indices)))
        self.metadata.block_tables[:, :, : new.block_tables.shape[2]] = new.block_tables
        self.metadata.seq_lens.copy_(new.seq_lens)
        self.metadata.slot_mapping.copy_(new.slot_mapping)


class Recorder:
    """Records CUDA graphs that share their working memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(NUM_WARM_UPS):
                run()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = run()
        return graph.replay, logits


@torch.inference_mode()
def build_graphs(
    layers: DecoderLayers, attention: AttentionBackend, *, max_num_seqs: int, max_num_blocks: int
) -> DecodeGraphs | None:
    """Graphs for batches of up to `max_num_seqs`. None where the device or its attention cannot record them."""
    if not isinstance(attention, VarlenAttention):
        return None
    try:
        graphs = DecodeGraphs(
            layers, attention, max_num_seqs=max_num_seqs, max_num_blocks=max_num_blocks, record=Recorder()
        )
        graphs.record_all()
    except RuntimeError as error:
        log.warning("decoding steps cannot be recorded here, they are launched kernel by kernel: %s", error)
        return None
    return graphs
