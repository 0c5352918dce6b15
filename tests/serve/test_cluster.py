"""Two applications on a Ray cluster of three nodes, two with fake GPUs: where they land, answer, and who stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from serve.config import ServeConfig
from serve.stages import build_local_runtime
from tests.helpers.checkpoints import random_llava
from tests.helpers.ray_cluster import RayCluster, ray_cluster
from tests.serve.conftest import free_port
from tests.serve.test_ray import IMAGE, OTHER, PATH, PRUNED, SAMPLED, STREAM, TEXT, body, without_clock

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
NODES: list[dict[str, Any]] = [
    {"num_cpus": 2, "labels": {"name": "head"}},
    {"num_cpus": 2, "num_gpus": 1, "labels": {"name": "cheap"}, "resources": {"accelerator_type:T4": 1}},
    {"num_cpus": 2, "num_gpus": 1, "labels": {"name": "dear"}, "resources": {"accelerator_type:H100": 1}},
]
SMALL = {"kv_cache_gb": 0.1, "encoder_cpus": 0.1, "decoder_cpus": 0.1, "threads": 1}
REQUESTS = {
    "text": ("Hello", {}),
    "two images, pruned": ([IMAGE, TEXT, OTHER], PRUNED),
    "stream, n = 2": ([IMAGE, TEXT], STREAM | SAMPLED | {"n": 2}),
    "bad field": ("Hello", {"temperature": 5}),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(*NODES) as running:
        yield running


def command(cluster: RayCluster, *options: str) -> list[str]:
    return [sys.executable, "-m", "serve.cli.app", "serve", *options, "--address", cluster.address]


@contextlib.contextmanager
def served(cluster: RayCluster, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`mm serve --address`, ready."""
    with tempfile.TemporaryFile("w+b") as output:
        process = subprocess.Popen(command(cluster, *options), stdout=output, stderr=output, env=cluster.env)
        try:
            deadline = time.monotonic() + 300
            while b"ready at" not in (said := os.pread(output.fileno(), 1 << 20, 0)):
                assert process.poll() is None, said.decode()
                assert time.monotonic() < deadline, said.decode()
                time.sleep(0.2)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def as_options(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


async def test_two_models_side_by_side_answer_as_in_process_and_one_leaves(cluster: RayCluster, tmp_path: Path) -> None:
    other = random_llava(tmp_path / "other")
    port = free_port()
    file = tmp_path / "mm.yaml"
    file.write_text(yaml.safe_dump(SMALL | {"device": "auto", "port": port}))
    first = ["tiny", "--config", str(file), "--encoder-accelerator-type", "T4", "--decoder-accelerator-type", "H100"]
    deployed = {
        "name": "second",
        "route_prefix": "/second",
        "import_path": "serve.deployments.application:build",
        "args": SMALL | {"model": str(other), "encoder_label": ["name=dear"], "decoder_label": ["name=head"]},
    }
    too_much = deployed | {"name": "third", "route_prefix": "/third", "args": {"num_decoders": 5, "device": "cuda"}}
    with served(cluster, *first, "--encoders", "2"):
        path = tmp_path / "deploy.yaml"
        path.write_text(yaml.safe_dump({"applications": [deployed, too_much]}))
        states = cluster.ask(f"deploy {path}")
        assert states["third"][0] == "DEPLOY_FAILED"
        assert "have room for 2" in states["third"][1]
        places = await_ingress(cluster, "second")
        assert places["mm/Encoder"] == ["cheap", "cheap"]
        assert places["mm/Decoder"] == ["dear"]
        assert (places["second/Encoder"], places["second/Decoder"]) == (["dear"], ["head"])
        url = f"http://127.0.0.1:{port}"
        await same_as_in_process(url, ServeConfig(**model_of("tiny")))
        await same_as_in_process(f"{url}/second", ServeConfig(**model_of(str(other))))
        assert httpx.get(f"{url}/second/health").json() == {"status": "ok"}
        refused = subprocess.run(command(cluster, "tiny"), env=cluster.env, capture_output=True, text=True, timeout=120)
        assert refused.returncode == 1
        assert "'mm' runs on this cluster already" in refused.stderr.splitlines()[-1]
    assert not any(name.startswith("mm/") for name in cluster.ask("places"))
    assert httpx.post(f"{url}/second{PATH}", json=body("Hello", {}) | {"model": "other"}).status_code == 200
    assert httpx.get(f"{url}/health").status_code == 404


def await_ingress(cluster: RayCluster, name: str) -> dict[str, list[str]]:
    deadline = time.monotonic() + 240
    while not (places := cluster.ask("places")).get(f"{name}/Ingress"):
        assert time.monotonic() < deadline, places
        time.sleep(0.5)
    return places


def model_of(model: str) -> dict[str, Any]:
    from mm.config import model_config

    return {"model": model_config(model=model, num_threads=1, kv_cache_gb=0.1)}


async def same_as_in_process(url: str, config: ServeConfig) -> None:
    from serve.api.routes import create_app

    runtime = build_local_runtime(config)
    try:
        transport = httpx.ASGITransport(app=create_app(runtime, config))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as local:
            for name, (content, fields) in REQUESTS.items():
                asked = body(content, fields) | {"model": config.names[0]}
                headers = {"x-request-id": "same"}
                expected = await local.post(PATH, json=asked, headers=headers)
                found = httpx.post(f"{url}{PATH}", json=asked, headers=headers, timeout=120)
                assert without_clock(found.content) == without_clock(expected.content), name
    finally:
        runtime.close()


def test_a_cluster_without_the_resources_is_said_in_one_line(cluster: RayCluster) -> None:
    asked = command(cluster, "tiny", "--device", "cuda", "--decoders", "4", "--app-name", "big")
    refused = subprocess.run(asked, env=cluster.env, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1
    assert "have room for" in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr
