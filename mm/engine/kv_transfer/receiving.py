"""The engine that goes on with requests whose prompts another engine has computed.

Such a request is made like one that resumes (see `mm.engine.resumption`): its tokens so far go through sampler, grammar
and detokenizer. Then its keys and values are written where a prompt would have been computed. From there on it is like
any other: its blocks are found by later prompts, and after a preemption it is computed here from its visual tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Several

import torch

from mm.data.request import Emitted
from mm.engine.kv_transfer.handing_over import fingerprint
from mm.engine.kv_transfer.messages import HandOff, ReceivedKV
from mm.engine.kv_transfer.rows import ReceivedRows
from mm.engine.prefill_pruning import PruneState
from mm.engine.sequence import EngineRequest, Sequence
from mm.engine.spec_decode.proposer import SpecDecoder
from mm.engine.spec_decode.verifier import TreeVerification
from mm.engine.step_result import StepResult
from mm.errors import EngineError
from mm.models.kv_cache_spec import KVCacheSpec


def may_be_drafted(emitted: Several[Emitted]) -> bool:
    """Whether a drafter can begin with what the other engine computed: it has seen the prompt and nothing else."""
    return all(len(one.token_ids) <= 1 for one in emitted)


def attach(seqs: Several[Sequence], received: ReceivedKV, spec: KVCacheSpec) -> None:
    """Give the sequences of a resumed request what another engine computed of them.

    Raises:
        EngineError: That was computed of other tokens, by another model, or something of it is missing.
    """
    request, state = seqs[0].request, received.state
    if request.params.emitted != state.emitted:
        raise EngineError("what was handed over belongs to other generated tokens than those of the request")
    if fingerprint(request, spec) != state.fingerprint:
        raise EngineError(
            "what was handed over was computed of another prompt, or by another model or dtype; prefill and decode "
            "replicas need the same settings"
        )
    by_choice = {seq.sampler.choice: seq for seq in seqs}
    for one in state.sequences:
        first, *others = (by_choice.pop(choice) for choice in one.choices)
        pieces = [piece for piece in received.pieces if piece.sequence == one.sequence]
        first.received, first.siblings = ReceivedRows(one, pieces, spec), others
        for seq in (first, *others):
            seq.kept_tokens = list(one.kept_tokens)
            del seq.block_hashes[one.num_block_hashes :]
    if by_choice:
        raise EngineError(f"nothing was handed over for the choices {sorted(by_choice)}")
    _note_past(request, state)


def _note_past(request: EngineRequest, state: HandOff) -> None:
    """What the summary says of the time at the other engine. Clocks of two machines differ, so times count from now."""
    request.first_token_time = time.perf_counter()
    request.first_scheduled_time = request.first_token_time - state.prefill_s
    request.arrival_time = request.first_scheduled_time - state.queue_s
    request.num_cached_tokens, request.kv_bytes = state.num_cached_tokens, state.kv_bytes
    request.reducer_faults += [fault for fault in state.reducer_faults if fault not in request.reducer_faults]
    if state.origins is not None:
        origins = state.origins.to(request.prompt.is_visual.device)
        nothing = torch.zeros(0, dtype=torch.int64)
        request.prune_state = PruneState(
            reducers={}, visual=origins, origins=origins, items=nothing, kinds=(), protected=nothing.bool()
        )


def begin_drafting(ready: Several[Sequence], rows: ReceivedRows, spec_decoder: SpecDecoder) -> None:
    """Let drafters begin where they would have begun if the prompt had been computed here.

    Args:
        ready: The sequences that go on from these rows.
    """
    for seq in ready:
        if seq.spec is not None and not seq.spec.captured:
            seq.spec.captured = list(rows.state.captured)
    spec_decoder.start_sequences(ready)
    logits = rows.state.last_logits
    results = [
        StepResult(seq, int(seq.request.prompt.token_ids[-1]), 0, TreeVerification(), emitted=seq.output.token_ids[:])
        for seq in ready
        if seq.spec is not None and seq.spec.control is not None
    ]
    results = [one for one in results if logits is not None or not _reads_logits(one.seq)]
    spec_decoder.observe(results, torch.zeros(0, 0) if logits is None else logits.unsqueeze(0))


def _reads_logits(seq: Sequence) -> bool:
    return seq.spec is not None and seq.spec.drafter.num_top_ids > 0
