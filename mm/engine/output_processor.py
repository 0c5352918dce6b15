"""From the logits of a step to tokens, text and events.

A step gives logits. Each sequence whose last token is among them gets its next token; where a draft was right, it gets
several. The processor samples them, makes them part of the output, hands the events to the request's sink, and ends
what is finished.
"""

from __future__ import annotations

import logging
import time
from collections import abc

from torch import Tensor

from mm.engine.cache_pruning import prune_cache
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.kv_cache.prefix_cache import PrefixCache
from mm.engine.kv_transfer.handing_over import HandingOver
from mm.engine.kv_transfer.receiving import begin_drafting
from mm.engine.lifecycle import RequestLifecycle
from mm.engine.model_input import Chunk
from mm.engine.model_runner import StepOutput
from mm.engine.sampling.sampler import SampledToken
from mm.engine.scheduler import ScheduledChunk, Scheduler
from mm.engine.sequence import Sequence
from mm.engine.spec_decode.proposer import SpecDecoder
from mm.engine.spec_decode.verifier import StepLogits, TreeVerification
from mm.engine.stats import Counters
from mm.engine.step_result import StepResult
from mm.engine.token_pruning import Candidates
from mm.errors import EngineError, SchemaNotFulfilled
from mm.plugins.calls import PluginCalls

log = logging.getLogger(__name__)


class OutputProcessor:
    """Turns step outputs into events.

    Args:
        counters: Where times are counted.
        calls: Calls the reducers.
    """

    def __init__(
        self,
        cache: KVCache,
        prefix_cache: PrefixCache,
        scheduler: Scheduler,
        spec_decoder: SpecDecoder,
        lifecycle: RequestLifecycle,
        counters: Counters,
        calls: PluginCalls,
    ) -> None:
        self._cache, self._prefix_cache, self._scheduler = cache, prefix_cache, scheduler
        self._spec_decoder, self._lifecycle, self._counters = spec_decoder, lifecycle, counters
        self._calls = calls
        self._handing_over = HandingOver(cache, prefix_cache, scheduler, spec_decoder, lifecycle, counters)

    def process(self, output: StepOutput) -> list[StepResult]:
        """Give each sequence its tokens: one, and those of its draft that were right."""
        self._counters.model_s += output.model_s
        results = self._decode_results(output)
        row = len(results)
        for item, chunk in zip(output.scheduled.chunks, output.chunks, strict=True):
            results += self._chunk_results(item, chunk, row)
            row += chunk.num_logits
        self._report_faults(results)
        self._sample(results, output.logits)
        self._keep_accepted(results)
        now = time.perf_counter()
        for result in results:
            self._count(result)
        for result in results:
            self._finish_if_done(result, now)
        self._handing_over.park(results, output.logits)
        if any(result.verification.draft.num_tokens for result in results):
            self._spec_decoder.stats.verify_s += time.perf_counter() - output.started
        return results

    def _decode_results(self, output: StepOutput) -> list[StepResult]:
        results = list[StepResult]()
        captured = {} if output.decode is None else output.decode.states
        for i, seq in enumerate(output.scheduled.decode):
            seq.num_computed_tokens += 1
            if output.decode is not None and (candidates := output.decode.candidates.get(i)) is not None:
                self._forget(seq, candidates, [0])
            has_states = captured and seq.states_to_capture
            states = {name: state[i : i + 1] for name, state in captured.items()} if has_states else {}
            results.append(StepResult(seq, seq.output.token_ids[-1], i, TreeVerification(), states))
        return results

    def _chunk_results(self, item: ScheduledChunk, chunk: Chunk, row: int) -> list[StepResult]:
        """Of a chunk: tokens for its sequence, the first token of each sibling, or nothing yet."""
        seq = item.seq
        if seq.draft.num_tokens:
            verification = TreeVerification(seq.draft)
            return [StepResult(seq, seq.output.token_ids[-1], row, verification, chunk.states, chunk.candidates)]
        root = seq.last_token_id
        states = {name: state[-1:] for name, state in chunk.states.items()}
        return [StepResult(one, root, row, TreeVerification(), states) for one in self._advance(item, chunk)]

    def _advance(self, item: ScheduledChunk, chunk: Chunk) -> list[Sequence]:
        """Count a chunk's tokens as computed. Returns the sequences that get a token from its last one."""
        seq, request = item.seq, item.seq.request
        if seq.spec is not None and chunk.kept is not None and not seq.output.token_ids:
            seq.spec.keep_prompt(seq.num_computed_tokens, chunk.kept, chunk.states)
        seq.num_computed_tokens += item.num_tokens
        if seq.num_computed_tokens in seq.snapshot_borders:
            assert seq.seq_index is not None
            last = seq.num_computed_tokens // self._cache.shape.block_size - 1
            self._prefix_cache.keep_states(seq.seq_index, seq.block_hashes[last])
        if chunk.candidates is not None:
            self._forget(seq, chunk.candidates, range(item.num_tokens))
        fault = None if chunk.prune_state is None else chunk.prune_state.error
        if fault is not None and not self._lifecycle.tolerate(request, fault):
            return []
        if request.cache_pruners and seq.num_computed_tokens == request.prompt.length:
            self._prune_cache(seq, chunk)
        if not self._lifecycle.is_live(seq) or not self._send_rows(seq) or not chunk.num_logits:
            return []
        ready = [seq] if seq.output.token_ids else self._finish_prompt(seq)
        self._handing_over.complete(seq, ready)
        return ready

    def begin_received(self) -> None:
        """Go on with sequences whose keys and values another engine computed, as far as there is room for them."""
        for seq, rows in self._scheduler.admit_received():
            self._counters.num_received += 1
            self._counters.kv_received_bytes += rows.num_bytes
            self._prefix_cache.put_snapshots(rows.state.snapshots)
            begin_drafting(self._finish_prompt(seq), rows, self._spec_decoder)

    def _send_rows(self, seq: Sequence) -> bool:
        """Hand over what a chunk added. Returns whether the sequence goes on."""
        try:
            self._handing_over.send_rows(seq)
        except Exception as error:
            log.exception("keys and values could not be sent: request_id=%s", seq.request.request_id)
            self._lifecycle.fail(seq.request, EngineError(f"keys and values could not be sent: {type(error).__name__}"))
            return False
        return True

    def _prune_cache(self, seq: Sequence, chunk: Chunk) -> None:
        """Let reducers remove tokens from the cache. Only blocks that stay as they are may be shared."""
        request = seq.request
        assert seq.seq_index is not None
        num_cached = request.prompt.length - chunk.num_tokens
        unchanged, fault = prune_cache(
            self._cache,
            seq.seq_index,
            request.prompt,
            num_cached,
            chunk.prune_state,
            request.cache_pruners,
            self._calls,
            request.media,
        )
        del seq.block_hashes[unchanged // self._cache.shape.block_size :]
        if fault is not None:
            self._lifecycle.tolerate(request, fault)

    def _finish_prompt(self, seq: Sequence) -> list[Sequence]:
        """Share the prompt's blocks. Returns the sequences that now get their first token."""
        assert seq.seq_index is not None
        self._prefix_cache.put(seq.seq_index, seq.block_hashes)
        if seq.request.params.prefix_keys:
            for key, length in seq.request.named_lengths().items():
                num_blocks = min(length // self._cache.shape.block_size, len(seq.block_hashes))
                if num_blocks:
                    count = num_blocks * self._cache.shape.block_size
                    self._prefix_cache.name(key, seq.block_hashes[num_blocks - 1], count)
        if seq.request.outgoing is not None:  # the other engine forks them
            ready, seq.siblings = [seq, *seq.siblings], []
            return ready
        ready = [seq]
        for sibling in seq.siblings:
            if sibling.spec is not None and seq.spec is not None:
                sibling.spec.captured = list(seq.spec.captured)
            if self._scheduler.fork(seq, sibling):
                ready.append(sibling)
            else:
                self._scheduler.add(sibling)
        seq.siblings = []
        return ready

    def _sample(self, results: abc.Sequence[StepResult], logits: Tensor) -> None:
        """Sample token after token, all sequences together, as long as drafts had the sampled tokens."""
        step_logits = StepLogits(logits)
        active = list(results)
        while active:
            sampled = step_logits.sample(
                [result.first_row + result.verification.node for result in active],
                [result.seq.sampler for result in active],
                [result.seq.output.position for result in active],
            )
            going_on = list[StepResult]()
            for result, token in zip(active, sampled, strict=True):
                is_appended = self._append(result, token)
                if is_appended and result.verification.follow(result.emitted[-1]):
                    going_on.append(result)
            active = going_on

    def _append(self, result: StepResult, sampled: SampledToken | EngineError) -> bool:
        """Make a token part of the output. Returns whether the sequence goes on."""
        seq, request = result.seq, result.seq.request
        if not self._lifecycle.is_live(seq):
            return False  # the request failed with a sibling
        if isinstance(sampled, EngineError):
            self._lifecycle.fail(request, sampled)
            return False
        is_first = request.first_token_time is None
        if is_first:
            request.first_token_time = time.perf_counter()
            request.kv_bytes = self._held_bytes(seq)
        is_drafted = result.verification.child_with(sampled.token_id) is not None
        try:
            delta = seq.output.append(sampled, request.prompt.length if is_first else None, is_drafted=is_drafted)
            request.sink.put(delta)
        except SchemaNotFulfilled as error:
            self._lifecycle.fail(request, error)
            return False
        except Exception as error:
            log.exception("a sequence cannot go on: request_id=%s", request.request_id)
            self._lifecycle.fail(
                request, EngineError(f"a token could not be added to the answer: {type(error).__name__}")
            )
            return False
        request.num_completion_tokens += 1
        result.emitted.append(sampled.token_id)
        return seq.output.finish_reason is None

    def _held_bytes(self, seq: Sequence) -> int:
        """Bytes of all blocks in which a sequence's keys and values are, shared ones included."""
        assert seq.seq_index is not None
        shape = self._cache.shape
        num_blocks = -(-self._cache.lengths[:, seq.seq_index] // shape.block_size)
        return int(num_blocks.sum()) * shape.block_bytes

    def _keep_accepted(self, results: abc.Sequence[StepResult]) -> None:
        """Remove the rejected draft tokens from the cache."""
        for result in results:
            seq, verification = result.seq, result.verification
            if verification.draft.num_tokens and seq.seq_index is not None:
                if result.candidates is not None:
                    self._forget(seq, result.candidates, verification.path)
                else:
                    self._cache.keep_accepted(seq.seq_index, verification.draft.num_tokens + 1, verification.path)
                seq.num_computed_tokens += len(verification.path)

    def _forget(self, seq: Sequence, candidates: Candidates, path: abc.Sequence[int]) -> None:
        """Remove generated tokens from the cache that are not kept or not on the path, and note what was decided."""
        assert seq.seq_index is not None
        first = int(candidates.indices[0])
        seq.kept_tokens[first : first + len(path)] = candidates.forget(self._cache, seq.seq_index, path)

    def _report_faults(self, results: abc.Sequence[StepResult]) -> None:
        """What a reducer did wrong when it decided about generated tokens ends its request, or is noted."""
        for result in results:
            pruning = result.seq.request.token_pruning
            if pruning is not None and pruning.error is not None and self._lifecycle.is_live(result.seq):
                self._lifecycle.tolerate(result.seq.request, pruning.error)

    def _count(self, result: StepResult) -> None:
        """Count what a sequence got, before its request is summed up."""
        num_draft_tokens, num_accepted = result.verification.draft.num_tokens, result.verification.num_accepted
        self._spec_decoder.stats.record(len(result.emitted), num_draft_tokens, num_accepted)
        if num_draft_tokens:
            request = result.seq.request
            request.num_drafts += 1
            request.num_draft_tokens += num_draft_tokens
            request.num_accepted_tokens += num_accepted

    def _finish_if_done(self, result: StepResult, now: float) -> None:
        """Record when tokens came, and finish a sequence that has its last one."""
        seq = result.seq
        if not self._lifecycle.is_live(seq) or not result.emitted:
            return
        if seq.last_token_time is not None:
            for _ in result.emitted:
                self._counters.inter_token_s.observe((now - seq.last_token_time) / len(result.emitted))
        seq.last_token_time = now
        if seq.output.finish_reason is not None:
            self._share_output_blocks(seq)
            self._lifecycle.finish(seq, now)

    def _share_output_blocks(self, seq: Sequence) -> None:
        """Put the blocks of a finished sequence into the prefix cache, for the next turn of its conversation."""
        if seq.seq_index is None or not seq.request.can_share_visual_tokens:
            return
        size = self._cache.shape.block_size
        if seq.num_computed_tokens // size > len(seq.block_hashes):
            self._prefix_cache.put(seq.seq_index, seq.request.block_hashes(size, seq.output.token_ids[:-1]))
