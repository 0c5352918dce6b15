"""What a Ray that cannot start says."""

from __future__ import annotations

import pytest

from serve.config import ServeConfig

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_a_node_that_does_not_come_up_is_an_error_that_says_what_to_do(monkeypatch):
    import ray

    from serve.deployments.application import RayDidNotStart, serving

    def timed_out(**options):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", timed_out)
    with pytest.raises(RayDidNotStart, match=r"timed out during startup.*--in-process"), serving(ServeConfig()):
        raise AssertionError("nothing is served")
