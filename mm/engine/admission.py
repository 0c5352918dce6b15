"""Whether an engine accepts another request."""

from __future__ import annotations

from mm.engine.scheduler import Scheduler, SchedulerConfig
from mm.engine.stats import Counters
from mm.errors import CapacityError

MAX_RETRY_S = 60


class AdmissionControl:
    """Refuses requests when too many wait, or when the engine is draining. What can run at the next step does not wait.

    Args:
        counters: Where the engine counts its steps, for the estimate of when to try again.
    """

    def __init__(self, config: SchedulerConfig, scheduler: Scheduler, counters: Counters) -> None:
        self._config, self._scheduler, self._counters = config, scheduler, counters
        self.is_draining = False

    def check(self, num_arrivals: int) -> None:
        """Refuse a request that there is no room for.

        Args:
            num_arrivals: Requests that are not in the scheduler's queue yet.

        Raises:
            CapacityError: Says when to try again.
        """
        if self.is_draining:
            raise CapacityError("the server is being stopped; ask another one", 5)
        num_free = max(0, self._config.max_num_seqs - len(self._scheduler.running))
        num_waiting = len(self._scheduler.waiting) + num_arrivals
        if num_waiting >= self._config.max_waiting + num_free:
            raise CapacityError(f"{num_waiting} requests are waiting already; try again shortly", self._retry_after_s())

    def _retry_after_s(self) -> int:
        """An estimate: one step for each waiting sequence."""
        step_s = self._counters.step_s / max(1, self._counters.num_steps)
        return max(1, min(MAX_RETRY_S, round(step_s * len(self._scheduler.waiting))))
