"""Teach a finished checkpoint its limits: about pictures that the generator did not draw, it says that it cannot tell.

Every batch holds scenes or clips as before, with their questions, and other pictures with questions of both sorts. On
the former, the decoder learns the true answers and what it said before (the divergence from the old probabilities);
on the latter, one sentence, `mm.models.shipped.CANNOT_TELL`. Only the decoder's layers are trained: tower, projector
and vocabulary stay.

    python -m demos.train.other_pictures --out RUN/pictures
    python -m demos.train.frozen --base mm/models/weights/tiny --run RUN --scenes 2200 --clips 200
    python -m demos.train.train_limits --base mm/models/weights/tiny --run RUN --pictures RUN/pictures [--resume]
    python -m demos.train.train_limits --base mm/models/weights/tiny --run RUN --pictures RUN/pictures --evaluate

RUN/limits gets state.pt, training.jsonl, limits.json (the figures), and checkpoint/: the model's folder.
"""

import argparse
import copy
import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer

from demos.train.compare import Answers, answers_by_row, paired, summary
from demos.train.dynamic_eval import HeldOut
from demos.train.export import PROCESSOR_FILES
from demos.train.limits_data import LimitsBatches, OtherPictures
from demos.train.limits_eval import held_out_refusals, patches, visual
from demos.train.lm_data import Batch
from demos.train.model import save_weights
from demos.train.packing import Packed
from demos.train.reducer_training import ReducerTraining, build_parser, main
from demos.train.train_lm import run_decoder, splice, to_device, visual_tokens
from demos.train.training import Optimisers, mean_where, split_matrices

MUON_LR, NORM_LR = 2e-3, 2.5e-4
WARMUP_STEPS, DECAY_FROM = 20, 0.4
SCENES, OTHERS = 4, 3  # rows of a batch
CLIP_SHARE, OTHER_ROWS = 0.4, 0.25  # of the batches: clips, two drawn and one filmed; rows of other shapes
CUTS = 4  # of a filmed clip: different frames
OLD_WEIGHT = 4.0  # of the divergence from what the checkpoint said before
LIMIT_WEIGHT = 0.5  # of the refusals: a few missed ones harm less than refusals about drawn pictures


@torch.no_grad()
def answers(model: nn.Module, held_out: HeldOut, first_token: int) -> tuple[Answers, Answers, float]:
    """Answers about pictures and about clips, and the share of them that would begin as a refusal does."""
    pictures, clips, refusals = [], [], []
    for batch in held_out.batches:
        packed = to_device(batch.packed, model.device.type)
        with torch.autocast(model.device.type, torch.bfloat16):
            embeds = splice(model, packed, visual_tokens(model, held_out.features, batch, model.device.type))
            logits, *_ = run_decoder(model, embeds, packed, batch.clip)
        (clips if batch.clip else pictures).extend(answers_by_row(logits, batch))
        refusals += begins(logits, packed, first_token)
    return pictures, clips, float(np.mean(refusals))


def begins(logits: Tensor, packed: Packed, token: int) -> list[bool]:
    """Whether each answer, whose true first token is another, would begin with a token."""
    asked = packed.target_question
    first = torch.cat([asked.new_ones(1, dtype=torch.bool), asked[1:] != asked[:-1]])
    first &= packed.target_token != token
    return (logits.argmax(-1)[first] == token).tolist()


class LimitsTraining(ReducerTraining):
    """Trains the decoder's layers."""

    save_every: ClassVar[int] = 50

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        decoder = self.model.model.language_model
        self.old = copy.deepcopy(self.model)
        self.tokenizer = AutoTokenizer.from_pretrained(args.base, trust_remote_code=False)
        self.batches = LimitsBatches(self.tokenizer, self.features.info)
        self.others = OtherPictures(args.pictures / "trained")
        decoder.layers.requires_grad_(True)
        matrices, _ = split_matrices(decoder, decoder.layers)
        self.optimisers = Optimisers(
            matrices,
            [p for p in decoder.layers.parameters() if p.ndim < 2],
            muon_lr=MUON_LR,
            adam_lr=NORM_LR,
            num_steps=args.steps,
            warmup_steps=WARMUP_STEPS,
            decay_from=DECAY_FROM,
        )
        self.held_out = HeldOut(self.tokenizer, self.held_out_features())
        self.first_token = self.tokenizer.convert_tokens_to_ids("I")
        self.parts = {"decoder": decoder, "optimisers": self.optimisers}

    def batch_of(self, step: int) -> tuple[Batch, list[Tensor]]:
        """The batch of a step, with the patches of the other pictures."""
        rng = np.random.default_rng([31, self.args.seed, step])
        clip, plain, info = rng.random() < CLIP_SHARE, rng.random() > OTHER_ROWS, self.features.info
        kind, strange = ("clips", 1) if clip else ("scenes", OTHERS)
        items = rng.integers(info[kind], size=strange + (2 if clip else SCENES)).tolist()
        batch = self.batches.draw_with(kind, items, strange, rng, unseen=False, plain=plain)
        pixels = [self.others.draw(rng, CUTS if clip else 1) for _ in range(strange)]
        return batch, list(patches(self.model, np.concatenate(pixels)).split(len(pixels[0])))

    def learn(self, step: int) -> dict[str, Any]:
        batch, strange = self.batch_of(step)
        packed = to_device(batch.packed, self.args.device)
        drawn = packed.target_row < len(batch.items) - len(strange)
        with torch.autocast(self.args.device, torch.bfloat16):
            embeds = splice(self.model, packed, visual(self.model, self.features, batch, strange))
            logits, *_ = run_decoder(self.model, embeds, packed, batch.clip)
            with torch.no_grad():
                before, *_ = run_decoder(self.old, embeds, packed, batch.clip)
        losses = F.cross_entropy(logits.float(), packed.target_token, reduction="none")
        moved = F.kl_div(
            logits.float().log_softmax(-1), before.float().log_softmax(-1), reduction="none", log_target=True
        )
        parts = {
            "answer": mean_where(losses[drawn], packed.target_weight[drawn]),
            "limit": mean_where(losses[~drawn], packed.target_weight[~drawn]),
            "moved": mean_where(moved.sum(-1)[drawn], packed.target_weight[drawn]),
        }
        (parts["answer"] + LIMIT_WEIGHT * parts["limit"] + OLD_WEIGHT * parts["moved"]).backward()
        self.optimisers.step(step)
        return {name: round(loss.item(), 4) for name, loss in parts.items()} | {"clip": batch.clip}

    def refusals(self) -> dict[str, list[float]]:
        def run(embeds: Tensor, packed: Packed) -> Tensor:
            return run_decoder(self.model, embeds, packed, clip=False)[0]

        return held_out_refusals(self.model, self.batches, self.args.pictures, run)

    def check(self) -> dict[str, Any]:
        pictures, clips, refused = answers(self.model, self.held_out, self.first_token)
        kinds = {"pictures": summary(pictures)["mean"], "clips": summary(clips)["mean"]}
        return kinds | {"refused": round(refused, 4), "others": self.refusals()}

    def evaluate(self) -> dict[str, Any]:
        own = answers(self.model, self.held_out, self.first_token)
        old = answers(self.old, self.held_out, self.first_token)
        result: dict[str, Any] = {"refused": round(own[2], 4), "others": self.refusals()}
        for i, kind in enumerate(("pictures", "clips")):
            result[kind] = summary(own[i])
            result[f"{kind} before"] = summary(old[i])
            result[f"{kind}, after less before"] = paired(own[i], old[i])
        return result

    def save(self, step: int, trained: dict[str, Any]) -> None:
        folder = self.out / "checkpoint"
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, folder)
        for name in PROCESSOR_FILES:
            shutil.copy(self.args.base / name, folder)
        facts = {"steps": step, "of_steps": self.args.steps, "seed": self.args.seed, **trained}
        facts["pictures"] = len(self.others.files)
        (self.out / "limits.json").write_text(json.dumps(facts, indent=2) + "\n")


def arguments() -> argparse.ArgumentParser:
    parser = build_parser(__doc__, name="limits", steps=400, scenes=32, clips=4)
    parser.add_argument("--pictures", type=Path, required=True, help="folder that demos.train.other_pictures wrote")
    return parser


if __name__ == "__main__":
    main(LimitsTraining, arguments())
