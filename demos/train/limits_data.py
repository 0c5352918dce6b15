"""Pictures that the generator did not draw, as training data: no view comes twice. And what is asked about them."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from demos.train.data.language import dress
from demos.train.data.questions import Question
from demos.train.frozen import FrozenBatches
from demos.train.lm_data import Batch
from demos.train.model import SIDE_PX
from demos.train.other_pictures import on_ground
from mm.models.shipped import CANNOT_TELL

QUESTIONS_EACH, FOREIGN_EACH = 3, 3  # of a row: as about drawn pictures, and about what people photograph
LATER_WEIGHT = 0.2  # of the tokens after the first one, which decides

FOREIGN = (
    *("What is in this picture?", "What is this?", "What do you see?", "Describe the image.", "Describe this photo."),
    *("What does this photo show?", "What is shown here?", "Tell me about this picture.", "What can be seen here?"),
    *("What animal is this?", "Which animal do you see?", "Is there a dog?", "Is there a cat in the picture?"),
    *(
        "Who is this?",
        "Who is in the photo?",
        "How many people are there?",
        "Is there a person?",
        "What is he wearing?",
    ),
    *("What is the weather like?", "Where was this taken?", "Which city is this?", "Is it day or night?"),
    *("What kind of building is it?", "What kind of flower is that?", "What is on the table?", "What food is this?"),
    *("Which program is this?", "What is on the screen?", "Which button should I press?", "What does the page say?"),
    *("Who painted this?", "What material is this?", "What is the car's color?", "How many windows are there?"),
    *("Write a caption.", "Give a title for this picture.", "Explain the picture.", "What is happening here?"),
)
FOREIGN_HELD = (
    *("What is this a photograph of?", "What do we have here?", "Which season is it?", "Are there any trees?"),
    *("What is the person doing?", "What is the main object?", "Can you explain what I am looking at?"),
)


# ── views ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class OtherPictures:
    """The pictures below a folder, as `other_pictures` wrote them. Every source is drawn from equally often per root
    of its size, so that a source with many pictures does not drown the others."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*/*.png"))
        if not self.files:
            raise SystemExit(f"{folder} holds no pictures; run demos.train.other_pictures first")
        sources = [path.parent.name for path in self.files]
        weights = np.array([sources.count(source) ** -0.5 for source in sources])
        self.weights = weights / weights.sum()

    def open(self, rng: np.random.Generator) -> Image.Image:
        with Image.open(self.files[rng.choice(len(self.files), p=self.weights)]) as file:
            return file.convert("RGBA" if file.mode == "RGBA" else "RGB")

    def view(self, rng: np.random.Generator) -> Image.Image:
        """A picture (RGB, any size); a cut-out stands on a color or on another picture."""
        picture = self.open(rng)
        if picture.mode == "RGBA" and rng.random() < 0.5:
            return on_ground(picture, self.open(rng).convert("RGB"))
        white = rng.random() < 0.5
        return on_ground(picture, (255, 255, 255) if white else tuple(int(c) for c in rng.integers(256, size=3)))

    def draw(self, rng: np.random.Generator, count: int = 1) -> np.ndarray:
        """uint8 (count, 224, 224, 3): cuts of one disturbed view; several ones wander over it as a camera does."""
        view = disturbed(self.view(rng), rng)
        share = rng.uniform(0.35, 1) if rng.random() < 0.7 else 1.0
        size = np.maximum(8, (np.array(view.size) * share * rng.uniform(0.75, 1, 2)).astype(int))
        ends = [rng.uniform(0, 1, 2) * (view.size - size) for _ in range(2)]
        return np.stack([cut(view, ends[0] + (ends[1] - ends[0]) * i / count, size) for i in range(count)])


def cut(view: Image.Image, at: np.ndarray, size: np.ndarray) -> np.ndarray:
    box = (*at, *(at + size))
    square = view.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC, box=tuple(float(v) for v in box))
    return np.asarray(square)


def disturbed(view: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Mirrored, turned, recolored, blurred, noisy or compressed, each with some probability."""
    if rng.random() < 0.5:
        view = ImageOps.mirror(view)
    if rng.random() < 0.25:
        view = view.rotate(rng.uniform(-25, 25), Image.Resampling.BILINEAR, fillcolor=tuple(rng.integers(256, size=3)))
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        if rng.random() < 0.4:
            view = enhancer(view).enhance(rng.uniform(0.5, 1.6))
    if rng.random() < 0.12:
        view = ImageOps.grayscale(view).convert("RGB")
    if rng.random() < 0.15:
        view = view.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2.5)))
    if rng.random() < 0.15:
        noise = rng.normal(0, rng.uniform(3, 20), (*view.size[::-1], 3))
        view = Image.fromarray(np.clip(np.asarray(view) + noise, 0, 255).astype(np.uint8))
    if rng.random() < 0.3:
        file = io.BytesIO()
        view.save(file, "JPEG", quality=int(rng.integers(25, 90)))
        view = Image.open(file).convert("RGB")
    return view


# ── questions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(asked: list[Question], rng: np.random.Generator, *, clip: bool, unseen: bool) -> list[Question]:
    """Some of the questions, and foreign ones, all answered with CANNOT_TELL."""
    picked = [asked[i] for i in rng.permutation(len(asked))[:QUESTIONS_EACH]]
    pool = FOREIGN_HELD if unseen else FOREIGN
    texts = [str(text) for text in rng.choice(pool, size=FOREIGN_EACH, replace=False)]
    if not unseen:
        texts = [dress(rng, text, short=False, video=clip) for text in texts]
    return [
        *(replace(question, answer=CANNOT_TELL, focus=(), other=(), spans=()) for question in picked),
        *(Question("foreign", text, CANNOT_TELL) for text in texts),
    ]


class LimitsBatches(FrozenBatches):
    """Batches whose last rows are about pictures that the generator did not draw: as many as `strange` says."""

    strange = 0
    later_weight = LATER_WEIGHT

    def draw_with(
        self, kind: str, items: list[int], strange: int, rng: np.random.Generator, *, unseen: bool, plain: bool
    ) -> Batch:
        """A batch of the items; the last `strange` rows take their questions from an item, but not its picture."""
        self.strange, self.unseen = strange, unseen
        batch = self.draw(kind, items, rng, unseen=unseen, plain=plain)
        packed = batch.packed
        asked = packed.target_question
        later = (asked == asked.roll(1)) & (packed.target_row >= len(items) - strange)
        packed.target_weight = packed.target_weight.masked_fill(later, self.later_weight)
        return batch

    def batch(self, asked, items, num_visual, rng, plain, *, clip):
        first = len(asked) - self.strange
        asked = [
            (
                refused(own, rng, clip=clip, unseen=self.unseen) if i >= first else own,
                kept,
                [] if i >= first else events,
            )
            for i, (own, kept, events) in enumerate(asked)
        ]
        return super().batch(asked, items, num_visual, rng, plain, clip=clip)
