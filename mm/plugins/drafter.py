"""Speculation: what drafters propose, what they observe, and what they promise.

A drafter is a plugin in three stages, so that each thing lives as long as it should:

    drafter = create("drafter", "copy", min_match=3)     # immutable options, shared by everyone
    loaded = drafter.load(target)                        # weights and tables, one per engine
    session = loaded.open(prompt, private=False)         # what it knows of one answer

    drafts = loaded.propose(sessions, budgets)           # before a pass, for all answers that may draft
    loaded.observe(sessions, observations)               # after it, for answers that are asked for a draft next

The target checks a draft in the pass that would have made one token. Row 0 of that pass is the *root*, the newest
token of the answer; row i + 1 is drafted token i. So a round gives at least one token, and however bad a draft is, it
costs time and changes nothing. Sessions see tensors and token ids, never a model class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from mm.data.tokens import Prompt
from mm.errors import DrafterFault


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A tree of tokens below the root; a chain is a tree with one child each. May be empty.

    Attributes:
        token_ids: (n,) parents before children, siblings in the order in which they are tried. Number the most
            probable path 1, 2, ... and accepting it moves nothing in the cache.
        parents: (n,) row of the parent: 0 is the root, i + 1 is drafted token i.
        path_scores: (n,) estimated probability that a node is reached; lets an engine cut where it pays least.
        source: Which of several drafters this came from, for figures.
    """

    token_ids: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    path_scores: tuple[float, ...] | None = None
    source: str = ""

    @classmethod
    def chain(cls, token_ids: Sequence[int], **more: Any) -> Draft:
        return cls(token_ids=tuple(token_ids), parents=tuple(range(len(token_ids))), **more)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """(n + 1,) of each row, the root's 0."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(len(self.parents)))

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """(n + 1,) rows below each row, in the order in which they are tried."""
        children: list[list[int]] = [[] for _ in range(self.num_tokens + 1)]
        for i, parent in enumerate(self.parents):
            children[parent].append(i + 1)
        return tuple(map(tuple, children))

    def mask(self) -> Tensor:
        """(n + 1, n + 1) bool: row i sees row j where j is i itself or an ancestor of it."""
        mask = torch.eye(self.num_tokens + 1, dtype=torch.bool)
        for i, parent in enumerate(self.parents):
            mask[i + 1] |= mask[parent]
        return mask

    def cut(self, num_tokens: int) -> Draft:
        """The first `num_tokens` nodes: parents come first, so what is left is a tree."""
        if num_tokens >= self.num_tokens:
            return self
        return Draft(
            token_ids=self.token_ids[:num_tokens],
            parents=self.parents[:num_tokens],
            path_scores=None if self.path_scores is None else self.path_scores[:num_tokens],
            source=self.source,
        )

    def check(self, vocab: int, budget: DraftBudget) -> None:
        """Refuse what cannot be verified.

        Raises:
            DrafterFault: Names what is wrong.
        """
        if len(self.parents) != len(self.token_ids):
            raise DrafterFault(self.source, f"gave {len(self.token_ids)} tokens with {len(self.parents)} parents")
        if any(not 0 <= parent <= i for i, parent in enumerate(self.parents)):
            raise DrafterFault(self.source, f"gave parents {self.parents}, which do not come before their children")
        if any(not 0 <= token < vocab for token in self.token_ids):
            raise DrafterFault(self.source, f"gave a token outside of the vocabulary of {vocab}")
        if self.num_tokens > budget.max_tokens or max(self.depths) > budget.max_depth:
            allowed = f"{budget.max_tokens} tokens in {budget.max_depth} levels"
            raise DrafterFault(
                self.source, f"gave {self.num_tokens} in {max(self.depths)} where it was allowed {allowed}"
            )
        siblings = [tuple(self.token_ids[row - 1] for row in rows) for rows in self.children]
        if any(len(set(tokens)) < len(tokens) for tokens in siblings):
            raise DrafterFault(self.source, "gave siblings of the same token")


NO_DRAFT = Draft()


@dataclass(frozen=True, kw_only=True)
class DraftBudget:
    """What one proposal may be.

    Attributes:
        max_tokens: Nodes; 0 asks for an empty draft.
        max_depth: Levels below the root.
        temperature: Of the answer; 0 is greedy.
        key: (seed, choice, position of the next token): the verifier draws the token at depth d with the noise of
            (seed, choice, position + d - 1), see `mm.engine.sampling.noise`. A draft may use that very noise.
    """

    max_tokens: int
    max_depth: int
    temperature: float = 0.0
    key: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What one answer learned since it was observed before: first from its prompt, then from passes that gave tokens.

    An answer that is not asked for drafts is not observed; one observation then tells of several passes. Of those in
    between there may be no states, since keeping them costs time.

    The *rows* of an answer are its prompt's, then one per token of the answer, without the newest: that is the root
    of the next round and has been through no pass yet. Row r is followed by the token of row r + 1; together they are
    what a feature drafter is fed. Its rotary position is `prompt.positions[:, r]`, after the prompt
    `prompt.next_position + r - prompt.length`.

    Attributes:
        token_ids: (k,) tokens that became part of the answer, in order; the last one is the new root.
        rows: (r,) int64, ascending: rows whose states are in `hidden`; the last one gave `token_ids[-1]`. After the
            prompt: its rows, without those that the prefix cache held or that a reducer dropped inside the decoder.
            Later: the rows that gave `token_ids`, the last of them at least. Empty when the drafter needs no states.
        hidden: State name, as in `Drafter.needs`, to (r, D).
        row_token_ids: (n + 1,) tokens of the newest pass's rows, the rejected ones too: first the rows off the accepted
            path, in order, then those on it, so that what came last is true.
        row_top_ids: (n + 1, k) int64, the ids of their largest logits in descending order; None unless needed.
        num_drafted, num_accepted: In the newest pass: tokens of the draft that was verified, and those of
            them that were right.
        is_prompt: Whether the prompt has just gone in.
    """

    token_ids: tuple[int, ...]
    rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    hidden: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    row_token_ids: tuple[int, ...] = ()
    row_top_ids: Tensor | None = None
    num_drafted: int = 0
    num_accepted: int = 0
    is_prompt: bool = False


@dataclass(frozen=True, kw_only=True)
class DraftTarget:
    """The model that drafts are for, as far as drafters may know it.

    Attributes:
        name: The checkpoint's folder, in which trained weights are found.
        embed: (n,) token ids to (n, D), the target's own table.
        head_weight: (vocab, D): logits are its product with the state "last_hidden".
        placeholder_ids: Tokens that stand for media in a prompt; never to be proposed.
    """

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    device: torch.device
    dtype: torch.dtype
    embed: Callable[[Tensor], Tensor]
    head_weight: Tensor
    placeholder_ids: frozenset[int] = frozenset()


class LoadedDrafter(Protocol):
    """A drafter with its weights and tables, for one engine, whose thread is the only one that calls it."""

    def open(self, prompt: Prompt, *, private: bool = False) -> Any:
        """A session for one answer to `prompt`. `observe` follows once the prompt is in.

        Args:
            private: The answer may neither read from nor leave traces in what answers share.
        """
        ...

    def propose(self, sessions: Sequence[Any], budgets: Sequence[DraftBudget]) -> list[Draft]:
        """A draft for each, from what was observed so far. Changes nothing that a later answer could notice."""
        ...

    def observe(self, sessions: Sequence[Any], seen: Sequence[Observation]) -> None:
        """Take note, for each session, of what its answer was given since it was observed before."""
        ...

    def close(self, session: Any) -> None:
        """The answer is over or was given up."""
        ...


class Drafter(Protocol):
    """A plugin that proposes tokens ahead of the decoder. Immutable; options are its dataclass fields.

    Attributes:
        needs: What observations have to hold beside tokens: "last_hidden" (the state after the final norm, from which
            the head makes logits), "hidden:3" (the input of decoder layer 3, counted from 0), "top_ids:8" (the ids of
            each verified row's 8 largest logits).
            One whose weights decide says it when it is loaded, by an attribute `needs` of what `load` gives.
        trained: Whether it has weights that belong to one target.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def trained(self) -> bool: ...

    def load(self, target: DraftTarget) -> LoadedDrafter:
        """Make ready for a target.

        Raises:
            IncompatiblePlugin: It cannot draft for this model.
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
