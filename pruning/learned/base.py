"""What learned reducers share: weights that are bound to options, and the network made of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import nn

from mm.errors import InvalidOption
from mm.plugins.weights import ReducerWeights
from pruning.base import BaseReducer


def started(card: Mapping[str, Any], build: Callable[[ReducerWeights], nn.Module]) -> ReducerWeights:
    """Weights as a training starts with: those that the network is born with.

    Args:
        card: What the card says, `reducer` included.
        build: Builds the network of such a card.
    """
    name = str(card["reducer"])
    empty = ReducerWeights(reducer=name, name=name, card=card, tensors={}, fingerprint="untrained")
    return replace(empty, tensors=dict(build(empty).state_dict()))


@dataclass(frozen=True, kw_only=True)
class LearnedReducer(BaseReducer):
    """A reducer with weights. A subclass gives `name` and `weights`, and writes `build` and `defaults`.

    An option of None is left open: `resolve` takes the value that the weights were trained for.

    Attributes:
        weights: Which weights: a name beside the model, a folder, or a hub name.
    """

    name: ClassVar[str]
    trained: ClassVar[bool] = True
    weights: str

    @staticmethod
    def build(weights: ReducerWeights) -> nn.Module:
        """The network that the card describes, with any weights.

        Raises:
            BadWeights: The card says something that cannot be built.
        """
        raise NotImplementedError

    def resolve(self, weights: ReducerWeights) -> Mapping[str, Any]:
        """Values of the options that depend on the weights, such as those that were left open.

        Raises:
            InvalidOption: An option asks for what these weights cannot do.
        """
        return {}

    @property
    def loaded(self) -> ReducerWeights | None:
        return vars(self).get("_loaded")

    def bind(self, weights: ReducerWeights) -> Self:
        bound = copy.copy(self)
        object.__setattr__(bound, "_loaded", weights)
        object.__setattr__(bound, "_network", weights.network(lambda: self.build(weights)))
        for name, value in {**self.resolve(weights), "weights": weights.pinned}.items():
            object.__setattr__(bound, name, value)
        return bound

    @property
    def network(self) -> nn.Module:
        """The network with its weights.

        Raises:
            InvalidOption: `bind` was not called.
        """
        found = vars(self).get("_network")
        if found is None:
            raise InvalidOption(
                self.name, "weights", "has to be bound to a model before the reducer is used: mm.plugins.spec.bind"
            )
        return found
