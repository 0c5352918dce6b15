"""One small Ray for all tests of the deployments, and the same application without it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from mm.config import ModelConfig
from serve.config import ServeConfig


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def config() -> ServeConfig:
    """In float32, in which the tokens of a request do not depend on what else is computed."""
    return ServeConfig(
        model=ModelConfig(dtype="float32"), port=free_port(), ray_cpus=4, object_store_bytes=200 << 20, max_choices=4
    )


@pytest.fixture(scope="session")
def on_ray(config: ServeConfig) -> Iterator[str]:
    """The address of the application on Ray."""
    from serve.deployments.launch import serving

    with serving(config):
        yield f"http://{config.host}:{config.port}"
