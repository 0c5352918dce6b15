"""Drafting for the answers of an engine: which drafter serves which answer, what it is asked, what it is told.

The engine calls `propose` before it plans a pass and `finish` behind it. A drafter that fails costs its answers their
drafts: that is logged and counted, and the answers go on without.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mm.core.config import SpeculationLimits
from mm.core.data import Request
from mm.core.drafting import NO_DRAFT, DraftBudget, Drafter, DraftTarget, LoadedDrafter, Observation
from mm.core.errors import IncompatiblePlugin, InvalidRequest, MmError
from mm.core.plugins import build_drafter, canonical_spec
from mm.engine.control import Controller, PassTimes, Tracked
from mm.engine.report import SpeculationStats
from mm.engine.sequence import Answer
from mm.engine.step import LAST_HIDDEN, Chunk, Pass
from mm.engine.verify import Walk

if TYPE_CHECKING:
    from mm.models.language import LanguageModel

log = logging.getLogger(__name__)

MAX_CALIBRATED = 64
"""Rows of the largest pass that is measured when an engine is made."""

BEGUN = 6
"""Tokens behind which control lets drafters begin that read states: their first draft is a pass over the whole prompt,
which an answer that ends sooner would not pay for."""


@dataclass(eq=False)
class Source:
    """A drafter of this engine.

    Attributes:
        states: Names of the states that it needs.
        num_top: How many of a row's largest logits it needs the ids of.
    """

    spec: str
    drafter: Drafter
    loaded: LoadedDrafter
    controller: Controller
    states: frozenset[str]
    num_top: int


@dataclass(eq=False)
class Drafting:
    """One answer's part in speculation.

    Attributes:
        session: Once the prompt is in.
        prompt_states: Rows of the prompt and their states, chunk by chunk, while it goes in.
    """

    source: Source
    max_tokens: int
    tracked: Tracked
    session: Any = None
    prompt_states: list[tuple[Tensor, dict[str, Tensor]]] = field(default_factory=list)


@dataclass(eq=False)
class Round:
    """What a pass gives one answer.

    Attributes:
        root: The token that stands in its first row.
        first: That row in the pass's logits, which gives the next token; those of its draft follow.
        states: State name to (1 + drafted tokens, D) of these rows.
        said: Tokens that became part of the answer.
    """

    answer: Answer
    root: int
    first: int
    walk: Walk
    states: Mapping[str, Tensor] = field(default_factory=dict)
    said: list[int] = field(default_factory=list)


class Speculation:
    """The drafters of one engine.

    Args:
        family: The target: language model, placeholders.
        limits: What the operator allows.
        clock: Seconds of this thread's work, for the cost model.
    """

    def __init__(self, family: Any, limits: SpeculationLimits, clock: Callable[[], float] | None = None) -> None:
        self.limits = limits
        self.clock = clock or (time.perf_counter if family.language.device.type == "cuda" else time.thread_time)
        self.times = PassTimes()
        self._language: LanguageModel = family.language
        self.stats = SpeculationStats(num_accepted_per_position=[0] * limits.max_draft_tokens)
        self._sources = {source.spec: source for source in (self._load(spec, family) for spec in limits.offered)}
        self._default = canonical_spec(build_drafter(limits.drafter), "drafter")

    def _load(self, spec: str, family: Any) -> Source:
        drafter = build_drafter(spec)
        loaded = drafter.load(target_of(family))
        needs: frozenset[str] = getattr(loaded, "needs", drafter.needs)
        states = frozenset(need for need in needs if need == LAST_HIDDEN or need.startswith("hidden:"))
        tops = [int(need.removeprefix("top_ids:")) for need in needs if need.startswith("top_ids:")]
        layers = [int(state.removeprefix("hidden:")) for state in states - {LAST_HIDDEN}]
        unknown = [need for need in needs - states if not need.startswith("top_ids:")]
        unknown += [f"hidden:{layer}" for layer in layers if not 0 <= layer < family.language.num_layers]
        if unknown:
            raise IncompatiblePlugin(spec, "this engine", sorted(unknown))
        return Source(
            spec=canonical_spec(drafter, "drafter"),
            drafter=drafter,
            loaded=loaded,
            controller=Controller(self.times),
            states=states,
            num_top=max(tops, default=0),
        )

    def calibrate(self, decoder: Pass, most: int) -> None:
        """Measure what passes cost, with rows that mean nothing."""
        language, cache = self._language, decoder.cache
        layers = cache.shape.num_layers
        most = min(most, MAX_CALIBRATED, cache.num_free_blocks // layers * cache.shape.block_size)

        def run(num_rows: int) -> float:
            slot = cache.open()
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
            cache.close(slot)
            return spent

        self.times.calibrate(run, most)

    @property
    def is_on(self) -> bool:
        """Whether any answer may draft."""
        return any(spec != "none" for spec in self._sources)

    def drafting(self, request: Request) -> Drafting | None:
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
        return Drafting(source, most, source.controller.track())

    def _source(self, spec: str | None) -> Source:
        if spec is None:
            return self._sources[self._default]
        try:
            wanted = canonical_spec(build_drafter(spec), "drafter")
        except MmError as error:
            raise InvalidRequest(f"speculation.drafter: {error}", "speculation.drafter") from None
        if wanted not in self._sources:
            allowed = ", ".join(self.limits.offered)
            raise InvalidRequest(
                f"speculation.drafter was {spec!r}; this server allows: {allowed}", "speculation.drafter"
            )
        return self._sources[wanted]

    # ── before a pass ─────────────────────────────────────────────────────────────────────────────────────────────────

    def propose(self, answers: Sequence[Answer], room: int) -> None:
        """Give each answer that decodes a draft worth verifying, or none.

        Args:
            room: Rows that the next pass may have beyond one per answer.
        """
        groups: dict[Source, list[Answer]] = {}
        for answer in answers:
            answer.draft = NO_DRAFT
            one = answer.drafting
            if one is not None and one.session is not None:
                groups.setdefault(one.source, []).append(answer)
        for source, group in groups.items():
            asked = [answer for answer in group if self._may_draft(answer)]
            if asked:
                room -= self._propose(source, asked, len(answers), room)

    def _may_draft(self, answer: Answer) -> bool:
        assert answer.drafting is not None
        if answer.output.num_left <= 1:
            return False
        source = answer.drafting.source
        if not self.limits.control:
            return True
        is_begun = not source.states or len(answer.output.token_ids) >= BEGUN
        return is_begun and source.controller.is_asked(answer.drafting.tracked)

    def _propose(self, source: Source, answers: list[Answer], num_answers: int, room: int) -> int:
        start = self.clock()
        budgets = [_budget(answer) for answer in answers]
        sessions = [answer.drafting.session for answer in answers]  # type: ignore[union-attr]
        try:
            drafts = source.loaded.propose(sessions, budgets)
            for draft, budget in zip(drafts, budgets, strict=True):
                draft.check(self._language.vocab_size, budget)
        except Exception as error:
            self._fail(source, answers, error)
            return 0
        spent = self.clock() - start
        self.stats.draft_s += spent
        source.controller.spent(spent, len(answers))
        if self.limits.control:
            tracked = [answer.drafting.tracked for answer in answers]  # type: ignore[union-attr]
            drafts = source.controller.choose(drafts, tracked, num_answers, room)
        for answer, draft in zip(answers, drafts, strict=True):
            answer.draft = draft
        return sum(draft.num_tokens for draft in drafts)

    def _fail(self, source: Source, answers: Iterable[Answer], error: Exception) -> None:
        log.error("a drafter failed; its answers go on without: drafter=%s", source.spec, exc_info=error)
        self.stats.num_faults += 1
        for answer in answers:
            self.close(answer)

    # ── during a pass ─────────────────────────────────────────────────────────────────────────────────────────────────

    def watched(self, answers: Iterable[Answer]) -> frozenset[str]:
        """States that the drafters of some answers need from the next pass."""
        found: set[str] = set()
        for answer in answers:
            if answer.drafting is not None:
                found |= answer.drafting.source.states
        return frozenset(found)

    def keep_prompt_states(self, answer: Answer, start: int, chunk: Chunk) -> None:
        """Put by what a chunk of the prompt showed, until the prompt is in.

        Args:
            start: The chunk's first row.
        """
        one = answer.drafting
        if one is not None and one.session is None and one.source.states and chunk.left is not None:
            states = {name: chunk.states[name] for name in one.source.states}
            one.prompt_states.append((chunk.left + start, states))

    # ── behind a pass ─────────────────────────────────────────────────────────────────────────────────────────────────

    def finish(self, rounds: Sequence[Round], logits: Tensor) -> None:
        """Tell drafters what came of a pass. Answers that are over draft no more."""
        groups: dict[Source, list[Round]] = {}
        for one in rounds:
            if one.answer.drafting is not None and one.said:
                groups.setdefault(one.answer.drafting.source, []).append(one)
        start = self.clock()
        for source, group in groups.items():
            try:
                self._observe(source, group, logits)
            except Exception as error:
                self._fail(source, [one.answer for one in group], error)
        self.stats.draft_s += self.clock() - start

    def _observe(self, source: Source, rounds: Sequence[Round], logits: Tensor) -> None:
        start = self.clock()
        for one in rounds:
            drafting = one.answer.drafting
            assert drafting is not None
            source.controller.learn(drafting.tracked, one.walk.draft, one.said)
        seen = [_observation(one, source, logits) for one in rounds]
        for one in rounds:
            drafting = one.answer.drafting
            assert drafting is not None
            if drafting.session is None:
                job = one.answer.job
                drafting.session = source.loaded.open(job.prompt, private=bool(job.request.cache_salt))
                drafting.prompt_states = []
        source.loaded.observe([one.answer.drafting.session for one in rounds], seen)  # type: ignore[union-attr]
        source.controller.spent(self.clock() - start, len(rounds))

    def count(self, one: Round) -> None:
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

    def close(self, answer: Answer) -> None:
        """The answer drafts no more."""
        drafting, answer.drafting = answer.drafting, None
        answer.draft = NO_DRAFT
        if drafting is None or drafting.session is None:
            return
        try:
            drafting.source.loaded.close(drafting.session)
        except Exception:
            log.exception("a drafter failed to close a session: drafter=%s", drafting.source.spec)
            self.stats.num_faults += 1


def _budget(answer: Answer) -> DraftBudget:
    assert answer.drafting is not None
    most, rule, position = answer.drafting.max_tokens, answer.sampler.rule, answer.output.position
    return DraftBudget(
        max_tokens=most,
        max_depth=min(most, answer.output.num_left - 1),
        temperature=rule.temperature,
        key=(rule.seed, answer.sampler.choice, position),
    )


def _observation(one: Round, source: Source, logits: Tensor) -> Observation:
    answer, walk = one.answer, one.walk
    assert answer.drafting is not None
    observation = Observation(
        token_ids=tuple(one.said),
        num_drafted=walk.draft.num_tokens,
        num_accepted=walk.num_accepted,
        is_prompt=answer.drafting.session is None,
    )
    if source.states:
        observation = _with_states(observation, one, source.states)
    return _with_tops(observation, one, logits, source.num_top) if source.num_top else observation


def _with_states(observation: Observation, one: Round, names: frozenset[str]) -> Observation:
    drafting, path = one.answer.drafting, one.walk.path
    assert drafting is not None
    if observation.is_prompt and (parts := drafting.prompt_states):
        rows = torch.cat([rows for rows, _ in parts])
        return replace(
            observation, rows=rows, hidden={name: torch.cat([states[name] for _, states in parts]) for name in names}
        )
    stop = one.answer.num_rows - 1  # the newest token's row has been through no pass
    rows = torch.arange(stop - len(path), stop)
    return replace(observation, rows=rows, hidden={name: one.states[name][path] for name in names})


def _with_tops(observation: Observation, one: Round, logits: Tensor, num_top: int) -> Observation:
    """The largest logits of every verified row, those on the accepted path last."""
    draft, path = one.walk.draft, one.walk.path
    order = [row for row in range(draft.num_tokens + 1) if row not in path] + path
    tokens = (one.root, *draft.token_ids)
    rows = logits[[one.first + row for row in order]]
    return replace(
        observation,
        row_token_ids=tuple(tokens[row] for row in order),
        row_top_ids=rows.topk(min(num_top, rows.shape[1])).indices,
    )


def target_of(family: Any) -> DraftTarget:
    """What drafters may know of a model."""
    language = family.language
    return DraftTarget(
        name=str(family.folder),
        vocab_size=language.vocab_size,
        hidden_size=language.head_weight.shape[1],
        num_layers=language.num_layers,
        device=language.device,
        dtype=language.dtype,
        embed=language.embed,
        head_weight=language.head_weight,
        placeholder_ids=family.placeholder_ids,
    )
