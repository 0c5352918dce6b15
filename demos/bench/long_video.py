"""Clips of any length through the server: memory of every process, time to the first token, and events that are found.

A long clip is a drawn one that stands still before and after its events, one frame per second. It is asked about in a
streamed request with cubes, the longest last, and compared with decoding and encoding alone (`--alone`).

    python -m demos.bench.long_video [--minutes 1,60] [--clips 1] [--model tiny]

Prints one JSON line per clip: peak memory of each process (MB), seconds to the first token, what came in comments, the
cubes' borders next to the events, and whether the answer is right.
"""

import argparse
import base64
import io
import json
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from threading import Event, Thread

import av
import httpx
import numpy as np

from demos.train.data.asking import content
from demos.train.data.clips import draw_clip, sample_clip
from demos.train.data.questions import ClipAsker, Question
from demos.train.data.things import HELD_OUT
from mm.config import MediaLimits, ModelConfig
from mm.data.media import FrameSampling
from mm.encode.clip_stream import STREAMED_FRAMES
from mm.media import MediaBudget, open_clip

FIRST_SEED = HELD_OUT + 700_000
NEAR_S = 5
POSITIONS = 60  # cubes at most: each takes the positions of a frame, and tiny has 4,096


def long_clip(seed: int, seconds: int) -> tuple[bytes, Question, list[int]]:
    """(MP4 at one frame per second, a question about what happens, when the events are over)."""
    clip, rng = sample_clip(seed, num_frames=16), np.random.default_rng([41, seed])
    frames = draw_clip(clip)
    start = int(rng.integers(0, max(1, seconds - len(frames))))
    question = ClipAsker(clip, rng).ask("happens")
    assert question is not None
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(1), options={"crf": "18", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for second in range(seconds):
            shown = frames[min(max(second - start, 0), len(frames) - 1)]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(shown), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue(), question, [start + event.after_frame for event in clip.events]


class Watch:
    """Peak resident memory (MB) of a process and of those below it, by what they run."""

    def __init__(self, pid: int) -> None:
        self.peak: dict[str, float] = {}
        self._pid, self._stop = pid, Event()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            for pid in [self._pid, *below(self._pid)]:
                try:
                    command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                except (OSError, IndexError):
                    continue
                name = "video child" if any("video_child" in part for part in command) else "server"
                self.peak[name] = max(self.peak.get(name, 0.0), round(pages * 4096 / 1e6, 1))

    def stop(self) -> dict[str, float]:
        self._stop.set()
        self._thread.join()
        return self.peak


def below(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found + [deeper for child in found for deeper in below(child)]


def ask(url: str, media: bytes, text: str, seconds: int) -> dict:
    """A streamed answer, with when its parts came."""
    link = f"data:video/mp4;base64,{base64.b64encode(media).decode()}"
    parts = [{"type": "video_url", "video_url": {"url": link}}, {"type": "text", "text": text}]
    vision = {"reducer": f"cubes:frames_per_cube={max(3, -(-seconds // POSITIONS))}", "num_frames": seconds}
    body = {"model": "tiny", "messages": [{"role": "user", "content": parts}], "temperature": 0, "stream": True}
    body |= {"max_tokens": 64, "vision": vision | {"return_map": True, "return_timings": True}}
    start, first, answer, comments, last = time.perf_counter(), 0.0, "", 0, {}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=None) as response:
        for line in response.iter_lines():
            comments += line.startswith(":")
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise SystemExit(f"the server refused: {event['error']['message']}")
            piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
            if piece and not first:
                first = time.perf_counter() - start
            answer += piece or ""
            last = event if not event["choices"] else last
    return {"ttft_s": round(first, 2), "answer": answer, "comments": comments, "vision": last["vision"]}


def alone_s(media: bytes, seconds: int, model: str) -> float:
    """Seconds of decoding and encoding alone, chunk by chunk, in this process."""
    from mm.build import build_encode_parts
    from mm.data.media import Video

    limits = MediaLimits(max_sampled_frames=seconds)
    parts = build_encode_parts(ModelConfig(model=model, num_threads=1, limits=limits))
    start = time.perf_counter()
    with open_clip(media, FrameSampling(num_frames=seconds), MediaBudget(limits), chunk_frames=STREAMED_FRAMES) as clip:
        for chunk in clip.chunks(STREAMED_FRAMES):
            shown = {"timestamps_s": chunk.timestamps_s, "duration_s": clip.duration_s, "content_hash": ""}
            parts.encoder.encode([Video(frames=chunk.frames, **shown)])
    return round(time.perf_counter() - start, 2)


def serve(model: str, most: int, port: int) -> subprocess.Popen:
    options = ["--in-process", "--port", str(port), "--max-sampled-frames", str(most), "--threads", "1"]
    options += ["--request-timeout-s", "3600"]
    server = subprocess.Popen([sys.executable, "-m", "serve.cli.app", "serve", model, *options])
    for _ in range(600):
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                return server
        except httpx.HTTPError:
            time.sleep(0.5)
    raise SystemExit("the server does not start")


def measure(args: argparse.Namespace, minutes: float, seed: int) -> dict:
    seconds, url = round(60 * minutes), f"http://127.0.0.1:{args.port}"
    media, question, events = long_clip(seed, seconds)
    server = serve(args.model, max(round(60 * m) for m in args.minutes), args.port)
    try:
        watch = Watch(server.pid)
        told = ask(url, media, question.text, seconds)
        peak = watch.stop()
    finally:
        server.terminate()
        server.wait()
    borders = [cube["start_s"] for cube in told["vision"]["items"][0]["cubes"]]
    near = [min(abs(border - event) for border in borders) for event in events]
    line = {"minutes": minutes, "seed": seed, "peak_mb": peak, "ttft_s": told["ttft_s"], "comments": told["comments"]}
    line |= {"cubes": len(borders), "events_s": events, "nearest_border_s": near, "answer": told["answer"]}
    line |= {"true": question.answer, "right": content(told["answer"]) == content(question.answer)}
    line["dated"] = all(distance <= NEAR_S for distance in near)
    if args.alone:
        line["alone_s"] = alone_s(media, seconds, args.model)
    return line | {"timings": told["vision"].get("timings")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--minutes", type=lambda text: [float(part) for part in text.split(",")], default=[1.0, 60.0])
    parser.add_argument("--clips", type=int, default=1, help="of each length")
    parser.add_argument("--port", type=int, default=8131)
    parser.add_argument("--alone", action="store_true", help="also time decoding and encoding alone")
    args = parser.parse_args()
    for minutes in args.minutes:
        for i in range(args.clips):
            print(json.dumps(measure(args, minutes, FIRST_SEED + i)), flush=True)


if __name__ == "__main__":
    main()
