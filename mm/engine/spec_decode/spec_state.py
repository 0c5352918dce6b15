"""What speculative decoding keeps of one sequence: its drafter, its draft, and hidden states not yet observed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mm.engine.spec_decode.controller import ControlState
from mm.engine.spec_decode.drafter_instance import DrafterInstance
from mm.engine.spec_decode.hidden_state_cache import CapturedStates
from mm.plugins.drafter import NO_DRAFT, Draft


@dataclass(eq=False)
class SpecState:
    """Everything that speculative decoding keeps of one sequence.

    Attributes:
        drafter: The drafter that serves the sequence.
        max_draft_tokens: Longest draft that its request allows.
        control: How often it gets a draft; None until drafting for it has started.
        session: The drafter's own state; None until the drafter has observed something.
        draft: What the next step verifies.
        num_observed: Output tokens that the session has observed.
        captured: Hidden states that the drafter has not observed yet, in order of their tokens.
    """

    drafter: DrafterInstance
    max_draft_tokens: int
    control: ControlState | None = None
    session: object | None = None
    draft: Draft = NO_DRAFT
    num_observed: int = 0
    captured: list[CapturedStates] = field(default_factory=list[CapturedStates])

    @property
    def states_to_capture(self) -> frozenset[str]:
        """Names of the hidden states that the next step has to capture for this sequence."""
        needed = self.drafter.states
        return needed if needed and self.control is not None and self.control.is_due_soon else frozenset()

    def keep(self, tokens: Tensor, states: Mapping[str, Tensor]) -> None:
        """Keep hidden states for the drafter.

        Args:
            tokens: (k,) indices of the tokens in the sequence. Nothing is kept if they do not follow what is kept.
            states: Name of the state to (k, D).
        """
        if self.captured and self.captured[-1].last >= int(tokens[0]):
            return
        if self.drafter.states <= states.keys():
            self.captured.append(CapturedStates(tokens, {name: states[name] for name in self.drafter.states}))

    def keep_prompt(self, start: int, tokens: Tensor, states: Mapping[str, Tensor]) -> None:
        """Keep the hidden states of a chunk of the prompt.

        Args:
            start: Index of the chunk's first token in the sequence.
            tokens: (k,) the chunk's tokens that reducers left, counted from `start`.
            states: Name of the state to (k, D).
        """
        with self.drafter.charged():
            if self.captured and self.captured[-1].last >= start:
                self.captured = []  # the sequence was preempted, and its prompt is computed again
            self.keep(tokens + start, states)

    def forget(self, num_prompt_tokens: int) -> None:
        """Drop what was captured. Before the first session the prompt's states stay: the session begins with them."""
        has_session = self.session is not None
        self.captured = [] if has_session else [one for one in self.captured if one.first < num_prompt_tokens]

    def take(self, stop: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Remove and return captured tokens (k,) and their states (k, D) by name.

        Args:
            stop: Only those whose first token is below it; None takes all.
        """
        taken = [one for one in self.captured if stop is None or one.first < stop]
        self.captured = self.captured[len(taken) :]
        if not taken:
            return torch.zeros(0, dtype=torch.int64), {}
        names = self.drafter.states
        states = {name: torch.cat([part.states[name] for part in taken]) for name in names}
        return torch.cat([part.token_indices for part in taken]), states
