"""Settings of every test run."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Small models are fastest on one thread, and results do not depend on how many cores a machine has."""
    torch.set_num_threads(1)
