"""`mm.read_media` gives what an encoder gets, whatever form the item comes in."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

import mm
from mm.config import MediaLimits
from mm.data.media import FrameSampling
from mm.errors import InvalidRequest, MediaError
from mm.media import decode_image, decode_video

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def png() -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(PIXELS).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_picture_is_one_frame(tmp_path, budget):
    path = tmp_path / "a.png"
    path.write_bytes(png())
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    for form in (path, str(path), png(), url, PIL.Image.fromarray(PIXELS), PIXELS):
        found = mm.read_media(form)
        assert (found.frames.shape, found.frames.dtype) == ((1, 24, 32, 3), np.uint8)
        assert np.array_equal(found.frames[0], decode_image(png(), budget).pixels)
        assert (found.times_s, found.duration_s) == ((0.0,), 0.0)


@pytest.mark.parametrize(("asked", "sampling"), [({}, {}), ({"num_frames": 4}, {"num_frames": 4}), ({"fps": 2.0},) * 2])
def test_a_clip_is_sampled_as_for_an_encoder(tmp_path, budget, make_clip, asked, sampling):
    path = tmp_path / "clip.mp4"
    path.write_bytes(make_clip())
    url = "data:;base64," + base64.b64encode(path.read_bytes()).decode()
    clip = decode_video(path.read_bytes(), FrameSampling(**sampling), budget)
    wrapped = "data:;base64," + base64.encodebytes(path.read_bytes()).decode()
    for form in (path, path.read_bytes(), url, wrapped):
        found = mm.read_media(form, **asked)
        assert np.array_equal(found.frames, clip.frames)
        assert (found.times_s, found.duration_s) == (clip.timestamps_s, clip.duration_s)
        assert len(found.times_s) == len(found.frames)


def test_a_gif_is_a_picture_unless_frames_are_asked_for(make_clip):
    gif = make_clip("a.gif", "gif", pix_fmt="rgb8", num_frames=6)
    assert len(mm.read_media(gif).frames) == 1
    assert len(mm.read_media(gif, num_frames=3).frames) == 3
    assert len(mm.read_media(gif, kind="video").frames) == 6
    assert len(mm.read_media(gif, num_frames=3, kind="image").frames) == 1


def test_what_cannot_be_read_says_why(tmp_path, make_clip):
    os.mkfifo(tmp_path / "pipe")
    for form, reason in (
        (tmp_path / "none.png", "file_not_found"),
        (tmp_path / "pipe", "file_not_found"),
        (b"", "empty"),
        (b"nonsense", "undecodable"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(99), "unsupported_format"),
        (png()[:500], "undecodable"),
        (make_clip()[:-20], "undecodable"),
        ("data:image/png,abc", "undecodable"),
        ("data:image/png;base64,ab_d", "bad_data_url"),
        ("http://127.0.0.1/a.png", "remote_disabled"),
    ):
        with pytest.raises(MediaError) as caught:
            mm.read_media(form)
        assert caught.value.reason == reason
    with pytest.raises(MediaError, match="more pixels"):
        mm.read_media(png(), limits=MediaLimits(max_pixels=100))


def test_bad_options_are_refused(make_clip):
    for options, message in (
        ({"num_frames": 2, "fps": 1.0}, "not both"),
        ({"num_frames": 0}, "at least 1"),
        ({"fps": -1.0}, "positive"),
        ({"kind": "audio"}, "has to be 'image' or 'video'"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            mm.read_media(make_clip(), **options)
    for form in (7, None, [PIXELS], PIXELS.astype(float)):
        with pytest.raises(InvalidRequest):
            mm.read_media(form)  # type: ignore[arg-type]


def test_reading_media_does_not_import_torch():
    """A tool that only looks at files should start in a fraction of a second."""
    code = "import sys, mm; mm.read_media; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
