"""Verification of drafts: chains and trees, greedy and sampled, whole batches.

A verification stands at one node of its draft. The logits at that node give the next token of the text, whatever was
drafted. That token is final and becomes part of the text at once. If a child of the node holds it, the verification
goes on at the child, whose logits are known already. Otherwise it is over. Penalties, grammars, stop strings and limits
therefore need no second implementation: they are applied at every node in the state that the text has there.

The token is sampled exactly as without speculative decoding, from the same distribution with the same noise (Daliri,
Musco and Suresh, arXiv:2408.07978). The text is the same token for token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mm.engine.sampling.sample import greedy, sample
from mm.engine.sampling.sampler import SampledToken, Sampler
from mm.errors import EngineError
from mm.plugins.drafter import NO_DRAFT, Draft


@dataclass
class TreeVerification:
    """The state of verifying one draft. Nodes are numbered as in `Draft`: 0 is the root, i + 1 is drafted token i.

    Attributes:
        row: The node where the verification stands.
        path: Nodes that gave a token, the root first.
        is_over: Whether no node is left to look at.
    """

    draft: Draft = NO_DRAFT
    row: int = 0
    path: list[int] = field(default_factory=lambda: [0])
    is_over: bool = False

    @property
    def num_accepted(self) -> int:
        return len(self.path) - 1

    def child_with(self, token_id: int) -> int | None:
        """The child of the current node that holds a token."""
        draft = self.draft
        return next((row for row in draft.children[self.row] if draft.token_ids[row - 1] == token_id), None)

    def follow(self, token_id: int) -> bool:
        """Go on at the child that holds the token. Whether there is one."""
        child = self.child_with(token_id)
        if child is None:
            self.is_over = True
        else:
            self.row = child
            self.path.append(child)
        return child is not None


class Rows:
    """The logits of a step, from which tokens are sampled node by node.

    Args:
        logits: (R, vocab).
    """

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits
        self._greedy: list[SampledToken | EngineError] | None = None

    def sample(
        self, rows: Sequence[int], samplers: Sequence[Sampler], positions: Sequence[int]
    ) -> list[SampledToken | EngineError]:
        """The next token at each of some rows. Where all are greedy, the whole step is computed once.

        Args:
            rows: (n,) indices into the logits.
            samplers: (n,).
            positions: (n,) how many tokens each text already has.
        """
        if all(sampler.is_greedy(position) for sampler, position in zip(samplers, positions, strict=True)):
            if self._greedy is None:
                self._greedy = greedy(self._logits)
            return [self._greedy[row] for row in rows]
        logits = self._logits
        return sample(logits if rows == list(range(len(logits))) else logits[rows], samplers, positions)
