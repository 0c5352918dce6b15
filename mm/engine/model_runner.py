"""Runs the decoder's layers over the tokens of one step. This is the only place that drives layers.

Chunks of different sequences share a step: one token of each sequence that decodes, many tokens of those that prefill.
Between two layers the reducers of a chunk may drop visual tokens, and decide about generated ones (`token_pruning`).
Neither affects its neighbours. Slots in the cache are allocated for the layers between two such points, so the layers
above never hold what was dropped.
"""

from __future__ import annotations

import time
from collections import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm.engine.attention.base import AttentionBackend
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.model_input import (
    Chunk,
    DecodeBatch,
    PackedTokens,
    input_token_ids,
    make_chunk,
    make_decode_batch,
)
from mm.engine.prefill_pruning import PrefillView, select_kept
from mm.engine.renumbering import renumber
from mm.engine.scheduler import ScheduledChunk, SchedulerOutput
from mm.models.attention import AttentionMetadata, Rotary
from mm.models.layers import DecoderLayers
from mm.plugins.calls import PluginCalls

if TYPE_CHECKING:
    from mm.engine.attention.cuda_graphs import DecodeGraphs


@dataclass(kw_only=True)
class StepOutput:
    """What a step computed.

    Attributes:
        scheduled: What was asked for.
        decode: The sequences that decode, with captured states; None without any.
        chunks: One per `scheduled.chunks`, with captured states.
        logits: (n, vocab): of the sequences that decode, then of each chunk as many as it wanted.
        started: Seconds on the clock of `time.perf_counter` when the layers started.
        model_s: Seconds in the layers.
    """

    scheduled: SchedulerOutput
    decode: DecodeBatch | None
    chunks: list[Chunk]
    logits: Tensor
    started: float
    model_s: float


class ModelRunner:
    """Computes steps.

    Args:
        model: The language model.
        attention: Backend over the cache in which the sequences are.
        graphs: Recorded decode steps, for steps in which every sequence decodes.
        calls: Calls the reducers.
    """

    def __init__(
        self,
        model: DecoderLayers,
        attention: AttentionBackend,
        graphs: DecodeGraphs | None = None,
        calls: PluginCalls | None = None,
    ) -> None:
        self._model, self._attention, self._graphs = model, attention, graphs
        self.cache: KVCache = attention.cache
        self._calls = calls or PluginCalls()

    def execute(self, scheduled: SchedulerOutput) -> StepOutput:
        """Compute what was scheduled. The cache has room for it."""
        last_ids = [seq.output.token_ids[-1] for seq in scheduled.decode]
        chunk_ids = [input_token_ids(item.seq, item.num_tokens) for item in scheduled.chunks]
        ids = torch.tensor(last_ids + [token for ids in chunk_ids for token in ids], dtype=torch.int64)
        embeddings = self._model.embed(ids)
        chunks = self._make_chunks(scheduled.chunks, chunk_ids, embeddings[len(last_ids) :])
        decode = make_decode_batch(scheduled.decode, embeddings[: len(last_ids)])
        if decode is not None:
            drafting = [seq.spec for seq in scheduled.decode if seq.spec is not None]
            decode.capture = frozenset[str]().union(*(spec.states_to_capture for spec in drafting))
        started = time.perf_counter()
        logits = self.forward(chunks, decode)
        model_s = time.perf_counter() - started
        return StepOutput(
            scheduled=scheduled, decode=decode, chunks=chunks, logits=logits, started=started, model_s=model_s
        )

    def _make_chunks(
        self, scheduled: abc.Sequence[ScheduledChunk], chunk_ids: abc.Sequence[list[int]], embeddings: Tensor
    ) -> list[Chunk]:
        chunks, start = list[Chunk](), 0
        for item, ids in zip(scheduled, chunk_ids, strict=True):
            stop = start + len(ids)
            chunk = make_chunk(item.seq, item.num_tokens, embeddings[start:stop] if ids else None)
            if item.seq.draft.num_tokens:
                self.cache.states.keep_for_rewind(chunk.seq_index)
            chunk.capture = item.seq.states_to_capture
            chunk.renumbers = item.seq.request.renumbers
            chunks.append(chunk)
            start = stop
        return chunks

    @torch.inference_mode()
    def forward(self, chunks: abc.Sequence[Chunk], decode: DecodeBatch | None = None) -> Tensor:
        """Logits (n, vocab): of the sequences that decode, then of each chunk. The cache has room for all tokens."""
        packed = PackedTokens(chunks, decode)
        if decode is not None:
            self.cache.append_slot_each(decode.seq_indices)
            is_plain = not (chunks or decode.capture or decode.candidates or packed.renumbers)
            if self._graphs is not None and is_plain:
                logits = self._graphs.run(decode.seq_indices, decode.embeddings, decode.positions)
                if logits is not None:
                    return logits
        prunes = any(chunk.prune_state for chunk in chunks)
        hidden = self._run_pruning(packed) if prunes else self._run_plain(packed)
        packed.return_states(hidden, self._model.norm)
        return self._model.logits(packed.with_logits(hidden))

    def _run_plain(self, packed: PackedTokens) -> Tensor:
        """The last layer's output (T, D), when no token leaves on the way."""
        for chunk in packed.chunks:
            self.cache.append_slots(chunk.seq_index, chunk.num_tokens)
        hidden, metadata = packed.embeddings, packed.metadata()
        if self._model.reads_ids:
            metadata.layer_inputs = self._model.layer_inputs(packed.token_ids, hidden)
        rotary, token_layers = self._model.rotary(packed.positions), packed.token_layers
        for start, stop in _segments(packed, self._model.num_layers, token_layers):
            if start in token_layers and packed.decide_tokens(start, hidden):
                metadata = packed.metadata()
            rotary = renumber(packed, start, self.cache, self._model, rotary)
            hidden = self._run_layers(start, stop, packed, hidden, metadata, rotary)
        return hidden

    def _run_layers(
        self, start: int, stop: int, packed: PackedTokens, hidden: Tensor, metadata: AttentionMetadata, rotary: Rotary
    ) -> Tensor:
        """The output (T, D) of the layers start..stop, between which nobody is asked anything."""
        with self._model.running(start, stop, hidden, metadata, rotary):
            for index in range(start, stop):
                packed.capture(f"hidden:{index}", hidden)
                hidden = self._model.layer(index, hidden, metadata, rotary, self._attention)
        return packed.with_planes(stop - 1, hidden)

    def _run_pruning(self, packed: PackedTokens) -> Tensor:
        """The same where reducers are asked at the input of some layers."""
        model, num_layers = self._model, self._model.num_layers
        layers_of = [sorted(chunk.prune_state.reducers) if chunk.prune_state else [] for chunk in packed.chunks]
        for chunk, layers in zip(packed.chunks, layers_of, strict=True):
            self.cache.append_slots(chunk.seq_index, chunk.num_tokens, 0, (*layers, num_layers)[0])
        hidden, metadata = packed.embeddings, packed.metadata()
        rotary, token_layers = model.rotary(packed.positions), packed.token_layers
        previous, asked = hidden, frozenset[int]().union(*layers_of)
        # Reducers may look at the input of the layer before theirs too.
        for start, stop in _segments(packed, num_layers, {*asked, *(layer - 1 for layer in asked), *token_layers}):
            if start in asked:
                kept = self._kept_tokens(packed, start, hidden, previous, rotary, layers_of)
                hidden, rotary = hidden[kept], (rotary[0][kept], rotary[1][kept])
                packed.select(kept)
                metadata = packed.metadata()
            if start in token_layers and packed.decide_tokens(start, hidden):
                metadata = packed.metadata()
            rotary = renumber(packed, start, self.cache, model, rotary)
            previous = hidden
            hidden = self._run_layers(start, stop, packed, hidden, metadata, rotary)
        return hidden

    def _kept_tokens(
        self,
        packed: PackedTokens,
        layer: int,
        hidden: Tensor,
        previous: Tensor,
        rotary: Rotary,
        layers_of: abc.Sequence[list[int]],
    ) -> Tensor:
        """(T',) int64: the tokens of the step that stay from this layer on.

        It also allocates their slots in the layers up to the next one at which a reducer is asked.

        Args:
            layers_of: Per chunk, the layers at whose input its reducers are asked.
        """
        kept = [torch.arange(packed.num_decode_tokens, device=hidden.device)]
        for i, chunk in enumerate(packed.chunks):
            first, count = packed.span(i)
            stay = torch.arange(first, first + count, device=hidden.device)
            if layer in layers_of[i]:
                assert chunk.prune_state is not None
                own = slice(first, first + count)
                view = PrefillView(
                    self._model,
                    self.cache,
                    chunk.seq_index,
                    chunk.prune_state,
                    layer=layer,
                    hidden=hidden[own],
                    previous=previous[own],
                    rotary=(rotary[0][own], rotary[1][own]),
                )
                stay = stay[select_kept(chunk.prune_state, view, self._calls)]
                stop = next((above for above in layers_of[i] if above > layer), self._model.num_layers)
                self.cache.append_slots(chunk.seq_index, stay.shape[0], layer, stop)
            kept.append(stay)
        packed.counts = [part.shape[0] for part in kept[1:]]
        return torch.cat(kept)


def _segments(packed: PackedTokens, num_layers: int, borders: abc.Set[int]) -> list[tuple[int, int]]:
    """First layer and end of each part of a pass: a part begins at a border, and behind a layer with planes.

    Where positions begin anew in each layer, each is a part.
    """
    num_planes = max((len(chunk.layer_planes) for chunk in packed.chunks if chunk.layer_planes is not None), default=0)
    starts = sorted({*borders, *range(num_planes + 1)} & {*range(num_layers)})
    starts = list(range(num_layers)) if packed.renumbers else starts
    return list(zip(starts, [*starts[1:], num_layers], strict=True))
