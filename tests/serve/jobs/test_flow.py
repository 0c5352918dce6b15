from __future__ import annotations

import threading
import time

import pytest

from serve.jobs.flow import prefetched


def test_closing_drops_what_was_not_begun():
    begun, go = [], threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item:
            go.wait(10)
        return item

    results = prefetched(range(9), work, num_ahead=5)
    assert next(results) == 0
    threading.Timer(0.05, go.set).start()
    results.close()
    assert begun in ([0], [0, 1])


def test_a_fault_of_the_work_comes_out_where_its_result_would():
    results = prefetched([1, 2, 0, 4], lambda item: 1 / item, num_ahead=2)
    assert [next(results), next(results)] == [1.0, 0.5]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_nothing_else_is_done_while_the_next_result_may_still_come():
    calls = []

    def work(item: int) -> int:
        time.sleep(0.02)
        return item

    def meanwhile() -> bool:
        calls.append(1)
        return True

    assert list(prefetched(range(3), work, 1, meanwhile=meanwhile, patience_s=lambda: None)) == [0, 1, 2]
    assert not calls
    assert list(prefetched(range(3), work, 1, meanwhile=meanwhile)) == [0, 1, 2]
    assert calls
