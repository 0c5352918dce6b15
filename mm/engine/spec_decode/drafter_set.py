"""The drafters of one engine: which a request gets, and how they are called.

Only a drafter's own methods run outside the engine's thread, see `mm.plugins.calls`. A call that does not end may still
change what the drafter has loaded. So that drafter is lost: its sequences go on without drafts, and it is loaded anew
when it is tried again.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TypeVar

from mm.config import SpeculationLimits
from mm.engine.spec_decode.controller import Controller
from mm.engine.spec_decode.cost_model import CostModel
from mm.engine.spec_decode.drafter_instance import DrafterInstance, load_drafter
from mm.errors import DrafterFault, InvalidRequest, MmError
from mm.plugins.calls import PluginCalls
from mm.plugins.drafter import DraftTarget
from mm.plugins.spec import drafter_spec

T = TypeVar("T")


class Drafters:
    """All drafters that the operator offers, loaded for one target.

    Args:
        limits: What the operator allows.
        costs, clock: For the controllers.
        calls: Calls the drafters.
    """

    def __init__(
        self,
        target: DraftTarget,
        limits: SpeculationLimits,
        costs: CostModel,
        clock: Callable[[], float],
        calls: PluginCalls,
    ) -> None:
        self._target, self._limits, self._costs, self._clock, self._calls = target, limits, costs, clock, calls
        drafters = [self._load(spec) for spec in limits.offered]
        self._by_spec = {drafter.spec: drafter for drafter in drafters}
        self._default = drafter_spec(limits.drafter).canonical
        self._lock = threading.Lock()

    def _load(self, spec: str) -> DrafterInstance:
        return load_drafter(spec, self._target, Controller(self._costs), self._clock)

    @property
    def active(self) -> list[DrafterInstance]:
        """Those that can draft."""
        return [one for one in self._by_spec.values() if one.spec != "none" and not one.is_lost]

    def get(self, text: str | None) -> DrafterInstance | None:
        """The drafter that a request names, or the default one. None instead of a default one that is switched off.

        Raises:
            InvalidRequest: The operator does not offer it.
            DrafterOff: It failed again and again.
        """
        drafter = self._by_spec[self._default] if text is None else self._named(text)
        try:
            self._calls.check("drafter", (drafter.name,))
            return self._loaded_anew(drafter.spec) if drafter.is_lost else drafter
        except DrafterFault:
            if text is not None:
                raise
            return None

    def _named(self, text: str) -> DrafterInstance:
        try:
            wanted = drafter_spec(text).canonical
        except MmError as error:
            raise InvalidRequest(f"speculation.drafter: {error}", "speculation.drafter") from None
        if wanted not in self._by_spec:
            allowed = ", ".join(self._limits.offered)
            raise InvalidRequest(
                f"speculation.drafter was {text!r}; this server allows: {allowed}", "speculation.drafter"
            )
        return self._by_spec[wanted]

    def _loaded_anew(self, spec: str) -> DrafterInstance:
        with self._lock:
            drafter = self._by_spec[spec]
            if drafter.is_lost:
                load, limit_s = functools.partial(self._load, spec), self._calls.limits.family_timeout_s
                drafter = self._calls.call("drafter", (drafter.name,), "while it was loaded", load, timeout_s=limit_s)
                self._by_spec = {**self._by_spec, spec: drafter}
            return drafter

    def call(self, drafter: DrafterInstance, method: str, function: Callable[[], T]) -> T:
        """Call a drafter inside a step.

        Raises:
            DrafterFault: It failed, took too long, or is switched off.
        """
        limit_s = self._calls.limits.step_timeout_s
        try:
            return self._calls.call(
                "drafter", (drafter.name,), f"in {method}", function, timeout_s=limit_s, holds_all=True
            )
        except DrafterFault as error:
            drafter.is_lost = drafter.is_lost or error.is_over
            raise
