"""Why a replica could not start, from what Ray Serve says of an application."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from serve.config import ServeConfig

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

TRACEBACK = """Failed to update the deployments: Deployment 'Decoder' in app 'mm' could not start; error:
ray::ServeReplica:mm:Decoder.initialize_and_get_metadata()
  File "serve/deployments/decoder.py", line 70, in __init__
{error}
"""
OURS = "mm.models.folder.BadCheckpoint: the model folder lacks weights"


def state(status: str, message: str) -> SimpleNamespace:
    waiting = SimpleNamespace(status="UPDATING", message=message)
    return SimpleNamespace(status=status, message="", deployments={"Ingress": waiting, "Decoder": waiting})


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (TRACEBACK.format(error=OURS), "the model folder lacks weights"),
        (TRACEBACK.format(error="ValueError: first\n\nRuntimeError: then"), "then"),
        (TRACEBACK.format(error="torch.OutOfMemoryError: CUDA out of memory"), "CUDA out of memory"),
        ("the replicas load", ""),
    ],
)
def test_the_last_error_of_a_traceback_is_the_reason(message, reason):
    from serve.deployments import launch

    assert launch._replica_error(state("DEPLOYING", message)) == reason


def test_an_error_is_told_while_ray_tries_again_once_and_ends_the_start_at_last(monkeypatch, caplog):
    from serve.deployments import launch
    from serve.deployments.node import RayDidNotStart

    loading, failing = state("DEPLOYING", ""), state("DEPLOYING", TRACEBACK.format(error=OURS))
    states = iter([None, loading, failing, failing, state("DEPLOY_FAILED", TRACEBACK.format(error=OURS))])
    monkeypatch.setattr(launch, "_state", lambda _: next(states))
    monkeypatch.setattr(launch, "POLL_S", 0)
    monkeypatch.setattr(launch, "ray_serve", Mock())
    monkeypatch.setattr(launch, "build_application", Mock())
    monkeypatch.setattr(launch.cluster, "nodes", list)
    with pytest.raises(RayDidNotStart, match="lacks weights"):
        launch._deploy(ServeConfig(), None)
    assert [one.message for one in caplog.records if "lacks weights" in one.message] == [
        "a replica could not start, and Ray tries again: the model folder lacks weights"
    ]
