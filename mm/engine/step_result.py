"""What one step gives one sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from mm.engine.sequence import Sequence
from mm.engine.spec_decode.verifier import TreeVerification
from mm.engine.token_pruning import Candidates


@dataclass(eq=False)
class StepResult:
    """The tokens that a step gives one sequence: one, and more where a draft was right.

    Attributes:
        seq: The sequence.
        root_token_id: The token whose logits give the next one.
        first_row: Row of that token in the step's logits; the rows of its draft follow.
        verification: The way through the draft.
        states: Name of a captured hidden state to (1 + draft tokens, D).
        candidates: The root and its draft, where a reducer decides about generated tokens.
        emitted: Tokens that became part of the output.
    """

    seq: Sequence
    root_token_id: int
    first_row: int
    verification: TreeVerification
    states: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    candidates: Candidates | None = None
    emitted: list[int] = field(default_factory=list[int])
