"""A plugin ends and holds nothing but its own call."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from mm.config import PluginLimits
from mm.errors import DrafterFault, DrafterOff, InvalidRequest, PluginFault, ReducerFault, ReducerOff
from mm.plugins.calls import PluginCalls
from mm.plugins.threads import THREADS, plugin_errors, while_slow
from tests.helpers.hanging import HANGS, RAISED, RELEASE, misbehave

NAMES = ("Odd",)


@pytest.fixture(autouse=True)
def _released():
    yield
    RELEASE.set()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def calls(clock):
    return PluginCalls(PluginLimits(max_plugin_faults=3, plugin_retry_s=60), clock)


def ask(calls, function=lambda: 1, *, kind="reducer", timeout_s=5.0, **options):
    return calls.call(kind, NAMES, "here", function, timeout_s=timeout_s, **options)


def test_results_and_our_own_errors_pass(calls):
    def refuse():
        raise InvalidRequest("not so")

    assert ask(calls) == 1
    for _ in range(5):
        with pytest.raises(InvalidRequest, match="not so"):
            ask(calls, refuse)
    assert not calls.status().plugins_off


@pytest.mark.parametrize("how", RAISED)
def test_whatever_a_plugin_raises_is_a_fault_of_its_name(calls, how):
    with pytest.raises(ReducerFault, match=f"Odd: failed here: {RAISED[how].__name__}"):
        ask(calls, lambda: misbehave(how))
    assert ask(calls) == 1


def wait_until_none_is_stuck() -> None:
    until = time.monotonic() + 60
    while THREADS.num_stuck and time.monotonic() < until:
        time.sleep(0.01)
    assert not THREADS.num_stuck


@pytest.mark.parametrize("how", HANGS)
def test_a_call_that_does_not_end_is_left_to_itself(calls, how):
    with pytest.raises(ReducerFault, match=r"Odd: took longer than 0\.1 s here"):
        ask(calls, lambda: misbehave(how), timeout_s=0.1)
    assert ask(calls) == 1
    if how == "loops":  # it was stopped, not only left
        wait_until_none_is_stuck()


def test_a_thread_that_clings_is_counted_until_it_ends(calls):
    wait_until_none_is_stuck()
    with pytest.raises(ReducerFault):
        ask(calls, lambda: misbehave("clings"), timeout_s=0.05)
    assert THREADS.num_stuck == 1
    RELEASE.set()
    wait_until_none_is_stuck()


def test_a_plugin_computes_under_the_settings_of_its_caller(calls):
    def settings():
        return torch.is_inference_mode_enabled(), torch.get_num_threads(), threading.current_thread().name

    before = torch.get_num_threads()
    try:
        for num_threads in (2, 1):
            torch.set_num_threads(num_threads)
            assert ask(calls, settings) == (False, num_threads, "plugin")
    finally:
        torch.set_num_threads(before)
    with torch.inference_mode():
        assert ask(calls, settings)[0]
    assert not ask(calls, settings)[0]


def fail(calls, **options):
    with pytest.raises((ReducerFault, PluginFault)):
        ask(calls, lambda: misbehave("exits"), **options)


def test_three_faults_in_a_row_switch_a_plugin_off_until_its_time_comes(calls, clock):
    for _ in range(3):
        fail(calls)
    with pytest.raises(ReducerOff, match=r"off for 60 s more.*failed here: SystemExit") as caught:
        ask(calls)
    assert caught.value.retry_after_s == 60
    (off,) = calls.status().plugins_off
    assert (off.kind, off.name, off.reason, off.retry_in_s) == ("reducer", "Odd", "failed here: SystemExit", 60)
    assert calls.call("reducer", ("Even",), "here", lambda: 2, timeout_s=5) == 2
    clock.now = 61
    assert ask(calls) == 1
    assert not calls.status().plugins_off
    for _ in range(2):
        fail(calls)
    assert ask(calls) == 1, "a call that went well starts the count anew"


def test_a_plugin_that_fails_again_when_it_is_tried_is_off_at_once(calls, clock):
    for _ in range(3):
        fail(calls)
    clock.now = 61
    fail(calls)
    with pytest.raises(ReducerOff):
        ask(calls)


def test_a_call_for_which_all_wait_is_switched_off_the_first_time(calls):
    with pytest.raises(ReducerFault, match="took longer"):
        ask(calls, lambda: misbehave("loops"), timeout_s=0.05, holds_all=True)
    with pytest.raises(ReducerOff):
        ask(calls)


def test_pictures_that_an_encoder_cannot_take_do_not_switch_it_off(calls):
    for _ in range(5):
        fail(calls, kind="encoder")
    assert ask(calls, kind="encoder") == 1
    assert not calls.status().problems


def test_an_encoder_that_hangs_is_a_reason_to_replace_the_process(calls):
    for _ in range(3):
        with pytest.raises(PluginFault, match="took longer"):
            ask(calls, lambda: misbehave("sleeps"), kind="encoder", timeout_s=0.05)
    assert calls.status().problems == ("the encoder Odd took longer than 0.05 s here",)


def test_a_reducer_inside_an_encoder_has_its_own_limit_and_its_own_fault():
    calls = PluginCalls(PluginLimits(reducer_timeout_s=0.1))

    def encode():
        with plugin_errors("Inside", "in the tower"):
            misbehave("loops")

    with pytest.raises(ReducerFault, match=r"Inside: took longer than 0.1 s"):
        ask(calls, encode, kind="encoder", timeout_s=60)


def test_a_drafter_that_is_off_says_so_as_a_drafter(calls):
    for _ in range(3):
        with pytest.raises(DrafterFault):
            ask(calls, lambda: misbehave("exits"), kind="drafter")
    with pytest.raises(DrafterOff):
        ask(calls, kind="drafter")


def test_a_slow_call_gives_its_place_back(calls, monkeypatch):
    monkeypatch.setattr("mm.plugins.calls.SLOW_S", 0.02)
    given = []
    with while_slow(lambda: given.append(1)):
        assert ask(calls) == 1
        assert not given
        assert ask(calls, lambda: time.sleep(0.1) or 3) == 3
    assert given == [1]


def test_the_time_of_a_plugin_is_counted_as_its_callers(calls):
    def work():
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass

    ask(calls, work)
    assert calls.thread_s >= 0.02
