"""Write the sample pictures, the sample clip and samples.json (a question and its true answer for each).

python -m demos.samples.make          Needs: PyAV.
"""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from demos.train.data.clips import draw_clip, sample_clip
from demos.train.data.questions import ClipAsker, SceneAsker
from demos.train.data.scenes import HELD_OUT, draw_scene, sample_scene

FOLDER = Path(__file__).parent
FRAMES_PER_S = 8
NUM_FRAMES = 16
SCENES = {  # file → (held-out seed, counts of the scene, kind of question)
    "shapes_and_text.png": (HELD_OUT + 2, {"num_things": 3, "num_texts": 1}, "read"),
    "many_shapes.png": (HELD_OUT + 8, {"num_things": 6, "num_texts": 0}, "count"),
    "one_of_each.png": (HELD_OUT + 13, {"num_things": 4, "num_texts": 1}, "where"),
}
CLIP = ("clip.mp4", HELD_OUT + 6, "happens")


def write_mp4(path: Path, frames: np.ndarray) -> None:
    """H.264 without visible loss; frames uint8 (T, H, W, 3)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FRAMES_PER_S), options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    listing = []
    for name, (seed, counts, kind) in SCENES.items():
        scene = sample_scene(seed, **counts)
        Image.fromarray(draw_scene(scene)).save(FOLDER / name, optimize=True)
        question = SceneAsker(scene, np.random.default_rng(seed)).ask(kind)
        listing.append({"file": name, "type": "image", "question": question.text, "answer": question.answer})
    name, seed, kind = CLIP
    clip = sample_clip(seed, num_frames=NUM_FRAMES)
    write_mp4(FOLDER / name, draw_clip(clip))
    question = ClipAsker(clip, np.random.default_rng(seed)).ask(kind)
    listing.append({"file": name, "type": "video", "question": question.text, "answer": question.answer})
    (FOLDER / "samples.json").write_text(json.dumps(listing, indent=2) + "\n")


if __name__ == "__main__":
    main()
