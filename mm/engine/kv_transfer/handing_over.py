"""The engine that computes prompts for another one: what leaves it, and when.

Keys and values are sent chunk by chunk, while the next chunk is computed; where reducers remove tokens once the prompt
is in, all at the end. When each choice of a request has its next token, the request is parked: nothing of it is
computed any more, and its blocks stay until its receiver confirms by aborting it. An engine whose receivers are full
therefore takes no more prompts than its cache holds. A request that has but one token left ends here; nothing is sent.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence as Several
from dataclasses import replace

from torch import Tensor

from mm.engine.kv_cache.blocks import KVCache
from mm.engine.kv_cache.prefix_cache import PrefixCache
from mm.engine.kv_transfer.messages import HandOff, SequenceHandOff
from mm.engine.kv_transfer.outgoing import Outgoing
from mm.engine.kv_transfer.rows import SentRows
from mm.engine.lifecycle import RequestLifecycle
from mm.engine.scheduler import Scheduler
from mm.engine.sequence import EngineRequest, Sequence
from mm.engine.spec_decode.proposer import SpecDecoder
from mm.engine.stats import Counters
from mm.engine.step_result import StepResult
from mm.errors import EngineError
from mm.models.kv_cache_spec import KVCacheSpec

log = logging.getLogger(__name__)


class HandingOver:
    """Hands requests over that have `outgoing`. Only the thread that runs a step uses it."""

    def __init__(
        self,
        cache: KVCache,
        prefix_cache: PrefixCache,
        scheduler: Scheduler,
        spec_decoder: SpecDecoder,
        lifecycle: RequestLifecycle,
        counters: Counters,
    ) -> None:
        self._cache, self._prefix_cache, self._scheduler = cache, prefix_cache, scheduler
        self._spec_decoder, self._lifecycle, self._counters = spec_decoder, lifecycle, counters

    def send_rows(self, seq: Sequence) -> None:
        """Send what a chunk added, unless reducers may still remove it."""
        outgoing, request = seq.request.outgoing, seq.request
        if outgoing is None or (request.cache_pruners and seq.num_computed_tokens < request.prompt.length):
            return
        assert seq.seq_index is not None
        choice = seq.sampler.choice
        sent = outgoing.sent.setdefault(choice, SentRows(choice, self._cache.shape.num_layers))
        piece = sent.next_piece(self._cache, seq.seq_index)
        if piece is not None:
            self._counters.kv_sent_bytes += piece.num_bytes
            outgoing.sink.put_piece(piece)

    def complete(self, seq: Sequence, choices: Several[Sequence]) -> None:
        """Note a sequence whose rows have been sent.

        Args:
            choices: The sequences that get their next token from its last one; it is one of them.
        """
        outgoing = seq.request.outgoing
        if outgoing is None:
            return
        assert seq.seq_index is not None
        spec, own = seq.spec, seq.sampler.choice
        if spec is not None:
            self._spec_decoder.remember(seq, spec)
        outgoing.follows |= {one.sampler.choice: own for one in choices}
        outgoing.computed[own] = SequenceHandOff(
            sequence=own,
            choices=(),
            num_computed_tokens=seq.num_computed_tokens,
            lengths=tuple(self._cache.lengths[:, seq.seq_index].tolist()),
            kept_tokens=tuple(seq.kept_tokens),
            num_block_hashes=len(seq.block_hashes),
            states=self._cache.states.snapshot(seq.seq_index),
            snapshots=self._prefix_cache.snapshots(seq.block_hashes),
            captured=() if spec is None else tuple(spec.captured),
        )

    def park(self, results: Several[StepResult], logits: Tensor) -> None:
        """Park the sequences that have their next token, and hand over the requests that are complete.

        Args:
            logits: (n, vocab) of the step.
        """
        requests = dict[EngineRequest, Outgoing]()
        for result in results:
            seq, outgoing = result.seq, result.seq.request.outgoing
            if outgoing is None:
                continue
            requests[seq.request] = outgoing
            if not result.emitted or not self._lifecycle.is_live(seq):
                continue
            source = outgoing.follows[seq.sampler.choice]
            if seq.spec is not None and seq.spec.drafter.num_top_ids:
                row = logits[result.first_row].clone()
                outgoing.computed[source] = replace(outgoing.computed[source], last_logits=row)
            self._spec_decoder.close(seq)
            self._scheduler.park(seq)
            outgoing.num_parked += 1
        for request, outgoing in requests.items():
            if not request.is_finished and outgoing.num_parked == request.num_unfinished:
                self._hand_over(request, outgoing)

    def _hand_over(self, request: EngineRequest, outgoing: Outgoing) -> None:
        emitted = outgoing.emitted
        going_on = [choice for choice in outgoing.follows if not emitted[choice].is_finished]
        sequences = [
            replace(one, choices=tuple(choice for choice in going_on if outgoing.follows[choice] == own))
            for own, one in outgoing.computed.items()
        ]
        assert request.first_scheduled_time is not None
        assert request.first_token_time is not None
        state = HandOff(
            fingerprint=fingerprint(request, self._cache.shape),
            emitted=emitted,
            seed=outgoing.seed,
            sequences=tuple(one for one in sequences if one.choices),
            origins=None if request.prune_state is None else request.prune_state.origins,
            num_cached_tokens=request.num_cached_tokens,
            kv_bytes=request.kv_bytes,
            reducer_faults=tuple(request.reducer_faults),
            queue_s=request.first_scheduled_time - request.arrival_time,
            prefill_s=request.first_token_time - request.first_scheduled_time,
        )
        self._counters.kv_sent_bytes += state.num_bytes
        self._counters.kv_saved_bytes += self._saved_bytes(request, sequences)
        self._counters.num_handed_over += 1
        try:
            outgoing.sink.hand_over(state)
        except Exception as error:
            log.exception("a request could not be handed over: request_id=%s", request.request_id)
            self._lifecycle.fail(request, EngineError(f"it could not be handed over: {type(error).__name__}"))

    def _saved_bytes(self, request: EngineRequest, sequences: Several[SequenceHandOff]) -> int:
        """Bytes of keys and values that would have been sent too if no visual token had been dropped."""
        num_dropped = sum(item.tokens.num_tokens_in - item.tokens.num_tokens for item in request.media)
        spec = self._cache.shape
        rows = sum(spec.num_layers * (one.num_computed_tokens + num_dropped) - sum(one.lengths) for one in sequences)
        return rows * spec.token_bytes


def fingerprint(request: EngineRequest, spec: KVCacheSpec) -> bytes:
    """Names everything that a prompt's keys and values depend on, as far as two engines may differ in it."""
    shape = (spec.num_layers, spec.num_heads, spec.head_dim, str(spec.dtype), spec.block_size, spec.has_states)
    digest = hashlib.blake2b(
        f"{shape}|{request.decoder}|{request.reducer}|{request.renumbers}".encode(), digest_size=16
    )
    for item in request.media:
        digest.update(f"|{item.key}:{item.tokens.num_tokens}".encode())
    digest.update(request.prompt.token_ids.cpu().numpy().tobytes())
    digest.update(request.prompt.positions.cpu().contiguous().numpy().tobytes())
    return digest.digest()
