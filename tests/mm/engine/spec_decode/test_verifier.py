"""The verifier against exact laws, worked out in rational numbers (vocabulary of a few tokens)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from mm.engine.sampling.noise import gumbel, noise_key
from mm.engine.sampling.sampler import ResolvedSamplingParams, Sampler, choose
from mm.engine.spec_decode.verifier import TreeVerification, draw, try_children
from mm.errors import DrafterFault
from mm.plugins.drafter import Draft, DraftBudget, ProposalKind
from tests.helpers.speculating import verify

WITHOUT, INDEPENDENT, POINT = ProposalKind.WITHOUT_REPLACEMENT, ProposalKind.INDEPENDENT, ProposalKind.POINT
P1, Q1 = (4, 3, 2, 1), (1, 2, 3, 4)
P2, Q2 = (5, 3, 2, 0), (2, 5, 2, 1)
P3, Q3 = (5, 3, 2), (2, 3, 5)


def law(tenths: Sequence[float]) -> torch.Tensor:
    return torch.tensor(tenths, dtype=torch.float64) / sum(tenths)


# ── greedy ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def walked(draft: Draft, argmax: Sequence[int]) -> tuple[list[int], list[int]]:
    """Path and emitted tokens where the target's choice at each row is given."""
    walk, emitted = TreeVerification(draft), []

    def say(alive: list[int]) -> list[int | None]:
        emitted.append(argmax[walk.row])
        return [emitted[-1]]

    verify([walk], say)
    return walk.path, emitted


@pytest.mark.parametrize(
    ("argmax", "path", "emitted"),
    [((3, 1, 4, 2), [0, 1, 2, 3], [3, 1, 4, 2]), ((3, 1, 0, 2), [0, 1, 2], [3, 1, 0]), ((0, 1, 4, 2), [0], [0])],
)
def test_greedy_chain(argmax, path, emitted):
    assert walked(Draft.chain((3, 1, 4)), argmax) == (path, emitted)


TREE = Draft(token_ids=(4, 7, 2, 4, 1, 7, 3), parents=(0, 0, 1, 1, 2, 3, 5))


@pytest.mark.parametrize(
    ("argmax", "path", "emitted"),
    [
        ((7, 2, 1, 7, 0, 8, 5, 6), [0, 2, 5], [7, 1, 8]),
        ((4, 2, 1, 7, 0, 8, 5, 6), [0, 1, 3, 6], [4, 2, 7, 5]),
        ((1, 2, 1, 7, 0, 8, 5, 6), [0], [1]),
    ],
)
def test_greedy_tree(argmax, path, emitted):
    assert walked(TREE, argmax) == (path, emitted)


def test_the_shape_of_a_tree():
    assert TREE.depths == (0, 1, 1, 2, 2, 2, 3, 3)
    rows = ["10000000", "11000000", "10100000", "11010000", "11001000", "10100100", "11010010", "10100101"]
    assert TREE.mask().int().tolist() == [[int(x) for x in row] for row in rows]
    assert not TREE.is_chain
    assert Draft.chain((1, 2)).mask().equal(torch.ones(3, 3).tril().bool())


def test_a_cut_tree_is_a_tree():
    assert TREE.cut(3) == Draft(token_ids=(4, 7, 2), parents=(0, 0, 1))
    assert TREE.cut(9) is TREE


@pytest.mark.parametrize(
    "draft",
    [
        Draft(token_ids=(1,), parents=(1,)),
        Draft(token_ids=(1, 2), parents=(0,)),
        Draft(token_ids=(8,), parents=(0,)),
        Draft(token_ids=(-1,), parents=(0,)),
        Draft(token_ids=(1, 1), parents=(0, 0)),
        Draft.chain((1, 2, 3, 4)),
        Draft(token_ids=(1, 2, 3, 4, 5), parents=(0,) * 5),
        Draft.chain((1,), draft_probs=torch.ones(2, 8)),
        Draft.chain((1,), kind=WITHOUT),
        Draft.chain((1,), kind=INDEPENDENT, draft_probs=torch.ones(1, 8)),
    ],
)
def test_what_cannot_be_verified_is_refused(draft):
    Draft.chain((1, 2, 3)).check(8, DraftBudget(max_tokens=4, max_depth=3))
    with pytest.raises(DrafterFault):
        draft.check(8, DraftBudget(max_tokens=4, max_depth=3))


def test_a_tree_is_refused_where_only_a_chain_can_be_verified():
    budget = DraftBudget(max_tokens=4, max_depth=3, chain_only=True)
    Draft.chain((1, 2, 3)).check(8, budget)
    with pytest.raises(DrafterFault, match="chain"):
        Draft(token_ids=(1, 2), parents=(0, 0)).check(8, budget)


# ── drawn from a law: exact ───────────────────────────────────────────────────────────────────────────────────────────


def ratio(p: torch.Tensor, q: torch.Tensor, tokens: Sequence[int], kind: ProposalKind) -> float:
    """Probability that the last of `tokens` is taken when those before it were refused, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        uniforms = [1 - 1e-12] * (len(tokens) - 1) + [middle]
        accepted, _ = try_children(p, q, tokens, kind, uniforms)
        low, high = (middle, high) if accepted == len(tokens) - 1 else (low, middle)
    return low


def residual(p, q, tokens, kind) -> torch.Tensor:
    accepted, rest = try_children(p, q, tokens, kind, [1 - 1e-12] * len(tokens))
    assert accepted is None
    return rest


def drawings(q: Sequence[float], count: int, kind: ProposalKind) -> list[tuple[tuple[int, ...], float]]:
    """Every sequence of siblings that can be drawn, with its probability."""
    found = []
    for tokens in itertools.product(range(len(q)), repeat=count):
        left, probability = list(q), 1.0
        for token in tokens:
            probability *= left[token] / sum(left) if left[token] else 0.0
            if kind is WITHOUT:
                left[token] = 0
        if probability:
            found.append((tokens, probability))
    return found


def outcome(p: Sequence[float], q: Sequence[float], count: int, kind: ProposalKind) -> tuple[list[float], list[float]]:
    """(masses of each sibling's acceptance and of the rest, emitted law), summed over every drawing."""
    masses, emitted = [0.0] * (count + 1), torch.zeros(len(p), dtype=torch.float64)
    for tokens, probability in drawings(q, count, kind):
        left = probability
        for i in range(count):
            taken = left * ratio(law(p), law(q), tokens[: i + 1], kind)
            masses[i] += taken
            emitted[tokens[i]] += taken
            left -= taken
            if left < 1e-12:
                break
        else:
            masses[count] += left
            emitted += left * residual(law(p), law(q), tokens, kind)
    return masses, emitted.tolist()


@pytest.mark.parametrize(
    ("p", "q", "accepts", "total", "rest"),
    [
        (P1, Q1, (1, 1, 2 / 3, 1 / 4), 3 / 5, (3 / 4, 1 / 4, 0, 0)),
        (P2, Q2, (1, 3 / 5, 1, 0), 7 / 10, (1, 0, 0, 0)),
    ],
)
def test_one_token_drawn_from_a_law(p, q, accepts, total, rest):
    assert [ratio(law(p), law(q), (t,), INDEPENDENT) for t in range(4)] == pytest.approx(accepts, abs=1e-12)
    masses, emitted = outcome(p, q, 1, INDEPENDENT)
    assert masses == pytest.approx([total, 1 - total])
    assert emitted == pytest.approx(law(p).tolist())
    refused = next(t for t in range(4) if accepts[t] < 1)
    assert residual(law(p), law(q), (refused,), INDEPENDENT).tolist() == pytest.approx(rest)


@pytest.mark.parametrize(
    ("p", "q", "kind", "masses"),
    [
        (P3, Q3, WITHOUT, (7 / 10, 3 / 25, 9 / 50)),
        (P1, Q1, WITHOUT, (3 / 5, 23 / 140, 33 / 140)),
        (P3, Q3, INDEPENDENT, (7 / 10, 3 / 50, 6 / 25)),
        (P1, Q1, INDEPENDENT, (3 / 5, 3 / 25, 7 / 25)),
    ],
)
def test_two_siblings_drawn_from_a_law(p, q, kind, masses):
    found, emitted = outcome(p, q, 2, kind)
    assert found == pytest.approx(masses, abs=1e-9)
    assert emitted == pytest.approx(law(p).tolist(), abs=1e-9)


def test_the_trace_of_two_siblings_without_replacement():
    assert ratio(law(P1), law(Q1), (3,), WITHOUT) == pytest.approx(1 / 4)
    assert ratio(law(P1), law(Q1), (3, 1), WITHOUT) == pytest.approx(3 / 4)
    assert residual(law(P1), law(Q1), (3, 1), WITHOUT).tolist() == pytest.approx([1, 0, 0, 0])
    assert ratio(law(P3), law(Q3), (2, 0), WITHOUT) == pytest.approx(1)
    assert ratio(law(P3), law(Q3), (2, 1), WITHOUT) == pytest.approx(0)


def test_drawing_without_replacement_is_not_drawing_independently():
    """Verified with the law that no longer holds, the second sibling spoils the target's law in a known way."""
    emitted = torch.zeros(4, dtype=torch.float64)
    for tokens, probability in drawings(Q1, 2, WITHOUT):
        first = ratio(law(P1), law(Q1), tokens[:1], INDEPENDENT)
        second = ratio(law(P1), law(Q1), tokens, INDEPENDENT) if first < 1 else 0.0
        emitted[tokens[0]] += probability * first
        emitted[tokens[1]] += probability * (1 - first) * second
        if first < 1 and second < 1:
            emitted += probability * (1 - first) * (1 - second) * residual(law(P1), law(Q1), tokens, INDEPENDENT)
    assert emitted.tolist() == pytest.approx([699 / 1960, 673 / 1960, 1 / 5, 1 / 10], abs=1e-9)


def test_the_ratio_rule_is_wrong_for_a_token_that_was_not_drawn():
    p, q = law(P3), law((6, 3, 1))
    taken = ratio(p, q, (0,), INDEPENDENT)
    emitted = (1 - taken) * residual(p, q, (0,), INDEPENDENT)
    emitted[0] += taken
    assert emitted.tolist() == pytest.approx([5 / 6, 0, 1 / 6])
    # Two drawn, the likelier one kept: the law of what is kept is no longer Q.
    emitted = torch.zeros(4, dtype=torch.float64)
    for tokens, probability in drawings(Q1, 2, INDEPENDENT):
        token = max(tokens, key=lambda t: Q1[t])
        taken = ratio(law(P1), law(Q1), (token,), INDEPENDENT)
        emitted[token] += probability * taken
        if taken < 1:
            emitted += probability * (1 - taken) * residual(law(P1), law(Q1), (token,), INDEPENDENT)
    assert emitted.tolist() == pytest.approx([7 / 16, 89 / 400, 9 / 50, 4 / 25], abs=1e-9)


def test_a_two_step_chain_drawn_from_laws():
    first, second = 7 / 10, 3 / 5
    found = outcome(P2, Q2, 1, INDEPENDENT)[0][0], outcome(P1, Q1, 1, INDEPENDENT)[0][0]
    assert found == pytest.approx((first, second))
    lengths = 1 - found[0], found[0] * (1 - found[1]), found[0] * found[1]
    assert lengths == pytest.approx((3 / 10, 7 / 25, 21 / 50))
    assert sum(n * p for n, p in enumerate(lengths, 1)) == pytest.approx(53 / 25)


# ── whole walks with the engine's own noise ───────────────────────────────────────────────────────────────────────────


def walk_with(
    draft: Draft, laws: torch.Tensor, sampler: Sampler, position: int = 0
) -> tuple[TreeVerification, list[int]]:
    """A walk whose rows have the logits log(laws)."""
    walk, emitted = TreeVerification(draft), []

    def say(alive: list[int]) -> list[int | None]:
        chosen = draw(laws[walk.row : walk.row + 1].log(), [walk], [sampler], [position + len(emitted)])[0]
        emitted.append(chosen.token_id)  # type: ignore[union-attr]
        return [emitted[-1]]

    verify([walk], say)
    return walk, emitted


def frequencies(tokens: Sequence[int], vocab: int) -> list[float]:
    return [tokens.count(token) / len(tokens) for token in range(vocab)]


S2 = (5, 2, 2, 1)


@pytest.mark.parametrize(
    ("children", "masses"), [((1, 0), (0.2, 0.5)), ((0, 1), (0.5, 0.2)), ((3,), (0.1,)), ((0, 1, 2, 3), S2)]
)
def test_points_are_taken_as_often_as_the_target_says_them(children, masses):
    draft = Draft(token_ids=children, parents=(0,) * len(children))
    laws = law(S2).expand(len(children) + 1, -1)
    walks = [
        walk_with(draft, laws, Sampler(ResolvedSamplingParams(temperature=1.0, seed=seed))) for seed in range(2000)
    ]
    total = sum(masses)
    masses = [mass / (10 if total > 1 else 1) for mass in masses]
    for i, mass in enumerate(masses):
        share = sum(walk.path[1:2] == [i + 1] for walk, _ in walks) / len(walks)
        assert share == pytest.approx(mass, abs=4 * math.sqrt(mass * (1 - mass) / len(walks)))
    assert frequencies([emitted[0] for _, emitted in walks], 4) == pytest.approx(law(S2).tolist(), abs=0.045)


def test_the_mean_length_of_a_point_tree():
    draft = Draft(token_ids=(0, 1, 2), parents=(0, 0, 1))
    laws = torch.stack([law(S2), law((1, 1, 7, 1)), law(S2), law(S2)])
    lengths = [
        len(walk_with(draft, laws, Sampler(ResolvedSamplingParams(temperature=1.0, seed=seed)))[1])
        for seed in range(2000)
    ]
    assert sum(lengths) / len(lengths) == pytest.approx(41 / 20, abs=0.07)


def test_a_draft_makes_its_token_no_likelier():
    """A verifier that draws once for the draft and once more for what follows would emit it in 21 of 25 cases."""
    laws = law((3, 2)).expand(2, -1)
    draft = Draft.chain((0,))
    said = [
        walk_with(draft, laws, Sampler(ResolvedSamplingParams(temperature=1.0, seed=seed)))[1][0]
        for seed in range(2000)
    ]
    assert said.count(0) / len(said) == pytest.approx(3 / 5, abs=0.044)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1.0, (0.665241, 0.244728, 0.090031)),
        (0.5, (0.866813, 0.117310, 0.015876)),
        (2.0, (0.506480, 0.307196, 0.186324)),
    ],
)
@pytest.mark.parametrize("kind", list(ProposalKind))
def test_the_token_behind_a_whole_draft_is_drawn_from_the_warped_law(temperature, expected, kind):
    probs = None if kind is POINT else torch.eye(4)[[2, 0]][:, :3].double()
    draft = Draft.chain((2,), kind=kind, draft_probs=probs)
    logits = torch.tensor([[0.0, 0.0, 50.0], [2.0, 1.0, 0.0]])
    said = []
    for seed in range(500):
        sampler = Sampler(ResolvedSamplingParams(temperature=temperature, seed=seed))
        assert sampler.law(logits[1], 1).exp().tolist() == pytest.approx(expected, abs=1e-6)
        _, emitted = walk_with(draft, logits.exp(), sampler)
        assert emitted[0] == 2
        said.append(emitted[1])
    assert frequencies(said, 3) == pytest.approx(expected, abs=0.09)


def test_points_leave_the_sampled_answer_as_it_is():
    """Random trees, random laws, the verifier's own noise: token for token what is drawn without a draft."""
    random = torch.Generator().manual_seed(0)
    for seed in range(200):
        count = int(torch.randint(0, 9, (1,), generator=random))
        table = torch.rand(8, 8, generator=random, dtype=torch.float64)
        parents = tuple(int(torch.randint(0, i + 1, (1,), generator=random)) for i in range(count))
        tokens = tuple(int(t) for t in torch.randint(0, 8, (count,), generator=random))
        draft = Draft(token_ids=tokens, parents=parents)
        rule = ResolvedSamplingParams(temperature=1.0, top_p=0.9, seed=seed, repetition_penalty=1.3)
        plain, drafted = Sampler(rule, 1), Sampler(rule, 1)
        walk, emitted, last = TreeVerification(draft), [], [3]

        def say(alive: list[int]) -> list[int | None]:
            row = table[(3, *tokens)[walk.row]].log().unsqueeze(0)  # noqa: B023
            chosen = draw(row, [walk], [drafted], [len(emitted)])[0]  # noqa: B023
            drafted.observe(chosen.token_id)  # type: ignore[union-attr]  # noqa: B023
            emitted.append(chosen.token_id)  # type: ignore[union-attr]  # noqa: B023
            return [emitted[-1]]  # noqa: B023

        verify([walk], say)
        for position, token in enumerate(emitted):
            alone = choose(table[last[-1]].log().unsqueeze(0), [plain], [position])[0]
            plain.observe(alone.token_id)  # type: ignore[union-attr]
            last.append(alone.token_id)  # type: ignore[union-attr]
            assert token == last[-1]


@pytest.mark.parametrize(("p", "q", "rate"), [(P1, Q1, 0.542857), (P3, Q3, 0.630769)])
def test_a_draft_drawn_with_the_verifiers_own_noise_is_taken_more_often(p, q, rate):
    """The most that independent noise allows is sum P * Q, which is 0.2 and 0.29."""
    taken, count = 0, 2000
    for seed in range(count):
        noise = gumbel(torch.tensor(noise_key(seed, 0, 0)), torch.arange(len(p)))
        draft = Draft.chain((int((law(q).log() + noise).argmax()),))
        sampler = Sampler(ResolvedSamplingParams(temperature=1.0, seed=seed))
        taken += walk_with(draft, law(p).expand(2, -1), sampler)[0].num_accepted
    assert taken / count == pytest.approx(rate, abs=0.045)


def drawn_tree(laws: torch.Tensor, kind: ProposalKind, seed: int) -> Draft:
    """Two levels of two siblings, drawn from `laws` by last token; root token 0."""
    random = torch.Generator().manual_seed(seed)
    tokens, parents, probs = [0], [], [laws[0]]
    for parent in (0, 1, 2):
        q = laws[tokens[parent]]
        for token in torch.multinomial(q, 2, replacement=kind is INDEPENDENT, generator=random).tolist():
            tokens.append(token)
            parents.append(parent)
            probs.append(laws[token])
    if kind is POINT:  # siblings are distinct: the tree is made of what is likely
        tokens, parents, probs = [0], [], None
        for parent in (0, 1, 2):
            tokens += laws[tokens[parent]].topk(2).indices.tolist()
            parents += [parent] * 2
    return Draft(
        token_ids=tuple(tokens[1:]),
        parents=tuple(parents),
        kind=kind,
        draft_probs=None if probs is None else torch.stack(probs),
    )


CRITICAL = {7: 29.9, 63: 115.0}
"""Quantiles of the chi-square law at 1 - 1e-4 for so many degrees of freedom."""


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("kind", list(ProposalKind))
@pytest.mark.parametrize("rounds", [1500, pytest.param(40_000, marks=pytest.mark.slow)])
def test_walks_follow_the_targets_law(kind, rounds):
    """First and second token against the target's law, at temperature 0.8."""
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 8, generator=random, dtype=torch.float64)
    target = (logits / 0.8).softmax(-1)
    draft_laws = (logits + torch.randn(8, 8, generator=random, dtype=torch.float64)).softmax(-1)
    pairs = torch.zeros(8, 8, dtype=torch.float64)
    lengths = 0
    for seed in range(rounds):
        draft = drawn_tree(draft_laws, kind, seed)
        sampler = Sampler(ResolvedSamplingParams(temperature=0.8, seed=seed))
        rows = torch.stack([logits[token].softmax(-1) for token in (0, *draft.token_ids)])
        _, emitted = walk_with(draft, rows, sampler)
        lengths += len(emitted)
        if len(emitted) == 1:  # the answer goes on without a draft
            emitted.append(choose(logits[emitted[0]].unsqueeze(0), [sampler], [1])[0].token_id)
        pairs[emitted[0], emitted[1]] += 1
    assert lengths > 1.3 * rounds, "hardly anything was accepted: nothing was tested"
    assert chi_square(pairs.sum(1), target[0] * rounds) < CRITICAL[7]
    joint = target[0][:, None] * target
    assert chi_square(pairs, joint * rounds) < CRITICAL[63]


@pytest.mark.parametrize("kind", [INDEPENDENT, WITHOUT])
def test_greedy_reduces_every_kind_to_the_walk_along_the_largest(kind):
    random = torch.Generator().manual_seed(2)
    logits = torch.randn(8, 8, generator=random, dtype=torch.float64)
    for seed in range(50):
        draft = drawn_tree(logits.softmax(-1), kind, seed)
        rows = torch.stack([logits[token].softmax(-1) for token in (0, *draft.token_ids)])
        walk, emitted = walk_with(draft, rows, Sampler(ResolvedSamplingParams(seed=seed)))
        last = 0
        for token in emitted:
            assert token == int(logits[last].argmax())
            last = token
        assert len(emitted) == len(walk.path)


def test_a_token_that_was_accepted_tells_the_same_as_one_that_was_chosen():
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(3))
    probs = torch.stack([logits[0].softmax(-1)] * 2).double()
    sampler = Sampler(ResolvedSamplingParams(temperature=1.0, seed=5, num_logprobs=3))
    draft = Draft.chain((2,), kind=INDEPENDENT, draft_probs=probs)
    one = draw(logits, [TreeVerification(draft)], [sampler], [0])[0]
    assert one.token_id == 2, "drawn from the target's own law, so it is always taken"
    assert one.logprob == pytest.approx(float(logits[0].log_softmax(-1)[2]))
    assert one.top == choose(logits, [sampler], [0])[0].top
