"""Settings of every test run."""

import pytest
import torch
from hypothesis import HealthCheck, settings

# How long an example takes is the machine's other work as much as ours.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Small models are fastest on one thread, and results do not depend on how many cores a machine has."""
    torch.set_num_threads(1)
