"""A plugin that hangs or wants to end the process costs its own request, over HTTP; the server says what is off."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from mm.config import ModelConfig, PluginLimits, SpeculationLimits
from serve.api.routes import create_app
from serve.config import ServeConfig
from serve.stages import build_local_runtime
from tests.helpers.distributions import on_path, write_distribution
from tests.helpers.hanging import BAD, DRAFTERS, HANGS, RAISED, REDUCERS, RELEASE

PATH = "/v1/chat/completions"
SHORT = PluginLimits(encoder_timeout_s=30, reducer_timeout_s=0.2, step_timeout_s=0.2, plugin_retry_s=0.001)
METHODS = ("open", "propose", "observe", "close")


@pytest.fixture(scope="module", autouse=True)
def strangers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strangers")
    write_distribution(folder, "strangers", {"reducer": REDUCERS, "drafter": DRAFTERS})
    with on_path(folder):
        yield


@pytest.fixture(autouse=True)
def _released():
    BAD.set()
    yield
    RELEASE.set()
    BAD.clear()


class Server:
    """A server in this process, and a client of it."""

    def __init__(self, runtime: Any, client: httpx.AsyncClient) -> None:
        self.runtime, self.client = runtime, client

    async def answer(self, body: dict[str, Any]) -> httpx.Response:
        return await self.client.post(PATH, json={"temperature": 0, "max_tokens": 8} | body)

    async def health(self) -> tuple[int, dict[str, Any]]:
        response = await self.client.get("/health")
        return response.status_code, response.json()


def build(plugins: PluginLimits = SHORT, **options: Any) -> tuple[Any, Any]:
    config = ServeConfig(model=ModelConfig(dtype="float32", num_threads=1, plugins=plugins, **options))
    runtime = build_local_runtime(config)
    return runtime, create_app(runtime, config)


@asynccontextmanager
async def client_of(runtime: Any, app: Any):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
        yield Server(runtime, client)


@asynccontextmanager
async def serving(**options: Any):
    runtime, app = build(**options)
    try:
        async with client_of(runtime, app) as server:
            yield server
    finally:
        RELEASE.set()
        runtime.close()


@pytest.fixture(scope="module")
def shared():
    """One server for all reducers: none of them is switched off for longer than a moment."""
    runtime, app = build()
    yield runtime, app
    RELEASE.set()
    runtime.close()


@pytest.fixture
def picture(ask, image_url):
    """A question about a picture, with fields added."""

    def body(**fields: Any) -> dict[str, Any]:
        return ask(
            [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": "What?"}], **fields
        )

    return body


@pytest.mark.parametrize("how", [*RAISED, *HANGS])
@pytest.mark.parametrize("name", REDUCERS)
async def test_a_reducer_costs_its_own_request(shared, picture, name, how) -> None:
    async with client_of(*shared) as server:
        bad = await server.answer(picture(vision={"reducer": f"{name}:how={how}"}))
        error = bad.json()["error"]
        reason = RAISED[how].__name__ if how in RAISED else "took longer than 0.2 s"
        assert reason in error["message"]
        assert name in error["message"].lower()
        assert bad.status_code in (400, 500)
        good = await server.answer(picture())
        assert good.status_code == 200
        assert (await server.health())[0] == 200


async def test_two_looping_reducers_hold_no_other_picture(picture, monkeypatch) -> None:
    monkeypatch.setattr("mm.plugins.calls.SLOW_S", 0.05)
    async with serving(plugins=PluginLimits(reducer_timeout_s=300)) as server:
        stuck = [
            asyncio.create_task(server.answer(picture(vision={"reducer": "projected:how=sleeps"}))) for _ in range(3)
        ]
        good = await asyncio.wait_for(server.answer(picture()), 60)
        assert good.status_code == 200
        assert not any(task.done() for task in stuck)
        RELEASE.set()
        assert [(await task).status_code for task in stuck] == [200] * 3


async def test_a_reducer_that_fails_again_and_again_is_off_by_name_and_comes_back(picture) -> None:
    limits = PluginLimits(plugin_retry_s=60)
    async with serving(plugins=limits) as server:
        bad = picture(vision={"reducer": "projected:how=exits"})
        statuses = [(await server.answer(bad)).status_code for _ in range(3)]
        assert statuses == [500] * 3
        off = await server.answer(bad)
        assert (off.status_code, off.json()["error"]["code"]) == (503, "reducer_off")
        assert "SystemExit" in off.json()["error"]["message"]
        assert 0 < int(off.headers["retry-after"]) <= 60
        status, health = await server.health()
        assert (status, health["status"]) == (200, "ok")
        (shown,) = health["plugins_off"]
        assert (shown["kind"], shown["name"]) == ("reducer", "projected")
        metrics = (await server.client.get("/metrics")).text
        assert 'mm:plugin_off{kind="reducer",model_name="tiny",name="projected"} 1.0' in metrics
        assert (await server.answer(picture())).status_code == 200
        calls = server.runtime._encoder.status.__self__
        calls._clock = lambda now=calls._clock: now() + 61
        assert (await server.answer(picture(vision={"reducer": "projected:how=fine"}))).status_code == 200
        assert "plugins_off" not in (await server.health())[1]


@pytest.mark.parametrize("how", ["exits", "loops", "sleeps"])
@pytest.mark.parametrize("method", METHODS)
async def test_a_drafter_costs_its_sequences_their_drafts(ask, method, how) -> None:
    drafter = f"stuck:how={how},method={method}"
    limits = PluginLimits(step_timeout_s=0.2, max_plugin_faults=1, plugin_retry_s=60)
    speculation = SpeculationLimits(drafters=(drafter,), control=False)
    async with serving(plugins=limits, speculation=speculation) as server:
        plain = await server.answer(ask())
        first = await server.answer(ask(speculation={"drafter": drafter}))
        assert first.status_code == 200
        assert first.json()["choices"] == plain.json()["choices"]
        off = await server.answer(ask(speculation={"drafter": drafter}))
        assert (off.status_code, off.json()["error"]["code"]) == (503, "drafter_off")
        assert off.json()["error"]["param"] == "speculation.drafter"
        status, health = await server.health()
        assert (status, [one["name"] for one in health["plugins_off"]]) == (200, ["stuck"])
        BAD.clear()
        RELEASE.set()
        calls = server.runtime._loop._engine.calls
        calls._clock = lambda now=calls._clock: now() + 61
        again = await server.answer(ask(speculation={"drafter": drafter}))
        assert again.json()["choices"] == plain.json()["choices"]
        assert again.json()["speculation"]["num_draft_tokens"] > 0 if "speculation" in again.json() else True
        assert server.runtime._loop.stats.spec_decode.num_drafts > 0


async def test_a_default_drafter_that_is_off_refuses_nobody(ask) -> None:
    speculation = SpeculationLimits(drafter="stuck:how=exits", control=False)
    async with serving(plugins=PluginLimits(max_plugin_faults=1), speculation=speculation) as server:
        for _ in range(3):
            assert (await server.answer(ask())).status_code == 200
        assert [one["name"] for one in (await server.health())[1]["plugins_off"]] == ["stuck"]


async def test_a_step_that_does_not_end_shows_in_health(ask, monkeypatch) -> None:
    async with serving(plugins=PluginLimits(stall_timeout_s=0.05)) as server:
        engine, gate, reached = server.runtime._loop._engine, threading.Event(), threading.Event()
        execute = engine._decoders._runners[""].execute

        def wait(scheduled):
            reached.set()
            gate.wait(60)
            return execute(scheduled)

        monkeypatch.setattr(engine._decoders._runners[""], "execute", wait)
        task = asyncio.create_task(server.answer(ask()))
        await asyncio.to_thread(reached.wait, 60)
        await asyncio.sleep(0.1)
        status, health = await server.health()
        assert (status, health["status"]) == (503, "unavailable")
        assert "a step of the decoder has not ended" in health["problems"][0]
        gate.set()
        assert (await task).status_code == 200
        assert (await server.health()) == (200, {"status": "ok"})


@pytest.mark.parametrize("error", [SystemExit, RuntimeError])
async def test_an_engine_that_raises_outside_of_a_request_goes_on(ask, monkeypatch, error) -> None:
    async with serving() as server:
        engine = server.runtime._loop._engine
        schedule, raised = engine._scheduler.schedule, []

        def fail_once():
            if engine._lifecycle.num_live and not raised:
                raised.append(1)
                raise error
            return schedule()

        monkeypatch.setattr(engine._scheduler, "schedule", fail_once)
        assert (await server.answer(ask())).status_code == 500
        assert (await server.answer(ask())).status_code == 200
        assert (await server.health())[0] == 200


async def test_an_engine_without_its_thread_shows_in_health(monkeypatch) -> None:
    async with serving() as server:
        loop = server.runtime._loop
        dead = threading.Thread(target=lambda: None)
        dead.start()
        dead.join()
        alive, loop._thread = loop._thread, dead
        status, health = await server.health()
        loop._thread = alive
        assert (status, health["problems"]) == (503, ["the thread that runs the decoder has ended"])
