"""A Ray that does not start is tried again, ends in one line, and leaves no process; what may not start does not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

BUSY = "Ray's raylet ended: Timed out waiting for file metrics_agent_port"


class FakeNode:
    """A node whose first starts fail."""

    def __init__(self, failures: list[str]) -> None:
        self.failures, self.num_closed, self.failure = failures, 0, None

    def __call__(self, options: dict[str, Any], on_end: Any) -> FakeNode:
        from serve.deployments.node import RayDidNotStart

        if self.failures and (reason := self.failures.pop(0)):
            raise RayDidNotStart(reason)
        return self

    def close(self) -> None:
        self.num_closed += 1


@pytest.fixture
def node(monkeypatch):
    from serve.deployments import node

    monkeypatch.setattr(node, "PAUSE_S", 0.0)
    return node


def test_a_start_that_failed_is_tried_again(node, monkeypatch, caplog):
    fake = FakeNode([BUSY, BUSY, ""])
    monkeypatch.setattr(node, "Node", fake)
    assert node.start({}, lambda: None, lambda _: None) is fake
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [BUSY, BUSY]
    assert fake.num_closed == 0


def test_a_node_that_cannot_be_used_is_closed_before_the_next_attempt(node, monkeypatch):
    fake = FakeNode([])
    monkeypatch.setattr(node, "Node", fake)
    errors = [TimeoutError("HTTP proxies not available after 60s.\nTraceback (most recent call last):\n  ...")]

    def use(_: Any) -> None:
        if errors:
            raise errors.pop()

    assert node.start({}, lambda: None, use) is fake
    assert fake.num_closed == 1


def test_a_machine_on_which_no_attempt_succeeds_is_told_so_in_one_line(node, monkeypatch):
    monkeypatch.setattr(node, "Node", FakeNode([BUSY] * node.ATTEMPTS))
    with pytest.raises(node.RayDidNotStart) as error:
        node.start({}, lambda: None, lambda _: None)
    assert "\n" not in str(error.value)
    assert all(text in str(error.value) for text in (BUSY, f"{node.ATTEMPTS} attempts", "mm serve --in-process"))


def test_an_interrupted_start_leaves_no_node(node, monkeypatch):
    fake = FakeNode([])
    monkeypatch.setattr(node, "Node", fake)

    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        node.start({}, lambda: None, interrupted)
    assert fake.num_closed == 1


def test_a_node_that_cannot_start_says_why_at_once(node):
    """Ray refuses the option; the process that tried is gone when the error arrives."""
    with pytest.raises(node.RayDidNotStart, match="object store"):
        node.Node({"object_store_memory": 1}, lambda: None)


def test_errors_of_rays_processes_are_found_in_their_logs(node):
    line = (
        "[2026-11-30 14:47:11,884 C 8991 8991] (raylet) node_manager.cc:3576:  An unexpected system state has "
        "occurred. Check failed: statussetor3576.has_value() Timed out waiting for file /tmp/ray/metrics_agent_port"
    )
    assert node.LOGGED_ERROR.match(line)
    assert not node.LOGGED_ERROR.match(line.replace(" C 8991", " I 8991"))


def test_marked_processes_are_found_whoever_their_parent_is():
    from serve.deployments.processes import MARK, kill_marked, marked

    mark = f"test-{os.getpid()}"
    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{SLEEP}'], start_new_session=True)"
    for code in (SLEEP, orphan):
        subprocess.Popen([sys.executable, "-c", code], env=os.environ | {MARK: mark}).returncode = 0
    other = subprocess.Popen([sys.executable, "-c", SLEEP], env=os.environ | {MARK: mark + "0"})
    try:
        deadline = time.monotonic() + 30
        while sum("sleep" in process.cmdline()[-1] for process in marked(mark)) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        kill_marked(mark)
        assert not list(marked(mark))
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


SLEEP = "import time; time.sleep(60)"


@pytest.mark.parametrize(("host", "mode"), [("0.0.0.0", "disabled"), ("192.0.2.7", ""), ("::", "off")])
def test_a_ray_without_token_is_refused_on_a_server_for_others(monkeypatch, host, mode):
    from serve.deployments.environment import UnsafeRay, prepare_environment

    monkeypatch.setattr(os, "environ", {"RAY_AUTH_MODE": mode})
    with pytest.raises(UnsafeRay, match=r"RAY_AUTH_MODE.*127\.0\.0\.1"):
        prepare_environment(host)


def test_each_server_has_a_token_of_its_own_unless_one_is_given(monkeypatch):
    from serve.deployments.environment import prepare_environment

    def token_in(**given: str) -> str | None:
        monkeypatch.setattr(os, "environ", dict(given))
        prepare_environment("0.0.0.0")
        assert os.environ["RAY_AUTH_MODE"] == "token"
        return os.environ.get("RAY_AUTH_TOKEN")

    first, second = token_in(), token_in()
    assert first
    assert second
    assert first != second
    assert token_in(RAY_AUTH_TOKEN="ours") == "ours"
    assert token_in(RAY_AUTH_TOKEN_PATH="/run/token") is None
