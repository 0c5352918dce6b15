"""What a trained drafter guesses behind an answer's newest row: chains, trees, or all levels from one pass."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mm.data.tokens import Prompt
from mm.engine.kv_cache.blocks import OutOfBlocks
from mm.engine.sampling.noise import gumbel, noise_key
from mm.engine.spec_decode.drafters.eagle.layer import DraftLayer
from mm.engine.spec_decode.drafters.eagle.tree import DynamicTree, ancestor_mask
from mm.plugins.drafter import Draft, DraftBudget, Observation


@dataclass(eq=False)
class EagleSession:
    """What the drafter knows of one answer.

    Attributes:
        slot: In the drafter's cache; None once the session is silent.
        pending: What was observed since the last draft.
        told: (D,), what the last item tells the rows behind it; None for nothing.
        output: (D,), the layer's output on the newest row; None before the first draft.
        next_position: Of the token that is drafted first, less one: where its row would stand.
    """

    prompt: Prompt
    slot: int | None
    pending: list[Observation] = field(default_factory=list)
    item: int = -1
    told: Tensor | None = None
    output: Tensor | None = None
    next_position: int = 0


class Guesser:
    """Drafts for answers whose newest rows have been through the layer; leaves its cache as it was.

    Args:
        width: Children of a node and nodes of a level; 1 drafts chains.
        depth: Levels, at most.
        stop_below: Paths that are less probable than this are not drafted.
        barred: Tokens never to be proposed.
        source: The drafter's name.
    """

    def __init__(
        self, layer: DraftLayer, *, width: int, depth: int, stop_below: float, barred: frozenset[int], source: str
    ) -> None:
        self._layer, self._network = layer, layer.network
        self._width, self._depth, self._stop_below = width, depth, stop_below
        self._barred, self._source = barred, source
        self._device = layer.cache.shape.device

    def guess(self, sessions: Sequence[EagleSession], budgets: Sequence[DraftBudget]) -> list[Draft]:
        """A draft for each."""
        if not sessions:
            return []
        is_chain = self._width == 1
        if self._network.config.num_ahead > 1:
            return self._ahead_chains(sessions, budgets) if is_chain else self._ahead_trees(sessions, budgets)
        return self._chains(sessions, budgets) if is_chain else self._trees(sessions, budgets)

    def _chains(self, sessions: Sequence[EagleSession], budgets: Sequence[DraftBudget]) -> list[Draft]:
        tokens: list[list[int]] = [[] for _ in sessions]
        scores: list[list[float]] = [[] for _ in sessions]
        stable = [self._layer.length(_slot(session)) for session in sessions]
        limits = [min(self._depth, budget.max_depth, budget.max_tokens) for budget in budgets]
        alive, outputs = list(range(len(sessions))), _outputs(sessions)
        for level in range(max(limits)):
            laws = self._network.logits(outputs)
            chosen, probs = self._likeliest(laws, [budgets[i] for i in alive], [level] * len(alive))
            going = []
            for at, (i, token, prob) in enumerate(zip(alive, chosen, probs, strict=True)):
                score = prob * (scores[i][-1] if scores[i] else 1.0)
                if score < self._stop_below or token in self._barred:
                    continue
                tokens[i].append(token)
                scores[i].append(score)
                if level + 1 < limits[i] and self._has_room(sessions[i]):
                    going.append(at)
            if not going:
                break
            if len(going) < len(alive):
                alive, outputs = [alive[at] for at in going], outputs[going]
            outputs = self._next(outputs, [sessions[i] for i in alive], [tokens[i][-1] for i in alive], level)
        for session, length in zip(sessions, stable, strict=True):
            self._layer.shrink(_slot(session), length)
        return [Draft.chain(t, path_scores=tuple(s), source=self._source) for t, s in zip(tokens, scores, strict=True)]

    def _has_room(self, session: EagleSession) -> bool:
        try:
            self._layer.grow(_slot(session), 1)
        except OutOfBlocks:
            return False
        return True

    def _next(self, outputs: Tensor, sessions: Sequence[EagleSession], tokens: list[int], level: int) -> Tensor:
        """The layer's outputs (B, D) one row further, on its own outputs and the tokens drafted from them."""
        inputs = self._guessed(outputs, sessions, torch.tensor(tokens, device=outputs.device))
        places = torch.tensor([session.next_position + level for session in sessions], device=outputs.device)
        slots, every = [_slot(session) for session in sessions], torch.arange(len(tokens), device=outputs.device)
        return self._layer.run(inputs, places, slots, [1] * len(slots), every)

    def _guessed(self, outputs: Tensor, sessions: Sequence[EagleSession], tokens: Tensor) -> Tensor:
        told = None
        if any(session.told is not None for session in sessions):
            nothing = outputs.new_zeros(outputs.shape[1])
            told = torch.stack([nothing if session.told is None else session.told for session in sessions])
        return self._network.inputs(self._network.seeing.tell(outputs, told), tokens)

    def _likeliest(
        self, logits: Tensor, budgets: Sequence[DraftBudget], levels: Sequence[int]
    ) -> tuple[list[int], list[float]]:
        """A token for each row, and its probability: the likeliest, or at a temperature the one the noise picks.

        Args:
            budgets, levels: Of each row, and how many tokens are drafted before it.
        """
        laws = logits.float()
        if any(budget.temperature for budget in budgets):
            laws = laws.log_softmax(-1)
            warmth = torch.tensor([[budget.temperature or 1.0] for budget in budgets], device=laws.device)
            keys = [_key(budget, level) for budget, level in zip(budgets, levels, strict=True)]
            ids = self._network.token_ids(torch.arange(laws.shape[1], device=laws.device))
            noise = gumbel(torch.tensor(keys, device=laws.device).unsqueeze(1), ids.unsqueeze(0))
            is_drawn = torch.tensor([[budget.temperature > 0] for budget in budgets], device=laws.device)
            laws = laws / warmth
            at = torch.where(is_drawn, laws + noise, laws).argmax(-1)
            probs = laws.softmax(-1).gather(1, at.unsqueeze(1)).squeeze(1)
        else:
            probs, at = laws.softmax(-1).max(-1)
        return self._network.token_ids(at).tolist(), probs.tolist()

    def _best(self, logits: Tensor) -> tuple[list[list[int]], list[list[float]]]:
        """The `width` likeliest tokens of each row and their log-probabilities, best first."""
        logprobs, at = logits.float().log_softmax(-1).topk(min(self._width, logits.shape[-1]), dim=-1)
        return self._network.token_ids(at).tolist(), logprobs.tolist()

    def _trees(self, sessions: Sequence[EagleSession], budgets: Sequence[DraftBudget]) -> list[Draft]:
        trees = [DynamicTree(self._width) for _ in sessions]
        found = self._best(self._network.logits(_outputs(sessions)))
        for tree, tokens, logprobs in zip(trees, *found, strict=True):
            tree.begin(tokens, logprobs)
        grown = [_Grown(session, tree) for session, tree in zip(sessions, trees, strict=True)]
        limits = [min(self._depth, budget.max_depth, budget.max_tokens) for budget in budgets]
        for level in range(1, max(limits)):
            going = [g for g, limit in zip(grown, limits, strict=True) if level < limit and g.tree.frontier]
            if not going:
                break
            self._grow_level(going)
        return [self._cut(tree, budget.max_tokens) for tree, budget in zip(trees, budgets, strict=True)]

    def _grow_level(self, grown: list[_Grown]) -> None:
        """One level further for each tree: its frontier with all ancestors goes through the layer behind the answer."""
        inputs, places, slots, counts, masks, wanted, members = [], [], [], [], {}, [], []
        for one in grown:
            lineage = one.tree.lineage(one.tree.frontier)
            slot = _slot(one.session)
            try:
                self._layer.grow(slot, len(lineage))
            except OutOfBlocks:
                one.tree.frontier = []
                continue
            one.read(self, lineage)
            rank = {candidate: row for row, candidate in enumerate(lineage)}
            parents = [rank.get(one.tree.parents[candidate], -1) for candidate in lineage]
            masks[len(slots)] = torch.from_numpy(ancestor_mask(parents))
            first = sum(counts)
            wanted += [first + rank[candidate] for candidate in one.tree.frontier]
            inputs += [one.inputs[candidate] for candidate in lineage]
            places += [one.session.next_position + one.tree.depths[candidate] - 1 for candidate in lineage]
            slots.append(slot)
            counts.append(len(lineage))
            members.append(one)
        if not members:
            return
        device = self._device
        outputs = self._layer.run(
            torch.stack(inputs),
            torch.tensor(places, device=device),
            slots,
            counts,
            torch.tensor(wanted, device=device),
            masks,
        )
        for one, count in zip(members, counts, strict=True):
            self._layer.shrink(_slot(one.session), self._layer.length(_slot(one.session)) - count)
        tokens, logprobs = self._best(self._network.logits(outputs))
        at = 0
        for one in members:
            stop = at + len(one.tree.frontier)
            one.outputs |= zip(one.tree.frontier, outputs[at:stop].unbind(), strict=True)
            one.tree.extend(tokens[at:stop], logprobs[at:stop])
            at = stop

    def _ahead_laws(self, sessions: Sequence[EagleSession]) -> Tensor:
        """(B, num_ahead, vocab) logits of all levels from one pass: none depends on what was drafted before it."""
        return self._network.logits(self._network.guesses(_outputs(sessions)))

    def _ahead_chains(self, sessions: Sequence[EagleSession], budgets: Sequence[DraftBudget]) -> list[Draft]:
        laws = self._ahead_laws(sessions)
        limits = [min(self._depth, budget.max_depth, budget.max_tokens, laws.shape[1]) for budget in budgets]
        rows = torch.cat([one[:limit] for one, limit in zip(laws, limits, strict=True)])
        asked = [budget for budget, limit in zip(budgets, limits, strict=True) for _ in range(limit)]
        tokens, probs = self._likeliest(rows, asked, [level for limit in limits for level in range(limit)])
        parts = zip(itertools.accumulate(limits), limits, strict=True)
        return [self._cut_chain(tokens[stop - limit : stop], probs[stop - limit : stop]) for stop, limit in parts]

    def _cut_chain(self, chosen: Sequence[int], probs: Sequence[float]) -> Draft:
        """As far as a path is probable enough and holds nothing that stands for media."""
        tokens, scores, score = [], [], 1.0
        for token, prob in zip(chosen, probs, strict=True):
            score *= prob
            if score < self._stop_below or token in self._barred:
                break
            tokens.append(token)
            scores.append(score)
        return Draft.chain(tokens, path_scores=tuple(scores), source=self._source)

    def _ahead_trees(self, sessions: Sequence[EagleSession], budgets: Sequence[DraftBudget]) -> list[Draft]:
        drafts = []
        for laws, budget in zip(self._ahead_laws(sessions), budgets, strict=True):
            tree = DynamicTree(self._width)
            tokens, logprobs = self._best(laws[: min(self._depth, budget.max_depth)])
            tree.begin(tokens[0], logprobs[0])
            for level in range(1, len(tokens)):
                count = len(tree.frontier)
                tree.extend([tokens[level]] * count, [logprobs[level]] * count)
            drafts.append(self._cut(tree, budget.max_tokens))
        return drafts

    def _cut(self, tree: DynamicTree, max_tokens: int) -> Draft:
        """The best nodes of a tree, without those that stand for media or are too improbable."""
        tree.strike(self._barred)
        tokens, parents, scores = tree.best(max_tokens, self._stop_below)
        return Draft(token_ids=tuple(tokens), parents=tuple(parents), path_scores=tuple(scores), source=self._source)


@dataclass(eq=False)
class _Grown:
    """A tree on its way: what each candidate's row is made of, and what the layer gave for it."""

    session: EagleSession
    tree: DynamicTree
    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def read(self, owner: Guesser, candidates: Sequence[int]) -> None:
        """Make the rows that are not made yet."""
        new = [c for c in candidates if c not in self.inputs]
        if not new:
            return
        assert self.session.output is not None
        states = torch.stack([self.outputs.get(self.tree.parents[c], self.session.output) for c in new])
        ids = torch.tensor([self.tree.token_ids[c] for c in new], device=states.device)
        told = None if self.session.told is None else self.session.told.expand_as(states)
        rows = owner._network.inputs(owner._network.seeing.tell(states, told), ids)
        self.inputs |= zip(new, rows.unbind(), strict=True)


def _slot(session: EagleSession) -> int:
    assert session.slot is not None
    return session.slot


def _outputs(sessions: Sequence[EagleSession]) -> Tensor:
    return torch.stack([session.output for session in sessions if session.output is not None])


def _key(budget: DraftBudget, level: int) -> int:
    seed, choice, position = budget.key
    return noise_key(seed, choice, position + level)
