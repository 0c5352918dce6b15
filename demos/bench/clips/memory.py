"""Peak memory of both processes while a clip is read chunk by chunk: a minute against an hour.

    python -m demos.bench.clips.memory          # needs the command ffmpeg, for the clips

Each length is measured in a process of its own. The parent's figure is what reading adds to it, without the file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from demos.bench.clips.make import ffmpeg, source
from mm.config import MediaLimits
from mm.data.media import FrameSampling
from mm.media import ChildPool, MediaBudget, open_clip

CHUNK_FRAMES = 16
LIMITS = MediaLimits(max_sampled_frames=4000, max_decoded_frames=100_000, decode_wall_s=600, decode_cpu_s=600)


def peak_mb(pid: int | str) -> float:
    lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measure(path: Path) -> dict[str, float]:
    """Read one clip at 1 frame per second."""
    data, pool = path.read_bytes(), ChildPool()
    pool.refill()
    before_mb, began = peak_mb("self"), time.perf_counter()
    figures: dict[str, float] = {"file_mb": len(data) / 1e6, "child_mb": 0.0}
    sampling = FrameSampling(fps=1.0, max_frames=4000)
    with open_clip(data, sampling, MediaBudget(LIMITS), chunk_frames=CHUNK_FRAMES, pool=pool) as clip:
        child, is_over = clip._child.process.pid, threading.Event()

        def watch() -> None:
            while not is_over.wait(0.02):
                figures["child_mb"] = max(figures["child_mb"], peak_mb(child))

        watcher = threading.Thread(target=watch)
        watcher.start()
        for chunk in clip.chunks(CHUNK_FRAMES):
            figures.setdefault("first_chunk_s", time.perf_counter() - began)
            figures["frames"] = chunk.first + len(chunk.frames)
        is_over.set()
        watcher.join()
    figures |= {"seconds": time.perf_counter() - began, "parent_mb": peak_mb("self") - before_mb}
    pool.close()
    return {name: round(value, 2) for name, value in figures.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for seconds, rate in ((60, 1), (3600, 1), (60, 25), (600, 25)):
            path = Path(folder) / f"{seconds}-{rate}.mp4"
            codec = ("-c:v", "libx264", "-preset", "ultrafast", "-bf", 2, "-pix_fmt", "yuv420p", "-threads", 1)
            ffmpeg(*source(size="320x240", rate=rate, seconds=seconds), *codec, path)
            command = [sys.executable, "-m", "demos.bench.clips.memory", str(path)]
            figures = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            print(f"{seconds} s at {rate} fps: {figures}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(Path(sys.argv[1]))))
    else:
        main()
