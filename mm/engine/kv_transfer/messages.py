"""What travels from the engine that computes a prompt to the one that goes on: plain data, tensors on any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from mm.data.request import Emitted
from mm.data.tokens import EncodedMedia
from mm.engine.spec_decode.hidden_state_cache import CapturedStates
from mm.models.recurrent import LayerState


@dataclass(frozen=True, kw_only=True, eq=False)
class KVPiece:
    """Keys and values of one sequence that no piece before this one had. Tokens that a reducer dropped are not in it.

    Attributes:
        sequence: Which of the request's sequences; see `SequenceHandOff.sequence`.
        starts: Per layer, how many tokens the pieces before this one had.
        counts: Per layer, tokens in this piece. They differ where a reducer dropped tokens between layers.
        keys, values: (sum of counts, num_heads, head_dim), layer after layer.
    """

    sequence: int
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    keys: Tensor
    values: Tensor

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceHandOff:
    """What one sequence needs beside its keys and values, and which choices go on from it.

    Attributes:
        sequence: Index of the choice that was computed.
        choices: Those that go on: this one, and others of the request that begin with the same tokens.
        num_computed_tokens: Tokens of prompt and output that were computed.
        lengths: Per layer, tokens that it holds.
        kept_tokens: Per computed token of the output, whether later ones may attend to it; see `Sequence.kept_tokens`.
        num_block_hashes: First blocks that other sequences may share.
        states: Of the layers that keep a state in place of keys and values.
        snapshots: Such states behind blocks that other prompts may begin with, by the block's hash.
        captured: Hidden states of the prompt that a drafter reads.
        last_logits: (vocab,) behind the last computed token, where a drafter reads them.
    """

    sequence: int
    choices: tuple[int, ...]
    num_computed_tokens: int
    lengths: tuple[int, ...]
    kept_tokens: tuple[bool, ...] = ()
    num_block_hashes: int = 0
    states: Mapping[int, LayerState]
    snapshots: Mapping[bytes, Mapping[int, LayerState]]
    captured: Sequence[CapturedStates] = ()
    last_logits: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the states of recurrent layers, and of what drafters read."""
        layers = [state for states in (self.states, *self.snapshots.values()) for state in states.values()]
        tensors = [state for part in self.captured for state in part.states.values()]
        tensors += [] if self.last_logits is None else [self.last_logits]
        return sum(one.num_bytes for one in layers) + sum(one.numel() * one.element_size() for one in tensors)


@dataclass(frozen=True, kw_only=True, eq=False)
class HandOff:
    """Everything but keys and values of a request that goes on at another engine.

    Attributes:
        fingerprint: Of the prompt, the reducer, and what one token takes in the cache. Both engines have to agree.
        emitted: Per choice, its tokens so far.
        seed: Of the sampler's noise.
        sequences: One for each sequence that was computed.
        origins: (V,) int64, which visual tokens the last layers kept; None where nothing was dropped between layers.
        num_cached_tokens, kv_bytes, reducer_faults, queue_s, prefill_s: For the summary.
    """

    fingerprint: bytes
    emitted: tuple[Emitted, ...]
    seed: int
    sequences: tuple[SequenceHandOff, ...]
    origins: Tensor | None
    num_cached_tokens: int
    kv_bytes: int
    reducer_faults: tuple[str, ...]
    queue_s: float
    prefill_s: float

    @property
    def num_bytes(self) -> int:
        """Bytes of what is neither key nor value."""
        return sum(one.num_bytes for one in self.sequences)


@runtime_checkable
class KVSink(Protocol):
    """What an `OutputSink` has too that takes requests over. The engine's thread calls it, so it must not block."""

    def put_piece(self, piece: KVPiece) -> None:
        """Take the next keys and values, while the rest of the prompt is still computed."""
        ...

    def hand_over(self, state: HandOff) -> None:
        """Take the rest. All pieces and the events of the first tokens came before. Called at most once.

        The engine keeps the blocks until the request is aborted, which is how their receiver confirms that it has them.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class ReceivedKV:
    """A request's media, and all that another engine handed over of it. The request then has `emitted`."""

    media: EncodedMedia
    pieces: Sequence[KVPiece]
    state: HandOff
