"""What one forward step computes: chunks of sequences, and one token of each sequence that decodes, packed together."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mm.data.arrays import to_tensor
from mm.data.tokens import Prompt
from mm.engine.prefill_pruning import PruneState, visual_planes
from mm.engine.sequence import EngineRequest, Sequence
from mm.engine.spec_decode.drafter_instance import LAST_HIDDEN
from mm.engine.token_pruning import Candidates, decide
from mm.models.attention import AttentionMetadata


@dataclass(kw_only=True)
class Chunk:
    """Consecutive new tokens of one sequence.

    Attributes:
        seq_index: The sequence's entry in the KV cache.
        embeddings: (n, D).
        positions: (P, n).
        num_logits: The last so many tokens whose logits are wanted.
        token_ids: (n,) int64, for models whose layers read them.
        mask_in_windows: Whether only layers with a window attend by the mask.
        mask: (n, n) bool for draft trees, and for prompts in which tokens attend to later ones; None means causal.
        layer_planes: (K, v, D), what is added to its visual tokens after each of the first K layers. None for models
            without DeepStack.
        visual: (v,) int64, which of its tokens these are; None without planes.
        prune_state: For a prompt whose reducers act inside the decoder.
        renumbers: Whether positions begin anew in each layer in which visual tokens left.
        candidates: Its generated tokens, where a reducer decides about them.
        capture: Names of the hidden states to hand out, such as "last_hidden" or "hidden:3".
        states: After the step: name to (k, D).
        kept: After the step: (k,) int64, the tokens of the chunk that `states` are of, which are those that no reducer
            dropped. None where nothing was captured.
    """

    seq_index: int
    embeddings: Tensor
    positions: Tensor
    num_logits: int = 1
    token_ids: Tensor | None = None
    mask: Tensor | None = None
    mask_in_windows: bool = False
    layer_planes: Tensor | None = None
    visual: Tensor | None = None
    prune_state: PruneState | None = None
    renumbers: bool = False
    candidates: Candidates | None = None
    capture: frozenset[str] = frozenset()
    states: dict[str, Tensor] = field(default_factory=dict[str, Tensor], init=False)
    kept: Tensor | None = field(default=None, init=False)

    @property
    def num_tokens(self) -> int:
        return self.embeddings.shape[0]


@dataclass(kw_only=True)
class DecodeBatch:
    """One new token of each of many sequences. Logits are wanted of all of them.

    Attributes:
        seq_indices: (B,) int64.
        embeddings: (B, D).
        positions: (1, B).
        token_ids: (B,) int64, for models whose layers read them.
        candidates: Per sequence its token, where a reducer decides about it.
        renumbers: Those of the sequences for which it is as for such a chunk.
        capture: Names of the hidden states to hand out, as for a chunk.
        states: After the step: name to (B, D).
    """

    seq_indices: np.ndarray
    embeddings: Tensor
    positions: Tensor
    renumbers: tuple[int, ...] = ()
    token_ids: Tensor | None = None
    candidates: dict[int, Candidates] = field(default_factory=dict[int, Candidates])
    capture: frozenset[str] = frozenset()
    states: dict[str, Tensor] = field(default_factory=dict[str, Tensor], init=False)

    @property
    def num_tokens(self) -> int:
        return len(self.seq_indices)


class PackedTokens:
    """The tokens of a step in one tensor: first those that decode, then chunk after chunk.

    Attributes:
        embeddings: (T, D).
        positions: (P, T).
        counts: Tokens that each chunk still has; pruning makes them fewer.
    """

    def __init__(self, chunks: abc.Sequence[Chunk], decode: DecodeBatch | None) -> None:
        self.chunks, self.num_decode_tokens = chunks, decode.num_tokens if decode else 0
        self.counts = [chunk.num_tokens for chunk in chunks]
        self.decode = decode
        self.renumbers = any(chunk.renumbers for chunk in chunks) or (decode is not None and bool(decode.renumbers))
        self._captured_names = frozenset[str]().union(
            decode.capture if decode else (), *(chunk.capture for chunk in chunks)
        )
        self._states: dict[str, Tensor] = {}
        self._kept: Tensor | None = None  # index in its chunk of each token that is left, once some were dropped
        parts = [decode.embeddings] if decode else []
        self.embeddings = _cat([*parts, *(chunk.embeddings for chunk in chunks)], 0)
        positions = [decode.positions] if decode else []
        positions += [chunk.positions for chunk in chunks]
        num_axes = max(part.shape[0] for part in positions)
        self.positions = _cat([part.expand(num_axes, -1) for part in positions], 1)
        planes = [chunk.layer_planes for chunk in chunks if chunk.layer_planes is not None]
        self._planes = _cat(planes, 1) if planes else None
        if planes:
            rows = [self.span(i)[0] + c.visual for i, c in enumerate(chunks) if c.visual is not None]
            self._plane_rows = _cat(rows, 0)

    def metadata(self) -> AttentionMetadata:
        """What attention has to know of the tokens that are left."""
        decode = self.decode.seq_indices if self.decode else np.zeros(0, dtype=np.int64)
        seq_indices = np.concatenate([decode, np.array([chunk.seq_index for chunk in self.chunks], dtype=np.int64)])
        counts = np.concatenate([np.ones(len(decode), dtype=np.int64), np.array(self.counts, dtype=np.int64)])
        masks = {len(decode) + i: c for i, c in enumerate(self.chunks) if c.mask is not None}
        return AttentionMetadata(
            seq_indices=seq_indices,
            query_starts=np.cumsum(counts) - counts,
            query_lens=counts,
            masks={i: c.mask for i, c in masks.items() if c.mask is not None and not c.mask_in_windows},
            windowed_masks={i: c.mask for i, c in masks.items() if c.mask is not None and c.mask_in_windows},
        )

    @property
    def token_ids(self) -> Tensor:
        """(T,) int64, for models whose layers read them."""
        parts = [part.token_ids for part in (*([self.decode] if self.decode else []), *self.chunks)]
        known = [part.to(self.embeddings.device) for part in parts if part is not None]
        assert len(known) == len(parts), "layers of this model read the ids of their tokens"
        return _cat(known, 0)

    def decide_tokens(self, layer: int, hidden: Tensor) -> bool:
        """Let reducers decide about generated tokens. Returns whether the metadata are others from this layer on."""
        groups = [] if self.decode is None else [(one, row) for row, one in self.decode.candidates.items()]
        groups += [(c.candidates, self.span(i)[0]) for i, c in enumerate(self.chunks) if c.candidates is not None]
        if not decide(layer, hidden, groups):
            return False
        for chunk in self.chunks:
            if chunk.candidates is not None and chunk.candidates.pruning.layer == layer:
                size = (chunk.num_tokens, chunk.num_tokens)
                causal = torch.ones(size, dtype=torch.bool, device=hidden.device).tril()
                chunk.mask = chunk.candidates.mask(causal if chunk.mask is None else chunk.mask)
        return True

    @property
    def token_layers(self) -> frozenset[int]:
        """The layers at whose input reducers decide about generated tokens of this step."""
        decode = [] if self.decode is None else list(self.decode.candidates.values())
        every = [*decode, *(chunk.candidates for chunk in self.chunks if chunk.candidates is not None)]
        return frozenset(one.pruning.layer for one in every)

    def with_planes(self, layer: int, hidden: Tensor) -> Tensor:
        """The output (T, D) of a layer, with what DeepStack adds to the visual tokens after it."""
        if self._planes is None or layer >= len(self._planes):
            return hidden
        return hidden.index_add(0, self._plane_rows, self._planes[layer])

    def capture(self, name: str, hidden: Tensor) -> None:
        """Keep a hidden state of all tokens if any sequence needs it."""
        if name in self._captured_names:
            self._states[name] = hidden

    def select(self, indices: Tensor) -> None:
        """Keep only some tokens of what was captured and of planes, as of everything else."""
        if self._planes is not None:
            stays = torch.isin(self._plane_rows, indices)
            self._planes, rows = self._planes[:, stays], self._plane_rows[stays]
            self._plane_rows = torch.searchsorted(indices, rows)
        if self._captured_names:
            if self._kept is None:
                counts = (self.num_decode_tokens, *(chunk.num_tokens for chunk in self.chunks))
                self._kept = torch.cat([torch.arange(n) for n in counts])
            self._kept = self._kept[indices.cpu()]
            self._states = {name: state[indices] for name, state in self._states.items()}

    def return_states(self, hidden: Tensor, norm: Callable[[Tensor], Tensor]) -> None:
        """Return the captured hidden states to each sequence.

        Args:
            hidden: (T, D), the last layer's output.
            norm: The model's final norm, which turns it into the state "last_hidden".
        """
        if not self._captured_names:
            return

        def states(names: frozenset[str], tokens: slice) -> dict[str, Tensor]:
            found = {name: self._states[name][tokens] for name in names - {LAST_HIDDEN}}
            return found | ({LAST_HIDDEN: norm(hidden[tokens])} if LAST_HIDDEN in names else {})

        if self.decode is not None:
            self.decode.states = states(self.decode.capture, slice(self.num_decode_tokens))
        for i, chunk in enumerate(self.chunks):
            if chunk.capture:
                first, count = self.span(i)
                tokens = slice(first, first + count)
                chunk.kept = torch.arange(count) if self._kept is None else self._kept[tokens]
                chunk.states = states(chunk.capture, tokens)

    def span(self, chunk: int) -> tuple[int, int]:
        """First token and number of tokens of a chunk."""
        return self.num_decode_tokens + sum(self.counts[:chunk]), self.counts[chunk]

    def with_logits(self, hidden: Tensor) -> Tensor:
        """The hidden states (n, D) of the tokens whose logits are wanted, of all (T, D)."""
        wanted = [np.arange(self.num_decode_tokens)]
        for i, chunk in enumerate(self.chunks):
            first, count = self.span(i)
            wanted.append(np.arange(first + count - min(chunk.num_logits, count), first + count))
        indices = np.concatenate(wanted)
        return hidden if len(indices) == hidden.shape[0] else hidden[to_tensor(indices, hidden.device)]


def input_token_ids(seq: Sequence, count: int) -> list[int]:
    """Output and draft tokens among the next `count` tokens of a sequence: those that have to be embedded."""
    if seq.draft.num_tokens:
        return [seq.output.token_ids[-1], *seq.draft.token_ids]
    start = seq.num_computed_tokens - seq.num_prompt_tokens
    return seq.output.token_ids[max(start, 0) : max(start + count, 0)]


def make_chunk(seq: Sequence, count: int, token_embeddings: Tensor | None) -> Chunk:
    """The next `count` tokens of a sequence.

    Args:
        token_embeddings: Of what `input_token_ids` returned; None where that was nothing.
    """
    assert seq.seq_index is not None
    if seq.draft.num_tokens:
        assert token_embeddings is not None
        return _make_verification_chunk(seq, seq.seq_index, token_embeddings)
    request, prompt, start = seq.request, seq.request.prompt, seq.num_computed_tokens
    stop = start + count
    parts, positions = list[Tensor](), list[Tensor]()
    if start < prompt.length:
        in_prompt = slice(start, min(stop, prompt.length))
        parts.append(prompt.embeddings[in_prompt])
        positions.append(prompt.positions[:, in_prompt])
    if token_embeddings is not None:
        first = max(start, prompt.length) - prompt.length + prompt.next_position
        after = torch.arange(first, first + token_embeddings.shape[0], device=prompt.positions.device)
        parts.append(token_embeddings)
        positions.append(after.expand(prompt.positions.shape[0] if positions else 1, -1))
    generated = range(max(start - prompt.length, 0), stop - prompt.length)
    visual, planes = _planes(prompt, start, stop)
    ids = torch.tensor(input_token_ids(seq, count), dtype=torch.int64, device=prompt.token_ids.device)
    return Chunk(
        seq_index=seq.seq_index,
        embeddings=_cat(parts, 0),
        positions=_cat(positions, 1),
        num_logits=int(stop == seq.num_tokens),
        token_ids=torch.cat([prompt.token_ids[start : min(stop, prompt.length)], ids]),
        mask_in_windows=prompt.mask_in_windows,
        mask=None if prompt.mask is None or start >= prompt.length else prompt.mask[start:stop, start:stop],
        layer_planes=planes,
        visual=visual,
        candidates=_candidates(seq, generated) if generated else None,
        prune_state=_start_pruning(request, start) if request.pruning_layers and start < prompt.length else None,
    )


def _planes(prompt: Prompt, start: int, stop: int) -> tuple[Tensor | None, Tensor | None]:
    """Of tokens `start` to `stop` of a prompt: which are visual, and their planes. None where there are no planes."""
    if prompt.layer_planes is None or start >= prompt.length:
        return None, None
    visual = prompt.is_visual[start:stop].nonzero().squeeze(1)
    first = int(prompt.is_visual[:start].sum())
    return visual, prompt.layer_planes[:, first : first + len(visual)]


def _make_verification_chunk(seq: Sequence, seq_index: int, token_embeddings: Tensor) -> Chunk:
    """The newest token and its draft: each token sees itself and its ancestors in the tree."""
    draft = seq.draft
    depths = torch.tensor(draft.depths, device=token_embeddings.device)
    return Chunk(
        seq_index=seq_index,
        embeddings=token_embeddings,
        positions=(seq.position + depths).unsqueeze(0),
        num_logits=token_embeddings.shape[0],
        token_ids=torch.tensor([seq.output.token_ids[-1], *draft.token_ids]),
        mask=None if draft.is_chain else draft.mask().to(token_embeddings.device),
        candidates=_candidates(seq, [len(seq.output.token_ids) - 1 + depth for depth in draft.depths]),
    )


def _candidates(seq: Sequence, indices: abc.Sequence[int]) -> Candidates | None:
    """Generated tokens by their places in the output, if a reducer decides about them."""
    pruning = seq.request.token_pruning
    return None if pruning is None else Candidates.of(pruning, indices, seq.kept_tokens[indices[0] : indices[-1] + 1])


def make_decode_batch(seqs: abc.Sequence[Sequence], embeddings: Tensor) -> DecodeBatch | None:
    """The newest token of each sequence; None without sequences.

    Args:
        embeddings: (B, D) of these tokens.
    """
    if not seqs:
        return None
    positions = torch.tensor([[seq.position for seq in seqs]], device=embeddings.device)
    indices = np.array([seq.seq_index for seq in seqs])
    candidates = {i: one for i, seq in enumerate(seqs) if (one := _candidates(seq, [len(seq.output.token_ids) - 1]))}
    return DecodeBatch(
        seq_indices=indices,
        embeddings=embeddings,
        positions=positions,
        renumbers=tuple(i for i, seq in enumerate(seqs) if seq.request.renumbers),
        token_ids=torch.tensor([seq.output.token_ids[-1] for seq in seqs]),
        candidates=candidates,
    )


def _start_pruning(request: EngineRequest, start: int) -> PruneState:
    """A prompt whose first `start` tokens were cached."""
    is_visual = request.prompt.is_visual
    visual = is_visual[start:].nonzero().squeeze(1)
    num_before = int(is_visual[:start].sum())
    origins = torch.arange(num_before, num_before + visual.shape[0], device=visual.device)
    items, protected = visual_planes(request.media, visual.device)
    state = PruneState(
        reducers=request.pruning_layers,
        visual=visual,
        origins=origins,
        items=items,
        kinds=tuple(item.tokens.kind for item in request.media),
        protected=protected,
    )
    request.prune_state = state
    return state


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
