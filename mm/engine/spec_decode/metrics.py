"""What speculative decoding counts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(kw_only=True)
class SpecDecodeStats:
    """What drafting has done so far.

    Attributes:
        num_drafts: Drafts that were verified.
        num_draft_tokens: Their tokens.
        num_accepted_tokens: Those of them that were right. The bonus token of a step is not counted.
        num_accepted_per_position: The same, at each depth of a draft.
        num_target_steps: Times that a step gave a sequence tokens, with or without a draft.
        num_emitted_tokens: These tokens.
        num_faults: Calls of a drafter that failed.
        draft_s: Seconds in drafters, which propose and observe.
        verify_s: Seconds in steps that verified drafts, from the first layer to the last sampled token.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_per_position: list[int] = field(default_factory=list[int])
    num_target_steps: int = 0
    num_emitted_tokens: int = 0
    num_faults: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that a step with a draft gave, its bonus token included."""
        return 1 + self.num_accepted_tokens / max(1, self.num_drafts)

    @property
    def tokens_per_target_step(self) -> float:
        """Tokens that a step gave a sequence, with or without a draft. It predicts the speed-up."""
        return self.num_emitted_tokens / max(1, self.num_target_steps)

    @property
    def acceptance_rate(self) -> float:
        """Accepted tokens / draft tokens."""
        return self.num_accepted_tokens / max(1, self.num_draft_tokens)

    def record(self, num_emitted: int, num_draft_tokens: int, num_accepted: int) -> None:
        """Count what a step gave one sequence.

        Args:
            num_draft_tokens: 0 where there was no draft.
        """
        self.num_emitted_tokens += num_emitted
        self.num_target_steps += 1
        if not num_draft_tokens:
            return
        self.num_drafts += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted
        for position in range(num_accepted):
            self.num_accepted_per_position[position] += 1

    def copy(self) -> SpecDecodeStats:
        return replace(self, num_accepted_per_position=list(self.num_accepted_per_position))
