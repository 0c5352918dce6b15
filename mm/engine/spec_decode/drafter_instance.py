"""A drafter and what it needs of the engine that asks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mm.engine.model_runner import LAST_HIDDEN
from mm.engine.spec_decode.controller import Controller
from mm.errors import IncompatiblePlugin
from mm.plugins.drafter import Drafter, DraftTarget, LoadedDrafter
from mm.plugins.spec import drafter_spec


@dataclass(eq=False)
class DrafterInstance:
    """A drafter of this engine.

    Attributes:
        states: Names of the states that it needs.
        num_top: How many of a row's largest logits it needs the ids of.
    """

    spec: str
    drafter: Drafter
    loaded: LoadedDrafter
    controller: Controller
    states: frozenset[str]
    num_top: int


def load_source(spec: str, family: Any, controller: Controller) -> DrafterInstance:
    """Load a drafter for a model.

    Raises:
        MmError: There is none of that name, or it does not fit the model.
        IncompatiblePlugin: It needs what this engine does not have.
    """
    resolved = drafter_spec(spec)
    drafter = resolved.plugin
    loaded = drafter.load(target_of(family))
    needs: frozenset[str] = getattr(loaded, "needs", drafter.needs)
    states = frozenset(need for need in needs if need == LAST_HIDDEN or need.startswith("hidden:"))
    tops = [int(need.removeprefix("top_ids:")) for need in needs if need.startswith("top_ids:")]
    layers = [int(state.removeprefix("hidden:")) for state in states - {LAST_HIDDEN}]
    unknown = [need for need in needs - states if not need.startswith("top_ids:")]
    unknown += [f"hidden:{layer}" for layer in layers if not 0 <= layer < family.language.num_layers]
    if unknown:
        raise IncompatiblePlugin(spec, "this engine", sorted(unknown))
    return DrafterInstance(
        spec=resolved.canonical,
        drafter=drafter,
        loaded=loaded,
        controller=controller,
        states=states,
        num_top=max(tops, default=0),
    )


def target_of(family: Any) -> DraftTarget:
    """What drafters may know of a model."""
    language = family.language
    return DraftTarget(
        name=str(family.folder),
        vocab_size=language.vocab_size,
        hidden_size=language.head_weight.shape[1],
        num_layers=language.num_layers,
        device=language.device,
        dtype=language.dtype,
        embed=language.embed,
        head_weight=language.head_weight,
        placeholder_ids=family.placeholder_ids,
    )
