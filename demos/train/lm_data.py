"""What the decoder is trained on: features on disk, and the batch of questions of each step.

A batch holds rows of one sort: scenes, clips, or several scenes side by side.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from demos.train.data.clips import sample_clip
from demos.train.data.questions import (
    CLIP_KINDS,
    FRAME_TOKENS,
    PICTURE_TOKENS,
    SHORT_KINDS,
    ClipAsker,
    Question,
    SceneAsker,
    SeveralAsker,
    disturb,
)
from demos.train.data.scenes import sample_scene
from demos.train.data.things import Scene
from demos.train.packing import Packed, Packer, Row, collate

SCENES_PER_BATCH, CLIPS_PER_BATCH, GROUPS_PER_BATCH = 8, 3, 4
QUESTIONS = 14  # per scene
READS, NUMBERS, CHARTS = 3, 3, 4  # questions on a scene that has texts, a display, or a chart
DISTURBED_SHARE = 0.15  # of the questions, after SHAPES_FROM
LONG_SHARE = {"caption": 0.3, "tour": 0.12, "list": 0.15}  # of the rows; the rest are short questions
KEEP, KEEP_CELLS = 96, 30  # visual tokens of an image, pooled cells of a clip, until FULL_FROM
FULL_FROM = 0.85  # share of the steps after which all visual tokens are in the row
CLIPS_FROM, CLIP_SHARE = 0.12, 0.4  # clips come in after the first lookups have formed
GROUPS_FROM, GROUP_SHARE, THREE_SHARE = 0.35, 0.06, 0.25  # several pictures in a row; three instead of two
SHAPES_FROM = 0.3  # when other row shapes (turns, system message, question first) come in


@dataclass
class Batch:
    packed: Packed
    questions: list[Question]
    items: list[tuple[int, ...]]  # which scenes (of one row), or which clip
    clip: bool

    def name(self, question: Question) -> str:
        return f"clip {question.kind}" if self.clip else question.kind


class Features:
    """Tower features on disk: scenes (N, 256, D), and the distinct frames of clips (M, 256, D).

    frames: for each clip, which of its distinct frames each of its frames looks like.
    """

    def __init__(self, folder: Path) -> None:
        self.info = json.loads((folder / "features.json").read_text())
        self.scenes = self.open(folder / "scenes.bin")
        self.folder, self.clips = folder, None
        self.index_clips(list(range(self.info["clips"])))

    def index_clips(self, seeds: list[int]) -> None:
        self.frames, self.first = [], [0]
        for seed in seeds:
            states = sample_clip(seed).states()
            rank = {state: i for i, state in enumerate(dict.fromkeys(states))}
            self.frames.append(torch.tensor([rank[state] for state in states]))
            self.first.append(self.first[-1] + len(rank))

    def open(self, path: Path) -> Tensor:
        size = path.stat().st_size // 2
        flat = torch.from_file(str(path), shared=False, size=size, dtype=torch.bfloat16)
        return flat.view(-1, self.info["tokens"], self.info["width"])

    def clip(self, item: int) -> tuple[Tensor, Tensor]:
        """Its distinct frames (m, 256, D), and which of them each frame is (T,)."""
        if self.clips is None:  # opened at the first use: it may still be written while the first steps run
            path = self.folder / "clips.bin"
            while path.stat().st_size < 2 * self.first[-1] * self.info["tokens"] * self.info["width"]:
                time.sleep(5)
            self.clips = self.open(path)
        return self.clips[self.first[item] : self.first[item + 1]], self.frames[item]


class Batches(Dataset[Batch]):
    """The batch of each step. `mix` (kinds,) are the weights of short kinds, shared with the training process."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, info: dict, first_step: int, num_steps: int, mix: Tensor
    ) -> None:
        self.packer, self.info, self.mix = Packer(tokenizer), info, mix
        self.first_step, self.num_steps = first_step, num_steps

    def __len__(self) -> int:
        return self.num_steps - self.first_step

    def __getitem__(self, index: int) -> Batch:
        step = self.first_step + index
        rng = np.random.default_rng([9, step])
        done, sort = step / self.num_steps, rng.random()
        full, plain = done >= FULL_FROM, done < SHAPES_FROM
        if self.info["clips"] and done >= CLIPS_FROM and sort < CLIP_SHARE:
            return self.clips(rng.integers(self.info["clips"], size=CLIPS_PER_BATCH).tolist(), rng, full, plain)
        if done >= GROUPS_FROM and sort > 1 - GROUP_SHARE:
            count = 3 if rng.random() < THREE_SHARE else 2
            groups = rng.integers(self.info["scenes"], size=(GROUPS_PER_BATCH, count))
            return self.groups([tuple(group) for group in groups.tolist()], rng, full, plain)
        return self.scenes(rng.integers(self.info["scenes"], size=SCENES_PER_BATCH).tolist(), rng, full, plain)

    def scenes(
        self, seeds: list[int], rng: np.random.Generator, full: bool, plain: bool, unseen: bool = False
    ) -> Batch:
        rows: list[tuple[list[Question], np.ndarray, list[tuple[int, int, int]]]] = []
        for seed in seeds:
            asker = SceneAsker(sample_scene(seed), rng, unseen=unseen)
            kept = choose(asker.marked(), PICTURE_TOKENS, PICTURE_TOKENS if full else KEEP, rng)
            rows.append(([q for kind in self.kinds(asker.scene, rng) if (q := asker.ask(kind))], kept, []))
        return self.batch(rows, [(seed,) for seed in seeds], PICTURE_TOKENS, rng, plain, clip=False)

    def kinds(self, scene: Scene, rng: np.random.Generator) -> list[str]:
        """Kinds of question to ask about a scene: those that only few scenes allow, some long ones, then short ones."""
        kinds = ["read"] * (READS if scene.texts else 0) + ["number"] * (NUMBERS if scene.display else 0)
        kinds += ["chart"] * (CHARTS if scene.chart else 0) + ["name"] * (1 if len(scene.things) == 1 else 0)
        kinds += [kind for kind, share in LONG_SHARE.items() if rng.random() < share]
        weights = self.mix.numpy() / self.mix.sum().item()
        return kinds + rng.choice(SHORT_KINDS, size=QUESTIONS - len(kinds), p=weights / weights.sum()).tolist()

    def clips(self, seeds: list[int], rng: np.random.Generator, full: bool, plain: bool, unseen: bool = False) -> Batch:
        rows: list[tuple[list[Question], np.ndarray, list[tuple[int, int, int]]]] = []
        for seed in seeds:
            clip = sample_clip(seed)
            asker = ClipAsker(clip, rng, unseen=unseen)
            cells = {
                t % FRAME_TOKENS
                for f in set(clip.states())
                for i in range(len(clip.things))
                for t in asker.tokens(i, f)
            }
            if clip.text:
                cells |= {t % FRAME_TOKENS for f in (0, clip.num_frames - 1) for t in asker.letters(f)}
            chosen = choose(cells, FRAME_TOKENS, FRAME_TOKENS if full else KEEP_CELLS, rng)
            tokens = (np.arange(clip.num_frames)[:, None] * FRAME_TOKENS + chosen).ravel()
            asked = [q for kind in CLIP_KINDS for _ in range(2) if (q := asker.ask(kind))]
            rows.append((asked, tokens, asker.changes()))
        return self.batch(rows, [(seed,) for seed in seeds], 16 * FRAME_TOKENS, rng, plain, clip=True)

    def groups(self, groups: list[tuple[int, ...]], rng: np.random.Generator, full: bool, plain: bool) -> Batch:
        rows: list[tuple[list[Question], np.ndarray, list[tuple[int, int, int]]]] = []
        for seeds in groups:
            asker = SeveralAsker([sample_scene(seed) for seed in seeds], rng)
            marked = asker.marked()
            parts = []
            for i in range(len(seeds)):
                own = {m - i * PICTURE_TOKENS for m in marked if m // PICTURE_TOKENS == i}
                parts.append(i * PICTURE_TOKENS + choose(own, PICTURE_TOKENS, PICTURE_TOKENS if full else KEEP, rng))
            asked = [q for kind in ["which"] * 5 + ["one"] * 9 if (q := asker.ask(kind))]
            rows.append((asked, np.concatenate(parts), []))
        return self.batch(rows, groups, len(groups[0]) * PICTURE_TOKENS, rng, plain, clip=False)

    def batch(
        self,
        asked: list[tuple[list[Question], np.ndarray, list[tuple[int, int, int]]]],
        items: list[tuple[int, ...]],
        num_visual: int,
        rng: np.random.Generator,
        plain: bool,
        *,
        clip: bool,
    ) -> Batch:
        """Pack (questions, kept visual tokens, events) of each row."""
        rows: list[Row] = []
        questions: list[Question] = []
        starts = []
        for own, kept, events in asked:
            own = [q if plain or rng.random() > DISTURBED_SHARE else replace(q, text=disturb(rng, q.text)) for q in own]
            rng.shuffle(own)
            starts.append(len(questions))
            questions += own
            length = sample_clip(items[len(rows)][0]).num_frames * FRAME_TOKENS if clip else num_visual
            rows.append(self.packer.pack(own, length, kept, rng, plain))
            rows[-1].events = events
        most = max(len(kept) for _, kept, _ in asked)
        kept = np.stack([np.pad(k, (0, most - len(k)), constant_values=-1) for _, k, _ in asked])
        return Batch(collate(rows, kept, num_visual, starts), questions, items, clip)


def choose(marked: set[int], total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of `total` tokens, ascending: the marked ones first, others at random."""
    if count >= total:
        return np.arange(total)
    score = rng.random(total)
    score[list(marked)] += 1
    return np.sort(np.argsort(-score)[:count])
