"""What drafters are told of an answer: its tokens, and the states of the rows that they were not told of yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mm.engine.sequence import Sequence
from mm.engine.spec_decode.controller import ControlState
from mm.engine.spec_decode.drafter_instance import DrafterInstance
from mm.engine.spec_decode.hidden_state_cache import Kept
from mm.engine.spec_decode.verifier import TreeVerification
from mm.plugins.drafter import Observation


@dataclass(eq=False)
class SpecState:
    """One answer's part in speculation.

    Attributes:
        tracked: Since its first pass.
        session: Since something was observed.
        num_seen: Tokens of the answer that the session was told.
        kept: What passes showed since something was observed; of the prompt, chunk by chunk.
    """

    source: DrafterInstance
    max_tokens: int
    tracked: ControlState | None = None
    session: Any = None
    num_seen: int = 0
    kept: list[Kept] = field(default_factory=list)

    def keep(self, rows: Tensor, states: Mapping[str, Tensor]) -> None:
        """Put by the states of some rows that the drafter needs, those behind what is there already."""
        if self.kept and int(self.kept[-1][0][-1]) >= int(rows[0]):
            return
        if self.source.states <= states.keys():
            self.kept.append((rows, {name: states[name] for name in self.source.states}))

    def forget(self, prompt_length: int) -> None:
        """Let go of what passes showed; of what the prompt's showed not before a session was told."""
        told = self.session is not None
        self.kept = [] if told else [one for one in self.kept if int(one[0][0]) < prompt_length]

    def take(self, stop: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Rows below `stop` that were put by, and their states; they are put by no more."""
        taken = [one for one in self.kept if stop is None or int(one[0][0]) < stop]
        self.kept = self.kept[len(taken) :]
        if not taken:
            return torch.zeros(0, dtype=torch.int64), {}
        names = self.source.states
        return torch.cat([rows for rows, _ in taken]), {name: torch.cat([s[name] for _, s in taken]) for name in names}


@dataclass(eq=False)
class StepResult:
    """What a pass gives one answer.

    Attributes:
        root: The token that stands in its first row.
        first: That row in the pass's logits, which gives the next token; those of its draft follow.
        states: State name to (1 + drafted tokens, D) of these rows.
        said: Tokens that became part of the answer.
    """

    answer: Sequence
    root: int
    first: int
    walk: TreeVerification
    states: Mapping[str, Tensor] = field(default_factory=dict)
    said: list[int] = field(default_factory=list)


def parts_of(answer: Sequence) -> tuple[SpecState, ControlState]:
    """Of an answer that drafts."""
    assert answer.drafting is not None
    assert answer.drafting.tracked is not None
    return answer.drafting, answer.drafting.tracked


def prompt_seen(answer: Sequence) -> Observation:
    """Of an answer that has gone on without being observed: its prompt and first token."""
    drafting, _ = parts_of(answer)
    rows, hidden = drafting.take(stop=answer.job.prompt.length)
    drafting.num_seen = 1
    return Observation(token_ids=tuple(answer.output.token_ids[:1]), rows=rows, hidden=hidden, is_prompt=True)


def observation(one: StepResult, source: DrafterInstance, logits: Tensor) -> Observation:
    """Of an answer that a pass gave tokens: these, and what was kept since its drafter was told of the last ones."""
    drafting, _ = parts_of(one.answer)
    token_ids = one.answer.output.token_ids
    rows, hidden = drafting.take()
    seen = Observation(
        token_ids=tuple(token_ids[drafting.num_seen :]),
        rows=rows,
        hidden=hidden,
        num_drafted=one.walk.draft.num_tokens,
        num_accepted=one.walk.num_accepted,
        is_prompt=not drafting.num_seen,
    )
    drafting.num_seen = len(token_ids)
    return _with_tops(seen, one, logits, source.num_top) if source.num_top else seen


def _with_tops(seen: Observation, one: StepResult, logits: Tensor, num_top: int) -> Observation:
    """The largest logits of every verified row, those on the accepted path last."""
    draft, path = one.walk.draft, one.walk.path
    order = [row for row in range(draft.num_tokens + 1) if row not in path] + path
    tokens = (one.root, *draft.token_ids)
    rows = logits[[one.first + row for row in order]]
    return replace(
        seen,
        row_token_ids=tuple(tokens[row] for row in order),
        row_top_ids=rows.topk(min(num_top, rows.shape[1])).indices,
    )
