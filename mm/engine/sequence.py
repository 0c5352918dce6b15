"""A request inside the engine, and the sequences that it asks for.

An `EngineRequest` is one call of `LLMEngine.submit`. It has one `Sequence` per choice (`n`). Sequences are what the
scheduler works with: each has its own tokens, its own entry in the KV cache and its own sampler.
"""

from __future__ import annotations

import time
from collections import abc
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np

from mm.data.outputs import Event
from mm.data.request import Request
from mm.data.tokens import Encoded, Prompt
from mm.engine.kv_cache.prefix_cache import BlockHash, BlockHasher
from mm.engine.kv_transfer.outgoing import Outgoing
from mm.engine.kv_transfer.rows import ReceivedRows
from mm.engine.prefill_pruning import PruneState
from mm.engine.sampling.sampler import Sampler
from mm.engine.sequence_output import SequenceOutput
from mm.engine.spec_decode.spec_state import SpecState
from mm.engine.token_pruning import TokenPruning
from mm.plugins.drafter import NO_DRAFT, Draft
from mm.plugins.reducer import InDecode, InPrefill


class OutputSink(Protocol):
    """Receives the events of one request, from the thread that runs the engine. Its methods must not block."""

    def put(self, event: Event) -> None:
        """Take the next event."""
        ...

    def end(self, error: BaseException | None = None) -> None:
        """Take note that no event follows. Called exactly once.

        Args:
            error: Why the request failed; None when it finished or was aborted.
        """
        ...


class PrefillOnly:
    """The sink of a request whose keys and values are wanted, up to the last visual token, and no output."""

    def put(self, event: Event) -> None:
        """Drop it."""

    def end(self, error: BaseException | None = None) -> None:
        """Take no note of it."""


@dataclass(kw_only=True, eq=False)
class EngineRequest:
    """A request that the engine has accepted.

    Attributes:
        params: The request as the caller made it.
        media: Its encoded media items, in the order of the prompt.
        prompt: The prompt with the visual tokens in it.
        sink: Receives the events.
        reducer: Canonical text of the reducer, for the summary.
        pruning_layers: Layer index to the reducer that is asked at the input of that layer, during prefill.
        renumbers: Whether positions begin anew in each layer in which visual tokens left.
        cache_pruners: Reducers that remove tokens from the KV cache once the prompt has been computed.
        reducer_faults: What reducers did wrong, when the error policy is to go on.
        token_pruning: Decides about generated tokens; None where nothing does.
        decoder: Fingerprint of the weights that the decoder's layers have for this request; empty for the model's own.
        prune_state: Which visual tokens the layers of `pruning_layers` kept; None before prefill and without them.
        outgoing: Of a request that goes on at another engine once each choice has its next token.
        priority: Lower values are scheduled first.
        deadline: On the clock of `time.perf_counter`; None means no deadline.
        num_unfinished: Sequences that are not finished yet.
        kv_bytes: Bytes of the first sequence's KV cache when the first token came.
        is_finished: The engine holds nothing of the request any more.
    """

    params: Request
    media: abc.Sequence[Encoded]
    prompt: Prompt
    sink: OutputSink
    reducer: str = "none"
    pruning_layers: dict[int, InPrefill] = field(default_factory=dict[int, InPrefill])
    renumbers: bool = False
    cache_pruners: tuple[InDecode, ...] = ()
    reducer_faults: list[str] = field(default_factory=list[str])
    token_pruning: TokenPruning | None = None
    decoder: str = ""
    prune_state: PruneState | None = None
    outgoing: Outgoing | None = None
    priority: int = 0
    deadline: float | None = None
    arrival_time: float = field(default_factory=time.perf_counter)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    num_unfinished: int = 1
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    kv_bytes: int = 0
    is_finished: bool = False

    @property
    def request_id(self) -> str:
        return self.params.request_id

    @property
    def can_share_visual_tokens(self) -> bool:
        """Whether the KV of the tokens after the first visual one is the same for every question.

        It is not where a reducer inside the decoder decides by the question. Neither are its layers of equal length
        where it drops generated tokens. And it is not where tokens attend to later ones.
        """
        is_pruned = self.pruning_layers or self.cache_pruners or self.token_pruning is not None
        return not is_pruned and self.prompt.mask is None

    def named_lengths(self) -> dict[str, int]:
        """Tokens of the prompt up to the end of each media item, and of the whole, by the sender's names for them."""
        visual = np.flatnonzero(self.prompt.is_visual.cpu().numpy())
        counts = np.cumsum([item.tokens.num_tokens for item in self.media], dtype=np.int64)
        ends = [int(visual[count - 1]) + 1 if count else 0 for count in counts]
        return dict(zip(self.params.prefix_keys, [*ends, self.prompt.length], strict=False))

    def block_hashes(self, block_size: int, generated: abc.Sequence[int] = ()) -> list[BlockHash]:
        """Hashes of the full blocks that other requests may share.

        The last token of a prompt is never part of one: it is always computed, since its logits are needed.

        Args:
            generated: Tokens of a sequence of this request, whose blocks follow the prompt's.
        """
        prompt = self.prompt
        ids = np.concatenate([prompt.token_ids.cpu().numpy(), np.asarray(generated, dtype=np.int64)])
        after = np.arange(prompt.next_position, prompt.next_position + len(generated))
        positions = prompt.positions.cpu().numpy()
        positions = np.concatenate([positions, np.broadcast_to(after, (len(positions), len(after)))], axis=1)
        stop = len(ids) if generated else len(ids) - 1
        item_of_token = np.full(len(ids), -1, dtype=np.int64)
        visual = np.flatnonzero(prompt.is_visual.cpu().numpy())
        item_of_token[visual] = np.repeat(np.arange(len(self.media)), [item.tokens.num_tokens for item in self.media])
        keys = [item.key for item in self.media]
        if len(visual) and (not self.can_share_visual_tokens or not all(keys)):
            stop = min(stop, int(visual[0]))
        if prompt.mask is not None:  # tokens are shared up to the first one that attends to a later one
            sees_later = prompt.mask.triu(1).any(dim=1).nonzero()
            stop = min(stop, int(sees_later[0])) if len(sees_later) else stop
        return BlockHasher(
            token_ids=ids[:stop],
            positions=positions[:, :stop],
            items=keys,
            item_of_token=item_of_token[:stop],
            salt=self.params.cache_salt,
            decoder=self.decoder,
        ).block_hashes(block_size)


class SequenceStatus(Enum):
    """Where a sequence is in its life. Preemption takes it from RUNNING back to WAITING.

    A PARKED one is computed as far as this engine computes it; its blocks stay until another engine has it.
    """

    WAITING = "waiting"
    RUNNING = "running"
    PARKED = "parked"
    FINISHED = "finished"


@dataclass(kw_only=True, eq=False)
class Sequence:
    """One choice of a request: the unit that is scheduled.

    Attributes:
        arrival_index: Order of arrival; it stays the same through preemption.
        seq_index: Entry of the sequence in the KV cache's tables; None while it has none.
        num_computed_tokens: Tokens of prompt and output whose keys and values are in the cache.
        siblings: Further choices, which start from the same prompt once that is computed.
        block_hashes: Hashes of the blocks that other sequences may share.
        snapshot_borders: Numbers of first tokens behind which the states of recurrent layers are kept for others.
        kept_tokens: For each generated token that was computed, whether later ones may attend to it. Only where a
            reducer decides about it. It stays the same through preemption.
        last_token_time: When the newest token came, on the clock of `time.perf_counter`.
        spec: State of speculative decoding; None where nothing is drafted for this sequence.
        received: What another engine computed of it, until the cache has room for that.
    """

    request: EngineRequest
    sampler: Sampler
    output: SequenceOutput
    status: SequenceStatus = SequenceStatus.WAITING
    arrival_index: int = 0
    seq_index: int | None = None
    num_computed_tokens: int = 0
    siblings: list[Sequence] = field(default_factory=list["Sequence"])
    block_hashes: list[BlockHash] = field(default_factory=list[BlockHash])
    snapshot_borders: tuple[int, ...] = ()
    kept_tokens: list[bool] = field(default_factory=list[bool])
    last_token_time: float | None = None
    spec: SpecState | None = None
    received: ReceivedRows | None = None

    def __post_init__(self) -> None:
        self.num_prompt_tokens = self.request.prompt.length

    @property
    def num_tokens(self) -> int:
        """Tokens that have to be in the cache before the next token can be sampled."""
        return self.num_prompt_tokens + len(self.output.token_ids)

    @property
    def position(self) -> int:
        """Rotary position of the last generated token."""
        return self.request.prompt.next_position + len(self.output.token_ids) - 1

    @property
    def last_token_id(self) -> int:
        """The newest token: of the output, or of the prompt while there is no output."""
        return self.output.token_ids[-1] if self.output.token_ids else int(self.request.prompt.token_ids[-1])

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_past_prompt(self) -> bool:
        """Whether all of its prompt is in the cache."""
        return self.num_computed_tokens >= self.num_prompt_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether only its newest token is still to be computed."""
        done = self.num_computed_tokens
        return done >= self.num_prompt_tokens and done + 1 == self.num_prompt_tokens + len(self.output.token_ids)

    @property
    def must_prefill_in_one_chunk(self) -> bool:
        """Whether the rest of the prompt has to be one chunk.

        Its last token decides which others are kept, or some of its tokens attend to later ones.
        """
        return (
            bool(self.request.pruning_layers or self.request.prompt.mask is not None)
            and self.num_computed_tokens < self.num_prompt_tokens
        )

    @property
    def max_chunk_tokens(self) -> int:
        """Length of the longest possible next chunk.

        Where reducers act inside the decoder, prompt and output are never in one chunk.
        """
        left = self.num_prompt_tokens - self.num_computed_tokens
        return left if left > 0 and not self.request.can_share_visual_tokens else self.num_uncomputed_tokens

    @property
    def draft(self) -> Draft:
        """The draft that the next step verifies."""
        return NO_DRAFT if self.spec is None else self.spec.draft

    @property
    def states_to_capture(self) -> frozenset[str]:
        """Names of the hidden states that the next step has to hand out, for the drafter."""
        return NO_STATES if self.spec is None else self.spec.states_to_capture


NO_STATES: frozenset[str] = frozenset()
