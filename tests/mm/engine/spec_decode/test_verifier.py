"""The verifier against exact distributions, worked out in rational numbers (vocabulary of a few tokens)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from mm.engine.sampling.noise import gumbel, noise_key
from mm.engine.sampling.resolved_params import ResolvedSamplingParams
from mm.engine.sampling.sample import sample
from mm.engine.sampling.sampler import Sampler
from mm.engine.spec_decode.verifier import TreeVerification
from mm.errors import DrafterFault
from mm.plugins.drafter import Draft, DraftBudget
from tests.helpers.sampling import sampling_logprobs
from tests.helpers.speculating import verify

P1, Q1 = (4, 3, 2, 1), (1, 2, 3, 4)
P3, Q3 = (5, 3, 2), (2, 3, 5)


def distribution(tenths: Sequence[float]) -> torch.Tensor:
    return torch.tensor(tenths, dtype=torch.float64) / sum(tenths)


# ── greedy ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def verified(draft: Draft, argmax: Sequence[int]) -> tuple[list[int], list[int]]:
    """Path and emitted tokens where the target's token at each node is given."""
    verification, emitted = TreeVerification(draft), []

    def emit(alive: list[int]) -> list[int | None]:
        emitted.append(argmax[verification.node])
        return [emitted[-1]]

    verify([verification], emit)
    return verification.path, emitted


@pytest.mark.parametrize(
    ("argmax", "path", "emitted"),
    [((3, 1, 4, 2), [0, 1, 2, 3], [3, 1, 4, 2]), ((3, 1, 0, 2), [0, 1, 2], [3, 1, 0]), ((0, 1, 4, 2), [0], [0])],
)
def test_greedy_chain(argmax, path, emitted):
    assert verified(Draft.chain((3, 1, 4)), argmax) == (path, emitted)


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
    assert verified(TREE, argmax) == (path, emitted)


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
    ],
)
def test_drafts_that_cannot_be_verified_are_refused(draft):
    Draft.chain((1, 2, 3)).check(8, DraftBudget(max_tokens=4, max_depth=3))
    with pytest.raises(DrafterFault):
        draft.check(8, DraftBudget(max_tokens=4, max_depth=3))


# ── verification with the engine's own noise ──────────────────────────────────────────────────────────────────────────


def verify_with(
    draft: Draft, distributions: torch.Tensor, sampler: Sampler, position: int = 0
) -> tuple[TreeVerification, list[int]]:
    """A verification whose nodes have the logits log(distributions)."""
    verification, emitted = TreeVerification(draft), []

    def emit(alive: list[int]) -> list[int | None]:
        sampled = sample(
            distributions[verification.node : verification.node + 1].log(), [sampler], [position + len(emitted)]
        )[0]
        emitted.append(sampled.token_id)  # type: ignore[union-attr]
        return [emitted[-1]]

    verify([verification], emit)
    return verification, emitted


def frequencies(tokens: Sequence[int], vocab: int) -> list[float]:
    return [tokens.count(token) / len(tokens) for token in range(vocab)]


S2 = (5, 2, 2, 1)


@pytest.mark.parametrize(
    ("children", "masses"), [((1, 0), (0.2, 0.5)), ((0, 1), (0.5, 0.2)), ((3,), (0.1,)), ((0, 1, 2, 3), S2)]
)
def test_drafts_are_accepted_as_often_as_the_target_samples_them(children, masses):
    draft = Draft(token_ids=children, parents=(0,) * len(children))
    distributions = distribution(S2).expand(len(children) + 1, -1)
    verifications = [
        verify_with(draft, distributions, Sampler(ResolvedSamplingParams(temperature=1.0, seed=seed)))
        for seed in range(2000)
    ]
    total = sum(masses)
    masses = [mass / (10 if total > 1 else 1) for mass in masses]
    for i, mass in enumerate(masses):
        share = sum(verification.path[1:2] == [i + 1] for verification, _ in verifications) / len(verifications)
        assert share == pytest.approx(mass, abs=4 * math.sqrt(mass * (1 - mass) / len(verifications)))
    assert frequencies([emitted[0] for _, emitted in verifications], 4) == pytest.approx(
        distribution(S2).tolist(), abs=0.045
    )


def test_the_mean_length_of_a_tree():
    draft = Draft(token_ids=(0, 1, 2), parents=(0, 0, 1))
    distributions = torch.stack([distribution(S2), distribution((1, 1, 7, 1)), distribution(S2), distribution(S2)])
    lengths = [
        len(verify_with(draft, distributions, Sampler(ResolvedSamplingParams(temperature=1.0, seed=seed)))[1])
        for seed in range(2000)
    ]
    assert sum(lengths) / len(lengths) == pytest.approx(41 / 20, abs=0.07)


def test_a_draft_makes_its_token_no_likelier():
    """A verifier that draws once for the draft and once more for what follows would emit it in 21 of 25 cases."""
    distributions = distribution((3, 2)).expand(2, -1)
    draft = Draft.chain((0,))
    sampled_ids = [
        verify_with(draft, distributions, Sampler(ResolvedSamplingParams(temperature=1.0, seed=seed)))[1][0]
        for seed in range(2000)
    ]
    assert sampled_ids.count(0) / len(sampled_ids) == pytest.approx(3 / 5, abs=0.044)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1.0, (0.665241, 0.244728, 0.090031)),
        (0.5, (0.866813, 0.117310, 0.015876)),
        (2.0, (0.506480, 0.307196, 0.186324)),
    ],
)
def test_the_token_after_a_whole_draft_is_sampled_after_temperature(temperature, expected):
    draft = Draft.chain((2,))
    logits = torch.tensor([[0.0, 0.0, 50.0], [2.0, 1.0, 0.0]])
    sampled_ids = []
    for seed in range(500):
        sampler = Sampler(ResolvedSamplingParams(temperature=temperature, seed=seed))
        assert sampling_logprobs(logits[1], sampler, 1).exp().tolist() == pytest.approx(expected, abs=1e-6)
        _, emitted = verify_with(draft, logits.exp(), sampler)
        assert emitted[0] == 2
        sampled_ids.append(emitted[1])
    assert frequencies(sampled_ids, 3) == pytest.approx(expected, abs=0.09)


def test_drafts_leave_the_sampled_tokens_as_they_are():
    """Random trees, random distributions, the verifier's own noise: token for token what is drawn without a draft."""
    random = torch.Generator().manual_seed(0)
    for seed in range(200):
        count = int(torch.randint(0, 9, (1,), generator=random))
        table = torch.rand(8, 8, generator=random, dtype=torch.float64)
        parents = tuple(int(torch.randint(0, i + 1, (1,), generator=random)) for i in range(count))
        tokens = tuple(int(t) for t in torch.randint(0, 8, (count,), generator=random))
        draft = Draft(token_ids=tokens, parents=parents)
        params = ResolvedSamplingParams(temperature=1.0, top_p=0.9, seed=seed, repetition_penalty=1.3)
        plain, drafted = Sampler(params, 1), Sampler(params, 1)
        verification, emitted, last = TreeVerification(draft), [], [3]

        def emit(alive: list[int]) -> list[int | None]:
            row = table[(3, *tokens)[verification.node]].log().unsqueeze(0)  # noqa: B023
            sampled = sample(row, [drafted], [len(emitted)])[0]  # noqa: B023
            drafted.observe(sampled.token_id)  # type: ignore[union-attr]  # noqa: B023
            emitted.append(sampled.token_id)  # type: ignore[union-attr]  # noqa: B023
            return [emitted[-1]]  # noqa: B023

        verify([verification], emit)
        for position, token in enumerate(emitted):
            alone = sample(table[last[-1]].log().unsqueeze(0), [plain], [position])[0]
            plain.observe(alone.token_id)  # type: ignore[union-attr]
            last.append(alone.token_id)  # type: ignore[union-attr]
            assert token == last[-1]


@pytest.mark.parametrize(("p", "q", "rate"), [(P1, Q1, 0.542857), (P3, Q3, 0.630769)])
def test_a_draft_drawn_with_the_verifiers_own_noise_is_accepted_more_often(p, q, rate):
    """The most that independent noise allows is sum P * Q, which is 0.2 and 0.29."""
    taken, count = 0, 2000
    for seed in range(count):
        noise = gumbel(torch.tensor(noise_key(seed, 0, 0)), torch.arange(len(p)))
        draft = Draft.chain((int((distribution(q).log() + noise).argmax()),))
        sampler = Sampler(ResolvedSamplingParams(temperature=1.0, seed=seed))
        taken += verify_with(draft, distribution(p).expand(2, -1), sampler)[0].num_accepted
    assert taken / count == pytest.approx(rate, abs=0.045)


def likely_tree(distributions: torch.Tensor) -> Draft:
    """Two levels of the two most probable children, by last token; root token 0."""
    tokens, parents = [0], []
    for parent in (0, 1, 2):
        tokens += distributions[tokens[parent]].topk(2).indices.tolist()
        parents += [parent] * 2
    return Draft(token_ids=tuple(tokens[1:]), parents=tuple(parents))


CRITICAL = {7: 29.9, 63: 115.0}
"""Quantiles of the chi-square distribution at 1 - 1e-4 for so many degrees of freedom."""


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("rounds", [1500, pytest.param(40_000, marks=pytest.mark.slow)])
def test_verified_tokens_follow_the_targets_distribution(rounds):
    """First and second token against the target's distribution, at temperature 0.8."""
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 8, generator=random, dtype=torch.float64)
    target = (logits / 0.8).softmax(-1)
    draft_distributions = (logits + torch.randn(8, 8, generator=random, dtype=torch.float64)).softmax(-1)
    pairs = torch.zeros(8, 8, dtype=torch.float64)
    lengths = 0
    for seed in range(rounds):
        draft = likely_tree(draft_distributions)
        sampler = Sampler(ResolvedSamplingParams(temperature=0.8, seed=seed))
        rows = torch.stack([logits[token].softmax(-1) for token in (0, *draft.token_ids)])
        _, emitted = verify_with(draft, rows, sampler)
        lengths += len(emitted)
        if len(emitted) == 1:  # the sequence goes on without a draft
            emitted.append(sample(logits[emitted[0]].unsqueeze(0), [sampler], [1])[0].token_id)
        pairs[emitted[0], emitted[1]] += 1
    assert lengths > 1.3 * rounds, "hardly anything was accepted: nothing was tested"
    assert chi_square(pairs.sum(1), target[0] * rounds) < CRITICAL[7]
    joint = target[0][:, None] * target
    assert chi_square(pairs, joint * rounds) < CRITICAL[63]
