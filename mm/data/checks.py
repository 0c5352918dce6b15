"""Checks of single values, shared by every dataclass that a caller fills in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mm.errors import InvalidRequest


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def check_number(name: str, value: Any, allowed: str, holds: Callable[[Any], bool]) -> None:
    if value is not None and not (is_number(value) and holds(value)):
        raise InvalidRequest(f"{name} was {shown(value)}; it has to be {allowed}", name)


def check_integer(name: str, value: Any, allowed: str, holds: Callable[[Any], bool]) -> None:
    check_number(name, value, f"a whole number, {allowed}", lambda x: isinstance(x, int) and holds(x))
