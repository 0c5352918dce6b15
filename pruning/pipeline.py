"""Several reducers as one.

Each part sees what the part before it left. The parts that act before the decoder are composed into one decision; the
engine calls the others at their stages, see `mm.plugins.capabilities`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mm.data.media import Kind
from mm.data.tokens import Grid, VisualTokens
from mm.errors import InvalidOption
from mm.plugins.apply import apply
from mm.plugins.capabilities import Capabilities, before_decoder, capabilities_of, plans_tokens
from mm.plugins.finite import finite
from mm.plugins.reducer import Count, ReduceContext, Reducer, Reduction, Stage
from mm.plugins.registry import name_of
from mm.plugins.threads import plugin_errors
from pruning.base import NoReduction, keep_all

ORDER = tuple(Stage)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Several reducers, one after the other: each sees what the one before it left.

    Attributes:
        stages: At least one reducer, in the order in which tokens meet them. Pipelines among them are unfolded.
    """

    stages: tuple[Reducer, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.stages, list | tuple) or not self.stages:
            raise InvalidOption(
                "pipeline", "stages", f"has to be a tuple of reducers, got {self.stages!r}; write a + b"
            )
        for stage in self.stages:
            if not isinstance(stage, Reducer):
                raise InvalidOption("pipeline", "stages", f"takes only reducers, got {stage!r}")
        flat = (inner for stage in self.stages for inner in (stage.stages if isinstance(stage, Pipeline) else (stage,)))
        object.__setattr__(self, "stages", tuple(flat))
        self._check_order()
        self._check_grids()

    def _check_order(self) -> None:
        """A part that acts at several stages is ordered by its first."""
        order = [ORDER.index(stage.acts_at[0]) for stage in self.stages]
        if order != sorted(order):
            names = " + ".join(f"{name_of(stage)} ({stage.acts_at[0].value})" for stage in self.stages)
            message = f"are in an order in which tokens do not meet them: {names}; put earlier stages first"
            raise InvalidOption("pipeline", "stages", message)

    def _check_grids(self) -> None:
        removing = [stage for stage in self.stages if not isinstance(stage, NoReduction)]
        for stage in removing[1:]:
            if getattr(stage, "needs_grid", False):
                message = (
                    f"put {name_of(stage)}, which needs every cell of the grid, after "
                    f"{name_of(removing[0])}, which removes some; let it come first"
                )
                raise InvalidOption("pipeline", "stages", message)

    @cached_property
    def _capabilities(self) -> Capabilities:
        return capabilities_of(self)

    @property
    def acts_at(self) -> tuple[Stage, ...]:
        return self._capabilities.stages

    @property
    def needs(self) -> frozenset[str]:
        return self._capabilities.needs

    @property
    def query_aware(self) -> bool:
        return self._capabilities.query_aware

    @property
    def count(self) -> Count:
        return self._capabilities.count

    def plan(self, num_tokens: int, grid: Grid | None = None, kind: Kind = "image") -> int:
        for stage in plans_tokens(self):
            num_tokens = stage.plan(num_tokens, grid, kind)
        return num_tokens

    def after_encode(self, tokens: VisualTokens, context: ReduceContext) -> Reduction:
        total, num_tokens = keep_all(tokens), tokens.num_tokens
        aux_features = dict(context.aux_features)
        for stage in before_decoder(self):
            with plugin_errors(name_of(stage), "before the decoder"):
                decision = stage.after_encode(tokens, replace(context, aux_features=aux_features))
                reduction = finite(decision, tokens, name_of(stage))
            aux_features = {
                name: _follow(plane, reduction.keep, tokens.num_tokens) for name, plane in aux_features.items()
            }
            tokens = replace(apply(reduction, tokens, name_of(stage)), aux_features=aux_features)
            total = _compose(total, reduction, tokens, num_tokens)
        return total


def _follow(plane: Tensor, keep: Tensor, num_tokens: int) -> Tensor:
    """The auxiliary features of the kept tokens: their own, also where others were merged into them."""
    per_token = plane.dim() > 0 and plane.shape[-1] == num_tokens
    return plane.index_select(-1, keep) if per_token else plane


def _compose(first: Reduction, then: Reduction, left: VisualTokens, num_tokens: int) -> Reduction:
    """One decision about `num_tokens` tokens that equals `first` and `then`, which leave the tokens `left`."""
    if first.embeddings is not None or then.embeddings is not None:
        return Reduction(
            keep=first.keep.index_select(0, then.keep),
            sizes=left.sizes,
            protected=left.protected,
            embeddings=left.embeddings,
            placement=left.placement,
            borders=left.borders,
        )
    merged = first.merge is not None or then.merge is not None
    resized = first.sizes is not None or then.sizes is not None
    return Reduction(
        keep=first.keep.index_select(0, then.keep),
        # Sparse again, so that a row that is not finite spoils only the mean it is part of.
        merge=(_weights(then, first.keep.shape[0]) @ _weights(first, num_tokens)).to_sparse() if merged else None,
        sizes=left.sizes if resized else None,
        protected=left.protected,
    )


def _weights(reduction: Reduction, num_tokens: int) -> Tensor:
    """(k, num_tokens) float32: the decision as a dense matrix; a selection has a single 1 in each row."""
    if reduction.merge is not None:
        return (reduction.merge.to_dense() if reduction.merge.is_sparse else reduction.merge).float()
    return torch.nn.functional.one_hot(reduction.keep, num_tokens).float()
