"""Drafts of a trained drafter for the tokens after a sequence's newest one: chains, trees, or all levels at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mm.data.arrays import float_rows, floats, int_rows, ints, to_tensor
from mm.data.tokens import Prompt
from mm.engine.kv_cache.blocks import OutOfBlocks
from mm.engine.sampling.noise import gumbel, noise_key
from mm.engine.spec_decode.drafters.eagle.head import DraftHead
from mm.engine.spec_decode.drafters.eagle.layer import DraftLayer
from mm.engine.spec_decode.drafters.eagle.tree import DynamicTree, ancestor_mask
from mm.plugins.drafter import Draft, DraftBudget, Observation


@dataclass(eq=False)
class EagleSession:
    """The drafter's state of one sequence.

    Attributes:
        seq_index: Index in the drafter's cache. None once the session drafts no more.
        pending: Observations since the last draft.
        item: The last item of the prompt, and -1 without any.
        global_feature: (D,), conditions the text after the last item. None without one.
        output: (D,), the layer's output for the newest token. None before the first draft.
        next_position: The position of the next input: one before the position of the first drafted token.
    """

    prompt: Prompt
    seq_index: int | None
    pending: list[Observation] = field(default_factory=list[Observation])
    item: int = -1
    global_feature: Tensor | None = None
    output: Tensor | None = None
    next_position: int = 0


class TreeBuilder:
    """Drafts for sequences whose newest tokens are in the drafter's cache. The cache is the same afterwards.

    Args:
        width: Children of a node and nodes of a level. 1 drafts chains.
        depth: Largest number of levels.
        stop_below: Paths that are less probable than this are not drafted.
        excluded: Tokens that are never proposed.
        source: The drafter's name.
    """

    def __init__(
        self, layer: DraftLayer, *, width: int, depth: int, stop_below: float, excluded: frozenset[int], source: str
    ) -> None:
        self._layer, self._network = layer, layer.network
        self._width, self._depth, self._stop_below = width, depth, stop_below
        self._excluded, self._source = excluded, source
        self._device = layer.cache.shape.device

    def build(self, sessions: Sequence[EagleSession], budgets: Sequence[DraftBudget]) -> list[Draft]:
        """One draft per session."""
        if not sessions:
            return []
        is_chain = self._width == 1
        if self._network.config.num_ahead > 1:
            return self._ahead_chains(sessions, budgets) if is_chain else self._ahead_trees(sessions, budgets)
        return self._chains(sessions, budgets) if is_chain else self._trees(sessions, budgets)

    def _chains(self, sessions: Sequence[EagleSession], budgets: Sequence[DraftBudget]) -> list[Draft]:
        tokens: list[list[int]] = [[] for _ in sessions]
        scores: list[list[float]] = [[] for _ in sessions]
        lengths = [self._layer.length(_seq_index(session)) for session in sessions]
        limits = [min(self._depth, budget.max_depth, budget.max_tokens) for budget in budgets]
        alive, outputs = list(range(len(sessions))), _outputs(sessions)
        for level in range(max(limits)):
            logits = self._network.logits(outputs)
            chosen, probs = self._likeliest(logits, [budgets[i] for i in alive], [level] * len(alive))
            going: list[int] = []
            for at, (i, token, prob) in enumerate(zip(alive, chosen, probs, strict=True)):
                score = prob * (scores[i][-1] if scores[i] else 1.0)
                if score < self._stop_below or token in self._excluded:
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
        for session, length in zip(sessions, lengths, strict=True):
            self._layer.truncate(_seq_index(session), length)
        return [Draft.chain(t, path_scores=tuple(s), source=self._source) for t, s in zip(tokens, scores, strict=True)]

    def _has_room(self, session: EagleSession) -> bool:
        try:
            self._layer.append_slots(_seq_index(session), 1)
        except OutOfBlocks:
            return False
        return True

    def _next(self, outputs: Tensor, sessions: Sequence[EagleSession], tokens: list[int], level: int) -> Tensor:
        """The layer's outputs (B, D) for one more token each, from its own outputs and the tokens drafted from them."""
        inputs = self._inputs(outputs, sessions, torch.tensor(tokens, device=outputs.device))
        positions = torch.tensor([session.next_position + level for session in sessions], device=outputs.device)
        seqs, every = [_seq_index(session) for session in sessions], torch.arange(len(tokens), device=outputs.device)
        return self._layer.run(inputs, positions, seqs, [1] * len(seqs), every)

    def _inputs(self, outputs: Tensor, sessions: Sequence[EagleSession], tokens: Tensor) -> Tensor:
        found = [session.global_feature for session in sessions]
        global_feature = None
        if any(feature is not None for feature in found):
            nothing = outputs.new_zeros(outputs.shape[1])
            global_feature = torch.stack([nothing if feature is None else feature for feature in found])
        features = self._network.vision_adapter.condition(outputs, global_feature)
        return self._network.inputs(features, tokens)

    def _likeliest(
        self, logits: Tensor, budgets: Sequence[DraftBudget], levels: Sequence[int]
    ) -> tuple[list[int], list[float]]:
        """A token for each of n rows of logits, and its probability.

        The token is the most probable one, or at a temperature the one that the noise samples.

        Args:
            logits: (n, vocab).
            budgets, levels: (n,) the budget of each row, and how many tokens are drafted before it.
        """
        scores = logits.float()
        if any(budget.temperature for budget in budgets):
            scores = scores.log_softmax(-1)
            temperatures = torch.tensor([[budget.temperature or 1.0] for budget in budgets], device=scores.device)
            keys = [_key(budget, level) for budget, level in zip(budgets, levels, strict=True)]
            ids = self._network.token_ids(torch.arange(scores.shape[1], device=scores.device))
            noise = gumbel(torch.tensor(keys, device=scores.device).unsqueeze(1), ids.unsqueeze(0))
            is_sampled = torch.tensor([[budget.temperature > 0] for budget in budgets], device=scores.device)
            scores = scores / temperatures
            at = torch.where(is_sampled, scores + noise, scores).argmax(-1)
            probs = scores.softmax(-1).gather(1, at.unsqueeze(1)).squeeze(1)
        else:
            probs, at = scores.softmax(-1).max(-1)
        return ints(self._network.token_ids(at)), floats(probs)

    def _best(self, logits: Tensor) -> tuple[list[list[int]], list[list[float]]]:
        """The `width` most probable tokens of each row and their log-probabilities, best first."""
        logprobs, at = logits.float().log_softmax(-1).topk(min(self._width, logits.shape[-1]), dim=-1)
        return int_rows(self._network.token_ids(at)), float_rows(logprobs)

    def _trees(self, sessions: Sequence[EagleSession], budgets: Sequence[DraftBudget]) -> list[Draft]:
        trees = [DynamicTree(self._width) for _ in sessions]
        found = self._best(self._network.logits(_outputs(sessions)))
        for tree, tokens, logprobs in zip(trees, *found, strict=True):
            tree.begin(tokens, logprobs)
        grown = [_Growing(session, tree) for session, tree in zip(sessions, trees, strict=True)]
        limits = [min(self._depth, budget.max_depth, budget.max_tokens) for budget in budgets]
        for level in range(1, max(limits)):
            going = [g for g, limit in zip(grown, limits, strict=True) if level < limit and g.tree.frontier]
            if not going:
                break
            self._grow_level(going)
        return [self._cut(tree, budget.max_tokens) for tree, budget in zip(trees, budgets, strict=True)]

    def _grow_level(self, grown: list[_Growing]) -> None:
        """Grow each tree by a level: its frontier goes through the layer with all ancestors, after the sequence."""
        inputs: list[Tensor] = []
        positions: list[int] = []
        seqs: list[int] = []
        counts: list[int] = []
        masks: dict[int, Tensor] = {}
        wanted: list[int] = []
        members: list[_Growing] = []
        for one in grown:
            lineage = one.tree.lineage(one.tree.frontier)
            seq_index = _seq_index(one.session)
            try:
                self._layer.append_slots(seq_index, len(lineage))
            except OutOfBlocks:
                one.tree.frontier = []
                continue
            one.embed(self._network, lineage)
            rank = {candidate: row for row, candidate in enumerate(lineage)}
            parents = [rank.get(one.tree.parents[candidate], -1) for candidate in lineage]
            masks[len(seqs)] = to_tensor(ancestor_mask(parents))
            first = sum(counts)
            wanted += [first + rank[candidate] for candidate in one.tree.frontier]
            inputs += [one.inputs[candidate] for candidate in lineage]
            positions += [one.session.next_position + one.tree.depths[candidate] - 1 for candidate in lineage]
            seqs.append(seq_index)
            counts.append(len(lineage))
            members.append(one)
        if not members:
            return
        device = self._device
        outputs = self._layer.run(
            torch.stack(inputs),
            torch.tensor(positions, device=device),
            seqs,
            counts,
            torch.tensor(wanted, device=device),
            masks,
        )
        for one, count in zip(members, counts, strict=True):
            self._layer.truncate(_seq_index(one.session), self._layer.length(_seq_index(one.session)) - count)
        tokens, logprobs = self._best(self._network.logits(outputs))
        at = 0
        for one in members:
            stop = at + len(one.tree.frontier)
            one.outputs |= zip(one.tree.frontier, outputs[at:stop].unbind(), strict=True)
            one.tree.extend(tokens[at:stop], logprobs[at:stop])
            at = stop

    def _ahead_logits(self, sessions: Sequence[EagleSession]) -> Tensor:
        """(B, num_ahead, vocab) logits of all levels from one step. No level depends on the tokens before it."""
        return self._network.logits(self._network.next_states(_outputs(sessions)))

    def _ahead_chains(self, sessions: Sequence[EagleSession], budgets: Sequence[DraftBudget]) -> list[Draft]:
        logits = self._ahead_logits(sessions)
        limits = [min(self._depth, budget.max_depth, budget.max_tokens, logits.shape[1]) for budget in budgets]
        rows = torch.cat([one[:limit] for one, limit in zip(logits, limits, strict=True)])
        asked = [budget for budget, limit in zip(budgets, limits, strict=True) for _ in range(limit)]
        tokens, probs = self._likeliest(rows, asked, [level for limit in limits for level in range(limit)])
        parts = zip(itertools.accumulate(limits), limits, strict=True)
        return [self._cut_chain(tokens[stop - limit : stop], probs[stop - limit : stop]) for stop, limit in parts]

    def _cut_chain(self, chosen: Sequence[int], probs: Sequence[float]) -> Draft:
        """The tokens up to where the path is too improbable or holds an excluded token."""
        tokens: list[int] = []
        scores: list[float] = []
        score = 1.0
        for token, prob in zip(chosen, probs, strict=True):
            score *= prob
            if score < self._stop_below or token in self._excluded:
                break
            tokens.append(token)
            scores.append(score)
        return Draft.chain(tokens, path_scores=tuple(scores), source=self._source)

    def _ahead_trees(self, sessions: Sequence[EagleSession], budgets: Sequence[DraftBudget]) -> list[Draft]:
        drafts: list[Draft] = []
        for logits, budget in zip(self._ahead_logits(sessions), budgets, strict=True):
            tree = DynamicTree(self._width)
            tokens, logprobs = self._best(logits[: min(self._depth, budget.max_depth)])
            tree.begin(tokens[0], logprobs[0])
            for level in range(1, len(tokens)):
                count = len(tree.frontier)
                tree.extend([tokens[level]] * count, [logprobs[level]] * count)
            drafts.append(self._cut(tree, budget.max_tokens))
        return drafts

    def _cut(self, tree: DynamicTree, max_tokens: int) -> Draft:
        """The best nodes of a tree, without excluded tokens and improbable paths."""
        tree.strike(self._excluded)
        tokens, parents, scores = tree.best(max_tokens, self._stop_below)
        return Draft(token_ids=tuple(tokens), parents=tuple(parents), path_scores=tuple(scores), source=self._source)


@dataclass(eq=False)
class _Growing:
    """A tree under construction, with each candidate's input of the layer, and its output."""

    session: EagleSession
    tree: DynamicTree
    inputs: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    outputs: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def embed(self, network: DraftHead, candidates: Sequence[int]) -> None:
        """Compute the inputs that are missing."""
        new = [c for c in candidates if c not in self.inputs]
        if not new:
            return
        assert self.session.output is not None
        states = torch.stack([self.outputs.get(self.tree.parents[c], self.session.output) for c in new])
        ids = torch.tensor([self.tree.token_ids[c] for c in new], device=states.device)
        global_feature = self.session.global_feature
        global_feature = None if global_feature is None else global_feature.expand_as(states)
        inputs = network.inputs(network.vision_adapter.condition(states, global_feature), ids)
        self.inputs |= zip(new, inputs.unbind(), strict=True)


def _seq_index(session: EagleSession) -> int:
    assert session.seq_index is not None
    return session.seq_index


def _outputs(sessions: Sequence[EagleSession]) -> Tensor:
    return torch.stack([session.output for session in sessions if session.output is not None])


def _key(budget: DraftBudget, level: int) -> int:
    seed, choice, position = budget.key
    return noise_key(seed, choice, position + level)
