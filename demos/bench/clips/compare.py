"""Compare what the product decodes of odd clips with ffmpeg's pixels and ffprobe's times.

python -m demos.bench.clips.compare            # all clips; needs the commands ffmpeg and ffprobe
python -m demos.bench.clips.compare vfr edit   # those whose name contains a word
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import mm
from demos.bench.clips.make import Case, cases
from mm.config import MediaLimits
from mm.errors import MediaError

LIMITS = MediaLimits(max_sampled_frames=500, max_pixels=40_000_000, max_total_pixels=2_000_000_000)
TIME_TOLERANCE_S = 0.0015
"""A unit of Matroska's clock, rounded."""


def probe(path: Path, *arguments: str) -> dict:
    command = ["ffprobe", "-v", "error", "-of", "json", *arguments, str(path)]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def main_stream(path: Path) -> dict:
    """The stream that ffmpeg takes when none is named: the largest, with a bonus for the default one."""
    streams = probe(path, "-show_streams", "-select_streams", "v")["streams"]
    real = [stream for stream in streams if not stream["disposition"]["attached_pic"]]
    return max(real, key=lambda s: s["width"] * s["height"] + 5_000_000 * s["disposition"]["default"])


TRANSPARENT = ("yuva", "rgba", "argb", "bgra", "abgr", "gbrap", "ya", "pal8")
"""How the names of pixel formats with transparent parts begin."""


def ffmpeg_frames(path: Path, stream: dict, shape: tuple[int, int]) -> np.ndarray:
    """RGB (T, H, W, 3) on white."""
    is_transparent = stream["pix_fmt"].startswith(TRANSPARENT)
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", str(path), "-map", f"0:{stream['index']}"]
    command += ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgba" if is_transparent else "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=False).stdout
    pixels = np.frombuffer(raw, np.uint8).reshape(-1, *shape, 4 if is_transparent else 3)
    if not is_transparent:
        return pixels
    rgba = pixels.astype(np.uint16)
    alpha = rgba[..., 3:]
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def expected_times(path: Path, case: Case, index: int) -> list[float]:
    if case.times_from == "ffmpeg":
        command = ["ffmpeg", "-nostdin", "-v", "error", "-i", str(path), "-map", f"0:{index}"]
        command += ["-fps_mode", "passthrough", "-enc_time_base", "1/90000", "-f", "framecrc", "-"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        times = [int(line.split(",")[2]) / 90000 for line in lines if not line.startswith("#")]
    else:
        entries = ("-show_frames", "-select_streams", str(index), "-show_entries", "frame=best_effort_timestamp_time")
        frames = probe(path, *entries)["frames"]
        times = [float(frame.get("best_effort_timestamp_time", "nan")) for frame in frames]
    if case.times_from == "rate":
        return [k / 10 for k in range(len(times))]
    return [t - times[0] for t in times]


def problem(case: Case, path: Path) -> str:
    """What is wrong, or empty."""
    try:
        ours = mm.read_media(path, num_frames=500, kind="video", limits=LIMITS)
    except MediaError as error:
        return "" if error.reason == case.refused else f"refused: {error}"
    if case.refused:
        return f"not refused: {case.refused}"
    stream = main_stream(path)
    times = expected_times(path, case, stream["index"])
    if len(times) != len(ours.times_s):
        return f"{len(ours.times_s)} frames, ffprobe has {len(times)}"
    worst_s = float(np.nanmax(np.abs(np.array(times) - ours.times_s)))  # ffprobe does not know some
    if not worst_s <= TIME_TOLERANCE_S:
        return f"times differ by {worst_s:.4f} s: {[round(t, 3) for t in ours.times_s[:8]]}, not {times[:8]}"
    theirs = ffmpeg_frames(path, stream, ours.frames.shape[1:3])
    if len(theirs) != len(ours.frames):
        return f"{len(ours.frames)} frames, ffmpeg has {len(theirs)}"
    difference = np.abs(ours.frames.astype(np.int16) - theirs)
    if difference.max() > case.tolerance:
        where = np.flatnonzero(difference.reshape(len(theirs), -1).max(1) > case.tolerance)
        return f"pixels differ by {difference.max()} (mean {difference.mean():.2f}) in frames {where[:8].tolist()}"
    if ours.num_damaged:
        return f"{ours.num_damaged} parts called damaged"
    return sampling_problem(path, ours)


def sampling_problem(path: Path, whole: mm.media.read.MediaFrames) -> str:
    """Whether a few frames are what all frames have at the same times: skipping must not change pixels."""
    for num in (1, 3, 5):
        few = mm.read_media(path, num_frames=num, kind="video", limits=LIMITS)
        at = [int(np.argmin(np.abs(np.array(whole.times_s) - t))) for t in few.times_s]
        if len(few.times_s) != min(num, len(whole.times_s)) or few.duration_s != whole.duration_s:
            return f"{num} sampled frames: {len(few.times_s)} came"
        if not np.array_equal(few.frames, whole.frames[at]):
            return f"{num} sampled frames differ from the same of all frames"
    return ""


def main(words: list[str]) -> int:
    chosen = [case for case in cases() if not words or any(word in case.name for word in words)]
    num_bad, began = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for case in chosen:
            path = Path(folder) / case.name
            try:
                case.make(path)
            except RuntimeError as error:
                print(f"NOT MADE {case.name}: {error}")
                num_bad += 1
                continue
            try:
                found = problem(case, path)
            except (MediaError, ValueError, subprocess.CalledProcessError) as error:
                found = repr(error)
            if found:
                print(f"WRONG {case.name}: {found}", flush=True)
                num_bad += 1
            path.unlink()
    num_refused = sum(bool(case.refused) for case in chosen)
    seconds = time.perf_counter() - began
    print(f"{len(chosen)} clips, {num_refused} of them to be refused, {num_bad} wrong, {seconds:.0f} s")
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
