"""Clips in windows: which spans, which frames, and their records in every form."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm.config import MediaLimits, ModelConfig
from mm.data.media import FrameSampling
from mm.media import MediaBudget, decode_video
from serve.jobs.batch.job import BatchJob
from serve.jobs.batch.windows import encoded, spans_of, window_id
from serve.jobs.job import JobError
from tests.serve.jobs.rows_server import rows_server
from tests.serve.jobs.test_batch import failures_of, picture, records_of, run

FPS, SIDE = 5, 32


@pytest.fixture
def server():
    with rows_server() as running:
        yield running


def clip(seconds: float) -> bytes:
    """A clip that is as light as its time: 20 for each second."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as made:
        stream = made.add_stream("libx264", rate=FPS, options={"crf": "0"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for i in range(round(seconds * FPS)):
            light = np.full((SIDE, SIDE, 3), round(20 * i / FPS), np.uint8)
            made.mux(stream.encode(av.VideoFrame.from_ndarray(light, format="rgb24")))
        made.mux(stream.encode(None))
    return file.getvalue()


def lights(data: bytes, num_frames: int) -> list[float]:
    """Seconds of the first clip that the frames of another show."""
    found = decode_video(data, FrameSampling(num_frames=num_frames), MediaBudget(MediaLimits()))
    return [float(frame.mean()) / 20 for frame in found.frames]


def sent(server) -> list[bytes]:
    urls = [body["messages"][0]["content"][0]["video_url"]["url"] for body in server.bodies]
    return [base64.b64decode(url.partition(",")[2]) for url in urls]


@pytest.mark.parametrize(
    ("duration_s", "expected"),
    [
        (10.0, [(0.0, 4.0), (4.0, 8.0), (8.0, 10.0)]),
        (8.0, [(0.0, 4.0), (4.0, 8.0)]),
        (8.39, [(0.0, 4.0), (4.0, 8.39)]),
        (8.41, [(0.0, 4.0), (4.0, 8.0), (8.0, 8.41)]),
        (1.0, [(0.0, 1.0)]),
        (0.0, [(0.0, 0.0)]),
    ],
)
def test_windows_cover_the_clip_and_a_short_rest_belongs_to_the_last(duration_s, expected):
    assert spans_of(duration_s, 4.0) == expected


def test_ids_of_windows_keep_the_ending_of_a_file_and_nothing_else():
    assert [window_id(name, 3) for name in ("a/b.mp4", "v1.2", 7)] == ["a/b-w00003.mp4", "v1.2-w00003", "7-w00003"]


def test_each_window_is_asked_about_with_its_own_frames_and_goes_on_after_a_stop(tmp_path, server):
    (tmp_path / "clip.mp4").write_bytes(clip(10))
    options = {"window_s": 4.0, "model": ModelConfig(num_frames=4), "concurrency": 1}
    (tmp_path / "list.txt").write_text("clip.mp4\n")
    assert run(tmp_path / "list.txt", tmp_path / "out", server, limit=1, **options) == 0
    assert len(server.bodies) == 1
    assert run(tmp_path / "list.txt", tmp_path / "out", server, **options) == 0
    assert run(tmp_path / "list.txt", tmp_path / "out", server, **options) == 0
    assert len(server.bodies) == 3, "no window is asked about twice"
    found = {r["id"]: (r["clip"], r["start_s"], r["end_s"]) for r in records_of(tmp_path / "out")}
    assert found == {
        "clip-w00000.mp4": ("clip.mp4", 0.0, 4.0),
        "clip-w00001.mp4": ("clip.mp4", 4.0, 8.0),
        "clip-w00002.mp4": ("clip.mp4", 8.0, 10.0),
    }
    expected = [[0.5, 1.5, 2.5, 3.5], [4.5, 5.5, 6.5, 7.5], [8.5, 9.5]]
    for data, times_s in zip(sent(server), expected, strict=True):
        assert lights(data, 4) == pytest.approx(times_s, abs=0.3)


def test_windows_are_in_every_form_beside_pictures_and_broken_clips(tmp_path, server):
    data = [picture(1), clip(3), clip(3)[:900]]
    pq.write_table(pa.table({"id": [5, 6, 7], "media": data}), tmp_path / "rows.parquet")
    options = {"window_s": 2.0, "model": ModelConfig(num_frames=2)}
    for form in ("jsonl", "parquet", "webdataset", "txt", "json"):
        assert run(tmp_path / "rows.parquet", tmp_path / form, server, form=form, **options) in (0, 3), form
    for form in ("jsonl", "parquet"):
        found = {r["id"]: (r["clip"], r["start_s"], r["end_s"]) for r in records_of(tmp_path / form, form)}
        assert found["5"] == (None, None, None)
        assert (found["6-w00000"], found["6-w00001"]) == (("6", 0.0, 2.0), ("6", 2.0, 3.0))
        assert {key for key in found if key.startswith("7")} <= {"7"}, "the server decides on what cannot be cut"
    with tarfile.open(tmp_path / "webdataset" / "part-00000.tar") as archive:
        names = set(archive.getnames())
        assert {"6-w00001.mp4", "6-w00001.txt", "6-w00001.json", "5.jpg"} <= names
    assert (tmp_path / "txt" / "6-w00001.txt").exists()
    assert json.loads((tmp_path / "json" / "6-w00001.json").read_text())["start_s"] == 2.0


def test_windows_of_addresses_and_of_several_media_are_refused_by_row(tmp_path, server):
    rows = [{"video": "https://example.org/a.mp4"}, {"image": "p.png", "video": "c.mp4"}]
    (tmp_path / "p.png").write_bytes(picture(0))
    (tmp_path / "c.mp4").write_bytes(clip(1))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(tmp_path / "rows.jsonl", tmp_path / "out", server, window_s=2.0) == 3
    assert [failure["message"].partition(",")[0] for failure in failures_of(tmp_path / "out")] == [
        "--window needs the clip's bytes or path",
        "it has a clip beside other media",
    ]
    assert not server.bodies


@pytest.mark.parametrize("window_s", [0.0, -1.0, float("nan"), float("inf"), 0.05])
def test_windows_of_no_length_are_refused(window_s):
    with pytest.raises(JobError, match=r"window was .*; give at least 0\.1 seconds"):
        BatchJob(inputs=("x",), out=Path("y"), window_s=window_s)


@pytest.mark.parametrize("shape", [(33, 32, 3), (32, 32, 3)])
@pytest.mark.parametrize(("count", "seconds"), [(1, 0.3), (7, 12.9), (32, 600.0)])
def test_frames_of_any_size_and_number_come_back(shape, count, seconds):
    frames = [np.full(shape, 8 * i, np.uint8) for i in range(count)]
    found = decode_video(encoded(frames, seconds), FrameSampling(num_frames=count), MediaBudget(MediaLimits()))
    assert found.frames.shape == (count, *shape)
    assert [float(frame.mean()) for frame in found.frames] == pytest.approx([8 * i for i in range(count)], abs=3)
    assert found.duration_s == pytest.approx(seconds, rel=0.02)
