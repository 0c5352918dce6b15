"""The application on Ray answers byte for byte like the one in process, and outlives its replicas."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import av
import httpx
import numpy as np
import PIL.Image
import pytest

from serve.api.routes import create_app
from serve.config import ServeConfig
from serve.stages import build_local_runtime

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PATH = "/v1/chat/completions"


def image_url(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (96, 128, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def clip_url() -> str:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(16):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), i * 15, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return f"data:video/mp4;base64,{base64.b64encode(file.getvalue()).decode()}"


IMAGE = {"type": "image_url", "image_url": {"url": image_url(1)}}
OTHER = {"type": "image_url", "image_url": {"url": image_url(2)}}
CLIP = {"type": "video_url", "video_url": {"url": clip_url()}}
TEXT = {"type": "text", "text": "What is this?"}
PRUNED = {"vision": {"reducer": "divprune", "keep_ratio": 0.25, "return_map": True}}
SAMPLED = {"temperature": 1.0, "seed": 5, "top_p": 0.9}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}

REQUESTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "text": ("Hello", {}),
    "image": ([IMAGE, TEXT], {}),
    "image behind the text": ([TEXT, IMAGE], {}),
    "clip": ([CLIP, TEXT], {"vision": {"num_frames": 4}}),
    "two images, pruned": ([IMAGE, TEXT, OTHER], PRUNED),
    "n = 2, sampled": ([IMAGE, TEXT], {"n": 2} | SAMPLED),
    "stream": ([IMAGE, TEXT], STREAM | SAMPLED),
    "stream, n = 2, pruned": ([OTHER, TEXT], STREAM | PRUNED | SAMPLED | {"n": 2}),
    "stop": ("Hello", SAMPLED | {"stop": ["e", "a"], "max_tokens": 40}),
    "bad media": ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}], {}),
    "bad media, stream": ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}], STREAM),
    "unknown reducer": ("Hello", {"vision": {"reducer": "divprunne"}}),
    "bad option": ([IMAGE], {"vision": {"reducer": "divprune:keep=1"}}),
    "too long": ("Hello", {"max_tokens": 1_000_000}),
    "too long, stream": ("Hello", {"max_tokens": 1_000_000} | STREAM),
    "too long beside a picture": ([IMAGE, {"type": "text", "text": "word " * 5000}], {}),
    "far too long": ([IMAGE, {"type": "text", "text": "word " * 1_000_000}], {}),
    "bad field": ("Hello", {"temperature": 5}),
    "unknown model": ("Hello", {"model": "gpt"}),
}


def body(content: Any, fields: dict[str, Any]) -> dict[str, Any]:
    start = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 6, "temperature": 0}
    return start | fields


def without_clock(content: bytes) -> bytes:
    return re.sub(rb'"created":\d+', b'"created":0', content)


@pytest.fixture(scope="module")
def ray_client(on_ray: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=on_ray, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def runtime(config: ServeConfig) -> Iterator[Any]:
    runtime = build_local_runtime(config)
    yield runtime
    runtime.close()


@pytest.fixture
async def local_client(runtime: Any, config: ServeConfig) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=create_app(runtime, config))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client


@pytest.mark.parametrize(("content", "fields"), REQUESTS.values(), ids=REQUESTS.keys())
async def test_same_bytes_as_in_process(ray_client, local_client, content, fields) -> None:
    headers = {"x-request-id": "same"}
    on_ray = await asyncio.to_thread(ray_client.post, PATH, json=body(content, fields), headers=headers)
    in_process = await local_client.post(PATH, json=body(content, fields), headers=headers)
    assert without_clock(on_ray.content) == without_clock(in_process.content)
    assert on_ray.status_code == in_process.status_code
    same = ("content-type", "x-request-id", "retry-after", "x-mm-ignored-fields")
    assert [on_ray.headers.get(name) for name in same] == [in_process.headers.get(name) for name in same]


def test_features_too_large_for_a_message_travel_by_reference(ray_client) -> None:
    """Eight images, more than `INLINE_BYTES` of features, asked about twice: encoded, then cached."""
    content = [{"type": "image_url", "image_url": {"url": image_url(seed)}} for seed in range(10, 18)]
    first, second = (ray_client.post(PATH, json=body([*content, TEXT], {})) for _ in range(2))
    assert first.status_code == second.status_code == 200, first.text
    assert first.json()["choices"] == second.json()["choices"]


@pytest.mark.parametrize("vision", [{}, {"reducer": "divprune", "keep_ratio": 0.25}])
async def test_embeddings_equal_those_in_process(ray_client, local_client, vision) -> None:
    """Features that travel by reference are collected for the vector too."""
    content = [{"type": "image_url", "image_url": {"url": image_url(seed)}} for seed in range(20, 28)]
    asked = {"model": "tiny", "messages": [{"role": "user", "content": content}], "vision": vision}
    headers = {"x-request-id": "same"}
    on_ray = await asyncio.to_thread(ray_client.post, "/v1/embeddings", json=asked, headers=headers)
    in_process = await local_client.post("/v1/embeddings", json=asked, headers=headers)
    assert on_ray.status_code == 200, on_ray.text
    assert without_clock(on_ray.content) == without_clock(in_process.content)


def test_operations(ray_client) -> None:
    assert ray_client.get("/health").json() == {"status": "ok"}
    assert ray_client.head("/metrics").status_code == 200
    metrics = ray_client.get("/metrics").text
    assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in metrics
    assert "mm:visual_tokens_kept_total" in metrics
    assert ray_client.get("/v1/models").json()["data"][0]["input_modalities"] == ["text", "image", "video"]
    refused = ray_client.get(PATH)
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert ray_client.get("/nothing").json()["error"]["code"] == "not_found"


def test_ray_listens_on_this_machine_only_and_wants_its_token(on_ray, config) -> None:
    """Serve's replicas unpickle what reaches their port, so it is the one that matters most."""
    import grpc

    from serve.deployments.loopback import open_ports
    from serve.deployments.processes import MARK, listening, marked

    marks = {process.environ()[MARK] for pid in replica_pids("Decoder") for process in [psutil_process(pid)]}
    (mark,) = marks
    names = {process.name() for process in marked(mark)}
    assert {"gcs_server", "raylet"} <= names
    assert open_ports(mark, but=config.port) == []
    ports = {address for name, address in listening(mark) if name.startswith("ray::ServeRepl")}
    refusals = []
    for address in ports:
        with grpc.insecure_channel(address.replace("::ffff:", "")) as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", timeout=60)
            refusals.append(refused.value.code())  # type: ignore[attr-defined]
    assert refusals.count(grpc.StatusCode.UNAUTHENTICATED) == 3  # one replica of each deployment
    assert set(refusals) <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}  # the latter: Ray's own


def psutil_process(pid: int) -> Any:
    import psutil

    return psutil.Process(pid)


def running(client: httpx.Client) -> float:
    text = client.get("/metrics").text
    found = re.search(r'vllm:num_requests_running\{model_name="tiny"\} (\S+)', text)
    assert found
    return float(found[1])


def figure(client: httpx.Client, name: str, labels: str = "") -> float:
    found = re.search(rf'^{name}{{model_name="tiny"{labels}}} (\S+)$', client.get("/metrics").text, re.MULTILINE)
    assert found, name
    return float(found[1])


def test_repeated_media_go_to_the_encoder_that_has_them(ray_client) -> None:
    """Two encoders, six pictures asked about three times each. At random a quarter of the repetitions would miss."""
    scale("Encoder", 2)
    await_replicas("Encoder", 2)
    try:
        queries, hits = "vllm:mm_cache_queries_total", "vllm:mm_cache_hits_total"
        before = figure(ray_client, queries), figure(ray_client, hits)
        pictures = [{"type": "image_url", "image_url": {"url": image_url(seed)}} for seed in range(300, 306)]
        for _ in range(3):
            for one in pictures:
                assert ray_client.post(PATH, json=body([one, TEXT], {})).status_code == 200
        assert figure(ray_client, queries) - before[0] == 18
        assert figure(ray_client, hits) - before[1] == 12
        assert figure(ray_client, "mm:routing_decisions_total", ',stage="encoder"') >= 18
        time.sleep(2.5)  # what decoders hold is published once a second
        assert ray_client.post(PATH, json=body([pictures[0], TEXT], {})).status_code == 200
        assert figure(ray_client, "mm:routing_hits_total", ',stage="decoder"') >= 1
    finally:
        scale("Encoder", 1)
        await_replicas("Encoder", 1)


def test_leaving_a_stream_frees_the_decoder(ray_client) -> None:
    long = body("Hello", {"stream": True, "max_tokens": 3000, "ignore_eos": True})
    with ray_client.stream("POST", PATH, json=long) as response:
        lines = response.iter_lines()  # kept: closing it would already leave
        next(lines)
        assert running(ray_client) == 1
    deadline = time.monotonic() + 5
    while running(ray_client) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running(ray_client) == 0


def replica_pids(deployment: str) -> list[int]:
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()
    replicas = details["applications"]["mm"]["deployments"][deployment]["replicas"]
    return [replica["pid"] for replica in replicas if replica["state"] == "RUNNING"]


def scale(deployment: str, num_replicas: int) -> None:
    """What an operator or an external scaler asks of Ray's controller."""
    import ray
    from ray.serve._private.common import DeploymentID
    from ray.serve.context import _get_global_client

    controller = _get_global_client()._controller
    ray.get(controller.update_deployment_replicas.remote(DeploymentID(name=deployment, app_name="mm"), num_replicas))


def await_replicas(deployment: str, num_replicas: int, timeout_s: float = 300.0) -> list[int]:
    deadline = time.monotonic() + timeout_s
    while len(pids := replica_pids(deployment)) != num_replicas:
        assert time.monotonic() < deadline, f"there are {len(pids)} replicas"
        time.sleep(0.1)
    return pids


def kill(deployment: str) -> None:
    for pid in replica_pids(deployment):
        os.kill(pid, signal.SIGKILL)


def await_health(client: httpx.Client, timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while client.get("/health").status_code != 200:
        assert time.monotonic() < deadline, "the lost replica was not replaced"
        time.sleep(0.2)


def ask_until_answered(client: httpx.Client, request: dict[str, Any], timeout_s: float = 300.0) -> list[int]:
    """Status codes up to the first 200; every other one is well-formed and says when to try again."""
    statuses = []
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        response = client.post(PATH, json=request)
        statuses.append(response.status_code)
        if response.status_code == 200:
            break
        assert response.json()["error"]["code"] in {"unavailable", "overloaded"}
        assert "retry-after" in response.headers
        time.sleep(0.5)
    return statuses


def test_a_running_stream_survives_the_removal_of_its_decoder(ray_client) -> None:
    """Streams run on two decoders when one of them is taken away. Ray stops sending to it, and lets it finish."""
    long = body("Hello", {"stream": True, "max_tokens": 1500, "ignore_eos": True})
    begun = threading.Barrier(5)

    def streamed() -> list[str]:
        with ray_client.stream("POST", PATH, json=long) as response:
            lines = response.iter_lines()
            first = next(lines)
            begun.wait(120)
            return [first, *lines]

    scale("Decoder", 2)
    before = set(await_replicas("Decoder", 2))
    try:
        with ThreadPoolExecutor(4) as pool:
            streams = [pool.submit(streamed) for _ in range(4)]
            begun.wait(120)
            scale("Decoder", 1)
            (left,) = await_replicas("Decoder", 1)
            assert running(ray_client) >= 1
            (removed,) = before - {left}
            assert os.path.exists(f"/proc/{removed}"), "it was ended at once"
            texts = ["".join(stream.result()) for stream in streams]
    finally:
        scale("Decoder", 1)
    assert [text.count('"finish_reason":"length"') for text in texts] == [1] * 4
    assert [text.endswith("data: [DONE]") for text in texts] == [True] * 4
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{removed}"):
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.2)
    assert ray_client.post(PATH, json=body("Hello", {})).status_code == 200


@pytest.mark.parametrize(
    ("deployment", "stage", "content"), [("Encoder", "encoder", [IMAGE, TEXT]), ("Decoder", "decoder", "Hello")]
)
def test_a_request_to_a_stage_without_replicas_is_refused_and_health_names_the_stage(
    ray_client, deployment, stage, content
) -> None:
    request = body(content, {})
    before = ray_client.post(PATH, json=request).json()["choices"]
    kill(deployment)
    refused = ray_client.post(PATH, json=request, timeout=60)
    assert refused.status_code == 503
    assert f"no {stage} is running" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1
    health = ray_client.get("/health", timeout=60)
    assert (health.status_code, health.json()) == (503, {"status": "unavailable", "missing": [stage]})
    if stage == "encoder":
        assert ray_client.post(PATH, json=body("Hello", {}), timeout=60).status_code == 200
    await_health(ray_client)
    assert ray_client.post(PATH, json=request).json()["choices"] == before


def test_whole_requests_that_were_begun_outlive_their_decoder(ray_client) -> None:
    """One is being decoded and one has been encoded; both are answered when the decoder is back."""
    long = body("Hello", {"max_tokens": 400, "ignore_eos": True})
    with ThreadPoolExecutor(2) as pool:
        answers = [
            pool.submit(ray_client.post, PATH, json=long | {"messages": [{"role": "user", "content": content}]})
            for content in ("Hello", [OTHER, TEXT])
        ]
        deadline = time.monotonic() + 20
        while running(ray_client) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        kill("Decoder")
        replies = [answer.result() for answer in answers]
    assert [reply.status_code for reply in replies] == [200, 200]
    assert [reply.json()["usage"]["completion_tokens"] for reply in replies] == [400, 400]


def test_streams_go_on_with_the_same_bytes_when_their_decoder_is_lost(ray_client) -> None:
    """Two sampled choices, a picture with a schema, and one with penalties."""
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    long = {"stream": True, "max_tokens": 300, "temperature": 1.0, "seed": 4}
    asked = [
        body("Hello", long | {"ignore_eos": True, "n": 2}),
        body([IMAGE, TEXT], long | PRUNED | {"response_format": form}),
        body([OTHER, TEXT], long | {"ignore_eos": True, "repetition_penalty": 1.2}),
    ]
    await_health(ray_client)
    undisturbed = [by_choice(ray_client.post(PATH, json=one).text) for one in asked]
    begun = threading.Barrier(len(asked) + 1)

    def streamed(request: dict[str, Any]) -> dict[int, list[Any]]:
        with ray_client.stream("POST", PATH, json=request) as response:
            lines = response.iter_lines()
            first = [next(lines) for _ in range(12)]
            begun.wait(120)
            return by_choice("\n".join([*first, *lines]))

    with ThreadPoolExecutor(len(asked)) as pool:
        streams = [pool.submit(streamed, one) for one in asked]
        begun.wait(120)
        kill("Decoder")
        assert [stream.result() for stream in streams] == undisturbed
    await_health(ray_client)


SCHEMA = {
    "type": "object",
    "properties": {"words": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 20}},
    "required": ["words"],
    "additionalProperties": False,
}


def by_choice(text: str) -> dict[int, list[Any]]:
    """What a stream says of each choice, in order; it has to end well."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1:] == ["[DONE]"], text[-1000:]
    found: dict[int, list[Any]] = {}
    for line in lines[:-1]:
        chunk = json.loads(line)
        assert "error" not in chunk, chunk
        for choice in chunk["choices"]:
            found.setdefault(choice["index"], []).append(choice)
    assert all(choices[-1]["finish_reason"] in ("stop", "length") for choices in found.values())
    return found
