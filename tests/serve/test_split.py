"""Whatever stages have replicas of their own, the answers are those of one process, and a lost replica costs none."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from mm.config import model_config
from serve.api.routes import create_app
from serve.config import ServeConfig
from serve.stages import build_local_runtime
from tests.serve.conftest import free_port
from tests.serve.test_ray import (
    IMAGE,
    OTHER,
    PATH,
    REQUESTS,
    SAMPLED,
    STREAM,
    TEXT,
    body,
    by_choice,
    image_url,
    without_clock,
)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
DRAFTERS = ("copy:min_match=1", "eagle")
SETTINGS: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "kv_cache_gb": 0.1, "max_num_seqs": 8}
ATTEMPTS = 3
MORE = REQUESTS | {
    "in the tower": ([IMAGE, TEXT], {"vision": {"reducer": "tome:keep_ratio=0.5"}}),
    "in prefill": ([IMAGE, TEXT], {"vision": {"reducer": "fastv:keep_ratio=0.5", "return_map": True}}),
    "in prefill, stream": ([IMAGE, TEXT], STREAM | {"vision": {"reducer": "pyramiddrop:keep_ratio=0.5"}}),
    "in the cache": ([IMAGE, TEXT], {"vision": {"reducer": "infinipot:keep_ratio=0.5"}}),
    "generated tokens": ([IMAGE, TEXT], {"vision": {"reducer": "dynamic:keep_ratio=0.5"}, "max_tokens": 20}),
    "copy": ([IMAGE, TEXT], {"speculation": {"drafter": DRAFTERS[0]}, "max_tokens": 30}),
    "eagle, n = 2": ([IMAGE, TEXT], SAMPLED | {"speculation": {"drafter": DRAFTERS[1]}, "max_tokens": 30, "n": 2}),
    "logprobs": ([IMAGE, TEXT], {"logprobs": True, "top_logprobs": 2}),
    "one token": ([IMAGE, TEXT], {"max_tokens": 1}),
}


class Server:
    """`mm serve` in processes of its own."""

    def __init__(self, split: str, *options: str) -> None:
        self.split, self.port = split, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        given = [word for name, value in SETTINGS.items() for word in (f"--{_name(name)}", str(value))]
        given += [word for drafter in DRAFTERS for word in ("--allow-drafter", drafter)]
        command = [sys.executable, "-m", "serve.cli.app", "serve", "tiny", "--port", str(self.port), "--split", split]
        command += ["--ray-cpus", "4", "--object-store-bytes", str(200 << 20), "--max-choices", "4", *given, *options]
        self._output = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        self.process = subprocess.Popen(command, stdout=self._output, stderr=self._output)

    def is_ready(self) -> bool:
        """Whether it answers; it may have been ended by a busy machine."""
        deadline = time.monotonic() + 300
        while b"ready at" not in self.said and time.monotonic() < deadline and self.process.poll() is None:
            time.sleep(0.2)
        return b"ready at" in self.said

    @property
    def said(self) -> bytes:
        return os.pread(self._output.fileno(), 1 << 20, 0)

    def pids(self, deployment: str) -> list[int]:
        import ray  # noqa: F401  (it brings psutil)
        import psutil  # isort: skip

        every = psutil.Process(self.process.pid).children(recursive=True)
        return [one.pid for one in every if f"ServeReplica:mm:{deployment}" in " ".join(one.cmdline())]

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(90)
        self._output.close()


def _name(setting: str) -> str:
    return {"num_threads": "threads"}.get(setting, setting).replace("_", "-")


@pytest.fixture(scope="module", params=["none", "epd"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    options = ["--decoders", "2"] + (["--prefills", "2"] if request.param == "epd" else [])
    for attempt in range(ATTEMPTS):
        started = Server(request.param, *options)
        if started.is_ready():
            break
        said = started.said.decode()
        started.end()
        assert attempt + 1 < ATTEMPTS, said
    yield started
    started.end()


@pytest.fixture(scope="module")
def config() -> ServeConfig:
    return ServeConfig(model=model_config(model="tiny", drafters=DRAFTERS, **SETTINGS), max_choices=4)


@pytest.fixture(scope="module")
def runtime(config: ServeConfig) -> Iterator[Any]:
    runtime = build_local_runtime(config)
    yield runtime
    runtime.close()


async def test_same_bytes_as_in_process(server: Server, runtime: Any, config: ServeConfig) -> None:
    """Each request is asked in process first, so that usage says the same of what was cached before."""
    transport = httpx.ASGITransport(app=create_app(runtime, config))
    headers = {"x-request-id": "same"}
    wrong = {}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as local:
        for name, (content, fields) in MORE.items():
            salt = f"{name}, {server.split}"  # so neither another replica nor an earlier server's requests matter
            asked = body(content, fields) | {"cache_salt": salt}
            expected = await local.post(PATH, json=asked, headers=headers)
            found = httpx.post(f"{server.url}{PATH}", json=asked, headers=headers, timeout=120)
            if uncounted(found.content) != uncounted(expected.content) or found.status_code != expected.status_code:
                wrong[name] = (found.text[:1500], expected.text[:1500])
    assert not wrong


def uncounted(content: bytes) -> bytes:
    """Without the clock, and without how often drafts paid, which the clock decides."""
    return re.sub(rb'"(accepted|rejected)_prediction_tokens":\d+', b"", without_clock(content))


def figure(server: Server, name: str, labels: str = "") -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    found = re.search(rf'^{name}{{model_name="tiny"{labels}}} (\S+)$', text, re.MULTILINE)
    assert found, text
    return float(found[1])


def test_what_moves_is_counted(server: Server) -> None:
    """Text travels inside messages; eight pictures, which are eight megabytes of keys and values, in shared memory."""
    if server.split != "epd":
        pytest.skip("nothing moves")
    pictures = [{"type": "image_url", "image_url": {"url": image_url(seed)}} for seed in range(40, 48)]
    before = {name: figure(server, "mm:kv_transfer_bytes_total", f',transport="{name}"') for name in TRANSPORTS}
    answers = [
        httpx.post(f"{server.url}{PATH}", json=body(content, {}), timeout=120)
        for content in ("Hello", [*pictures, TEXT])
    ]
    tokens = sum(answer.json()["usage"]["prompt_tokens"] for answer in answers)
    moved = {
        name: figure(server, "mm:kv_transfer_bytes_total", f',transport="{name}"') - before[name] for name in TRANSPORTS
    }
    assert sum(moved.values()) == tokens * TOKEN_BYTES
    assert moved["object_store"] > moved["inline"] > 0  # of a long prompt the last, short piece too
    assert figure(server, "mm:kv_transport", ',transport="object_store"') == 1
    sent, received = figure(server, "mm:kv_sent_bytes_total"), figure(server, "mm:kv_received_bytes_total")
    assert sent == received >= sum(moved.values())
    assert figure(server, "mm:kv_transfers_unconfirmed") == 0


TRANSPORTS = ("inline", "object_store")
TOKEN_BYTES = 4 * 2 * 2 * 64 * 4
"""Of tiny in float32: layers, keys and values, heads, width, bytes."""


@pytest.mark.parametrize("deployment", ["Prefill", "Decoder", "Model"])
def test_streams_go_on_with_the_same_bytes_when_a_replica_is_lost(server: Server, deployment: str) -> None:
    """Some have begun and some wait for their first token when one of two replicas is killed."""
    if deployment not in {"none": ["Model"], "epd": ["Prefill", "Decoder"]}[server.split]:
        pytest.skip("there is no such replica")
    long = {"stream": True, "max_tokens": 150, "ignore_eos": True, "temperature": 1.0}
    asked = [
        body([picture, TEXT] if seed % 2 else "Hello", long | {"seed": seed, "n": 1 + seed % 2})
        for seed, picture in enumerate([IMAGE, OTHER] * 3)
    ]
    answered = [httpx.post(f"{server.url}{PATH}", json=one, timeout=120) for one in asked]
    undisturbed = [by_choice(one.text) for one in answered]
    begun = threading.Barrier(4)

    def streamed(index: int) -> dict[int, list[Any]]:
        with httpx.stream("POST", f"{server.url}{PATH}", json=asked[index], timeout=300) as response:
            lines = response.iter_lines()
            first = [next(lines) for _ in range(10)] if index < 3 else []
            if index < 3:
                begun.wait(120)
            return by_choice("\n".join([*first, *lines]))

    with ThreadPoolExecutor(len(asked)) as pool:
        streams = [pool.submit(streamed, i) for i in range(3)]
        begun.wait(120)
        streams += [pool.submit(streamed, i) for i in range(3, len(asked))]
        time.sleep(0.05)
        os.kill(server.pids(deployment)[0], signal.SIGKILL)
        assert [stream.result() for stream in streams] == undisturbed
    assert httpx.get(f"{server.url}/health", timeout=30).json() == {"status": "ok"}


def test_leaving_a_stream_frees_every_replica(server: Server) -> None:
    long = body([IMAGE, TEXT], {"stream": True, "max_tokens": 3000, "ignore_eos": True})
    with httpx.stream("POST", f"{server.url}{PATH}", json=long, timeout=300) as response:
        lines = response.iter_lines()
        for _ in range(5):
            next(lines)
    deadline = time.monotonic() + 20
    while figure(server, "vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert figure(server, "vllm:num_requests_running") == 0
    assert figure(server, "mm:kv_transfers_unconfirmed") == 0
