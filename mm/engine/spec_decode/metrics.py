"""What speculative decoding counts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(kw_only=True)
class SpecDecodeStats:
    """What drafting has done so far.

    Attributes:
        num_drafts: Drafts that were verified.
        num_draft_tokens, num_accepted_tokens: Tokens of these, and those that were right; no bonus token is counted.
        num_accepted_per_position: At each depth of a draft.
        num_target_steps, num_emitted_tokens: Times that a pass gave an answer tokens, with or without a
            draft, and the tokens.
        num_faults: Calls of a drafter that failed.
        draft_s: Seconds in drafters: proposing and taking note.
        verify_s: Seconds in passes that verified drafts, and in the walks behind them.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_per_position: list[int] = field(default_factory=list)
    num_target_steps: int = 0
    num_emitted_tokens: int = 0
    num_faults: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that a pass with a draft gave, the bonus token included."""
        return 1 + self.num_accepted_tokens / max(1, self.num_drafts)

    @property
    def tokens_per_target_step(self) -> float:
        """Tokens that a pass gave an answer, with or without a draft: what predicts speed."""
        return self.num_emitted_tokens / max(1, self.num_target_steps)

    @property
    def acceptance_rate(self) -> float:
        return self.num_accepted_tokens / max(1, self.num_draft_tokens)

    def copy(self) -> SpecDecodeStats:
        return replace(self, num_accepted_per_position=list(self.num_accepted_per_position))
