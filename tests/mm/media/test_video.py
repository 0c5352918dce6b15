"""Clips: true times, even sampling, every limit with its reason, and a child that cannot hurt us."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.data.media import FrameSampling
from mm.errors import EngineError, InvalidRequest, MediaError
from mm.media import ChildPool, decode_video, prepare_decoder, video_from_array
from mm.media.sample import choose, num_wanted

ODD_CHILD = str(Path(__file__).with_name("odd_child.py"))
FORMATS = [
    ("a.mp4", "libx264", "yuv420p"),
    ("a.mp4", "libx265", "yuv420p"),
    ("a.mp4", "mjpeg", "yuvj420p"),
    ("a.webm", "libvpx-vp9", "yuv420p"),
    ("a.webm", "libvpx", "yuv420p"),
    ("a.mkv", "libx264", "yuv420p"),
    ("a.avi", "mpeg4", "yuv420p"),
    ("a.avi", "libx264", "yuv420p"),
    ("a.gif", "gif", "rgb8"),
]
LOSS = {"gif": 8, "mpeg4": 2}
"""How far a frame's shade may be off, in frames: a 256-colour palette and a low bit rate cost more than the rest."""


@pytest.fixture
def odd_pool() -> Iterator[Callable[[str], ChildPool]]:
    """Makes pools whose children decode with a decoder of `odd_child.py`."""
    pools: list[ChildPool] = []

    def make(decoder: str) -> ChildPool:
        pools.append(ChildPool((sys.executable, ODD_CHILD, decoder)))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def reason(call, *args, **kwargs) -> str:
    with pytest.raises(MediaError) as caught:
        call(*args, **kwargs)
    assert caught.value.kind == "video"
    return caught.value.reason


@pytest.mark.parametrize(("name", "codec", "pix_fmt"), FORMATS, ids=lambda value: str(value))
def test_formats_give_the_frames_at_the_centres(make_clip, read_shade, budget, name, codec, pix_fmt):
    options = (("x265-params", "log-level=none"),) if codec == "libx265" else ()
    clip = make_clip(name=name, codec=codec, pix_fmt=pix_fmt, options=options)
    video = decode_video(clip, FrameSampling(num_frames=3), budget)
    assert video.frames.shape == (3, 48, 64, 3)
    assert video.frames.dtype == np.uint8
    # 30 frames in 3 s: centres at 0.5, 1.5 and 2.5 s, where frames 5, 15 and 25 begin.
    assert video.timestamps_s == pytest.approx((0.5, 1.5, 2.5), abs=0.002)
    assert video.duration_s == pytest.approx(3.0, abs=0.002)
    assert [read_shade(frame) for frame in video.frames] == pytest.approx([5, 15, 25], abs=LOSS.get(codec, 1))
    assert video.frames[:, :20, :28].min() > 225, "the white quarter is at the top left"


def test_a_short_clip_gives_all_its_frames(make_clip, budget):
    video = decode_video(make_clip(num_frames=3), FrameSampling(num_frames=8), budget)
    assert video.timestamps_s == pytest.approx((0.0, 0.1, 0.2))


@pytest.mark.parametrize(("fps", "expected"), [(1.0, 3), (2.0, 6), (0.1, 1), (1000.0, 12)])
def test_fps_sampling_counts_by_duration(make_clip, budget, fps, expected):
    video = decode_video(make_clip(), FrameSampling(fps=fps, max_frames=12), budget)
    assert len(video.frames) == len(video.timestamps_s) == expected


def test_variable_frame_rate_keeps_true_times(make_clip, read_shade, budget):
    times_ms = (*range(0, 1000, 50), *range(1000, 11000, 1000))  # 20 frames in the first second, 10 in the next ten
    clip = make_clip(name="v.mkv", times_ms=times_ms)
    video = decode_video(clip, FrameSampling(num_frames=5), budget)
    assert video.timestamps_s == pytest.approx((1.0, 3.0, 5.0, 7.0, 9.0), abs=0.002)
    assert [read_shade(frame) for frame in video.frames] == [20, 22, 24, 26, 28]
    everything = decode_video(clip, FrameSampling(num_frames=30), budget)
    assert everything.timestamps_s == pytest.approx([ms / 1000 for ms in times_ms], abs=0.002)


def test_packets_before_the_needed_key_frame_are_not_decoded(make_clip, read_shade, make_budget):
    clip = make_clip(num_frames=100, options=(("g", "10"),))
    budget = make_budget(max_decoded_frames=45)  # straight through would be 96
    video = decode_video(clip, FrameSampling(num_frames=4), budget)
    assert video.timestamps_s == pytest.approx((1.2, 3.7, 6.2, 8.7))
    assert [read_shade(frame) for frame in video.frames] == pytest.approx([12, 37, 62, 87], abs=1)
    assert (
        reason(decode_video, clip, FrameSampling(num_frames=4), make_budget(max_decoded_frames=5)) == "too_many_frames"
    )


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied(make_clip, budget, degrees):
    plain = decode_video(make_clip(), FrameSampling(num_frames=2), budget).frames
    turned = decode_video(rotated(make_clip(), degrees), FrameSampling(num_frames=2), budget).frames
    assert np.array_equal(turned, np.rot90(plain, -degrees // 90, axes=(1, 2)))


def rotated(mp4: bytes, degrees: int) -> bytes:
    """The clip with a track matrix that asks players for a clockwise turn, as phones write it."""
    one, minus = (1 << 16).to_bytes(4, "big"), (-1 << 16 & 0xFFFFFFFF).to_bytes(4, "big")
    zero, unit = bytes(4), (1 << 30).to_bytes(4, "big")
    a, b, c, d = {90: (zero, one, minus, zero), 180: (minus, zero, zero, minus), 270: (zero, minus, one, zero)}[degrees]
    at = mp4.index(b"tkhd") + 4 + 40
    matrix = a + b + zero + c + d + zero + zero + zero + unit
    return mp4[:at] + matrix + mp4[at + len(matrix) :]


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.gif"])
def test_truncated_clips_are_refused(make_clip, budget, name, keep):
    clip = make_clip(name=name, codec="gif", pix_fmt="rgb8") if name == "a.gif" else make_clip(name=name)
    assert reason(decode_video, clip[: int(len(clip) * keep)], FrameSampling(), budget) == "undecodable"


def test_padding_behind_the_clip_is_no_damage(make_clip, budget):
    for name, codec, pix_fmt in FORMATS[::2]:
        clip = make_clip(name=name, codec=codec, pix_fmt=pix_fmt)
        for padding in (bytes(40), b"\xff" * 40):
            assert len(decode_video(clip + padding, FrameSampling(num_frames=3), budget).frames) == 3


def test_what_is_not_a_video_is_refused(budget):
    for data in (b"garbage" * 99, b"\0", bytes(5000), b"\0\0\0\x18ftypisom" + bytes(500)):
        assert reason(decode_video, data, FrameSampling(), budget) == "undecodable"
    assert reason(decode_video, b"", FrameSampling(), budget) == "empty"


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF", "PDF"])
def test_other_files_are_named(budget, file_format):
    data = BytesIO()
    PIL.Image.new("RGB", (64, 64)).save(data, file_format)
    with pytest.raises(MediaError, match=rf"(?i)not allowed; send MP4.*\(this is a .*{file_format}") as caught:
        decode_video(data.getvalue(), FrameSampling(), budget)
    assert caught.value.reason == "unsupported_format"


def test_a_codec_off_the_list_is_named_as_such(make_clip, budget):
    clip = make_clip(name="a.avi", codec="magicyuv", pix_fmt="gbrp", num_frames=3)
    with pytest.raises(MediaError, match=r"send MP4, MOV, WebM.*this clip's codec is magicyuv"):
        decode_video(clip, FrameSampling(), budget)


@pytest.mark.parametrize(
    "playlist", ["#EXTM3U\n#EXTINF:1,\n{url}\n", "ffconcat version 1.0\nfile '{url}'\n", "<?xml?><MPD>{url}"]
)
def test_playlists_reach_no_decoder(budget, playlist):
    with_listener(lambda url: reason(decode_video, playlist.format(url=url).encode(), FrameSampling(), budget))


def with_listener(act) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.3)
        assert act(f"http://127.0.0.1:{listener.getsockname()[1]}/x.ts") == "unsupported_format"
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_pixels": 64 * 48 - 1}, "too_many_pixels"),
        ({"max_total_pixels": 64 * 48 * 8 - 1}, "too_many_pixels"),
        ({"min_side_px": 49}, "too_small"),
        ({"max_aspect": 1.3}, "bad_aspect"),
        ({"max_duration_s": 2.9}, "too_long"),
        ({"max_sampled_frames": 7}, "too_many_frames"),
        ({"decode_wall_s": 0.0}, "decode_limit"),
    ],
    ids=str,
)
def test_limits(make_clip, make_budget, limits, expected):
    assert reason(decode_video, make_clip(), FrameSampling(num_frames=8), make_budget(**limits)) == expected


def test_limits_are_met_exactly(make_clip, make_budget):
    budget = make_budget(max_pixels=64 * 48, max_total_pixels=64 * 48 * 8, max_sampled_frames=8, max_duration_s=3.0)
    assert len(decode_video(make_clip(), FrameSampling(num_frames=8), budget).frames) == 8


def test_fps_beyond_the_frame_limit_is_refused_and_not_thinned(make_clip, make_budget):
    sampling = FrameSampling(fps=10, max_frames=30)
    assert reason(decode_video, make_clip(), sampling, make_budget(max_sampled_frames=20)) == "too_many_frames"


@pytest.mark.parametrize(
    "sampling", [{"num_frames": 0}, {"fps": 0.0}, {"fps": float("nan")}, {"fps": 1.0, "max_frames": 0}]
)
def test_sampling_nothing_is_refused(make_clip, budget, sampling):
    with pytest.raises(InvalidRequest, match=r"fps|frame"):
        decode_video(make_clip(), FrameSampling(**sampling), budget)


CLIP = b"\0\0\0\x08ftyp"


def odd(pool: ChildPool, budget, data: bytes = CLIP, **sampling):
    return decode_video(data, FrameSampling(**sampling), budget, pool)


@pytest.mark.parametrize(
    ("decoder", "expected", "limits"),
    [
        ("sleep", "decode_limit", {"decode_wall_s": 0.3}),
        ("fork_and_wait", "decode_limit", {"decode_wall_s": 0.3}),
        ("spin", "decode_limit", {"decode_cpu_s": 1, "decode_wall_s": 20.0}),
        ("hoard", "decode_limit", {"decode_memory_bytes": 512 << 20}),
        ("crash", "undecodable", {}),
        ("open_file", "undecodable", {}),
        ("open_socket", "undecodable", {}),
        ("lying", "undecodable", {}),
        ("greedy", "undecodable", {}),
        ("backwards", "undecodable", {}),
        ("endless", "decode_limit", {"decode_wall_s": 0.5}),
    ],
)
def test_a_child_that_misbehaves_ends_one_clip_only(odd_pool, make_budget, decoder, expected, limits):
    began = time.monotonic()
    pool = odd_pool(decoder)
    assert reason(odd, pool, make_budget(**limits)) == expected
    assert time.monotonic() - began < 8
    assert odd(odd_pool("well"), make_budget()).frames.mean() == 127
    pool.close()
    assert not children(decoder)


def children(decoder: str) -> list[str]:
    """Our processes that run a decoder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        found += [folder.name] if ODD_CHILD.encode() in command and decoder.encode() in command else []
    return found


def test_what_a_library_prints_does_not_break_the_answer(odd_pool, budget):
    assert odd(odd_pool("chatter"), budget).frames.mean() == 127


def test_large_clips_and_results_do_not_deadlock(odd_pool, make_budget):
    video = odd(odd_pool("large"), make_budget(), CLIP + bytes(100 << 20), num_frames=40)
    assert [int(frame[0, 0, 0]) for frame in video.frames] == list(range(40))


def test_a_child_that_does_not_start_is_our_fault(odd_pool, budget):
    with pytest.raises(EngineError, match="does not start"):
        odd(odd_pool("absent"), budget)


def test_a_dead_spare_is_replaced(odd_pool, budget):
    pool = odd_pool("well")
    pool.refill()
    spare = pool._spare
    spare.kill()
    spare.process.wait()
    assert odd(pool, budget).frames.mean() == 127


def test_threads_share_the_pool(odd_pool, make_budget):
    means: list[float] = []
    pool = odd_pool("well")
    threads = [threading.Thread(target=lambda: means.append(odd(pool, make_budget()).frames.mean())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert means == [127] * 4


def test_a_spare_ends_with_its_parent():
    parent = subprocess.run([sys.executable, ODD_CHILD, "orphan"], capture_output=True, text=True, check=True)
    spare = Path("/proc") / parent.stdout.strip()
    ended = time.monotonic() + 10
    while spare.exists() and "Z" not in (spare / "stat").read_text().split(") ")[1][:1]:
        assert time.monotonic() < ended, "the spare outlives its parent"
        time.sleep(0.05)


def test_the_child_does_not_import_torch_and_sees_no_secrets(monkeypatch):
    from mm.processes.child import child_environment

    monkeypatch.setenv("MM_API_KEY", "secret")
    assert "MM_API_KEY" not in child_environment()
    code = "import sys; from mm.media import video_child; print('torch' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=child_environment()
    )
    assert answer.stdout.strip() == "False"


def test_an_absent_decoder_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"mm-serving\[models\]"):
        prepare_decoder()


def test_no_descriptors_are_left_behind(make_clip, make_budget):
    decode_video(make_clip(), FrameSampling(), make_budget())
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        decode_video(make_clip(), FrameSampling(), make_budget())
        reason(decode_video, CLIP, FrameSampling(), make_budget())
    assert len(os.listdir("/proc/self/fd")) == before


def test_frames_in_memory(budget):
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    video = video_from_array(frames, [0.0, 0.5], 1.0, budget)
    assert video.timestamps_s == (0.0, 0.5)
    assert not np.shares_memory(video.frames, frames)
    for times_s in ([0.0], [0.5, 0.0], [0.0, 2.0]):
        with pytest.raises(InvalidRequest, match="timestamps_s"):
            video_from_array(frames, times_s, 1.0, budget)
    with pytest.raises(InvalidRequest, match="uint8"):
        video_from_array(frames[0], [0.0], 1.0, budget)


@given(gaps=st.lists(st.floats(0.001, 100.0), min_size=1, max_size=60), wanted=st.integers(1, 60))
def test_chosen_frames_are_different_and_ascending(gaps, wanted):
    times_s = [sum(gaps[:k]) for k in range(len(gaps))]
    count = num_wanted(len(times_s), sum(gaps), wanted, None, 0)
    chosen = choose(times_s, sum(gaps), count)
    assert len(chosen) == count == min(wanted, len(gaps))
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(len(times_s)))
