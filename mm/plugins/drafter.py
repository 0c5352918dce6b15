"""The interface of drafters: what they propose, what they observe, and what the engine expects of them.

A drafter is a plugin with three stages, one for each lifetime:

    drafter = create("drafter", "copy", min_match=3)     # immutable options, shared by all engines
    loaded = drafter.load(target)                        # weights and tables, one per engine
    session = loaded.open(prompt, private=False)         # the state of one sequence

    drafts = loaded.propose(sessions, budgets)           # before a step, for the sequences that may draft
    loaded.observe(sessions, observations)               # after it, for the sequences that draft next

The target verifies a draft in the step that would have made one token. The first token of that step is the *root*, the
newest token of the sequence. So every step gives at least one token. A bad draft costs time and changes no output.
Sessions see tensors and token ids, never a model class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mm.data.tokens import Prompt
from mm.errors import DrafterFault

SessionT = TypeVar("SessionT")
"""A drafter's own type for the state of one sequence. The engine passes sessions back and never looks into them."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A tree of tokens below the root. A chain is a tree in which each node has one child. A draft may be empty.

    Node 0 is the root, and node i + 1 is drafted token i.

    Attributes:
        token_ids: (n,) parents before children, and siblings in the order in which they are tried. The cache need not
            move anything if the most probable path comes first, as nodes 1, 2, ...
        parents: (n,) the parent node of each drafted token.
        path_scores: (n,) estimated probability that a node is accepted with all its ancestors. The engine uses it to
            shorten drafts. None where the drafter has no estimate.
        source: Name of the drafter, for metrics.
    """

    token_ids: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    path_scores: tuple[float, ...] | None = None
    source: str = ""

    @classmethod
    def chain(
        cls, token_ids: Sequence[int], *, path_scores: tuple[float, ...] | None = None, source: str = ""
    ) -> Draft:
        """A draft in which each token follows the one before it."""
        return cls(
            token_ids=tuple(token_ids), parents=tuple(range(len(token_ids))), path_scores=path_scores, source=source
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """(n + 1,) the depth of each node. The root has depth 0."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(len(self.parents)))

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """(n + 1,) the children of each node, in the order in which they are tried."""
        children: list[list[int]] = [[] for _ in range(self.num_tokens + 1)]
        for i, parent in enumerate(self.parents):
            children[parent].append(i + 1)
        return tuple(map(tuple, children))

    def mask(self) -> Tensor:
        """(n + 1, n + 1) bool: entry (i, j) is true where node j is node i or an ancestor of it."""
        mask = torch.eye(self.num_tokens + 1, dtype=torch.bool)
        for i, parent in enumerate(self.parents):
            mask[i + 1] |= mask[parent]
        return mask

    def cut(self, num_tokens: int) -> Draft:
        """The first `num_tokens` tokens. Parents come before children, so the result is a tree."""
        if num_tokens >= self.num_tokens:
            return self
        return Draft(
            token_ids=self.token_ids[:num_tokens],
            parents=self.parents[:num_tokens],
            path_scores=None if self.path_scores is None else self.path_scores[:num_tokens],
            source=self.source,
        )

    def first_path(self) -> Draft:
        """The chain from the root along the children that are tried first."""
        if self.is_chain:
            return self
        nodes = list[int]()
        while children := self.children[nodes[-1] if nodes else 0]:
            nodes.append(children[0])
        return Draft.chain(
            [self.token_ids[node - 1] for node in nodes],
            path_scores=None if self.path_scores is None else tuple(self.path_scores[node - 1] for node in nodes),
            source=self.source,
        )

    def check(self, vocab: int, budget: DraftBudget) -> None:
        """Check that the draft is a tree within its budget and the vocabulary.

        Raises:
            DrafterFault: It is not. The message names the reason.
        """
        if len(self.parents) != len(self.token_ids):
            raise DrafterFault(self.source, f"gave {len(self.token_ids)} tokens with {len(self.parents)} parents")
        if any(not 0 <= parent <= i for i, parent in enumerate(self.parents)):
            raise DrafterFault(self.source, f"gave parents {self.parents}, which do not come before their children")
        if any(not 0 <= token < vocab for token in self.token_ids):
            raise DrafterFault(self.source, f"gave a token outside of the vocabulary of {vocab}")
        if self.num_tokens > budget.max_tokens or max(self.depths) > budget.max_depth:
            raise DrafterFault(
                self.source,
                f"gave {self.num_tokens} tokens in {max(self.depths)} levels; its budget was {budget.max_tokens} "
                f"tokens in {budget.max_depth} levels",
            )
        siblings = [tuple(self.token_ids[node - 1] for node in nodes) for nodes in self.children]
        if any(len(set(tokens)) < len(tokens) for tokens in siblings):
            raise DrafterFault(self.source, "gave siblings with the same token")


NO_DRAFT = Draft()


@dataclass(frozen=True, kw_only=True)
class DraftBudget:
    """The limits of one draft, and how its sequence is sampled.

    Attributes:
        max_tokens: Most tokens. With 0, the draft has to be empty.
        max_depth: Most levels below the root.
        temperature: Temperature of the sequence; 0 is greedy.
        key: (seed, choice, position of the next token). The verifier samples the token at depth d with the noise of
            (seed, choice, position + d - 1), see `mm.engine.sampling.noise`. A drafter may use the same noise.
    """

    max_tokens: int
    max_depth: int
    temperature: float = 0.0
    key: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What happened to one sequence since its session observed something: its prompt first, then new tokens.

    A sequence that does not draft is not observed. So one observation may cover several steps. Hidden states of the
    steps in between may be missing, because capturing them costs time.

    Tokens are counted from the start of the sequence, the prompt included. The newest token is the next root: the
    target has not run it, so it has no state. Token t is followed by token t + 1; the state of the one and the id of
    the other are a feature drafter's input. The rotary position of token t is `prompt.positions[:, t]`. After the
    prompt it is `prompt.next_position + t - prompt.length`.

    Attributes:
        token_ids: (k,) new tokens in order. The last one is the new root.
        token_indices: (r,) int64, ascending: the tokens with states in `hidden`. The last one is the token before
            `token_ids[-1]`. After the prompt: its tokens, without those that came from the prefix cache or were pruned
            inside the decoder. Later: the tokens that `token_ids` were sampled from, or at least the last of them.
            Empty when the drafter needs no states.
        hidden: Name of a state, as in `Drafter.needs`, to (r, D).
        step_token_ids: (n + 1,) the tokens of the newest step, with the rejected ones. Tokens off the accepted path
            come first, then those on it. So the last entry for a token is the valid one.
        step_top_ids: (n + 1, k) int64, the ids of each such token's largest logits, in descending order. None unless
            the drafter needs them.
        num_drafted, num_accepted: How many drafted tokens the newest step verified, and how many it accepted.
        is_prompt: Whether this is the observation right after the prompt.
    """

    token_ids: tuple[int, ...]
    token_indices: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    hidden: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    step_token_ids: tuple[int, ...] = ()
    step_top_ids: Tensor | None = None
    num_drafted: int = 0
    num_accepted: int = 0
    is_prompt: bool = False


@dataclass(frozen=True, kw_only=True)
class DraftTarget:
    """The model that a drafter drafts for.

    Attributes:
        name: The checkpoint's folder. Trained drafters are looked up in it.
        embed: (n,) token ids to (n, D), the target's embedding table.
        head_weight: Gives the head, (vocab, D); the logits are its product with the state "last_hidden". Where the
            target's weights have 8 bits, each call makes it anew. So only a drafter that needs it should call it, once.
        placeholder_ids: Tokens that stand for media in a prompt. A drafter must not propose them.
        only_chains: Whether drafts are cut to their first path, because layers keep a state that cannot branch.
    """

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    device: torch.device
    dtype: torch.dtype
    embed: Callable[[Tensor], Tensor]
    head_weight: Callable[[], Tensor]
    placeholder_ids: frozenset[int] = frozenset()
    only_chains: bool = False


class LoadedDrafter(Protocol[SessionT]):
    """A drafter with its weights and tables, for one engine. Only the engine's thread calls it."""

    def open(self, prompt: Prompt, *, private: bool = False) -> SessionT:
        """A session for one sequence. `observe` is called once the prompt is computed.

        Args:
            private: The session must not read or write state that sequences share.
        """
        ...

    def propose(self, sessions: Sequence[SessionT], budgets: Sequence[DraftBudget]) -> list[Draft]:
        """One draft per session, from what it observed. Must not change what later sequences observe or get."""
        ...

    def observe(self, sessions: Sequence[SessionT], seen: Sequence[Observation]) -> None:
        """Take one observation per session."""
        ...

    def close(self, session: SessionT) -> None:
        """End a session: its sequence is finished or was aborted."""
        ...


class Drafter(Protocol):
    """A plugin that proposes tokens before the target computes them. It is immutable; its options are dataclass fields.

    Attributes:
        needs: What observations have to hold besides tokens. "last_hidden" is the state after the final norm, from
            which the head computes logits. "hidden:3" is the input of decoder layer 3, counted from 0. "top_ids:8" are
            the ids of the 8 largest logits of each verified token. A drafter whose needs depend on its weights gives
            them as the attribute `needs` of what `load` returns.
        trained: Whether it has weights that belong to one target.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def trained(self) -> bool: ...

    def load(self, target: DraftTarget) -> LoadedDrafter[Any]:
        """Load weights and tables for a target. Only what is returned knows the type of its sessions.

        Raises:
            IncompatiblePlugin: The drafter cannot draft for this model.
        """
        ...


__all__ = [
    "NO_DRAFT",
    "Draft",
    "DraftBudget",
    "DraftTarget",
    "Drafter",
    "LoadedDrafter",
    "Observation",
]
