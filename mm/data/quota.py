"""Splits a number of tokens over parts of different sizes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def quota(total: int, counts: Sequence[int]) -> list[int]:
    """`total` kept tokens split over parts of `counts` tokens: in proportion, remainders to the largest fractions.

    Among equal fractions the earlier part is served first. Where `total` allows, each part keeps at least one, taken
    from the part that keeps most.

    Args:
        total: From 0 to the sum of `counts`.
    """
    exact = [Fraction(total * count, max(1, sum(counts))) for count in counts]
    shares = [int(share) for share in exact]
    by_fraction = sorted(range(len(counts)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_fraction[: total - sum(shares)]:
        shares[i] += 1
    for i, count in enumerate(counts):
        if count and not shares[i] and max(shares) > 1:
            shares[shares.index(max(shares))] -= 1
            shares[i] = 1
    return shares
