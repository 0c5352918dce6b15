"""The gain budget: what drafting has gained so far, less what it has cost, at about one batch size.

A budget is counted in decode steps. A balance of 2 means that drafting has saved the time of two steps. The budget
bounds what drafting can lose: while it is open, sequences may start to draft; when the balance falls below
-MAX_DEFICIT, it closes, and no sequence starts. `EXPLORATION_SHARE` of a step is added at every step. A closed budget
therefore opens again when its balance is back at 0, and drafting is tried anew. A drafter that never pays costs about
that share of the time, and a drafter that begins to pay is noticed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mm.engine.spec_decode.cost_model import Median

EXPLORATION_SHARE = 0.01
"""Share of the time that may be lost in trying whether drafting pays. Every step adds it to the budget."""
INITIAL_BALANCE = 8.0
"""Balance of a new budget, in steps."""
MAX_DEFICIT = 2.0
"""The budget closes below a balance of -MAX_DEFICIT steps. This is what one trial may cost."""
MIN_BALANCE, MAX_BALANCE = -16.0, 32.0
"""Bounds of the balance, in steps. They keep the past, good or bad, from deciding for long."""


@dataclass
class GainBudget:
    """Gains and costs of drafting at about one batch size.

    Attributes:
        balance: Gains less costs, in decode steps.
        is_open: Whether sequences may start to draft.
        speedup: Running mean of the speed-up that the drafts of all sequences promised. New sequences start with it.
        propose_s: Seconds per sequence to propose a draft and to select from it.
        observe_s: Seconds per sequence to observe a step.
    """

    balance: float = INITIAL_BALANCE
    is_open: bool = True
    speedup: float = 1.1
    propose_s: Median = field(default_factory=Median)
    observe_s: Median = field(default_factory=Median)

    def add(self, steps: float) -> None:
        """Add a gain, or a cost below zero, in decode steps. Opens or closes the budget."""
        self.balance = max(MIN_BALANCE, min(MAX_BALANCE, self.balance + steps))
        self.is_open = self.balance >= (-MAX_DEFICIT if self.is_open else 0.0)

    @property
    def draft_s(self) -> float:
        """Seconds to draft once for a sequence: to propose and to observe. The first draft may take longer."""
        return self.propose_s.value + self.observe_s.value
