"""Questions → token rows: many questions share one picture in a row, and each attends to what it would attend to alone.

A row is   <s><|user|> visual tokens | question<|assistant|>answer</s> | question<|assistant|>answer</s> | ... Every
question attends to the shared prefix and to itself, and its positions continue after the prefix's end. So the packed
row computes what single prompts would. Some rows have other shapes of the same chat template: turn after turn (no
sharing, plain causal), with a system message, or with the question before the picture (then there is only one).
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from demos.train.data.questions import Focus, Question

EOS_WEIGHT = 0.2  # of the loss on </s> after a one-word answer, where it is trivial
TURNS_SHARE, SYSTEM_SHARE, QUESTION_FIRST_SHARE = 0.12, 0.06, 0.06  # of the rows, when other shapes are on
SYSTEM_MESSAGES = ("You are a helpful assistant.", "Answer briefly.", "You answer questions about images and videos.")
LENGTH_STEP = 32  # rows are padded to a multiple: few shapes, so that kernels caching per shape stay small


@dataclass
class Row:
    """One token sequence. All attend to group 0. A look is (index, slot, visual tokens to attend to)."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    visual_at: int = 0
    targets: list[tuple[int, int, float, int]] = field(default_factory=list)  # index, next token, weight, question
    looks: list[tuple[int, int, Focus]] = field(default_factory=list)
    events: list[tuple[int, int, int]] = field(default_factory=list)  # visual token, kind and order

    def add(self, ids: list[int], group: int, position: int) -> int:
        """Append tokens; gives the position after the last."""
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.group += [group] * len(ids)
        return position + len(ids)


class Packer:
    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.encoder = tokenizer._tokenizer
        ids = tokenizer.convert_tokens_to_ids
        self.bos, self.eos, self.image = ids("<s>"), ids("</s>"), ids("<image>")
        self.user, self.assistant, self.system = ids("<|user|>"), ids("<|assistant|>"), ids("<|system|>")

    def encode(self, text: str) -> list[int]:
        return self.encoder.encode(text).ids

    def pack(
        self, questions: list[Question], num_visual: int, kept: np.ndarray, rng: np.random.Generator, plain: bool
    ) -> Row:
        """A row with the kept of num_visual visual tokens at their original positions.

        plain: only the packed shape. Targets carry the index of their question in `questions`.
        """
        shape = 1.0 if plain else rng.random()
        row = Row()
        turns = shape < TURNS_SHARE
        question_first = bool(questions) and not turns and shape < TURNS_SHARE + QUESTION_FIRST_SHARE
        start = [self.bos]
        if not plain and rng.random() < SYSTEM_SHARE:
            start += [self.system, *self.encode(SYSTEM_MESSAGES[rng.integers(len(SYSTEM_MESSAGES))])]
        position = row.add([*start, self.user], 0, 0)
        if question_first:
            asked = int(rng.integers(len(questions)))
            position = row.add(self.encode(questions[asked].text), 0, position)
        row.visual_at = len(row.ids)
        row.add([self.image] * len(kept), 0, position)
        row.positions[row.visual_at :] = [position + int(k) for k in kept]
        position += num_visual
        if question_first:
            position = row.add([self.assistant], 0, position)
            self.answer(row, questions[asked], asked, 0, position)
            return row
        for i, question in enumerate(questions):
            group = 0 if turns else i + 1
            ids = [self.user] if turns and i else []
            end = row.add([*ids, *self.encode(question.text), self.assistant], group, position)
            end = self.answer(row, question, i, group, end)
            position = end if turns else position
        return row

    def answer(self, row: Row, question: Question, index: int, group: int, position: int) -> int:
        """Append answer and </s>, with what is to be predicted and attended to from the token before each one."""
        encoding = self.encoder.encode(question.answer)
        for i, (token, (start, _)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            place = len(row.ids) - 1 + i
            row.targets.append((place, token, 1.0, index))
            if question.spans:
                span = next(s for s in question.spans if s.start <= start < s.stop)
                row.looks.append((place, 2, span.focus))
                if span.other:
                    row.looks.append((place, 3, span.other))
            else:
                row.looks.append((place, 0, question.focus))
                if question.other:
                    row.looks.append((place, 1, question.other))
        weight = 1.0 if question.spans else EOS_WEIGHT
        row.targets.append((len(row.ids) - 1 + len(encoding.ids), self.eos, weight, index))
        return row.add([*encoding.ids, self.eos], group, position)


@dataclass
class Packed:
    """A batch of rows. B rows, T tokens, S targets, K looks.

    ids, positions (B, T); mask (B, 1, T, T) True where attended; visual_at (B,): index of the first visual token; kept
    (B, n): which visual tokens they are, then -1. Targets and looks are flat, with the row and the index that they
    belong to.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    visual_at: Tensor
    kept: Tensor
    target_row: Tensor
    target_place: Tensor
    target_token: Tensor
    target_weight: Tensor
    target_question: Tensor  # index into all questions of the batch
    look_row: Tensor
    look_place: Tensor
    look_slot: Tensor
    look_at: Tensor  # (K, T) bool
    event_kind: (
        Tensor  # (B, n) as `kept`: 0 nothing, else 1 + kind of the event that changes the token, -1 past the end
    )
    event_order: Tensor  # (B, n): 0 nothing, 1 the first event, 2 the second, -1 past the end


def collate(rows: list[Row], kept: np.ndarray, num_visual: int, first_question: list[int], pad: int = 0) -> Packed:
    """Pad rows to one length. kept (B, n), -1 past a row's end; first_question: each row's first in the list."""
    length = -(-max(len(row.ids) for row in rows) // LENGTH_STEP) * LENGTH_STEP
    ids = np.full((len(rows), length), pad)
    positions, group = np.zeros((len(rows), length), dtype=np.int64), np.full((len(rows), length), -1)
    targets, looks, look_at = [], [], []
    event_kind, event_order = (np.where(kept < 0, -1, 0) for _ in range(2))
    for b, row in enumerate(rows):
        ids[b, : len(row.ids)], positions[b, : len(row.ids)] = row.ids, row.positions
        group[b, : len(row.ids)] = row.group
        targets += [(b, place, token, weight, first_question[b] + q) for place, token, weight, q in row.targets]
        column = np.full(num_visual, -1)
        own = kept[b][kept[b] >= 0]
        column[own] = row.visual_at + np.arange(len(own))
        for token, kind, order in row.events:
            if column[token] >= 0:
                at = column[token] - row.visual_at
                event_kind[b, at], event_order[b, at] = 1 + kind, 1 + order
        for place, slot, focus in row.looks:
            columns = column[list(focus)]
            at = np.zeros(length, dtype=bool)
            at[columns[columns >= 0]] = True
            if not at.any():
                at[0] = True  # nothing to look at: <s>
            looks.append((b, place, slot))
            look_at.append(at)
    group_t = torch.from_numpy(group)
    same = (group_t[:, None] == 0) | (group_t[:, None] == group_t[:, :, None])
    mask = same & torch.ones(length, length, dtype=torch.bool).tril()
    target = np.array(targets)
    look = torch.tensor(looks)
    return Packed(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        mask=mask[:, None],
        visual_at=torch.tensor([row.visual_at for row in rows]),
        kept=torch.from_numpy(kept),
        target_row=torch.from_numpy(target[:, 0]).long(),
        target_place=torch.from_numpy(target[:, 1]).long(),
        target_token=torch.from_numpy(target[:, 2]).long(),
        target_weight=torch.from_numpy(target[:, 3]).float(),
        target_question=torch.from_numpy(target[:, 4]).long(),
        look_row=look[:, 0],
        look_place=look[:, 1],
        look_slot=look[:, 2],
        look_at=torch.from_numpy(np.stack(look_at)),
        event_kind=torch.from_numpy(event_kind),
        event_order=torch.from_numpy(event_order),
    )
