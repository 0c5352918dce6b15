"""Verification of drafts: chains and trees, greedy and sampled, whole batches.

A verification stands at one node of its draft. The logits at that node give the next token of the sequence, whatever
was drafted. That token is final and is emitted at once. If a child of the node holds the token, the verification goes
on at the child, whose logits are known already. Otherwise it is over. Penalties, grammars, stop strings and limits
therefore need no second implementation: at every node they are applied in the state that the sequence has there.

The token is sampled exactly as without speculative decoding, from the same distribution with the same noise (Daliri,
Musco and Suresh, arXiv:2408.07978). The emitted tokens are the same, one by one.
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
        draft: The draft; without one there is only the root.
        node: The node at which the verification stands.
        path: Nodes that gave a token, the root first.
        is_over: Whether the draft did not have the last token.
    """

    draft: Draft = NO_DRAFT
    node: int = 0
    path: list[int] = field(default_factory=lambda: [0])
    is_over: bool = False

    @property
    def num_accepted(self) -> int:
        """Draft tokens that were accepted."""
        return len(self.path) - 1

    def child_with(self, token_id: int) -> int | None:
        """The child of the current node that holds a token."""
        draft = self.draft
        return next((child for child in draft.children[self.node] if draft.token_ids[child - 1] == token_id), None)

    def follow(self, token_id: int) -> bool:
        """Go on at the child that holds the token. Returns whether there is one."""
        child = self.child_with(token_id)
        if child is None:
            self.is_over = True
        else:
            self.node = child
            self.path.append(child)
        return child is not None


class StepLogits:
    """The logits of a step, from which tokens are sampled node by node.

    Args:
        logits: (n, vocab).
    """

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits
        self._greedy: list[SampledToken | EngineError] | None = None

    def sample(
        self, indices: Sequence[int], samplers: Sequence[Sampler], positions: Sequence[int]
    ) -> list[SampledToken | EngineError]:
        """Sample the next token of some nodes. Where all samplers are greedy, the whole step is computed once.

        Args:
            indices: (k,) indices of the nodes into the logits.
            samplers: (k,) one for each node.
            positions: (k,) how many tokens each sequence has emitted.
        """
        if all(sampler.is_greedy(position) for sampler, position in zip(samplers, positions, strict=True)):
            if self._greedy is None:
                self._greedy = greedy(self._logits)
            return [self._greedy[index] for index in indices]
        logits = self._logits
        is_whole = indices == list(range(len(logits)))
        return sample(logits if is_whole else logits[indices], samplers, positions)
