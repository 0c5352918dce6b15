"""Keeps tokens that are not finite out of a reducer's decision.

In half precision a tower may overflow at a few patches. Such a token would make every logit of its prompt NaN, so it is
never kept while another one is left, whatever the reducer thought of it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mm.data.arrays import ints
from mm.data.tokens import VisualTokens
from mm.errors import ReducerFault
from mm.plugins.reducer import Reduction


def finite(reduction: Reduction, tokens: VisualTokens, owner: str) -> Reduction:
    """`reduction` without tokens whose embeddings are not finite: the nearest ones that were not kept replace them.

    Means leave them out. Decisions that keep everything, and those that bring embeddings of their own, stay as they
    are.

    Args:
        reduction: Of the shapes that `mm.plugins.apply.apply` checks.
        owner: Named in errors.

    Raises:
        ReducerFault: There are too few finite tokens.
    """
    if reduction.embeddings is not None or not reduction.keep.shape[0] or reduction.keep.shape[0] == tokens.num_tokens:
        return reduction
    if torch.isfinite(tokens.embeddings.sum(dtype=torch.float32)):
        return reduction
    broken = ~torch.isfinite(tokens.embeddings).all(dim=1)
    num_whole = tokens.num_tokens - int(broken.sum())
    if num_whole < reduction.keep.shape[0]:
        what = f"would keep {reduction.keep.shape[0]} of {tokens.num_tokens} tokens, of which {num_whole} are finite"
        raise ReducerFault(owner, f"{what}; the encoder gave values that are no numbers")
    if reduction.merge is not None:
        return _whole_means(reduction, reduction.merge, tokens, broken)
    keep, order = _replaced(reduction.keep, broken).sort()
    protected = reduction.protected
    return replace(
        reduction,
        keep=keep,
        sizes=None if reduction.sizes is None else reduction.sizes[order],
        protected=None if protected is None else protected[order],
    )


def _replaced(keep: Tensor, broken: Tensor) -> Tensor:
    """`keep` with each broken token replaced by the nearest that is whole and not kept."""
    free = ~broken
    free[keep] = False
    keep = keep.clone()
    for row in ints(broken[keep].nonzero().squeeze(1)):
        choices = free.nonzero().squeeze(1)
        keep[row] = choices[(choices - keep[row]).abs().argmin()]
        free[keep[row]] = False
    return keep


def _whole_means(reduction: Reduction, merge: Tensor, tokens: VisualTokens, broken: Tensor) -> Reduction:
    """Means over the whole tokens. One whose anchor is broken stands at another of its tokens, or at a free one."""
    entries = (merge if merge.is_sparse else merge.to_sparse()).coalesce()
    (rows, columns), weights = entries.indices(), entries.values()
    used = ~broken[columns] & (weights > 0)
    rows, columns, weights = rows[used], columns[used], weights[used]
    keep = reduction.keep.clone()
    for row in ints(broken[keep].nonzero().squeeze(1)):
        members = columns[rows == row]
        others = members[~torch.isin(members, keep)]
        if len(others):
            keep[row] = others[(others - keep[row]).abs().argmin()]
    without = broken[keep]
    keep = _replaced(keep, broken)
    alone = without.nonzero().squeeze(1)
    stays = ~torch.isin(rows, alone)
    rows, columns = torch.cat([rows[stays], alone]), torch.cat([columns[stays], keep[alone]])
    weights = torch.cat([weights[stays], weights.new_ones(len(alone))])
    totals = torch.zeros(len(keep), dtype=weights.dtype, device=weights.device).index_add_(0, rows, weights)
    sizes = torch.zeros(len(keep), device=keep.device).index_add_(0, rows, tokens.sizes[columns])
    keep, order = keep.sort()
    places = torch.stack([torch.argsort(order)[rows], columns])
    shape = (len(keep), tokens.num_tokens)
    shares = weights / totals[rows]
    means = torch.sparse_coo_tensor(places, shares, shape, check_invariants=False)  # pyright: ignore[reportUnknownMemberType]
    protected = reduction.protected
    return replace(
        reduction,
        keep=keep,
        merge=means,
        sizes=sizes[order],
        protected=None if protected is None else protected[order],
    )
