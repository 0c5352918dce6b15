"""Write the held-out set that `mm eval` asks: scenes and clips of seeds that no training sees, with their questions.

Pictures are stored as JPEG without colour subsampling and clips as H.264, so that any client can send them; --check
compares them with the raw pixels. The same seeds and versions make the same file.

    python -m demos.train.data.held_out [--out serve/evaluation/held_out.parquet] [--check MODEL]
"""

import argparse
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from demos.train.data.clips import draw_clip, sample_clip
from demos.train.data.questions import CLIP_KINDS, SCENE_KINDS, ClipAsker, Question, SceneAsker
from demos.train.data.scenes import HELD_OUT, draw_scene, sample_scene
from serve.evaluation.items import Item, held_out_path, with_swaps, write_test_set
from serve.evaluation.scoring import Scoring, content

FIRST_SEED = HELD_OUT + 500_000  # the checks during training and demos.train.evaluate use others
NUM_MEDIA = {"image": 330, "video": 170}  # seeds that every kind of question draws from
NUM_MORE = 2000  # further seeds, for kinds that need a picture of a rare sort
FRAMES_PER_S = 8
JPEG_QUALITY = 92
QP = 18  # a constant quantiser: x264's rate control adds up floats in an order that differs from run to run

MANY, FEWER = 120, 60  # questions in unseen wordings: of kinds that the model is held to, and of the others
HELD_TO = ("exist", "where", "relation", "count", "read", "chart", "caption", "clip-happens", "clip-first")
ATTRIBUTES, MORE = ("color", "shape", "size"), 216  # held to where there are 3 or more objects: half of the pictures
TRAINED = 40  # questions of each kind in wordings of the training
PER_KIND = 2  # questions of one kind and wording about one picture, at most

VERBATIM = ("read", "number", "text")
CONTENT = ("caption", "tour", "list", "happens", "first", "last")
DIGITS = [str(number) for number in range(11)]
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def quota(task: str, wording: str) -> int:
    """Questions wanted."""
    if wording == "trained":
        return TRAINED
    return MORE if task in ATTRIBUTES else MANY if task in HELD_TO else FEWER


def asker_of(medium: str, seed: int, rng: np.random.Generator, wording: str) -> tuple[SceneAsker | ClipAsker, int]:
    """Who asks about the picture or clip of a seed, and how many objects it shows."""
    if medium == "image":
        scene = sample_scene(seed)
        return SceneAsker(scene, rng, unseen=wording == "unseen"), len(scene.things)
    clip = sample_clip(seed)
    return ClipAsker(clip, rng, unseen=wording == "unseen"), len(clip.things)


def seeds_of(medium: str, rng: np.random.Generator) -> Iterator[int]:
    """Seeds to ask about, each PER_KIND times: those that all kinds share, then further ones.

    The shared ones come in random order, so that a kind meets pictures as the generator draws them and not those which
    another kind had no use for.
    """
    for _ in range(PER_KIND):
        yield from (FIRST_SEED + int(i) for i in rng.permutation(NUM_MEDIA[medium]))
    for seed in range(FIRST_SEED + NUM_MEDIA[medium], FIRST_SEED + NUM_MEDIA[medium] + NUM_MORE):
        yield from [seed] * PER_KIND


def item_of(
    question: Question, others: tuple[str, ...], wording: str, num_objects: int, medium: str, seed: int, number: int
) -> Item:
    task = question.kind if medium == "image" else f"clip-{question.kind}"
    scoring: Scoring = "content" if question.kind in CONTENT else "verbatim" if question.kind in VERBATIM else "exact"
    if scoring == "content" and not content(question.answer):
        raise ValueError(f"no content is seen in {question.answer!r}; teach it to serve/evaluation/scoring.py")
    return Item(
        id=f"{task}-{wording}-{number:03}",
        task=task,
        media=b"",
        media_type="image/jpeg" if medium == "image" else "video/mp4",
        media_index=seed,
        question=question.text,
        answer=question.answer,
        accepted=(*accepted(question.answer), *others),
        scoring=scoring,
        num_objects=num_objects,
        wording=wording,
        seed=seed,
    )


def accepted(answer: str) -> tuple[str, ...]:
    """Other words for the same answer, for models that were not trained on ours."""
    if answer in DIGITS:
        return (NUMBERS[int(answer)],) if answer != "0" else ("zero", "none")
    if answer == "center":
        return ("centre", "middle", "middle center", "the center")
    if answer in ("top center", "bottom center"):
        return (answer.replace("center", "middle"), answer.replace("center", "centre"))
    return {"small": ("little",), "large": ("big",)}.get(answer, ())


def other_captions(asker: SceneAsker | ClipAsker, question: Question) -> tuple[str, ...]:
    """Descriptions that say other things and are right too: some styles name the colors of texts, some do not."""
    if question.kind not in ("caption", "tour") or not isinstance(asker, SceneAsker):
        return ()
    said, others = {content(question.answer)}, []
    for style in (0, 2):
        other = asker.describe(style).answer
        if content(other) not in said:
            said.add(content(other))
            others.append(other)
    return tuple(others)


def choose(medium: str, kinds: tuple[str, ...]) -> list[Item]:
    """Items of one medium, seed by seed."""
    items = []
    for kind_index, kind in enumerate(kinds):
        task = kind if medium == "image" else f"clip-{kind}"
        for wording in ("unseen", "trained"):
            rng = np.random.default_rng([12, medium == "video", kind_index, wording == "unseen"])
            asked: set[tuple[int, str]] = set()
            wanted = quota(task, wording)
            for seed in seeds_of(medium, rng):
                if len(asked) == wanted:
                    break
                asker, num_objects = asker_of(medium, seed, rng, wording)
                question = asker.ask(kind)
                if question and (seed, question.text) not in asked:
                    asked.add((seed, question.text))
                    others = other_captions(asker, question)
                    items.append(item_of(question, others, wording, num_objects, medium, seed, len(asked)))
            if len(asked) < wanted:
                print(f"{task}: only {len(asked)} of {wanted} questions in {wording} wordings")
    return sorted(items, key=lambda item: item.seed or 0)


# ── media ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def pixels_of(item: Item) -> np.ndarray:
    """The raw frames, uint8 (T, H, W, 3); T is 1 for a picture."""
    assert item.seed is not None
    return draw_scene(sample_scene(item.seed))[None] if item.kind == "image" else draw_clip(sample_clip(item.seed))


def encoded(pixels: np.ndarray) -> bytes:
    """A JPEG of one frame, an MP4 of several."""
    file = io.BytesIO()
    if len(pixels) == 1:
        Image.fromarray(pixels[0]).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
        return file.getvalue()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(FRAMES_PER_S), options={"qp": str(QP)})
        stream.codec_context.thread_count = 1  # the number of threads changes the bytes too
        stream.height, stream.width, stream.pix_fmt = pixels.shape[1], pixels.shape[2], "yuv420p"
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def with_media(items: list[Item]) -> list[Item]:
    media: dict[tuple[str, int], bytes] = {}
    for item in items:
        if (item.kind, item.media_index) not in media:
            media[item.kind, item.media_index] = encoded(pixels_of(item))
    return [replace(item, media=media[item.kind, item.media_index]) for item in items]


# ── is the encoding harmless? ─────────────────────────────────────────────────────────────────────────────────────────


def check(items: list[Item], model_name: str, every: int = 8) -> None:
    """Ask some questions about the stored and about the raw pixels, and print how often answers and outcomes differ."""
    import mm
    from mm.data.media import Video
    from serve.evaluation.scoring import is_right

    model, outcomes, differ = mm.load(model_name), Counter(), Counter()
    for item in items[::every]:
        pixels = pixels_of(item)
        times_s = tuple(i / FRAMES_PER_S for i in range(len(pixels)))
        duration_s, name = len(pixels) / FRAMES_PER_S, f"raw {item.seed}"
        raw: Any = pixels[0]
        if len(pixels) > 1:
            raw = Video(frames=pixels, timestamps_s=times_s, duration_s=duration_s, content_hash=name)
        options = {"temperature": 0.0, "max_new_tokens": 192} | ({"num_frames": 16} if item.kind == "video" else {})
        texts = [
            model.generate(item.question, **{f"{item.kind}s": [medium]}, **options).text for medium in (item.media, raw)
        ]
        differ[item.kind] += texts[0] != texts[1]
        right = [is_right(text, (item.answer, *item.accepted), item.scoring) for text in texts]
        outcomes[item.kind, right[0], right[1]] += 1
    for kind in ("image", "video"):
        both = {(a, b): outcomes[kind, a, b] for a in (True, False) for b in (True, False)}
        print(
            f"{kind}: {sum(both.values())} questions, {differ[kind]} answers differ; right on both {both[True, True]}, "
            f"only stored {both[True, False]}, only raw {both[False, True]}, on none {both[False, False]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=held_out_path())
    parser.add_argument("--check", metavar="MODEL", help="compare answers on stored and raw pixels")
    args = parser.parse_args()
    items = with_swaps(with_media([*choose("image", SCENE_KINDS), *choose("video", CLIP_KINDS)]))
    write_test_set(args.out, items)
    media = {(item.kind, item.media_index): len(item.media) for item in items}
    for kind in ("image", "video"):
        sizes = [size for (of, _), size in media.items() if of == kind]
        print(f"{kind}: {len(sizes)} media, {sum(sizes) / 1e6:.2f} MB")
    print(f"{len(items)} items, {args.out.stat().st_size / 1e6:.2f} MB")
    for (task, wording), count in sorted(Counter((i.task, i.wording) for i in items).items()):
        print(f"{task:18}{wording:9}{count:5}")
    if args.check:
        check(items, args.check)


if __name__ == "__main__":
    main()
