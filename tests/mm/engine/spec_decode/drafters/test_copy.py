"""Copying: the automaton against brute force, the rules against worked examples."""

from __future__ import annotations

import random

import pytest
import torch

from mm.data.tokens import Prompt
from mm.engine.spec_decode.drafters.copy import Copy, LoadedCopy, text_of
from mm.engine.spec_decode.drafters.suffix_automaton import SuffixAutomaton
from mm.errors import InvalidOption
from mm.plugins.drafter import DraftBudget, Observation

A = [1, 2, 3, 9, 1, 2, 3, 7, 8, 1, 2, 3]
B = [5, 1, 2, 3, 9, 4, 1, 2, 3, 7, 8, 4, 1, 2, 3]


def prompt_of(tokens: list[int], visual: tuple[int, ...] = ()) -> Prompt:
    is_visual = torch.zeros(len(tokens), dtype=torch.bool)
    is_visual[list(visual)] = True
    return Prompt(
        token_ids=torch.tensor(tokens),
        embeddings=torch.zeros(len(tokens), 1),
        positions=torch.arange(len(tokens)).unsqueeze(0),
        next_position=len(tokens),
        is_visual=is_visual,
    )


def drafted(tokens: list[int], count: int, **options) -> tuple[int, ...]:
    loaded = LoadedCopy(Copy(**options))
    session = loaded.open(prompt_of(tokens[:-1]))
    session.observe(Observation(token_ids=(tokens[-1],), is_prompt=True))
    return session.propose(DraftBudget(max_tokens=count, max_depth=count)).token_ids


@pytest.mark.parametrize(
    ("tokens", "count", "options", "expected"),
    [
        (A, 3, {"min_match": 1, "max_match": 3, "occurrence": "earliest"}, (9, 1, 2)),
        (A, 10, {"min_match": 1, "max_match": 3, "occurrence": "earliest"}, (9, 1, 2, 3, 7, 8, 1, 2, 3)),
        (A, 4, {"occurrence": "latest"}, (7, 8, 1, 2)),
        (A, 10, {"min_match": 3, "max_match": 3, "occurrence": "earliest"}, (9, 1, 2, 3, 7, 8, 1, 2, 3)),
        (B, 3, {"min_match": 1, "max_match": 3, "occurrence": "earliest"}, (9, 4, 1)),
        (B, 4, {"occurrence": "earliest"}, (7, 8, 4, 1)),
        (B, 10, {"min_match": 3, "max_match": 3, "occurrence": "earliest"}, (9, 4, 1, 2, 3, 7, 8, 4, 1, 2)),
        ([1, 2, 3, 4], 10, {"min_match": 3, "max_match": 3}, ()),
        ([1, 2, 1, 2, 1, 2], 5, {"occurrence": "latest"}, (1, 2, 1, 2, 1)),
        ([1, 2, 1, 2, 1, 2], 5, {"occurrence": "latest", "factor": 0.5}, (1, 2)),
        ([1, 2, 1, 2, 1, 2], 0, {}, ()),
    ],
)
def test_the_published_rules(tokens, count, options, expected):
    assert drafted(tokens, count, **options) == expected


@pytest.mark.parametrize(
    ("tokens", "trace", "num_states"),
    [
        (A, [0, 0, 0, 0, (1, 0), (2, 1), (3, 2), 0, 0, (1, 0), (2, 1), (3, 2)], 13),
        (B, [*[0] * 11, (1, 5), (2, 6), (3, 7), (4, 8)], 23),
        ([1, 2, 1, 2, 1, 2], [0, 0, (1, 0), (2, 1), (3, 2), (4, 3)], 7),
        ([1, 1, 1, 1], [0, (1, 0), (2, 1), (3, 2)], 5),
    ],
)
def test_the_trace_of_the_automaton(tokens, trace, num_states):
    automaton = SuffixAutomaton()
    found = []
    for token in tokens:
        automaton.append(token)
        found.append((automaton.matched, automaton.earlier_end()) if automaton.matched else 0)
    if tokens is B:  # what the first tokens repeat is not listed
        found[:11] = [0] * 11
    assert found == trace
    assert automaton.num_states == num_states


def ends(tokens: list[int], length: int) -> list[int]:
    """Where the last `length` tokens end, the last place excluded."""
    last = tokens[len(tokens) - length :]
    return [i for i in range(length - 1, len(tokens) - 1) if tokens[i - length + 1 : i + 1] == last]


def test_matches_against_brute_force():
    rng = random.Random(0)
    for _ in range(300):
        tokens = [rng.randrange(rng.choice((2, 3, 6))) for _ in range(rng.randint(1, 40))]
        automaton = SuffixAutomaton()
        for i, token in enumerate(tokens):
            automaton.append(token)
            text = tokens[: i + 1]
            matched = max((n for n in range(1, len(text)) if ends(text, n)), default=0)
            assert automaton.matched == matched
            for longest in (None, 1, 2, 3):
                length = min(matched, longest or matched)
                if length:
                    assert automaton.earlier_end(longest) == ends(text, length)[0]
                    assert automaton.earlier_end(longest, latest=True) in ends(text, length)
            if matched > 0:
                assert automaton.earlier_end(latest=True) == ends(text, matched)[-1]
        assert automaton.num_states <= max(2, 2 * len(tokens))


def test_following_another_text_while_the_automaton_grows():
    rng = random.Random(1)
    for _ in range(100):
        automaton = SuffixAutomaton([rng.randrange(3) for _ in range(10)])
        state = matched = 0
        text: list[int] = []
        for _ in range(20):
            if rng.random() < 0.3:
                automaton.append(rng.randrange(3))
            text.append(rng.randrange(3))
            previous = matched
            state, matched = automaton.follow(state, matched, text[-1])
            source = automaton.tokens
            windows = {tuple(source[i : i + n]) for n in range(1, 22) for i in range(len(source) - n + 1)}
            longest = max((n for n in range(1, len(text) + 1) if tuple(text[-n:]) in windows), default=0)
            assert matched == min(longest, previous + 1)
            if matched:
                end = automaton.last_end(state)
                assert source[end - matched + 1 : end + 1] == text[-matched:]


def test_nothing_is_copied_across_a_picture():
    prompt = prompt_of([1, 2, 9, 9, 9, 5, 9, 9, 1, 2], visual=(2, 3, 4, 6, 7))
    assert [token if token >= 0 else "medium" for token in text_of(prompt)] == [1, 2, "medium", 5, "medium", 1, 2]
    session = LoadedCopy(Copy(min_match=1)).open(prompt)
    session.observe(Observation(token_ids=(2,)))
    session.observe(Observation(token_ids=(1,)))
    session.observe(Observation(token_ids=(2,)))
    assert session.propose(DraftBudget(max_tokens=5, max_depth=5)).token_ids == (2, 1, 2, 2, 1)
    session = LoadedCopy(Copy(min_match=2)).open(prompt)
    session.observe(Observation(token_ids=(1,)))
    session.observe(Observation(token_ids=(2,)))
    assert session.propose(DraftBudget(max_tokens=5, max_depth=5)).token_ids == (1, 2, 1, 2, 1)
    session = LoadedCopy(Copy(min_match=1, occurrence="earliest")).open(prompt)
    session.observe(Observation(token_ids=(1,)))
    assert session.propose(DraftBudget(max_tokens=5, max_depth=5)).token_ids == (2,), "a medium ends the copy"


def test_answers_copy_from_earlier_ones_where_that_is_allowed():
    loaded = LoadedCopy(Copy(shared_tokens=64))
    first = loaded.open(prompt_of([1]))
    first.observe(Observation(token_ids=(20, 21, 22, 23, 24)))
    loaded.close(first)
    budget = DraftBudget(max_tokens=3, max_depth=3)
    for private, expected in ((False, (22, 23, 24)), (True, ())):
        session = loaded.open(prompt_of([2]), private=private)
        session.observe(Observation(token_ids=(20, 21)))
        assert session.propose(budget).token_ids == expected
    for i in range(40):  # the store is bounded, and matches go on after it has forgotten
        one = loaded.open(prompt_of([3]))
        one.observe(Observation(token_ids=tuple(range(100 + 5 * i, 105 + 5 * i))))
        loaded.close(one)
        assert len(loaded.store.text.tokens) <= 64
    session = loaded.open(prompt_of([2]))
    session.observe(Observation(token_ids=(295, 296)))
    assert session.propose(budget).token_ids == (297, 298, 299)


def test_copies_that_are_wrong_are_expected_less():
    loaded = LoadedCopy(Copy())
    before = loaded.odds.path_scores(2, 3)
    for _ in range(50):
        loaded.odds.learn(2, (1, 2), (5,))
    after = loaded.odds.path_scores(2, 3)
    assert after[0] < 0.3 * before[0]
    assert list(after) == sorted(after, reverse=True)


@pytest.mark.parametrize(
    "options", [{"min_match": 0}, {"min_match": 3, "max_match": 2}, {"occurrence": "last"}, {"factor": -1.0}]
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(InvalidOption):
        Copy(**options)
