"""What a request may take."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from serve.planning.curves import PlanError


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Seconds to the first token, and per token after it, that a request may take."""

    ttft_s: float
    tpot_s: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (value > 0 and np.isfinite(value)):
                raise PlanError(f"the target {name} is {value:g}; it has to be above 0 seconds")
