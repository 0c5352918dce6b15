"""Drafting for the answers of an engine: which drafter serves which answer, what it is asked, what it is told.

The engine calls `propose` before it plans a pass and `finish` behind it. A drafter that fails costs its answers their
drafts: that is logged and counted, and the answers go on without.
"""

from __future__ import annotations

import logging
import time
from collections import abc
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mm.config import SpeculationLimits
from mm.data.request import Request
from mm.engine.model_runner import Chunk, ModelRunner
from mm.engine.sequence import Sequence
from mm.engine.spec_decode.controller import Controller, ControlState
from mm.engine.spec_decode.cost_model import MOST_WARM, CostModel
from mm.engine.spec_decode.drafter_instance import DrafterInstance, load_source
from mm.engine.spec_decode.hidden_state_cache import StateCache
from mm.engine.spec_decode.metrics import SpecDecodeStats
from mm.engine.spec_decode.spec_state import SpecState, StepResult, observation, parts_of, prompt_seen
from mm.errors import InvalidRequest, MmError
from mm.plugins.drafter import NO_DRAFT, DraftBudget
from mm.plugins.spec import drafter_spec

if TYPE_CHECKING:
    from mm.models.language import LanguageModel

log = logging.getLogger(__name__)

STATE_BYTES = 64 << 20
"""Of prompts' states that are remembered."""


class SpecDecoder:
    """The drafters of one engine.

    Args:
        family: The target: language model, placeholders.
        limits: What the operator allows.
        clock: Seconds of this thread's work, for the cost model.
        share_prefixes: Whether prompts are found in a cache, in which case their states are noted.
    """

    def __init__(
        self,
        family: Any,
        limits: SpeculationLimits,
        clock: Callable[[], float] | None = None,
        *,
        share_prefixes: bool = True,
    ) -> None:
        self.limits = limits
        self.clock = clock or (time.perf_counter if family.language.device.type == "cuda" else time.thread_time)
        self.times = CostModel()
        self._language: LanguageModel = family.language
        self._block_size = family.language.kv_cache_spec.block_size
        self._states = StateCache(STATE_BYTES, self._block_size) if share_prefixes else None
        self.stats = SpecDecodeStats(num_accepted_per_position=[0] * limits.max_draft_tokens)
        sources = [load_source(spec, family, Controller(self.times)) for spec in limits.offered]
        self._sources = {source.spec: source for source in sources}
        self._default = drafter_spec(limits.drafter).canonical
        self._num_served = 1
        self._speaking = [source for source in self._sources.values() if source.spec != "none"]

    def calibrate(self, decoder: ModelRunner, most: int) -> None:
        """Measure what passes cost, with rows that mean nothing."""
        language, cache = self._language, decoder.cache
        layers = cache.shape.num_layers
        most = min(most, MOST_WARM, cache.num_free_blocks // layers * cache.shape.block_size)

        def run(num_rows: int) -> float:
            slot = cache.allocate()
            rows = torch.zeros(num_rows, dtype=torch.int64)
            chunk = Chunk(
                slot=slot,
                embeddings=language.embed(rows),
                positions=torch.arange(num_rows, device=language.device).unsqueeze(0),
                num_logits=num_rows,
            )
            start = self.clock()
            int(decoder.run([chunk]).argmax())
            spent = self.clock() - start
            cache.free(slot)
            return spent

        self.times.calibrate(run, most)

    @property
    def is_on(self) -> bool:
        """Whether any answer may draft."""
        return bool(self._speaking)

    def drafting(self, request: Request) -> SpecState | None:
        """How an answer to a request drafts; None where it does not.

        Raises:
            InvalidRequest: It asks for what the operator does not allow.
        """
        asked = request.speculation
        source = self._source(asked.drafter)
        most = self.limits.max_draft_tokens
        if asked.max_draft_tokens is not None:
            if asked.max_draft_tokens > most:
                raise InvalidRequest(
                    f"speculation.max_draft_tokens was {asked.max_draft_tokens}; this server allows up to {most}",
                    "speculation.max_draft_tokens",
                )
            most = asked.max_draft_tokens
        if source.spec == "none" or not most:
            return None
        return SpecState(source, most)

    def _source(self, spec: str | None) -> DrafterInstance:
        if spec is None:
            return self._sources[self._default]
        try:
            wanted = drafter_spec(spec).canonical
        except MmError as error:
            raise InvalidRequest(f"speculation.drafter: {error}", "speculation.drafter") from None
        if wanted not in self._sources:
            allowed = ", ".join(self.limits.offered)
            raise InvalidRequest(
                f"speculation.drafter was {spec!r}; this server allows: {allowed}", "speculation.drafter"
            )
        return self._sources[wanted]

    # ── before a pass ─────────────────────────────────────────────────────────────────────────────────────────────────

    def propose(self, answers: abc.Sequence[Sequence], room: int, num_served: int) -> None:
        """Give each answer that decodes a draft worth verifying, or none.

        Args:
            room: Rows that the next pass may have beyond one per answer.
            num_served: Answers that are being served, those in line too.
        """
        self._num_served = num_served
        for source in self._speaking:
            source.controller.pass_begins(len(answers), num_served)
        groups: dict[DrafterInstance, list[Sequence]] = {}
        for answer in answers:
            answer.draft = NO_DRAFT
            if answer.drafting is not None:
                groups.setdefault(answer.drafting.source, []).append(answer)
        for source, members in groups.items():
            start = self.clock()
            asked = [answer for answer in members if self._may_draft(answer)]
            source.controller.spent(self.clock() - start)
            if asked:
                room -= self._propose(source, asked, room)

    def _may_draft(self, answer: Sequence) -> bool:
        """Whether control asks an answer that can use a draft, and its session knows all that was said."""
        one = answer.drafting
        if one is None or one.tracked is None:
            return False
        is_asked = not self.limits.control or one.source.controller.is_asked(one.tracked)
        return is_asked and one.session is not None and answer.output.num_left > 1

    def _propose(self, source: DrafterInstance, answers: list[Sequence], room: int) -> int:
        start = self.clock()
        budgets = [_budget(answer) for answer in answers]
        sessions = [parts_of(answer)[0].session for answer in answers]
        try:
            drafts = source.loaded.propose(sessions, budgets)
            for draft, budget in zip(drafts, budgets, strict=True):
                draft.check(self._language.vocab_size, budget)
        except Exception as error:
            self._fail(source, answers, error)
            return 0
        if self.limits.control:
            tracked = [parts_of(answer)[1] for answer in answers]
            drafts = source.controller.choose(drafts, tracked, room)
        for answer, draft in zip(answers, drafts, strict=True):
            answer.draft = draft
        spent = self.clock() - start
        self.stats.draft_s += spent
        source.controller.spent(spent, num_asked=len(answers))
        return sum(draft.num_tokens for draft in drafts)

    def _fail(self, source: DrafterInstance, answers: Iterable[Sequence], error: Exception) -> None:
        log.error("a drafter failed; its answers go on without: drafter=%s", source.spec, exc_info=error)
        self.stats.num_faults += 1
        for answer in answers:
            self.close(answer)

    # ── during a pass ─────────────────────────────────────────────────────────────────────────────────────────────────

    def watched(self, answers: Iterable[Sequence]) -> dict[Sequence, frozenset[str]]:
        """Whose states drafters need from the next pass, and which. Decides whether new answers draft at all."""
        found: dict[Sequence, frozenset[str]] = {}
        # Whose drafter reads no states may begin at any pass: not asked one by one where none of them can.
        waits = {s for s in self._speaking if self.limits.control and not s.controller.may_begin(self._num_served)}
        for answer in answers:
            one = answer.drafting
            if one is None:
                continue
            if one.tracked is None and (one.source.states or one.source not in waits):
                self._begin(answer, one)
            if one.source.states and one.tracked is not None and one.tracked.is_near:
                found[answer] = one.source.states
                one.source.controller.watched()
        return found

    def _begin(self, answer: Sequence, one: SpecState) -> None:
        """Let an answer draft, if that may pay. Whose drafter reads states has to begin with its prompt."""
        start, controller, reads_states = self.clock(), one.source.controller, bool(one.source.states)
        is_late = reads_states and answer.output.token_ids and not one.kept  # nobody watched its prompt
        if not self.limits.control and not is_late:
            one.tracked = ControlState()
        elif not is_late:
            one.tracked = controller.begin(self._num_served, reads_states=reads_states)
        if one.tracked is not None:
            controller.spent(self.clock() - start)
        elif reads_states:
            answer.drafting = None

    def keep_prompt_states(self, answer: Sequence, start: int, chunk: Chunk) -> None:
        """Put by what a chunk of the prompt showed, until the prompt is in.

        Args:
            start: The chunk's first row.
        """
        one = answer.drafting
        if one is None or chunk.left is None or not one.source.states or answer.output.token_ids:
            return
        began = self.clock()
        if one.kept and int(one.kept[-1][0][-1]) >= start:
            one.kept = []  # the answer lost its rows and begins again
        one.keep(chunk.left + start, chunk.states)
        one.source.controller.spent(self.clock() - began)

    def took(self, num_answers: int, num_drafted: int, seconds: float) -> None:
        """How long a pass took in which nothing but decoding was done."""
        self.times.observe(num_answers, num_drafted, seconds)
        charged = [source.controller for source in self._speaking if source.controller.estimated_s]
        estimated, added = sum(one.estimated_s for one in charged), seconds - self.times.plain(num_answers)
        for one in charged:
            one.took(added * one.estimated_s / estimated)

    # ── behind a pass ─────────────────────────────────────────────────────────────────────────────────────────────────

    def finish(self, rounds: abc.Sequence[StepResult], logits: Tensor) -> None:
        """Tell drafters what came of a pass, where they are asked next. Answers that are over draft no more."""
        groups: dict[DrafterInstance, list[StepResult]] = {}
        for one in rounds:
            drafting = one.answer.drafting
            if drafting is None or not one.said:
                continue
            is_first = len(one.said) == len(one.answer.output.token_ids)
            if drafting.tracked is None and is_first:  # its prompt went in with a sibling's
                self._begin(one.answer, drafting)
            if drafting.tracked is not None:
                groups.setdefault(drafting.source, []).append(one)
        for source, group in groups.items():
            start = self.clock()
            due = [one for one in group if self._is_due(one)]
            try:
                self._observe(source, due, logits)
            except Exception as error:
                self._fail(source, [one.answer for one in group], error)
            spent = self.clock() - start
            self.stats.draft_s += spent
            if self.limits.control:
                source.controller.spent(spent, num_observed=len(due))

    def _is_due(self, one: StepResult) -> bool:
        """Whether a drafter is asked about an answer next; notes what the pass showed."""
        drafting, tracked = parts_of(one.answer)
        if tracked.draft.num_tokens:
            drafting.source.controller.learn(tracked, one.walk.draft, one.said)
        if not tracked.is_near:
            drafting.forget(one.answer.job.prompt.length)
        elif drafting.source.states and one.states:
            path, stop = one.walk.path, one.answer.num_rows - 1  # the newest token's row has been through no pass
            whole = len(path) == len(next(iter(one.states.values())))
            states = one.states if whole else {name: state[path] for name, state in one.states.items()}
            drafting.keep(torch.arange(stop - len(path), stop), states)
        return tracked.is_due

    def _observe(self, source: DrafterInstance, rounds: abc.Sequence[StepResult], logits: Tensor) -> None:
        late = []
        for one in rounds:
            drafting, job = parts_of(one.answer)[0], one.answer.job
            if drafting.session is None:
                drafting.session = source.loaded.open(job.prompt, private=bool(job.request.cache_salt))
                self._remember(one.answer, drafting)
                late += [one.answer] if len(one.answer.output.token_ids) > 1 else []
        if late:  # what the prompt showed is told apart from what came behind
            source.loaded.observe([parts_of(answer)[0].session for answer in late], [prompt_seen(one) for one in late])
        seen = [observation(one, source, logits) for one in rounds]
        if seen:
            source.loaded.observe([parts_of(one.answer)[0].session for one in rounds], seen)

    def _remember(self, answer: Sequence, drafting: SpecState) -> None:
        """Note a prompt's states for those who find it in the prefix cache, and find what was noted of it."""
        if not drafting.kept or self._states is None:
            return
        self._states.put(answer.prefix, drafting.kept)
        num_found = int(drafting.kept[0][0][0]) // self._block_size
        if num_found and (found := self._states.get(answer.prefix[:num_found], drafting.source.states)) is not None:
            drafting.kept.insert(0, found)

    def count(self, one: StepResult) -> None:
        """Note what a round gave; before its request is summed up."""
        stats, walk = self.stats, one.walk
        stats.num_emitted_tokens += len(one.said)
        stats.num_target_steps += 1
        drafted = walk.draft.num_tokens
        if not drafted:
            return
        stats.num_drafts += 1
        stats.num_draft_tokens += drafted
        stats.num_accepted_tokens += walk.num_accepted
        for position in range(walk.num_accepted):
            stats.num_accepted_per_position[position] += 1
        one.answer.job.num_drafts += 1
        one.answer.job.num_drafted_tokens += drafted
        one.answer.job.num_accepted_tokens += walk.num_accepted

    def close(self, answer: Sequence) -> None:
        """The answer drafts no more."""
        drafting, answer.drafting = answer.drafting, None
        answer.draft = NO_DRAFT
        if drafting is None:
            return
        if drafting.tracked is not None and self.limits.control:
            drafting.source.controller.end()
        if drafting.session is None:
            return
        try:
            drafting.source.loaded.close(drafting.session)
        except Exception:
            log.exception("a drafter failed to close a session: drafter=%s", drafting.source.spec)
            self.stats.num_faults += 1


def _budget(answer: Sequence) -> DraftBudget:
    assert answer.drafting is not None
    most, rule, position = answer.drafting.max_tokens, answer.sampler.rule, answer.output.position
    return DraftBudget(
        max_tokens=most,
        max_depth=min(most, answer.output.num_left - 1),
        temperature=rule.temperature,
        key=(rule.seed, answer.sampler.choice, position),
    )
