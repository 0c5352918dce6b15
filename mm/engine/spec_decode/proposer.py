"""Speculative decoding of one engine: which drafter serves which sequence, when it drafts and what it observes.

The engine calls `propose` before it schedules a step, and `observe` after it. Between the two, the output processor
verifies the drafts. A drafter that fails costs its sequences their drafts: the failure is logged and counted, and the
sequences go on without drafts.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from mm.config import SpeculationLimits
from mm.data.request import Request
from mm.engine.sequence import Sequence
from mm.engine.spec_decode.calibration import Forward, calibrate
from mm.engine.spec_decode.controller import ControlState
from mm.engine.spec_decode.cost_model import CostModel
from mm.engine.spec_decode.drafter_instance import DrafterInstance
from mm.engine.spec_decode.drafter_set import Drafters
from mm.engine.spec_decode.hidden_state_cache import HiddenStateCache
from mm.engine.spec_decode.metrics import SpecDecodeStats
from mm.engine.spec_decode.observation import observe_prompt, observe_step
from mm.engine.spec_decode.spec_state import SpecState
from mm.engine.step_result import StepResult
from mm.errors import DrafterOff, InvalidRequest
from mm.plugins.calls import PluginCalls
from mm.plugins.drafter import NO_DRAFT, Draft, DraftBudget, DraftTarget

log = logging.getLogger(__name__)

STATE_BYTES = 64 << 20
"""Memory of the hidden states of prompts that are kept for later requests."""


class SpecDecoder:
    """The drafters of one engine.

    Args:
        target: The model that drafts are for.
        block_size: Tokens of a block of the KV cache.
        limits: What the operator allows.
        clock: Seconds of this thread's work and of its drafters', for the cost model; by default wall time on a GPU,
            thread time on a CPU.
        calls: Calls the drafters.
        has_prefix_cache: Whether prompts may be found in a cache. Their hidden states are then kept too.
    """

    def __init__(
        self,
        target: DraftTarget,
        block_size: int,
        limits: SpeculationLimits,
        clock: Callable[[], float] | None = None,
        *,
        calls: PluginCalls | None = None,
        has_prefix_cache: bool = True,
    ) -> None:
        self.limits, self._calls = limits, calls or PluginCalls()
        self.clock = clock or (time.perf_counter if target.device.type == "cuda" else self._thread_time)
        self.costs = CostModel()
        self._target, self._block_size = target, block_size
        self._states = HiddenStateCache(STATE_BYTES, block_size) if has_prefix_cache else None
        self.stats = SpecDecodeStats(num_accepted_per_position=[0] * limits.max_draft_tokens)
        self._drafters = Drafters(target, limits, self.costs, self.clock, self._calls)
        self._num_seqs = 1

    @property
    def _active(self) -> list[DrafterInstance]:
        return self._drafters.active

    @property
    def is_on(self) -> bool:
        """Whether any sequence may get drafts."""
        return bool(self._active)

    def _thread_time(self) -> float:
        """CPU seconds of the thread that runs the engine, and of the threads in which its drafters run."""
        return time.thread_time() + self._calls.thread_s

    def calibrate(self, runner: Forward, max_tokens: int) -> None:
        """Measure what steps cost, with meaningless tokens, if any sequence may get drafts.

        Args:
            max_tokens: Tokens of the largest step.
        """
        if self.is_on:
            calibrate(self.costs, self._target, runner, max_tokens, self.clock)

    def new_state(self, request: Request) -> SpecState | None:
        """State for a sequence of a request; None where it does not get drafts.

        Raises:
            InvalidRequest: The request asks for something that the operator does not allow.
            DrafterOff: It names a drafter that failed again and again.
        """
        options = request.speculation
        drafter = self._drafters.get(options.drafter)
        limit = self.limits.max_draft_tokens
        if options.max_draft_tokens is not None:
            if options.max_draft_tokens > limit:
                raise InvalidRequest(
                    f"speculation.max_draft_tokens was {options.max_draft_tokens}; this server allows up to {limit}",
                    "speculation.max_draft_tokens",
                )
            limit = options.max_draft_tokens
        return None if drafter is None or drafter.spec == "none" or not limit else SpecState(drafter, limit)

    # ── before a step ─────────────────────────────────────────────────────────────────────────────────────────────────

    def propose(self, seqs: SequenceOf[Sequence], max_tokens: int, num_seqs: int) -> None:
        """Give each sequence that decodes a draft that is worth verifying, or none.

        Args:
            seqs: The sequences that decode.
            max_tokens: Draft tokens of all sequences together.
            num_seqs: Sequences that are under way, those in the waiting queue included.
        """
        self._num_seqs = num_seqs
        for drafter in self._active:
            drafter.controller.start_step(len(seqs), num_seqs)
        groups: dict[DrafterInstance, list[Sequence]] = {}
        for seq in seqs:
            if seq.spec is not None and seq.spec.drafter.is_lost:
                self.close(seq)
            if seq.spec is not None:
                seq.spec.draft = NO_DRAFT
                groups.setdefault(seq.spec.drafter, []).append(seq)
        for drafter, members in groups.items():
            with drafter.charged():
                proposing = [seq for seq in members if self._should_propose(seq)]
            if proposing:
                max_tokens -= self._propose(drafter, proposing, max_tokens)

    def _should_propose(self, seq: Sequence) -> bool:
        """Whether the controller wants a draft for a sequence, its session is open, and it may emit two tokens."""
        spec = seq.spec
        if spec is None or spec.control is None:
            return False
        is_wanted = not self.limits.control or spec.drafter.controller.should_propose(spec.control)
        return is_wanted and spec.session is not None and seq.output.num_remaining_tokens > 1

    def _propose(self, drafter: DrafterInstance, seqs: list[Sequence], max_tokens: int) -> int:
        start = self.clock()
        specs = [spec for seq in seqs if (spec := seq.spec) is not None]
        budgets = [_budget(seq, spec) for seq, spec in zip(seqs, specs, strict=True)]
        try:
            drafts = self._drafters.call(drafter, "propose", lambda: self._drafts(drafter, specs, budgets))
        except Exception as error:
            self._fail(drafter, seqs, error)
            return 0
        if self.limits.control:
            drafts = drafter.controller.select(drafts, [_control(spec) for spec in specs], max_tokens)
        for spec, draft in zip(specs, drafts, strict=True):
            spec.draft = draft
        seconds = self.clock() - start
        self.stats.draft_s += seconds
        drafter.controller.record_cost(seconds, num_proposed=len(seqs))
        return sum(draft.num_tokens for draft in drafts)

    def _drafts(
        self, drafter: DrafterInstance, specs: SequenceOf[SpecState], budgets: SequenceOf[DraftBudget]
    ) -> list[Draft]:
        """What a drafter proposes, checked."""
        drafts = list(
            itertools.islice(drafter.loaded.propose([spec.session for spec in specs], budgets), len(specs) + 1)
        )
        for draft, budget in zip(drafts, budgets, strict=True):
            draft.check(self._target.vocab_size, budget)
        return [draft.first_path() for draft in drafts] if self._target.only_chains else drafts

    def start_sequences(self, seqs: Iterable[Sequence]) -> None:
        """Decide for newly scheduled sequences whether they get drafts. Their first step may have to capture states."""
        if not self._active:
            return
        # A drafter that reads no states may start at any step. Drafters that may not start now are left out at once.
        control = self.limits.control
        closed = {d for d in self._active if control and not d.controller.may_start(self._num_seqs)}
        for seq in seqs:
            spec = seq.spec
            if spec is None or spec.drafter.is_lost:
                continue
            if spec.control is None and (spec.drafter.states or spec.drafter not in closed):
                self._start(seq, spec)
            if spec.states_to_capture:
                spec.drafter.controller.record_capture()

    def _start(self, seq: Sequence, spec: SpecState) -> None:
        """Start drafting for a sequence if that may pay. A drafter that reads states has to start with the prompt."""
        reads_states = bool(spec.drafter.states)
        start, controller = self.clock(), spec.drafter.controller
        is_late = reads_states and seq.output.token_ids and not spec.captured  # its prompt's states were not captured
        if not self.limits.control and not is_late:
            spec.control = ControlState()
        elif not is_late:
            spec.control = controller.start(self._num_seqs, reads_states=reads_states)
        if spec.control is not None:
            controller.record_cost(self.clock() - start)
        elif reads_states:
            seq.spec = None

    # ── after a step ──────────────────────────────────────────────────────────────────────────────────────────────────

    def record_step(self, num_seqs: int, num_draft_tokens: int, seconds: float) -> None:
        """Record how long a step took that did nothing but decode."""
        self.costs.record(num_seqs, num_draft_tokens, seconds)
        charged = [drafter.controller for drafter in self._active if drafter.controller.estimated_s]
        estimated, added = sum(one.estimated_s for one in charged), seconds - self.costs.decode_s(num_seqs)
        for one in charged:
            one.record_step_cost(added * one.estimated_s / estimated)

    def observe(self, results: SequenceOf[StepResult], logits: Tensor) -> None:
        """Let drafters observe what a step gave, for the sequences that get a draft next.

        Args:
            logits: (n, vocab) of the step.
        """
        groups: dict[DrafterInstance, list[StepResult]] = {}
        for result in results:
            seq = result.seq
            if seq.spec is not None and seq.spec.drafter.is_lost:
                self.close(seq)
            if seq.spec is None or not result.emitted:
                continue
            is_first = len(result.emitted) == len(seq.output.token_ids)
            if seq.spec.control is None and is_first:  # its prompt was computed as a sibling's
                self._start(seq, seq.spec)
            spec = seq.spec  # starting may have ended it
            if spec is not None and spec.control is not None:  # pyright: ignore[reportUnnecessaryComparison]
                groups.setdefault(spec.drafter, []).append(result)
        for drafter, group in groups.items():
            start = self.clock()
            due = [result for result in group if self._is_due(result)]
            try:
                self._observe(drafter, due, logits)
            except Exception as error:
                self._fail(drafter, [result.seq for result in group], error)
            seconds = self.clock() - start
            self.stats.draft_s += seconds
            if self.limits.control:
                drafter.controller.record_cost(seconds, num_observed=len(due))

    def _is_due(self, result: StepResult) -> bool:
        """Whether a sequence gets a draft next. Records the acceptance of its last draft, and keeps hidden states."""
        seq, spec = result.seq, result.seq.spec
        assert spec is not None
        control = _control(spec)
        if control.draft.num_tokens:
            spec.drafter.controller.record_acceptance(control, result.verification.draft, result.emitted)
        if not control.is_due_soon:
            spec.forget(seq.num_prompt_tokens)
        elif spec.drafter.states and result.states:
            path, stop = result.verification.path, seq.num_tokens - 1  # the newest token has no state yet
            is_whole = len(path) == len(next(iter(result.states.values())))
            states = result.states if is_whole else {name: state[path] for name, state in result.states.items()}
            spec.keep(torch.arange(stop - len(path), stop), states)
        return control.is_due

    def _observe(self, drafter: DrafterInstance, results: SequenceOf[StepResult], logits: Tensor) -> None:
        pairs = [(result, spec) for result in results if (spec := result.seq.spec) is not None]
        late = self._open(drafter, [(result.seq, spec) for result, spec in pairs if spec.session is None])
        # The prompt is observed apart from the tokens that followed it.
        seen = [(spec.session, observe_prompt(seq, spec)) for seq, spec in late]
        then = [(spec.session, observe_step(result, spec, logits)) for result, spec in pairs]
        groups = [list(zip(*group, strict=True)) for group in (seen, then) if group]

        def observe() -> None:
            for sessions, observations in groups:
                drafter.loaded.observe(list(sessions), list(observations))

        if groups:
            self._drafters.call(drafter, "observe", observe)

    def _open(
        self, drafter: DrafterInstance, new: SequenceOf[tuple[Sequence, SpecState]]
    ) -> list[tuple[Sequence, SpecState]]:
        """Open sessions. Returns the sequences that have more than their first token already."""

        def open_each() -> list[object]:
            requests = [seq.request for seq, _ in new]
            return [drafter.loaded.open(one.prompt, private=bool(one.params.cache_salt)) for one in requests]

        if not new:
            return []
        sessions = self._drafters.call(drafter, "open", open_each)
        for (seq, spec), session in zip(new, sessions, strict=True):
            spec.session = session
            self.remember(seq, spec)
        return [(seq, spec) for seq, spec in new if len(seq.output.token_ids) > 1]

    def remember(self, seq: Sequence, spec: SpecState) -> None:
        """Keep a prompt's hidden states for requests that find it in the prefix cache, and find those kept before."""
        if not spec.captured or self._states is None:
            return
        self._states.put(seq.block_hashes, spec.captured)
        num_found = spec.captured[0].first // self._block_size
        found = self._states.get(seq.block_hashes[:num_found], spec.drafter.states) if num_found else None
        if found is not None:
            spec.captured.insert(0, found)

    # ── the end ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _fail(self, drafter: DrafterInstance, seqs: Iterable[Sequence], error: Exception) -> None:
        log.error("a drafter failed; its sequences go on without drafts: drafter=%s", drafter.spec, exc_info=error)
        self.stats.num_faults += 1
        for seq in seqs:
            self.close(seq)

    def close(self, seq: Sequence) -> None:
        """Draft no more for a sequence."""
        spec, seq.spec = seq.spec, None
        if spec is None:
            return
        if spec.control is not None and self.limits.control:
            spec.drafter.controller.stop()
        if spec.session is None:
            return
        if spec.drafter.is_lost:
            return
        try:
            self._drafters.call(spec.drafter, "close", lambda: spec.drafter.loaded.close(spec.session))
        except DrafterOff:
            pass
        except Exception:
            log.exception("a drafter failed to close a session: drafter=%s", spec.drafter.spec)
            self.stats.num_faults += 1


def _control(spec: SpecState) -> ControlState:
    assert spec.control is not None, "only sequences that have started to draft get here"
    return spec.control


def _budget(seq: Sequence, spec: SpecState) -> DraftBudget:
    params = seq.sampler.params
    return DraftBudget(
        max_tokens=spec.max_draft_tokens,
        max_depth=min(spec.max_draft_tokens, seq.output.num_remaining_tokens - 1),
        temperature=params.temperature,
        key=(params.seed, seq.sampler.choice, seq.output.position),
    )
