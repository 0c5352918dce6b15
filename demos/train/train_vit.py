"""Stage 1: train the tower alone, to classify in every patch what is there and where it is.

Fresh pictures for every step: crowded ones (many texts and things) and scenes. Per-patch labels: see data/labels.py;
from [CLS]: which colored shapes and characters are present. For the first part of the run only the labelled patches,
their neighbours and some ground go through the tower.

    python -m demos.train.train_vit --out RUN --steps 2000 [--resume] [--device cuda --batch 128]
    python -m demos.train.train_vit --out RUN --steps 2000 --init mm/models/weights/tiny     # not from scratch
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from demos.train.data.labels import NUM_CLASSES, patch_labels, sample_crowd
from demos.train.data.scenes import draw_scene, sample_scene
from demos.train.data.things import CHARACTERS, COLORS, GRID, HELD_OUT, SHAPES, Scene
from demos.train.model import build_config, build_model, normalise
from demos.train.training import Optimisers, append_record, mean_where, save_checkpoint, split_matrices

MUON_LR = 0.02
ADAM_LR = 1.5e-3
INIT_MUON_LR, INIT_WARMUP = 0.012, 150  # with --init: the read-outs are new, the tower is not
CROWD_SHARE = 0.5
DECAY_FROM = 0.4
CUT_UNTIL = 0.97  # share of the steps that see KEEP of the 256 patches
KEEP = 144
LOSS_WEIGHT = {"char1": 1.5, "char2": 0.3, "cell": 0.7, "row": 0.25, "column": 0.25, "size": 0.7}
LOSS_WEIGHT |= {"last": 0.5, "level": 0.4, "extreme": 0.4}
GROUND_WEIGHT = 0.5  # of the loss on patches with nothing in them, against that on the others
CLS_WEIGHT = 5.0
EVAL_SCENES = 96


@dataclass
class Batch:
    pixels: np.ndarray  # uint8 (B, 224, 224, 3)
    labels: dict[str, Tensor]  # int64 (B, 256) each
    present: Tensor  # float32 (B, S * C + A): colored shapes, then characters


class Heads(nn.Module):
    """Linear read-outs, thrown away after the training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patch = nn.ModuleDict({name: nn.Linear(width, n) for name, n in NUM_CLASSES.items()})
        self.present = nn.Linear(width, len(SHAPES) * len(COLORS) + len(CHARACTERS))


def make_batch(scenes: list[Scene]) -> Batch:
    labels = [patch_labels(s) for s in scenes]
    present = torch.zeros(len(scenes), len(SHAPES) * len(COLORS) + len(CHARACTERS))
    colors = list(COLORS)
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            present[i, SHAPES.index(thing.shape) * len(COLORS) + colors.index(thing.color)] = 1
        for character in "".join(t.string for t in scene.all_texts):
            present[i, len(SHAPES) * len(COLORS) + CHARACTERS.index(character)] = 1
    stacked = {name: torch.from_numpy(np.stack([x[name] for x in labels])) for name in NUM_CLASSES}
    return Batch(np.stack([draw_scene(s) for s in scenes]), stacked, present)


class Batches(Dataset[Batch]):
    """The batch of each step, drawn from the step's own seeds."""

    def __init__(self, first_step: int, num_steps: int, size: int) -> None:
        self.steps, self.size = range(first_step, num_steps), size

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Batch:
        step = self.steps[index]
        crowded = np.random.default_rng([8, step]).random(self.size) < CROWD_SHARE
        seeds = range(step * self.size, (step + 1) * self.size)
        return make_batch([(sample_crowd if c else sample_scene)(s) for c, s in zip(crowded, seeds, strict=True)])


def run_tower(tower: CLIPVisionModel, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
    """Last hidden state (B, 1 + N, D), [CLS] first; `keep` (B, N): the patches that go in, at their own positions."""
    hidden = tower.embeddings(pixels)
    if keep is not None:
        index = F.pad(keep + 1, (1, 0))[..., None].expand(-1, -1, hidden.shape[-1])
        hidden = hidden.gather(1, index)
    return tower.encoder(inputs_embeds=tower.pre_layrnorm(hidden)).last_hidden_state


def choose_patches(labels: dict[str, Tensor], count: int) -> Tensor:
    """(B, count) ascending: labelled patches and their neighbours first, then ground, at random within each."""
    marked = ((labels["color"] > 0) | (labels["char1"] > 0)).float().view(-1, 1, GRID, GRID)
    near = F.max_pool2d(marked, 3, stride=1, padding=1).flatten(1)
    return (near + torch.rand_like(near)).topk(count, dim=1).indices.sort(dim=1).values


def loss_of(tower: CLIPVisionModel, heads: Heads, batch: Batch, device: str, count: int | None) -> tuple[Tensor, dict]:
    keep = choose_patches(batch.labels, count).to(device) if count else None
    hidden = run_tower(tower, normalise(batch.pixels).to(device), keep)
    states, parts = heads.norm(hidden[:, 1:]), {}
    total = hidden.new_zeros(())
    for name, head in heads.patch.items():
        label = batch.labels[name].to(device)
        label = label if keep is None else label.gather(1, keep)
        losses = F.cross_entropy(head(states).float().flatten(0, 1), label.flatten(), reduction="none").view(
            label.shape
        )
        if name in ("row", "column"):
            loss = losses.mean()
        else:
            loss = mean_where(losses, label > 0) + GROUND_WEIGHT * mean_where(losses, label == 0)
        parts[name] = loss.item()
        total = total + LOSS_WEIGHT.get(name, 1.0) * loss
    present = heads.present(tower.post_layernorm(hidden[:, 0])).float()
    parts["cls"] = F.binary_cross_entropy_with_logits(present, batch.present.to(device))
    total = total + CLS_WEIGHT * parts["cls"]
    return total, {**parts, "cls": parts["cls"].item()}


@torch.no_grad()
def evaluate(tower: CLIPVisionModel, heads: Heads, device: str) -> dict[str, float]:
    """Accuracy on the labelled patches of held-out scenes, all patches in; and the average precision of [CLS]."""
    counts = {name: [0, 0] for name in NUM_CLASSES}
    scores, truths = [], []
    for start in range(0, EVAL_SCENES, 16):
        batch = make_batch([sample_scene(HELD_OUT + start + i) for i in range(16)])
        with torch.autocast(device, torch.bfloat16):
            hidden = run_tower(tower, normalise(batch.pixels).to(device))
            states = heads.norm(hidden[:, 1:])
            found = {name: head(states).argmax(-1).cpu() for name, head in heads.patch.items()}
            scores.append(heads.present(tower.post_layernorm(hidden[:, 0])).float().cpu())
        truths.append(batch.present)
        for name, guess in found.items():
            label = batch.labels[name]
            mask = label > 0 if name not in ("row", "column") else batch.labels["color"] > 0
            counts[name][0] += int(((guess == label) & mask).sum())
            counts[name][1] += int(mask.sum())
    score, truth = torch.cat(scores), torch.cat(truths)
    hits = truth.flatten()[score.flatten().argsort(descending=True)]
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    result = {name: round(right / max(1, total), 3) for name, (right, total) in counts.items()}
    return {**result, "cls_ap": round(float((precision * hits).sum() / hits.sum()), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="run folder: vit.pt (checkpoint), vit.jsonl (curve)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    parser.add_argument("--init", type=Path, help="exported folder whose tower to start from, instead of from scratch")
    parser.add_argument("--resume", action="store_true", help="continue OUT/vit.pt; --steps may be larger than before")
    parser.add_argument("--eval-every", type=int, default=250)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    start = (
        LlavaForConditionalGeneration.from_pretrained(args.init, trust_remote_code=False)
        if args.init
        else build_model(build_config())
    )
    tower = start.model.vision_tower.float().to(args.device)
    heads = Heads(tower.config.hidden_size).to(args.device)
    matrices, others = split_matrices(tower, tower.encoder.layers)
    optimisers = Optimisers(
        matrices,
        others + list(heads.parameters()),
        muon_lr=INIT_MUON_LR if args.init else MUON_LR,
        adam_lr=ADAM_LR,
        num_steps=args.steps,
        warmup_steps=INIT_WARMUP if args.init else 50,
        decay_from=DECAY_FROM,
    )
    first = 0
    if args.resume:
        state = torch.load(args.out / "vit.pt", map_location=args.device, weights_only=True)
        tower.load_state_dict(state["tower"])
        heads.load_state_dict(state["heads"])
        optimisers.load_state_dict(state["optimisers"])
        first = state["step"]

    batches = DataLoader(Batches(first, args.steps, args.batch), batch_size=None, num_workers=args.workers)
    bar = tqdm(batches, initial=first, total=args.steps, mininterval=10)
    for step, batch in enumerate(bar, start=first):
        count = KEEP if step < CUT_UNTIL * args.steps else None
        with torch.autocast(args.device, torch.bfloat16):
            loss, parts = loss_of(tower, heads, batch, args.device, count)
        loss.backward()
        optimisers.step(step)
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.2f} char {parts['char1']:.2f}", refresh=False)
            append_record(args.out / "vit.jsonl", step=step, loss=round(loss.item(), 4), **parts)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            scores = evaluate(tower, heads, args.device)
            append_record(args.out / "vit.jsonl", step=step + 1, held_out=scores)
            tqdm.write(f"step {step + 1} {scores}")
            save_checkpoint(
                args.out / "vit.pt",
                tower=tower.state_dict(),
                heads=heads.state_dict(),
                optimisers=optimisers.state_dict(),
                step=step + 1,
            )


if __name__ == "__main__":
    main()
