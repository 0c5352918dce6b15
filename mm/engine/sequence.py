"""A request under way and its answers."""

from __future__ import annotations

import threading
import time
from collections import abc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from mm.data.outputs import Event
from mm.data.request import Request
from mm.data.tokens import Encoded, Prompt
from mm.engine.kv_cache.prefix_cache import BlockHash, BlockHasher
from mm.engine.model_runner import Chunk, PruneState
from mm.engine.output_processor import SequenceOutput
from mm.engine.sampling.sampler import Sampler
from mm.plugins.drafter import NO_DRAFT, Draft
from mm.plugins.reducer import InDecode, InPrefill

if TYPE_CHECKING:
    from mm.engine.spec_decode.spec_state import SpecState


class OutputSink(Protocol):
    """Where a request's events go. Called by the thread that runs the engine; must not wait."""

    def put(self, event: Event) -> None: ...

    def end(self, error: BaseException | None = None) -> None: ...


@dataclass(kw_only=True, eq=False)
class EngineRequest:
    """A request that the engine has taken.

    Attributes:
        reducer: How its visual tokens are reduced, for the summary.
        hooks: Layer to reducer, for those that act in prefill.
        evictors: Reducers that act on the cache once the prompt is in.
        faults: What reducers did wrong, where that is only noted.
        drops: Once the prompt has gone in, which visual rows the last of `hooks` left; None without hooks.
        deadline: On the clock of `time.perf_counter`; None waits for ever.
        num_left: Answers not finished yet.
        cancelled: Set by anyone, seen at the next step.
        is_over: Whether the engine holds nothing of it any more.
    """

    request: Request
    encoded: abc.Sequence[Encoded]
    prompt: Prompt
    sink: OutputSink
    reducer: str = "none"
    hooks: dict[int, InPrefill] = field(default_factory=dict)
    evictors: tuple[InDecode, ...] = ()
    faults: list[str] = field(default_factory=list)
    drops: PruneState | None = None
    priority: int = 0
    deadline: float | None = None
    arrived: float = field(default_factory=time.perf_counter)
    admitted: float | None = None
    first_token: float | None = None
    num_left: int = 1
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_drafts: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)
    is_over: bool = False

    @property
    def shares_prompt(self) -> bool:
        """Whether the rows behind the first visual one are the same for every question."""
        return not self.hooks and not self.evictors

    def block_hashes(self, block_size: int, generated: abc.Sequence[int] = ()) -> list[BlockHash]:
        """Names of the whole blocks that may be shared: the last row is always computed, for its logits."""
        prompt = self.prompt
        ids = np.concatenate([prompt.token_ids.cpu().numpy(), np.asarray(generated, dtype=np.int64)])
        behind = np.arange(prompt.next_position, prompt.next_position + len(generated))
        positions = prompt.positions.cpu().numpy()
        positions = np.concatenate([positions, np.broadcast_to(behind, (len(positions), len(behind)))], axis=1)
        stop = len(ids) if generated else len(ids) - 1
        item_of_token = np.full(len(ids), -1, dtype=np.int64)
        visual = np.flatnonzero(prompt.is_visual.cpu().numpy())
        item_of_token[visual] = np.repeat(np.arange(len(self.encoded)), [e.tokens.num_tokens for e in self.encoded])
        keys = [item.key for item in self.encoded]
        if len(visual) and (not self.shares_prompt or not all(keys)):
            stop = min(stop, int(visual[0]))
        return BlockHasher(
            token_ids=ids[:stop],
            positions=positions[:, :stop],
            items=keys,
            item_of_token=item_of_token[:stop],
            salt=self.request.cache_salt,
        ).block_hashes(block_size)


@dataclass(kw_only=True, eq=False)
class Sequence:
    """One answer of a request: the unit that is scheduled.

    Attributes:
        slot: Where its rows are cached; None while it waits.
        num_computed: Rows of prompt and answer that have been through the decoder.
        siblings: Further answers that begin when the prompt is in, from the same rows.
        order: Place in line; kept through preemption.
        last_token: When the last token came, on the clock of `time.perf_counter`.
        drafting: Its part in speculation; None where nothing is drafted for it.
        draft: What the next pass verifies.
    """

    job: EngineRequest
    sampler: Sampler
    output: SequenceOutput
    order: int = 0
    slot: int | None = None
    num_computed: int = 0
    siblings: list[Sequence] = field(default_factory=list)
    prefix: list[BlockHash] = field(default_factory=list)
    last_token: float | None = None
    drafting: SpecState | None = None
    draft: Draft = NO_DRAFT

    def __post_init__(self) -> None:
        self.num_prompt_rows = self.job.prompt.length

    @property
    def num_rows(self) -> int:
        """Rows that have to be in the cache before the next token is known."""
        return self.num_prompt_rows + len(self.output.token_ids)

    @property
    def position(self) -> int:
        """Rotary position of the last generated token."""
        return self.job.prompt.next_position + len(self.output.token_ids) - 1

    @property
    def newest_token(self) -> int:
        """The last one of the answer, or of its prompt."""
        return self.output.token_ids[-1] if self.output.token_ids else int(self.job.prompt.token_ids[-1])

    @property
    def num_todo(self) -> int:
        return self.num_rows - self.num_computed

    @property
    def is_decoding(self) -> bool:
        done = self.num_computed
        return done >= self.num_prompt_rows and done + 1 == self.num_prompt_rows + len(self.output.token_ids)

    @property
    def goes_whole(self) -> bool:
        """Whether the rest of the prompt has to be one chunk, since its last row decides about the others."""
        return bool(self.job.hooks) and self.num_computed < self.job.prompt.length

    def most_rows(self) -> int:
        """The longest next chunk. Where reducers act inside the decoder, prompt and answer are never in one."""
        left = self.job.prompt.length - self.num_computed
        return left if left > 0 and not self.job.shares_prompt else self.num_todo

    def chunk(self, count: int, token_rows: Tensor | None) -> Chunk:
        """The next `count` rows.

        Args:
            token_rows: Embeddings of the generated tokens among them.
        """
        prompt, start = self.job.prompt, self.num_computed
        stop = start + count
        assert self.slot is not None
        if self.draft.num_tokens:
            assert token_rows is not None
            return self._verifying_chunk(token_rows)
        in_prompt = slice(start, min(stop, prompt.length))
        parts, places = [], []
        if start < prompt.length:
            parts.append(prompt.embeddings[in_prompt])
            places.append(prompt.positions[:, in_prompt])
        if token_rows is not None:
            first = max(start, prompt.length) - prompt.length + prompt.next_position
            behind = torch.arange(first, first + token_rows.shape[0], device=prompt.positions.device)
            parts.append(token_rows)
            places.append(behind.expand(prompt.positions.shape[0] if places else 1, -1))
        return Chunk(
            slot=self.slot,
            embeddings=parts[0] if len(parts) == 1 else torch.cat(parts),
            positions=places[0] if len(places) == 1 else torch.cat(places, dim=1),
            num_logits=int(stop == self.num_rows),
            drops=self._begin_drops(start) if self.job.hooks and start < prompt.length else None,
        )

    def _verifying_chunk(self, token_rows: Tensor) -> Chunk:
        """The newest token and its draft: each row sees itself and what it follows from."""
        assert self.slot is not None
        depths = torch.tensor(self.draft.depths, device=token_rows.device)
        return Chunk(
            slot=self.slot,
            embeddings=token_rows,
            positions=(self.position + depths).unsqueeze(0),
            num_logits=token_rows.shape[0],
            mask=None if self.draft.is_chain else self.draft.mask().to(token_rows.device),
        )

    def generated(self, count: int) -> list[int]:
        """Generated and drafted tokens among the next `count` rows."""
        if self.draft.num_tokens:
            return [self.output.token_ids[-1], *self.draft.token_ids]
        behind = self.job.prompt.length
        return self.output.token_ids[max(self.num_computed - behind, 0) : max(self.num_computed + count - behind, 0)]

    def _begin_drops(self, start: int) -> PruneState:
        visual = self.job.prompt.is_visual[start:].nonzero().squeeze(1)
        before = int(self.job.prompt.is_visual[:start].sum())
        origins = torch.arange(before, before + visual.shape[0], device=visual.device)
        items, protected = visual_planes(self.job.encoded, visual.device)
        self.job.drops = PruneState(
            hooks=self.job.hooks, visual=visual, origins=origins, items=items, protected=protected
        )
        return self.job.drops


def visual_planes(encoded: abc.Sequence[Encoded], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of all visual rows of a prompt: which item each belongs to (int64), and whether it is protected (bool)."""
    sizes = torch.tensor([item.tokens.num_tokens for item in encoded])
    protected = [item.tokens.protected for item in encoded]
    flags = [
        torch.zeros(int(size), dtype=torch.bool) if plane is None else plane.cpu()
        for size, plane in zip(sizes, protected, strict=True)
    ]
    return torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(device), torch.cat(flags).to(device)
