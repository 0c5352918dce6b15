"""Which of the drafted tokens the target says itself: one walk for chains and trees, greedy and sampled, whole batches.

A walk stands at one row of its draft. The row's logits give the next token of the answer, whatever was drafted: that
token is final, and it becomes part of the answer at once. If a child of the row holds it, the walk goes on there with
logits that are at hand already; otherwise the walk is over. So penalties, grammars, stop strings and limits need no
second implementation: at every row they are asked in the state that the answer is in there.

For point drafts the token is drawn exactly as without drafting, from the same law with the same noise (the draw-first
rule; Daliri, Musco and Suresh, arXiv:2408.07978), so the answer is the same token for token. For drafts that were drawn
from a law the children are tried in order (Leviathan et al., arXiv:2211.17192; SpecInfer; without replacement: RSD,
arXiv:2402.14160), which is right in law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mm.engine.sampling.sampler import SampledToken, Sampler, choose, greedy, told
from mm.errors import EngineError
from mm.plugins.drafter import NO_DRAFT, Draft, ProposalKind

NO_MASS = 1e-9
"""A rest of less probability than this is rounding: the draft had the target's own law."""


@dataclass
class TreeVerification:
    """One answer's way down its draft.

    Attributes:
        row: Where it stands; 0 is the root.
        path: Rows that gave a token, the root first.
        is_over: Whether no row is left to look at.
    """

    draft: Draft = NO_DRAFT
    row: int = 0
    path: list[int] = field(default_factory=lambda: [0])
    is_over: bool = False

    @property
    def num_accepted(self) -> int:
        return len(self.path) - 1

    @property
    def tries_children(self) -> bool:
        """Whether the next token is drawn child by child, and not first and looked for then."""
        return self.draft.kind is not ProposalKind.POINT and bool(self.draft.children[self.row])

    def child_with(self, token_id: int) -> int | None:
        """The row below that holds a token; of siblings with the same one, the first."""
        draft = self.draft
        return next((row for row in draft.children[self.row] if draft.token_ids[row - 1] == token_id), None)

    def follow(self, token_id: int) -> bool:
        """Go on to the child that holds the token; whether there is one."""
        child = self.child_with(token_id)
        if child is None:
            self.is_over = True
        else:
            self.row = child
            self.path.append(child)
        return child is not None


class Rows:
    """Logits of a pass, from which answers draw one row after the other.

    Args:
        logits: (R, vocab).
    """

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits
        self._likeliest: list[SampledToken | EngineError] | None = None

    def draw(
        self,
        rows: Sequence[int],
        walks: Sequence[TreeVerification],
        samplers: Sequence[Sampler],
        positions: Sequence[int],
    ) -> list[SampledToken | EngineError]:
        """As the function, of these rows; where all are greedy, every row of the pass is looked at once."""
        pairs = zip(samplers, positions, strict=True)
        if all(sampler.is_plain(position) for sampler, position in pairs) and not any(w.tries_children for w in walks):
            if self._likeliest is None:
                self._likeliest = greedy(self._logits)
            return [self._likeliest[row] for row in rows]
        logits = self._logits
        return draw(logits if rows == list(range(len(logits))) else logits[rows], walks, samplers, positions)


def draw(
    logits: Tensor, walks: Sequence[TreeVerification], samplers: Sequence[Sampler], positions: Sequence[int]
) -> list[SampledToken | EngineError]:
    """The next token of each answer, at the row where its walk stands.

    Args:
        logits: (n, vocab) of these rows.
        positions: (n,) how many tokens each answer has.
    """
    tried = [i for i, walk in enumerate(walks) if walk.tries_children]
    if not tried:
        return choose(logits, samplers, positions)
    found: dict[int, SampledToken | EngineError] = {}
    rest = [i for i in range(len(walks)) if i not in set(tried)]
    if rest:
        chosen = choose(logits[rest], [samplers[i] for i in rest], [positions[i] for i in rest])
        found |= zip(rest, chosen, strict=True)
    for i in tried:
        found[i] = _try(logits[i], walks[i], samplers[i], positions[i])
    return [found[i] for i in range(len(walks))]


def _try(logits: Tensor, walk: TreeVerification, sampler: Sampler, position: int) -> SampledToken | EngineError:
    """The token that trying the children of a row gives."""
    draft = walk.draft
    assert draft.draft_probs is not None
    try:
        law = sampler.law(logits, position).double().exp()
    except EngineError as error:
        return error
    tokens = [draft.token_ids[row - 1] for row in draft.children[walk.row]]
    draft_law = draft.draft_probs[walk.row].to(law)
    accepted, rest = try_children(law, draft_law, tokens, draft.kind, sampler.uniforms(position, len(tokens)))
    if accepted is None:
        token = int((rest.log() + sampler.noise(position, len(rest), rest.device)).argmax())
    else:
        token = tokens[accepted]
    return told(logits, token, sampler.rule.num_logprobs)


def try_children(
    target_probs: Tensor, draft_probs: Tensor, tokens: Sequence[int], kind: ProposalKind, uniforms: Sequence[float]
) -> tuple[int | None, Tensor]:
    """Which of the tokens drawn from `draft_probs` is taken, and the law that is left when none is.

    A token is taken when its uniform number is below target / draft; after a refusal the target's law is what it has
    above the draft's, renormalised. Without replacement the refused token then leaves the draft's law.

    Args:
        target_probs, draft_probs: (vocab,) float64.
        uniforms: One in [0, 1) per token.
    """
    rest, law = target_probs, draft_probs
    for i, (token, uniform) in enumerate(zip(tokens, uniforms, strict=True)):
        if uniform * float(law[token]) < float(rest[token]):
            return i, rest
        above = (rest - law).clamp_(min=0)
        mass = float(above.sum())
        if mass < NO_MASS:
            return i, rest
        rest = above / mass
        if kind is ProposalKind.WITHOUT_REPLACEMENT and i + 1 < len(tokens):
            law = law.clone()
            law[token] = 0
            law = law / law.sum()
    return None, rest
