"""Carries out a reducer's decision: the one place where visual tokens become fewer.

A reducer says which tokens stay and how they merge; embeddings, positions and sizes follow here, so no reducer can move
one of them and forget another. What comes back is checked before it reaches a prompt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from mm.data.tokens import VisualTokens
from mm.errors import IncompatiblePlugin, ReducerFault
from mm.plugins.capabilities import acts_before_decoder, acts_outside_decoder, parts_of, plans_tokens, rewrites
from mm.plugins.finite import finite
from mm.plugins.reducer import BeforeDecoder, ReduceContext, Reducer, Reduction
from mm.plugins.registry import name_of
from mm.plugins.threads import plugin_errors

ROW_SUM_TOLERANCE = 1e-3


def reduce_tokens(
    reducer: Reducer, tokens: VisualTokens, text_embeddings: Tensor | None = None, clip_text: Tensor | None = None
) -> VisualTokens:
    """The tokens that `reducer` leaves of one item, without auxiliary features.

    Args:
        text_embeddings, clip_text: See `ReduceContext`.

    Raises:
        ReducerFault: The reducer broke its promise (see `apply`), kept another number of tokens than its plan says, or
            gave new embeddings without declaring that it `rewrites`.
    """
    if not acts_outside_decoder(reducer):
        return tokens.without_aux_features()
    name = name_of(reducer)
    context = ReduceContext(aux_features=tokens.aux_features, text_embeddings=text_embeddings, clip_text=clip_text)
    reduced, planned = tokens.without_aux_features(), tokens.num_tokens
    with plugin_errors(name, "before the decoder"):
        if acts_before_decoder(reducer):
            reduction = cast(BeforeDecoder, reducer).after_encode(tokens, context)
            if reduction.embeddings is not None and not any(map(rewrites, parts_of(reducer))):
                raise ReducerFault(name, "gave new embeddings; declare rewrites = True, or leave them out")
            reduced = apply(reduction, tokens, name)
        for part in plans_tokens(reducer):
            planned = part.plan(planned, tokens.grid, tokens.kind)
    kept = reduced.num_tokens
    if kept > planned or (kept < planned and reducer.count == "fixed"):
        raise ReducerFault(name, f"kept {kept} of {tokens.num_tokens} tokens, but its plan says {planned}")
    return reduced


def apply(reduction: Reduction, tokens: VisualTokens, owner: str = "the reducer") -> VisualTokens:
    """`tokens` after `reduction`, on every per-token plane; auxiliary features are dropped, the input stays as it was.

    Tokens that are not finite are not kept (`mm.plugins.finite`). Kept rows are gathered unchanged. Merged rows are
    computed in float32 and cast to the tokens' dtype at the end.

    Args:
        owner: Named in errors.

    Raises:
        ReducerFault: `keep` is not a non-empty, strictly ascending int64 vector of token indices; the merge weights
            are of a wrong shape, negative, not finite or do not sum to 1 in a row; the sizes are of a wrong shape or
            not positive; there are fewer finite tokens than it keeps.
        IncompatiblePlugin: The reduction rewrites the embeddings of tokens that have planes for further layers.
    """
    _check(reduction, tokens, owner)
    reduction = finite(reduction, tokens, owner)
    keep, planes = reduction.keep, tokens.layer_planes
    if planes is not None:
        planes = _planes(reduction, planes, owner)
    embeddings = tokens.embeddings.index_select(0, keep) if reduction.merge is None else _merge(reduction.merge, tokens)
    sizes = tokens.sizes.index_select(0, keep) if reduction.sizes is None else reduction.sizes
    protected = reduction.protected
    if protected is None and tokens.protected is not None:
        protected = tokens.protected.index_select(0, keep)
    placement = reduction.placement
    if placement is None and tokens.placement is not None:
        placement = tokens.placement.take(keep)
    return replace(
        tokens,
        embeddings=embeddings if reduction.embeddings is None else reduction.embeddings,
        positions=tokens.positions.index_select(0, keep),
        sizes=sizes,
        protected=protected,
        layer_planes=planes,
        aux_features={},
        placement=placement,
        borders=reduction.borders or tokens.borders,
    )


def rewritten(reduction: Reduction, like: VisualTokens, num_steps: int) -> VisualTokens:
    """What `apply` gives for a clip of `num_steps` steps whose tokens were never all there.

    Args:
        reduction: With embeddings and sizes of its own.
        like: Tokens of some of the clip's steps.
    """
    _, height, width = like.grid
    keep, area = reduction.keep, height * width
    assert reduction.embeddings is not None
    assert reduction.sizes is not None
    cells = torch.stack([keep // area, keep % area // width, keep % width], dim=1)
    return VisualTokens(
        embeddings=reduction.embeddings,
        positions=cells,
        sizes=reduction.sizes,
        grid=(num_steps, height, width),
        kind=like.kind,
        placement=reduction.placement,
        borders=reduction.borders,
    )


def _merge(weights: Tensor, tokens: VisualTokens) -> Tensor:
    return (weights.float() @ tokens.embeddings.float()).to(tokens.embeddings.dtype)


def _planes(reduction: Reduction, planes: Tensor, owner: str) -> Tensor:
    """The planes (L, N, D) of the first layers after a reduction: they go with the tokens."""
    if reduction.embeddings is not None:
        missing = "tokens without further planes for the first layers, which a reducer that rewrites tokens cannot make"
        raise IncompatiblePlugin(owner, "this model", [missing])
    if reduction.merge is None:
        return planes.index_select(1, reduction.keep)
    return torch.stack([(reduction.merge.float() @ plane.float()).to(plane.dtype) for plane in planes])


def _check(reduction: Reduction, tokens: VisualTokens, owner: str) -> None:
    keep, num_tokens = reduction.keep, tokens.num_tokens
    if keep.dtype != torch.int64 or keep.dim() != 1:
        raise ReducerFault(owner, f"keep has to be an int64 vector, not {keep.dtype} of shape {tuple(keep.shape)}")
    num_kept = keep.shape[0]
    if num_kept == 0 and num_tokens:
        raise ReducerFault(owner, f"kept none of {num_tokens} tokens; at least one has to stay")
    for name, plane, shape in (
        ("merge", reduction.merge, (num_kept, num_tokens)),
        ("sizes", reduction.sizes, (num_kept,)),
        ("protected", reduction.protected, (num_kept,)),
        ("embeddings", reduction.embeddings, (num_kept, tokens.embeddings.shape[1])),
        ("placement", reduction.placement and reduction.placement.offsets, (num_kept,)),
    ):
        if plane is not None and tuple(plane.shape) != shape:
            raise ReducerFault(owner, f"{name} has to be of shape {shape}, not {tuple(plane.shape)}")
    if num_kept:
        _check_values(reduction, num_tokens, owner)


def _check_values(reduction: Reduction, num_tokens: int, owner: str) -> None:
    keep = reduction.keep
    checks = {
        f"keep names a token outside 0..{num_tokens - 1}": (keep[0] >= 0) & (keep.amax() < num_tokens),
        "keep is not strictly ascending": (keep[1:] > keep[:-1]).all(),
    }
    if reduction.merge is not None:
        weights = reduction.merge.coalesce().values() if reduction.merge.is_sparse else reduction.merge
        rows = torch.sum(reduction.merge.float(), dim=1)
        rows = rows.to_dense() if rows.is_sparse else rows
        checks["merge weights are negative or not finite"] = (torch.isfinite(weights) & (weights >= 0)).all()
        checks["merge weights do not sum to 1 in every row"] = ((rows - 1).abs() <= ROW_SUM_TOLERANCE).all()
    if reduction.sizes is not None:
        checks["sizes are not positive and finite"] = (torch.isfinite(reduction.sizes) & (reduction.sizes > 0)).all()
    # Stacked, so that a GPU is waited for once per item and not once per check.
    flags = torch.stack(list(checks.values()))
    passed = cast("list[bool]", flags.tolist())  # pyright: ignore[reportUnknownMemberType]
    for text, has_passed in zip(checks, passed, strict=True):
        if not has_passed:
            raise ReducerFault(owner, text)
