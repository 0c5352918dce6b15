"""A drafter that is loaded for one engine, with its controller and what it needs of each step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from mm.engine.spec_decode.controller import Controller
from mm.errors import BrokenPlugin, IncompatiblePlugin, MmError
from mm.models.family import CheckpointFamily
from mm.plugins.drafter import DraftTarget, LoadedDrafter
from mm.plugins.spec import drafter_spec
from mm.plugins.threads import is_interrupt

LAST_HIDDEN = "last_hidden"
"""The state after the final norm, from which the head computes logits. "hidden:3" is the input of layer 3."""


@dataclass(eq=False)
class DrafterInstance:
    """A drafter of this engine.

    Attributes:
        spec: Canonical text of the drafter.
        name: Its registered name, or those of a hybrid.
        loaded: The drafter with its weights.
        controller: Decides when it drafts, and how much of its drafts is verified.
        clock: Seconds, for what drafting costs.
        states: Names of the hidden states that it needs.
        num_top_ids: How many of a token's largest logits it needs the ids of.
        is_lost: A call did not end, and may still change what is loaded: it must not be called any more.
    """

    spec: str
    name: str
    loaded: LoadedDrafter[Any]
    controller: Controller
    clock: Callable[[], float]
    states: frozenset[str]
    num_top_ids: int
    is_lost: bool = False

    @contextlib.contextmanager
    def charged(self) -> Generator[None]:
        """Charge the drafter for the time that the body takes."""
        start = self.clock()
        yield
        self.controller.record_cost(self.clock() - start)


def load_drafter(spec: str, target: DraftTarget, controller: Controller, clock: Callable[[], float]) -> DrafterInstance:
    """Load a drafter for a model.

    Raises:
        MmError: There is no drafter of that name, or it does not fit the model.
        IncompatiblePlugin: It needs states that this engine does not have.
    """
    resolved = drafter_spec(spec)
    drafter = resolved.plugin
    try:
        loaded = drafter.load(target)
    except BaseException as error:
        if isinstance(error, MmError) or is_interrupt(error):
            raise
        raise BrokenPlugin("drafter", spec, f"loading it raised {type(error).__name__}", str(error)) from error
    needs: frozenset[str] = getattr(loaded, "needs", drafter.needs)
    states = frozenset(need for need in needs if need == LAST_HIDDEN or need.startswith("hidden:"))
    top_ids = [int(need.removeprefix("top_ids:")) for need in needs if need.startswith("top_ids:")]
    layers = [int(state.removeprefix("hidden:")) for state in states - {LAST_HIDDEN}]
    unknown = [need for need in needs - states if not need.startswith("top_ids:")]
    unknown += [f"hidden:{layer}" for layer in layers if not 0 <= layer < target.num_layers]
    if unknown:
        raise IncompatiblePlugin(spec, "this engine", sorted(unknown))
    return DrafterInstance(
        spec=resolved.canonical,
        name=" + ".join(part.name for part in resolved.parts),
        loaded=loaded,
        controller=controller,
        clock=clock,
        states=states,
        num_top_ids=max(top_ids, default=0),
    )


def target_of(family: CheckpointFamily) -> DraftTarget:
    """What drafters may know of a model."""
    language = family.language
    return DraftTarget(
        name=str(family.folder),
        vocab_size=language.vocab_size,
        hidden_size=language.config.hidden_size,
        num_layers=language.num_layers,
        device=language.device,
        dtype=language.dtype,
        embed=language.embed,
        head_weight=lambda: language.head_weight,
        placeholder_ids=family.placeholder_ids,
        only_chains=language.kv_cache_spec.has_states,
    )
