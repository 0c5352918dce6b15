"""Odd but valid clips, and damaged ones: true times, one size, right side up, and every frame that can be decoded.

`demos/bench/clips` compares many more with ffmpeg's command line.
"""

from __future__ import annotations

import tempfile
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mm
from demos.bench.clips import boxes
from demos.bench.clips.boxes import EMPTY
from mm.data.media import FrameSampling
from mm.errors import MediaError
from mm.media import decode_video
from mm.media.video_decoder import Selection
from tests.helpers.clips import clip_bytes, picture, shade

ALL = FrameSampling(num_frames=100)


def shades(video) -> list[int]:
    return [shade(frame) for frame in video.frames]


def near(times_s) -> object:
    return pytest.approx(times_s, abs=0.002)


@pytest.mark.parametrize(
    ("edits", "frames", "times", "duration_s"),
    [
        # Edits: length in 1/1000 s, start in 1/10240 s. Frame k of the whole clip is at k / 10 s.
        ([(1000, 5 * 1024)], range(5, 15), range(10), 1.0),
        ([(800, 7 * 1024)], range(7, 15), range(8), 0.8),
        ([(500, EMPTY), (1500, 0)], range(15), range(15), 1.5),
        ([(500, 0), (500, 10 * 1024)], (*range(5), *range(10, 15)), range(10), 1.0),
        ([(500, 0), (1000, EMPTY), (500, 10 * 1024)], (*range(5), *range(10, 15)), (*range(5), *range(15, 20)), 2.0),
        (
            [(300, EMPTY), (300, 0), (200, EMPTY), (300, 5 * 1024), (400, EMPTY), (300, 0)],
            (*range(3), *range(5, 8), *range(3)),
            (*range(3), *range(5, 8), *range(12, 15)),
            1.5,
        ),
        ([(500, 10 * 1024), (500, 0)], (*range(10, 15), *range(5)), range(10), 1.0),
        ([(500, 0), (500, 0)], (*range(5), *range(5)), range(10), 1.0),
    ],
)
@pytest.mark.parametrize("bframes", ["0", "2"])
def test_edit_lists(make_budget, bframes, edits, frames, times, duration_s):
    options = (("g", "10"), ("bf", bframes))
    clip = boxes.with_edits(clip_bytes(name="a.mov", num_frames=15, options=options), shifted(edits, bframes))
    video = decode_video(clip, ALL, make_budget())
    assert video.timestamps_s == near([t / 10 for t in times])
    assert video.duration_s == near(duration_s)
    assert shades(video) == pytest.approx(list(frames), abs=1)
    few = decode_video(clip, FrameSampling(num_frames=3), make_budget())
    at = [video.timestamps_s.index(t) for t in few.timestamps_s]
    assert np.array_equal(few.frames, video.frames[at]), "skipping changes no frame"


def shifted(edits, bframes: str) -> list[tuple[int, int]]:
    """Media times count from the first decoding time, which B-frames put before the first picture."""
    delay = {"0": 0, "2": 2 * 1024}[bframes]
    return [(length, start if start == EMPTY else start + delay) for length, start in edits]


@pytest.mark.parametrize(("codec", "name"), [("libvpx", "a.webm"), ("libvpx-vp9", "a.webm"), ("libx264", "a.mkv")])
def test_a_size_that_changes_is_that_of_the_first_frame(budget, codec, name):
    clip = resized(codec, name, [(64, 48), (96, 80)])
    video = decode_video(clip, ALL, budget)
    assert video.frames.shape == (20, 48, 64, 3)
    assert shades(video) == pytest.approx([*range(10), *range(10)], abs=1)
    assert video.timestamps_s == near([k / 10 for k in range(20)])
    last = decode_video(clip, FrameSampling(num_frames=1), budget)
    assert last.frames.shape == (1, 48, 64, 3)
    assert video.num_damaged == 0


def resized(codec: str, name: str, sizes: list[tuple[int, int]]) -> bytes:
    """Ten frames of each size in one stream. H.264 carries its parameters in the stream."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=10)
            (stream.width, stream.height), stream.pix_fmt = sizes[0], "yuv420p"
            for part, (width, height) in enumerate(sizes):
                encoder = av.CodecContext.create(codec, "w")
                encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
                encoder.time_base, encoder.framerate = Fraction(1, 10), Fraction(10)
                for index in [*range(10), None]:
                    frame = (
                        None if index is None else av.VideoFrame.from_ndarray(picture(index, width, height), "rgb24")
                    )
                    if frame is not None:
                        frame.pts, frame.time_base = 10 * part + index, Fraction(1, 10)
                    for packet in encoder.encode(frame):
                        packet.stream = stream
                        container.mux(packet)
        return path.read_bytes()


@pytest.mark.parametrize("gap", ["ahead", "back"])
def test_joined_transport_streams_go_on(budget, gap):
    first, second = clip_bytes(name="a.ts", num_frames=20), clip_bytes(name="a.ts", num_frames=10)
    if gap == "ahead":
        second = later(second, 5000)
    video = decode_video(first + second, ALL, budget)
    assert video.timestamps_s == near([k / 10 for k in range(30)])
    assert video.duration_s == near(3.0)
    assert shades(video) == pytest.approx([*range(20), *range(10)], abs=1)


def test_a_recording_that_starts_between_key_frames(budget):
    clip = clip_bytes(name="a.ts", codec="mpeg2video", fps=25, options=(("g", "10"), ("bf", "0")))
    with av.open(BytesIO(clip)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    video = decode_video(clip[places[4] :], ALL, budget)
    assert shades(video) == pytest.approx(list(range(10, 30)), abs=1)
    assert video.timestamps_s == near([k / 25 for k in range(20)])
    assert video.duration_s == near(20 / 25)


def later(ts: bytes, seconds: float) -> bytes:
    """The stream with later time stamps."""
    output = BytesIO()
    with av.open(BytesIO(ts)) as source, av.open(output, "w", "mpegts") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.pts, packet.dts = (round(stamp + seconds * 90000) for stamp in (packet.pts, packet.dts))
                packet.stream = stream
                target.mux(packet)
    return output.getvalue()


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4", "mpeg2video"])
def test_frames_that_nobody_needs_may_be_skipped(make_budget, codec):
    options = (("bf", "3"), ("g", "50"), ("x265-params", "log-level=none"))[: 3 if codec == "libx265" else 2]
    clip = clip_bytes(name="a.mkv", codec=codec, num_frames=60, fps=25, options=options)
    whole = decode_video(clip, ALL, make_budget())
    for num in (1, 2, 7, 13):
        few = decode_video(clip, FrameSampling(num_frames=num), make_budget())
        at = [whole.timestamps_s.index(time_s) for time_s in few.timestamps_s]
        assert np.array_equal(few.frames, whole.frames[at])


def test_frames_are_in_order_in_avi(budget):
    clip = clip_bytes(name="a.avi", options=(("bf", "2"), ("g", "12")))
    video = decode_video(clip, ALL, budget)
    assert shades(video) == pytest.approx(list(range(30)), abs=1)
    assert video.timestamps_s == near([k / 10 for k in range(30)])
    assert video.duration_s == near(3.0)


@pytest.mark.parametrize("factor", [0, 0.4, 20])
def test_durations_in_headers_are_not_believed(budget, factor):
    clip = boxes.with_durations(clip_bytes(name="a.mov"), factor)
    assert decode_video(clip, ALL, budget).duration_s == near(3.0)


def test_a_false_key_frame_is_noticed(make_budget):
    clip = clip_bytes(name="a.mov", options=(("g", "100"), ("bf", "0")))
    marked = boxes.without(clip, (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stss"))  # then all are key frames
    right, video = (decode_video(data, FrameSampling(num_frames=3), make_budget()) for data in (clip, marked))
    assert np.array_equal(video.frames, right.frames)


@pytest.mark.parametrize(
    ("matrix", "act"),
    [
        ((0, 1, -1, 0), lambda frames: np.rot90(frames, -1, axes=(1, 2))),
        ((-1, 0, 0, 1), lambda frames: frames[:, :, ::-1]),
        ((1, 0, 0, -1), lambda frames: frames[:, ::-1]),
        ((0, 1, 1, 0), lambda frames: frames.swapaxes(1, 2)),
        ((0, -1, -1, 0), lambda frames: frames[:, ::-1, ::-1].swapaxes(1, 2)),
    ],
)
def test_turns_and_mirrors(make_budget, matrix, act):
    clip = clip_bytes(name="a.mov")
    plain, turned = (
        decode_video(data, FrameSampling(num_frames=2), make_budget()).frames
        for data in (clip, boxes.with_matrix(clip, *matrix))
    )
    assert np.array_equal(turned, act(plain))


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "name"), [("mjpeg", "yuvj420p", "a.mov"), ("libx264", "yuv420p", "a.mkv")]
)
def test_a_broken_packet_costs_one_frame(make_budget, codec, pix_fmt, name):
    clip = clip_bytes(name=name, codec=codec, pix_fmt=pix_fmt, options=(("g", "1"), ("bf", "0")))
    damaged = with_broken_packets(clip, 12, 13)
    video = decode_video(damaged, ALL, make_budget())
    assert shades(video) == pytest.approx([k for k in range(30) if k not in (12, 13)], abs=1)
    assert video.num_damaged == 2
    assert video.duration_s == near(3.0)
    few = decode_video(damaged, FrameSampling(num_frames=15), make_budget())
    assert len(few.frames) == 15, "other frames take the places of broken ones"


@pytest.mark.parametrize("limit", [45, 9000])
def test_a_broken_key_frame_costs_its_group_at_most(make_budget, limit):
    clip = clip_bytes(name="a.mkv", codec="mpeg4", num_frames=100, options=(("g", "10"),))
    damaged = with_broken_packets(clip, 30)
    video = decode_video(damaged, FrameSampling(num_frames=4), make_budget(max_decoded_frames=limit))
    assert [video.timestamps_s[k] for k in (0, -2, -1)] == near([1.2, 6.2, 8.7])
    assert [shade(video.frames[k]) for k in (0, -2, -1)] == pytest.approx([12, 62, 87], abs=2)
    assert video.num_damaged > 0


def with_broken_packets(clip: bytes, *broken: int) -> bytes:
    data = bytearray(clip)
    with av.open(BytesIO(clip)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        for index in broken:
            at = clip.index(bytes(packets[index]))
            data[at : at + packets[index].size] = b"\xff" * packets[index].size
    return bytes(data)


def test_a_cover_is_no_clip(budget):
    def written(has_video: bool) -> bytes:
        output = BytesIO()
        with av.open(output, "w", "mp4") as container:
            cover, sound = container.add_stream("mjpeg", rate=10), container.add_stream("aac", rate=44100)
            cover.width, cover.height, cover.pix_fmt, cover.disposition = 200, 200, "yuvj420p", 1024
            video = container.add_stream("mpeg4", rate=10) if has_video else None
            if video:
                video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((200, 200, 3), np.uint8), "rgb24")))
            samples = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
            samples.rate = 44100
            container.mux(sound.encode(samples))
            if video:
                for index in range(5):
                    container.mux(video.encode(av.VideoFrame.from_ndarray(picture(index, 64, 48), "rgb24")))
            for stream in container.streams:
                container.mux(stream.encode(None))
        return output.getvalue()

    assert decode_video(written(True), ALL, budget).frames.shape == (5, 48, 64, 3)
    with pytest.raises(MediaError, match="only sound or a cover"):
        decode_video(written(False), ALL, budget)


def test_a_clip_without_frames_is_empty(budget):
    clip = boxes.with_edits(clip_bytes(name="a.mov"), [(500, 90 * 1024)])
    with pytest.raises(MediaError, match="empty"):
        decode_video(clip, ALL, budget)


@pytest.mark.parametrize("file_format", ["WEBP", "PNG"])
def test_animated_pictures_are_clips(file_format):
    frames = [PIL.Image.fromarray(picture(index, 64, 48)) for index in range(5)]
    output, durations = BytesIO(), [100, 200, 50, 40, 110]
    frames[0].save(output, file_format, save_all=True, append_images=frames[1:], duration=durations, lossless=True)
    clip = mm.read_media(output.getvalue(), num_frames=9)
    assert np.array_equal(clip.frames, [picture(index, 64, 48) for index in range(5)])
    assert clip.times_s == near([0.0, 0.1, 0.3, 0.35, 0.39])
    assert clip.duration_s == near(0.5)
    assert mm.read_media(output.getvalue()).frames.shape == (1, 48, 64, 3), "a picture, if no frames are asked for"


@given(decoded=st.sets(st.integers(0, 30)), wanted=st.sets(st.integers(0, 30), min_size=1))
def test_selection(decoded, wanted):
    selection = Selection(sorted(wanted))
    given_frames = [one for rank in sorted(decoded) for one in selection.offer(rank, rank)] + list(selection.rest())
    ranks = [rank for rank, _ in given_frames]
    assert ranks == sorted(set(ranks))
    assert set(ranks) <= decoded
    assert wanted & decoded <= set(ranks), "a frame that was chosen and decoded is given"
    assert len(ranks) <= len(wanted)
