"""Checks of single values, shared by every dataclass that a caller fills in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeGuard

from mm.errors import InvalidRequest, shown


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether the value is a finite number. Booleans are not numbers here."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that an option may have.

    Attributes:
        low, high: Bounds; None is no bound.
        excludes_low: Whether `low` itself is outside.
        is_whole: Whether only whole numbers are allowed.
        text: How the range is described, where the bounds do not say it.
    """

    low: float | None = None
    high: float | None = None
    excludes_low: bool = False
    is_whole: bool = False
    text: str | None = None

    def __contains__(self, value: object) -> bool:
        if not is_number(value) or (self.is_whole and not isinstance(value, int)):
            return False
        if self.low is not None and (value <= self.low if self.excludes_low else value < self.low):
            return False
        return self.high is None or value <= self.high

    def __str__(self) -> str:
        return f"a whole number, {self._bounds()}" if self.is_whole else self._bounds()

    def _bounds(self) -> str:
        if self.text is not None:
            return self.text
        if self.low is None:
            return "of any size" if self.high is None else f"at most {self.high:g}"
        if self.high is None:
            return f"above {self.low:g}" if self.excludes_low else f"at least {self.low:g}"
        low, high = f"{self.low:g}", f"{self.high:g}"
        return f"above {low} and at most {high}" if self.excludes_low else f"from {low} to {high}"

    def check(self, name: str, value: object) -> None:
        """Refuse a value outside of the range. None passes.

        Raises:
            InvalidRequest: Names the option, the value and what is allowed.
        """
        if value is not None and value not in self:
            raise InvalidRequest(f"{name} was {shown(value)}; it has to be {self}", name)
