"""Ask a model folder held-out questions and count the right answers, generated freely by `transformers`.

An answer is right if it is the true one, word for word. A description is right if it names the same things with the
same properties in the same order (`content`), in any style. The control asks the same questions about another item's
picture: what is still right does not come from the picture. Prints a table, then one JSON line.

    python -m demos.train.evaluate --model mm/models/weights/tiny --scenes 150 --clips 60 [--unseen] [--json FILE]
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from demos.train.data.clips import draw_clip, sample_clip
from demos.train.data.questions import CLIP_KINDS, SCENE_KINDS, ClipAsker, Question, SceneAsker, SeveralAsker, content
from demos.train.data.scenes import HELD_OUT, draw_scene, sample_scene
from demos.train.model import IMAGE_TOKENS, pool_frames

FIRST_SEED = HELD_OUT + 100_000  # none of them is used by the check during training
MAX_NEW_TOKENS = 130
BATCH = 12
DESCRIPTIONS = {"caption", "tour", "list"}


@dataclass
class Item:
    """One question on pictures uint8 (T, 224, 224, 3): one image, the frames of a video, or several images."""

    question: Question
    pixels: np.ndarray
    group: str  # of the number of things: "0", "1-2", "3-6"
    medium: str = "image"

    @property
    def task(self) -> str:
        return f"clip {self.question.kind}" if self.medium == "video" else self.question.kind

    def right(self, answer: str) -> bool:
        if self.question.kind in DESCRIPTIONS:
            return content(answer) == content(self.question.answer)
        return answer.strip() == self.question.answer


def group_of(num_things: int) -> str:
    return "0" if num_things == 0 else "1-2" if num_things < 3 else "3-6"


def scene_items(count: int, unseen: bool, per_scene: int) -> Iterator[Item]:
    """`per_scene` kinds of question on each scene, in turn, so that every kind has its share."""
    for i in range(count):
        scene, rng = sample_scene(FIRST_SEED + i), np.random.default_rng([10, i])
        asker, pixels = SceneAsker(scene, rng, unseen=unseen), draw_scene(scene)[None]
        kinds = [SCENE_KINDS[(i * per_scene + k) % len(SCENE_KINDS)] for k in range(per_scene)]
        kinds += ["chart"] * bool(scene.chart) + ["number"] * bool(scene.display)  # few scenes have any
        for kind in dict.fromkeys(kinds):
            if question := asker.ask(kind):
                yield Item(question, pixels, group_of(len(scene.things)))


def clip_items(count: int, unseen: bool, per_clip: int) -> Iterator[Item]:
    for i in range(count):
        clip, rng = sample_clip(FIRST_SEED + i), np.random.default_rng([11, i])
        asker, frames = ClipAsker(clip, rng, unseen=unseen), draw_clip(clip)
        asked = [q for kind in CLIP_KINDS if (q := asker.ask(kind))]
        for k in range(min(per_clip, len(asked))):
            yield Item(asked[(i + k) % len(asked)], frames, group_of(len(clip.things)), "video")


def several_items(count: int, unseen: bool) -> Iterator[Item]:
    """Two pictures each: which of them shows something, and something about one of them."""
    for i in range(count):
        scenes = [sample_scene(FIRST_SEED + 50_000 + 2 * i + k) for k in range(2)]
        asker = SeveralAsker(scenes, np.random.default_rng([12, i]), unseen=unseen)
        pixels = np.stack([draw_scene(scene) for scene in scenes])
        for kind in ("which", "one"):
            if question := asker.ask(kind):
                yield Item(question, pixels, group_of(sum(len(s.things) for s in scenes)), "images")


@torch.no_grad()
def answer(model: torch.nn.Module, processor: object, items: list[Item], pictures: list[np.ndarray]) -> list[str]:
    """Greedy answers to prompts of one medium; `pictures` may be those of other items."""
    medium = items[0].medium
    media = [{"type": "video"}] if medium == "video" else [{"type": "image"}] * len(pictures[0])
    turns = [{"role": "user", "content": [*media, {"type": "text", "text": i.question.text}]} for i in items]
    prompts = [processor.apply_chat_template([turn], add_generation_prompt=True) for turn in turns]
    if medium == "video":
        return [answer_clip(model, processor, prompt, frames) for prompt, frames in zip(prompts, pictures, strict=True)]
    images = [list(p) for p in pictures]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt").to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(ids, skip_special_tokens=True)


def answer_clip(model: torch.nn.Module, processor: object, prompt: str, frames: np.ndarray) -> str:
    """`transformers` knows no video for this architecture: pool the frames here and generate from embeddings."""
    pixels = processor.image_processor(list(frames), return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    features = torch.stack(list(model.get_image_features(pixels).pooler_output)).view(
        -1, IMAGE_TOKENS, model.config.text_config.hidden_size
    )
    ids = processor.tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    at = int((ids[0] == model.config.video_token_id).nonzero())
    embeds = model.get_input_embeddings()(ids)[0]
    embeds = torch.cat([embeds[:at], pool_frames(features), embeds[at + 1 :]])[None]
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=model.device)
    new = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return processor.decode(new[0], skip_special_tokens=True)


def run(model: torch.nn.Module, processor: object, items: list[Item], swapped: bool) -> list[str]:
    """Answers in the order of the items; long answers are batched together so that few steps are spent on padding."""
    media = [item.pixels for item in items]
    mediums = sorted({item.medium for item in items})
    if swapped:  # the picture of the item half a list away, of the same medium
        for group in [[i for i, item in enumerate(items) if item.medium == medium] for medium in mediums]:
            pixels = [items[i].pixels for i in group]
            for i, other in zip(group, pixels[len(pixels) // 2 :] + pixels[: len(pixels) // 2], strict=True):
                media[i] = other
    order = sorted(range(len(items)), key=lambda i: (items[i].medium, len(items[i].question.answer)))
    answers = [""] * len(items)
    starts = range(0, len(order), BATCH)
    for start in tqdm(starts, desc="swapped" if swapped else "true picture", mininterval=5):
        batch = order[start : start + BATCH]
        for medium in mediums:
            part = [i for i in batch if items[i].medium == medium]
            if part:
                given = answer(model, processor, [items[i] for i in part], [media[i] for i in part])
                for i, text in zip(part, given, strict=True):
                    answers[i] = text
    return answers


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share."""
    z, p = 1.96, right / total
    middle, half = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, (middle - half) / (1 + z * z / total)), (middle + half) / (1 + z * z / total)


def tabulate(items: list[Item], answers: dict[str, list[str]]) -> dict[str, dict]:
    tasks: dict[str, dict] = {}
    for i, item in enumerate(items):
        for name in (item.task, f"{item.task} n={item.group}"):
            row = tasks.setdefault(name, {"items": 0, "right": 0, "swapped_right": 0})
            row["items"] += 1
            row["right"] += item.right(answers["true"][i])
            row["swapped_right"] += item.right(answers["swapped"][i])
    for row in tasks.values():
        row["accuracy"] = round(row["right"] / row["items"], 3)
        row["interval"] = [round(v, 3) for v in wilson(row["right"], row["items"])]
        row["swapped"] = round(row.pop("swapped_right") / row["items"], 3)
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=150)
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--several", type=int, default=40, help="prompts with two pictures")
    parser.add_argument("--per-scene", type=int, default=4)
    parser.add_argument("--per-clip", type=int, default=4)
    parser.add_argument("--unseen", action="store_true", help="ask in the wordings kept out of the training")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--show", type=int, default=0, help="print so many wrong answers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.time()
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=False)
    dtype = getattr(torch, args.dtype)
    model = (
        AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype, trust_remote_code=False)
        .to(args.device)
        .eval()
    )
    items = [
        *scene_items(args.scenes, args.unseen, args.per_scene),
        *clip_items(args.clips, args.unseen, args.per_clip),
        *several_items(args.several, args.unseen),
    ]
    answers = {name: run(model, processor, items, name == "swapped") for name in ("true", "swapped")}
    tasks = tabulate(items, answers)
    print(f"{'task':24}{'items':>6}{'right':>8}{'95 %':>14}{'swapped':>9}")
    for name, row in sorted(tasks.items()):
        low, high = row["interval"]
        print(f"{name:24}{row['items']:6}{row['accuracy']:8.2f}{f'{low:.2f}-{high:.2f}':>14}{row['swapped']:9.2f}")
    wrong = [i for i, item in enumerate(items) if not item.right(answers["true"][i])]
    for i in wrong[:: max(1, len(wrong) // max(1, args.show))][: args.show]:
        print(
            f"{items[i].task}: {items[i].question.text}\n"
            f"   true {items[i].question.answer}\n   said {answers['true'][i]}"
        )
    result = {
        "model": args.model.name,
        "tasks": dict(sorted(tasks.items())),
        "unseen_wordings": args.unseen,
        "first_seed": FIRST_SEED,
        "dtype": args.dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "wall_s": round(time.time() - start, 1),
    }
    line = json.dumps(result)
    print(line)
    if args.json:
        args.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
