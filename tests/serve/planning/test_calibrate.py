"""Recordings of a server, and curves that were measured here, are what the planner reads."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import PIL.Image
import pytest

from mm.config import ModelConfig
from mm.errors import InvalidOption
from serve.api.routes import create_app
from serve.api.trace import TraceRecorder
from serve.config import ServeConfig
from serve.planning.calibrate import Calibration, run_calibration
from serve.planning.curves import parse_curves, read_curves
from serve.planning.traces import read_trace
from serve.stages import build_local_runtime
from tests.helpers.planning import curves_data

MODEL = ModelConfig(dtype="float32", num_threads=1)


def body(num_pictures: int, num_tokens: int, *, stream: bool) -> dict:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (224, 224), "red").save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content: list[dict] = [{"type": "text", "text": "hidden words"}]
    content += [{"type": "image_url", "image_url": {"url": url}}] * num_pictures
    asked = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": num_tokens}
    return asked | {"ignore_eos": True, "stream": stream}


async def test_a_server_records_sizes_and_no_contents(tmp_path):
    path = tmp_path / "trace.csv"
    config = ServeConfig(model=replace(MODEL, reducer="divprune:keep_ratio=0.25"), record_trace=str(path))
    runtime = build_local_runtime(config)
    prompts = []
    try:
        transport = httpx.ASGITransport(create_app(runtime, config))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client:
            for pictures, tokens, stream in ((2, 5, False), (0, 3, True), (1, 7, False)):
                answer = await client.post("/v1/chat/completions", json=body(pictures, tokens, stream=stream))
                assert answer.status_code == 200
                prompts.append(None if stream else answer.json()["usage"]["prompt_tokens"])
    finally:
        runtime.close()
    assert "hidden" not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    found = read_trace(path, None)
    assert found.pictures.tolist() == [2, 0, 1]
    assert found.output_tokens.tolist() == [5, 3, 7]
    assert found.patches.tolist() == [512, 0, 256]
    assert found.visual_tokens.tolist() == [128, 0, 64]
    assert [found.prompt_tokens[0], found.prompt_tokens[2]] == [prompts[0], prompts[2]]
    assert (found.arrival_s[1:] > found.arrival_s[:-1]).all()


def test_a_recording_is_continued_and_another_file_is_left_alone(tmp_path):
    path = tmp_path / "trace.csv"
    TraceRecorder(str(path), 8)
    TraceRecorder(str(path), 8)
    assert path.read_text().count("timestamp") == 1
    (tmp_path / "notes.txt").write_text("mine")
    for wrong in (tmp_path / "notes.txt", tmp_path / "no" / "trace.csv", tmp_path):
        with pytest.raises(InvalidOption, match="record_trace"):
            TraceRecorder(str(wrong), 8)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(InvalidOption, match="single HTTP replica"):
        ServeConfig(record_trace="trace.csv", num_ingress=2)


@pytest.mark.slow
def test_curves_that_were_measured_can_be_read(tmp_path):
    out = Path(tmp_path / "curves.json")
    run_calibration(Calibration(out=out, model=replace(MODEL, max_num_seqs=4), repeats=3, hand_off=False))
    curves, data = read_curves(out), json.loads(out.read_text())
    assert data["about"]["clock"] == "processor time"
    assert data["about"]["settings"] == {"dtype": "float32", "threads": 1, "max_num_seqs": 4}
    assert "hand_off" not in data
    assert curves.encode is not None
    assert curves.prefill is not None
    assert curves.decode is not None
    assert 3 * curves.encode(256, 1) < curves.encode(256, 8)
    assert 2 * curves.prefill(32, 0) < curves.prefill(512, 0)
    assert curves.decode(1, 32) < curves.decode(4, 1024)
    assert 0 <= curves.step_s <= curves.decode(1, 32) * 1.5
    assert curves.front_end[0] > 0
    assert (curves.engine.max_num_seqs, curves.engine.max_batch_tokens) == (4, 512)
    assert curves.picture is not None
    assert (curves.picture.patches, curves.kv_token_bytes) == (256, 4096)


HAND_OFF = """
from serve.deployments.environment import LOOPBACK, prepare_environment
prepare_environment(LOOPBACK)
from serve.planning import hand_off
import json, ray
hand_off.SIZES = (0, 6 << 20)
print(json.dumps(hand_off.measure_hand_off(3, lambda what: None)))
assert not ray.is_initialized()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_hand_off_takes_longer_the_more_it_moves(tmp_path):
    """In a process of its own, since Ray reads its settings once."""
    output = subprocess.run([sys.executable, "-c", HAND_OFF], capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(output.stdout)
    assert list(found) == ["auto", "object_store", "inline"]
    read = parse_curves(curves_data(hand_off=found), "the measurement")
    for name in found:
        assert 0 < read.hand_off_s(name, 0) < read.hand_off_s(name, 6 << 20)
    assert read.hand_off_s("inline", 6 << 20) > read.hand_off_s("object_store", 6 << 20)
