"""What cubes are trained on: frames as tokens, the labels of their changes, and prompts made of cubes."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from demos.train.cubing import Cubes, CubeShape, token_places
from demos.train.data.clips import Clip, sample_clip
from demos.train.data.questions import CLIP_KINDS, FRAME_TOKENS, ClipAsker, Question
from demos.train.frozen import FrozenFeatures, pack_rows
from demos.train.lm_data import Batch
from demos.train.model import pool_frames
from demos.train.packing import Packer

PER_KIND = 2  # questions of each kind about a clip


def frame_tokens(model: LlavaForConditionalGeneration, features: FrozenFeatures, item: int, device: str) -> Tensor:
    """(F, 64, D): the projected and pooled tokens of a clip's frames, as the decoder gets them without cubes."""
    distinct, frames = features.clip(item)
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        tokens = pool_frames(projector(distinct.to(device, projector.linear_1.weight.dtype)))
    return tokens.view(len(distinct), FRAME_TOKENS, -1)[frames.to(device)].float()


def event_frames(clip: Clip) -> list[int]:
    """The first frame in which each event shows."""
    return [event.before_frame + 1 for event in clip.events]


def changed_frames(clip: Clip, num_frames: int) -> Tensor:
    """(F,) 1 where something happens: the frames of every event, from the first in which it shows."""
    labels = torch.zeros(num_frames, dtype=torch.long)
    for event in clip.events:
        labels[event.before_frame + 1 : event.after_frame + 1] = 1
    return labels


@dataclass
class Prompt:
    """The visual part of a prompt: thumbnail, then each cube after the digits of its first frame's number.

    places: position of each token, from the thumbnail's first on, ascending; digit: its value, -1 for visual tokens.
    """

    tokens: Tensor
    places: list[int]
    digit: list[int]
    length: int

    def embeddings(self, embed: nn.Embedding, digits: list[int]) -> Tensor:
        """(n, D) with the embedded digits between the visual tokens; digits: token ids of 0-9."""
        written = torch.tensor(self.digit, device=self.tokens.device)
        result = self.tokens.new_zeros(len(written), self.tokens.shape[-1])
        ids = torch.tensor(digits, device=self.tokens.device)[written[written >= 0]]
        result = result.index_put((written >= 0,), embed(ids).to(result.dtype))
        return result.index_put((written < 0,), self.tokens)


def build_prompt(shape: CubeShape, cubes: Cubes, *, timestamps: bool = True) -> Prompt:
    """Digits stand at the first positions of a cube's span, where no query of the grid stands."""
    thumbnail, per_frame = len(cubes.thumbnail), shape.side**2
    places, digit = list(range(thumbnail)), [-1] * thumbnail
    for c, (begins, own) in enumerate(zip(cubes.borders, token_places(shape, len(cubes.borders)), strict=True)):
        if timestamps:
            written = [int(character) for character in str(begins)]
            places += [thumbnail + c * per_frame + i for i in range(len(written))]
            digit += written
        places += (thumbnail + own).tolist()
        digit += [-1] * len(own)
    tokens = torch.cat([cubes.thumbnail, cubes.tokens.flatten(0, 1)])
    return Prompt(tokens, places, digit, thumbnail + len(cubes.borders) * per_frame)


@dataclass
class Asked:
    clip: Clip
    questions: list[Question]


class CubeBatches:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, info: dict) -> None:
        self.packer, self.first = Packer(tokenizer), info["first_seed"]
        self.packer.tokenizer = tokenizer
        self.digits = tokenizer.convert_tokens_to_ids([str(value) for value in range(10)])

    def ask(self, item: int, rng: np.random.Generator, *, unseen: bool = False) -> Asked:
        clip = sample_clip(self.first + item)
        asker = ClipAsker(clip, rng, unseen=unseen)
        return Asked(clip, [q for kind in CLIP_KINDS for _ in range(PER_KIND) if (q := asker.ask(kind))])

    def pack(self, asked: list[Asked], prompts: list[Prompt]) -> Batch:
        """Rows of many questions, each after its own visual part."""
        questions = [one.questions for one in asked]
        return pack_rows(self.packer, questions, [p.places for p in prompts], [p.length for p in prompts], clip=True)
