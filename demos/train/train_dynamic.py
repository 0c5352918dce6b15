"""Train Dynamic-LLaVA for a finished checkpoint: predictors of what to drop, and a decoder that is used to it.

First the predictors alone, the decoder frozen; from FREE_FROM on the decoder too, at a small rate (--adapt). The share
of tokens to keep falls from START_RATIO to its goal within the first ANNEAL of the steps, so that there is something
to choose between from the first step on. sparse.py has the method.

With --init the training goes on from a finished reducer: everything is trained from the first step, and the goal for
pictures is kept exactly. With --pictures, rows about pictures that the generator did not draw teach the decoder to keep
saying that it cannot tell.

    python -m demos.train.frozen --base mm/models/weights/tiny --run RUN
    python -m demos.train.train_dynamic --base mm/models/weights/tiny --run RUN --steps 1600 [--resume] [--device cuda]
        [--init FOLDER] [--pictures RUN/pictures]
    python -m demos.train.train_dynamic --base mm/models/weights/tiny --run RUN --evaluate --scenes 256

RUN holds the features. RUN/dynamic gets state.pt, training.jsonl, and what ships: model.safetensors (predictors),
decoder.safetensors (the changed tensors), config.json.
"""

import argparse
import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer

from demos.train.compare import summary
from demos.train.dynamic_eval import HeldOut, ask, report
from demos.train.frozen import save_reducer
from demos.train.limits_data import LimitsBatches, OtherPictures
from demos.train.limits_eval import held_out_refusals, patches, visual
from demos.train.lm_data import Batch
from demos.train.packing import Packed
from demos.train.reducer_training import ReducerTraining, build_parser, load_reducer, main
from demos.train.sparse import Decide, by_answer, run_sparse
from demos.train.train_lm import run_decoder, splice, to_device
from demos.train.training import Optimisers, mean_where, split_matrices
from mm.plugins.weights import checkpoint_fingerprint
from pruning.learned.predictors import Predictors, PredictorShape, TextPredictor

IMAGE_RATIO, TEXT_RATIO = 0.25, 0.355  # of the visual tokens of an image; of generated tokens after the first few
KEEP_FIRST = 3  # generated tokens that stay
RATIO_WEIGHT = 100.0
MATCH_WEIGHT = 1.0  # of the divergence from what the checkpoint says with all tokens
LIMIT_WEIGHT, LATER_WEIGHT = 1.0, 1.0  # of the refusals about other pictures; of all but their first tokens
START_RATIO, ANNEAL = 0.9, 0.25
FREE_FROM = 0.15
LONG_TOKENS = 20  # answers of so many tokens are held to TEXT_RATIO
TEMPERATURE, INIT_TEMPERATURE = (1.0, 0.1), 0.3  # from, to; from where a finished reducer goes on
PREDICTOR_LR, MUON_LR, NORM_SHARE = 2e-3, 7e-4, 0.1
WARMUP_STEPS, DECAY_FROM = 30, 0.4
SCENES, CLIPS, CLIP_SHARE = 6, 2, 0.12  # per batch; share of the batches that are clips
OTHERS, CUTS = 2, 4  # rows about other pictures beside scenes (one beside clips); different frames of a filmed one
LONGER_SHARE, FEWER_QUESTIONS = {"caption": 1.0, "tour": 0.7, "list": 0.5}, 8  # of a row of scenes with --long
OTHER_ROWS = 0.25  # of the batches: with turns, system messages, questions first; nothing generated is dropped there


# ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def batch_of(batches: LimitsBatches, step: int, others: OtherPictures | None) -> tuple[Batch, bool, list[np.ndarray]]:
    """The batch of a step, whether generated tokens may be dropped in it, and the pictures of its last rows."""
    rng = np.random.default_rng([21, step])
    clip, plain = rng.random() < CLIP_SHARE, rng.random() > OTHER_ROWS
    clip = bool(clip and batches.info["clips"])
    kind, count, strange = ("clips", CLIPS, 1) if clip else ("scenes", SCENES, OTHERS)
    strange = strange if others else 0
    items = rng.integers(batches.info[kind], size=count + strange).tolist()
    batch = batches.draw_with(kind, items, strange, rng, unseen=False, plain=plain)
    return batch, plain, [others.draw(rng, CUTS if clip else 1) for _ in range(strange)] if others else []


# ── losses ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def budget_losses(
    packed: Packed, image: list[Tensor], output: Tensor | None, goals: tuple[float, float], skip: int
) -> Tensor:
    """Squared distance of the kept shares from the goals: of each picture, and of all long answers together."""
    loss = torch.stack([(kept.mean() - goals[0]) ** 2 for kept in image]).mean() if image else torch.zeros(())
    if output is None:
        return loss
    count, share = by_answer(packed, output, skip)
    counted = (count - skip) * (count >= LONG_TOKENS)
    return loss + (mean_where(share, counted) - goals[1]) ** 2 * bool(counted.any())


def progress(step: int, num_steps: int, *, warm: bool) -> tuple[tuple[float, float], float]:
    """(shares to keep of image and text, temperature) at a step; warm: of a finished reducer that goes on."""
    first, last = (INIT_TEMPERATURE if warm else TEMPERATURE[0]), TEMPERATURE[1]
    temperature = first * (last / first) ** (step / num_steps)
    if warm:
        return (IMAGE_RATIO, TEXT_RATIO), temperature
    done = min(1.0, step / (ANNEAL * num_steps))
    goals = tuple(START_RATIO + done * (goal - START_RATIO) for goal in (IMAGE_RATIO, TEXT_RATIO))
    return goals, temperature


def answer_losses(logits: Tensor, before: Tensor, packed: Packed, num_drawn: int) -> dict[str, Tensor]:
    """Of the rows about drawn pictures: the true answers, and the divergence from `before`. Of the others: refusals."""
    losses, drawn = F.cross_entropy(logits, packed.target_token, reduction="none"), packed.target_row < num_drawn
    moved = F.kl_div(logits.log_softmax(-1), before.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    weight = packed.target_weight
    return {
        "answer": mean_where(losses[drawn], weight[drawn]),
        "match": mean_where(moved[drawn], weight[drawn]),
        "limit": mean_where(losses[~drawn], weight[~drawn]),
    }


# ── run ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def adapted(model: nn.Module, adapt: str) -> list[tuple[str, nn.Parameter]]:
    """Parameters of the decoder's layers that are trained: all, those of attention, or none."""
    layers = model.model.language_model.layers
    names = {"all": "", "attention": "self_attn", "none": "?"}
    return [(f"layers.{name}", p) for name, p in layers.named_parameters() if names[adapt] in name]


def build_optimisers(
    model: nn.Module, predictors: Predictors, trained: list[nn.Parameter], args: argparse.Namespace
) -> Optimisers:
    """Muon for the trained matrices of the decoder, AdamW for the predictors and, slower, for the decoder's norms."""
    decoder, inside = model.model.language_model, {id(p) for p in trained}
    matrices, _ = split_matrices(decoder, decoder.layers)
    norms = [p for p in trained if p.ndim < 2]
    optimisers = Optimisers(
        [p for p in matrices if id(p) in inside] or [nn.Parameter(torch.zeros(1, 1))],  # Muon refuses an empty list
        list(predictors.parameters()),
        muon_lr=args.decoder_lr,
        adam_lr=args.predictor_lr,
        num_steps=args.steps,
        warmup_steps=WARMUP_STEPS,
        decay_from=DECAY_FROM,
        calmed=norms,
    )
    optimisers.calm(NORM_SHARE if norms else 1.0)
    return optimisers


def soften(predictor: TextPredictor, factor: float) -> None:
    """Multiply the logits of a predictor, so that a finished one is uncertain enough to learn again."""
    last = predictor.head[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.mul_(factor)
        last.bias.mul_(factor)


def kept_at(held_out: dict[str, Any]) -> list[list[float]]:
    """[share of the generated tokens of long answers that was kept, threshold] of each threshold that was measured."""
    found = []
    for name, figures in held_out.items():
        is_variant = isinstance(figures, dict) and "cache" in figures  # and no difference of two
        if is_variant and (name == "dynamic" or name.startswith("dynamic, threshold")):
            kept = figures["kept"]
            share = kept["long kept"] / max(1, kept["long"])
            found.append([round(share, 4), float(name.rpartition(" ")[2]) if "threshold" in name else 0.0])
    return sorted(found)


class DynamicTraining(ReducerTraining):
    """Trains the predictors and, from FREE_FROM on, the adapted part of the decoder."""

    save_every: ClassVar[int] = 200

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        width, decoder = self.model.config.text_config.hidden_size, self.model.model.language_model
        self.base, self.old = {n: t.clone() for n, t in decoder.state_dict().items()}, copy.deepcopy(self.model)
        layers = {"image_layer": args.image_layer, "text_layer": args.text_layer}
        shape = PredictorShape(width=width, channels=args.channels or width // 8, keep_first=KEEP_FIRST, **layers)
        self.predictors = Predictors(shape).to(args.device)
        tokenizer = AutoTokenizer.from_pretrained(args.base, trust_remote_code=False)
        if args.init:
            load_reducer(args.init, self.predictors, decoder)
            soften(self.predictors.text, args.soften)
            self.predictors.image.requires_grad_(not args.hold_image)
        self.batches = LimitsBatches(tokenizer, self.features.info)
        if args.long:
            self.batches.long_share, self.batches.questions = LONGER_SHARE, FEWER_QUESTIONS
        self.batches.later_weight = LATER_WEIGHT
        self.others = OtherPictures(args.pictures / "trained") if args.pictures else None
        self.trained = [p for _, p in adapted(self.model, args.adapt)]
        self.optimisers = build_optimisers(self.model, self.predictors, self.trained, args)
        self.held_out = HeldOut(tokenizer, self.held_out_features())
        self.parts = {"decoder": decoder, "predictors": self.predictors, "optimisers": self.optimisers}

    def learn(self, step: int) -> dict[str, Any]:
        if self.args.init or step >= FREE_FROM * self.args.steps:
            for parameter in self.trained:
                parameter.requires_grad_(True)
        batch, plain, pixels = batch_of(self.batches, step, self.others)
        strange = list(patches(self.model, np.concatenate(pixels)).split(len(pixels[0]))) if pixels else []
        loss, record = self.loss(batch, plain, strange, step)
        if loss.requires_grad:  # not where nothing is decided and the decoder is frozen
            loss.backward()
            self.optimisers.step(step)
        return record

    def loss(self, batch: Batch, plain: bool, strange: list[Tensor], step: int) -> tuple[Tensor, dict[str, Any]]:
        """The loss of one step, with what is to be recorded. strange: patches of the pictures of the last rows."""
        args, keep_first = self.args, self.predictors.shape.keep_first
        goals, temperature = progress(step, args.steps, warm=bool(args.init))
        packed = to_device(batch.packed, args.device)
        decide = Decide(temperature, torch.Generator(args.device).manual_seed(args.seed * 1_000_003 + step), text=plain)
        # Clips are in the data so that the decoder does not forget them.
        decide = replace(decide, images=not batch.clip, image_ratio=goals[0] if args.init else 1.0)
        with torch.autocast(args.device, torch.bfloat16):
            embeds = splice(self.model, packed, visual(self.model, self.features, batch, strange))
            logits, decisions = run_sparse(self.model, self.predictors, embeds, packed, decide)
            with torch.no_grad():
                before, *_ = run_decoder(self.old, embeds, packed, batch.clip)
        parts = answer_losses(logits.float(), before.float(), packed, len(batch.items) - len(strange))
        budget = budget_losses(packed, decisions.image, decisions.output, goals, keep_first)
        record = {f"{name}_loss": round(loss.item(), 4) for name, loss in parts.items()}
        record |= {"budget_loss": round(budget.item(), 5), "clip": batch.clip}
        if decisions.image:
            record["image_kept"] = round(float(torch.stack([k.detach().mean() for k in decisions.image]).mean()), 3)
        if plain:
            count, share = by_answer(packed, decisions.output.detach(), keep_first)
            record["text_kept"] = round(mean_where(share, count >= LONG_TOKENS).item(), 3)
        loss = parts["answer"] + MATCH_WEIGHT * parts["match"] + LIMIT_WEIGHT * parts["limit"]
        return loss + RATIO_WEIGHT * budget, record

    def refusals(self) -> dict[str, list[float]]:
        def run(embeds: Tensor, packed: Packed) -> Tensor:
            return run_sparse(self.model, self.predictors, embeds, packed, Decide(image_ratio=IMAGE_RATIO))[0]

        return held_out_refusals(self.model, self.batches, self.args.pictures, run)

    def check(self) -> dict[str, Any]:
        pictures, clips, kept = ask(self.model, self.predictors, self.held_out, Decide(image_ratio=IMAGE_RATIO))
        found = {"pictures": summary(pictures), "clips": summary(clips), "kept": kept}
        return found | ({"others": self.refusals()} if self.args.pictures else {})

    def evaluate(self) -> dict[str, Any]:
        found = report(self.model, self.base, self.predictors, self.held_out, IMAGE_RATIO)
        return found | ({"others": self.refusals()} if self.args.pictures else {})

    def save(self, step: int, trained: dict[str, Any]) -> None:
        args, info, predictors = self.args, self.features.info, self.predictors
        changed = dict(adapted(self.model, args.adapt)) if args.init or step > FREE_FROM * args.steps else {}
        sizes = {p: sum(t.numel() for t in getattr(predictors, p).parameters()) for p in ("image", "text")}
        config = {"reducer": "dynamic", "base": checkpoint_fingerprint(args.base), **asdict(predictors.shape)}
        config |= {"image_keep_ratio": IMAGE_RATIO, "text_keep_ratio": TEXT_RATIO, "text_threshold": 0.0}
        config["text_kept_at"] = kept_at(trained.get("held_out", {}))
        config |= {"keep_class": 0, "media": ["image"]}  # media: whose visual tokens are dropped
        config["parameters"] = {**sizes, "decoder": sum(p.numel() for p in changed.values())}
        config["decoder_prefix"] = "model.language_model."
        config["trained"] = {"steps": step, "of_steps": args.steps, "seed": args.seed, "adapt": args.adapt, **trained}
        config["data"] = {name: info[name] for name in ("scenes", "clips", "first_seed")}
        save_reducer(self.out, dict(predictors.state_dict()), config, changed)


def arguments() -> argparse.ArgumentParser:
    parser = build_parser(__doc__, name="dynamic", steps=1600, scenes=48, clips=8)
    parser.add_argument("--adapt", choices=("all", "attention", "none"), default="all", help="of the decoder's layers")
    parser.add_argument("--init", type=Path, help="folder of a finished `dynamic` from which to go on")
    parser.add_argument("--pictures", type=Path, help="folder that demos.train.other_pictures wrote")
    parser.add_argument("--predictor-lr", type=float, default=PREDICTOR_LR, help="peak rate of the predictors")
    parser.add_argument("--decoder-lr", type=float, default=MUON_LR, help="peak rate of the decoder's matrices")
    parser.add_argument("--long", action="store_true", help="more captions, tours and lists, and fewer short questions")
    parser.add_argument("--soften", type=float, default=1.0, help="with --init: factor of the text predictor's logits")
    parser.add_argument("--hold-image", action="store_true", help="with --init: the image predictor stays as it is")
    parser.add_argument("--channels", type=int, help="of the predictors; an eighth of the width by default")
    parser.add_argument("--image-layer", type=int, default=0)
    parser.add_argument("--text-layer", type=int, default=1)
    return parser


if __name__ == "__main__":
    main(DynamicTraining, arguments())
