"""Decoding steps as recorded CUDA graphs, one per bucket of batch sizes.

A step of a few rows through a large model launches hundreds of small kernels, and launching them takes the host longer
than running them takes the GPU. A graph launches them at once. What changes from step to step (embeddings, rotary
angles, where rows lie in the cache) is copied into tensors that the graph reads; a batch smaller than its bucket is
filled up with rows that write to a sequence of their own, which nobody reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm.engine.attention.cuda import Places, VarlenAttention
from mm.models.attention import AttentionMetadata

log = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
NUM_WARM_UPS = 2

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Takes a function without arguments; gives what runs it again, and the tensor in which its result then is."""


class DecodeGraphs:
    """Graphs of the layers and the head over one row of each of many sequences.

    Args:
        layers: The language model; see `mm.engine.model_runner.Layers`.
        attention: Backend whose work between two layers needs no host.
        most: Largest batch.
        width: Blocks that the longest sequence may have in a layer.
        record: `Recorder` on a GPU.
    """

    def __init__(self, layers: Any, attention: VarlenAttention, *, most: int, width: int, record: Record) -> None:
        self._layers, self._attention, self._record = layers, attention, record
        self._cache, self._width = attention.cache, width
        self._filler = self._cache.allocate()
        self._cache.append_slots(self._filler, 1)
        below = [size for size in BUCKETS if size < most]
        self._sizes = [*below, next((size for size in BUCKETS if size >= most), most)]
        self._graphs: dict[int, _Graph] = {}

    def record_all(self) -> None:
        """Record every bucket, the largest first, whose memory the others then use."""
        for size in reversed(self._sizes):
            self._graph(size)

    def run(self, slots: np.ndarray, embeddings: Tensor, positions: Tensor) -> Tensor | None:
        """Logits (B, vocab) of one new row of each slot, for which the cache has made room; None if there are too many.

        Args:
            slots: (B,) int64.
            embeddings: (B, D).
            positions: (P, B).
        """
        count = len(slots)
        size = next((size for size in self._sizes if size >= count), None)
        if size is None:
            return None
        graph = self._graph(size)
        graph.load(self._cache, np.concatenate([slots, np.full(size - count, self._filler)]))
        graph.embeddings[:count] = embeddings
        for held, new in zip(graph.rotary, self._layers.rotary(positions), strict=True):
            held[:count] = new
        graph.replay()
        return graph.logits[:count].clone()

    def _graph(self, size: int) -> _Graph:
        if size not in self._graphs:
            self._graphs[size] = _Graph(self, size)
        return self._graphs[size]


class _Graph:
    """One bucket: what is read, what is written, and how to run it."""

    def __init__(self, owner: DecodeGraphs, size: int) -> None:
        layers, cache = owner._layers, owner._cache
        shape, device = cache.shape, cache.shape.device
        filler = AttentionMetadata.of([owner._filler] * size, [1] * size)
        found = Places.of(cache, filler)
        tables = torch.zeros((shape.num_layers, size, owner._width), dtype=torch.int32, device=device)
        tables[:, :, :1] = found.tables
        self.places = Places(
            starts=found.starts,
            tables=tables,
            lengths=found.lengths,
            targets=found.targets,
            most_rows=1,
            most_length=owner._width * shape.block_size,
        )
        filler.places = self.places
        self.embeddings = layers.embed(torch.zeros(size, dtype=torch.int64, device=device)).clone()
        cos, sin = layers.rotary(torch.zeros((1, size), dtype=torch.int64, device=device))
        self.rotary = cos.clone(), sin.clone()

        def step() -> Tensor:
            hidden = self.embeddings
            for index in range(layers.num_layers):
                hidden = layers.layer(index, hidden, filler, self.rotary, owner._attention)
            return layers.logits(hidden)

        self.replay, self.logits = owner._record(step)

    def load(self, cache: Any, slots: np.ndarray) -> None:
        """Let the graph read where the rows of these slots lie now."""
        new = Places.of(cache, AttentionMetadata.of(slots.tolist(), [1] * len(slots)))
        self.places.tables[:, :, : new.tables.shape[2]] = new.tables
        self.places.lengths.copy_(new.lengths)
        self.places.targets.copy_(new.targets)


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
def build_graphs(layers: Any, attention: Any, *, most: int, width: int) -> DecodeGraphs | None:
    """Recorded graphs for batches of up to `most`; None where the device or its attention does not allow it."""
    if not isinstance(attention, VarlenAttention):
        return None
    try:
        graphs = DecodeGraphs(layers, attention, most=most, width=width, record=Recorder())
        graphs.record_all()
    except RuntimeError as error:
        log.warning("decoding steps cannot be recorded here, they are launched kernel by kernel: %s", error)
        return None
    return graphs
