"""Stage 2: train projector and decoder on cached features of the frozen tower.

Rows of many questions on one picture (see packing.py). Two losses: the answers' tokens, and an attention loss that
makes a few heads look at the tokens an answer is read from. Kinds of questions that are still answered badly are asked
more often.

    python -m demos.train.train_lm --run RUN --start FOLDER --steps 4000 [--resume] [--device cuda]

RUN holds vit.pt and the cached features; lm.pt and lm.jsonl are written there. FOLDER: what `demos.train.model` wrote.
"""

import argparse
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from demos.train.data.clips import draw_clip, sample_clip
from demos.train.data.questions import (
    CLIP_KINDS,
    FRAME_TOKENS,
    POOL,
    SHORT_KINDS,
    ClipAsker,
    Question,
    SceneAsker,
)
from demos.train.data.scenes import GRID, HELD_OUT, draw_scene, sample_scene
from demos.train.model import FRAME_POOL, IMAGE_TOKENS, build_config, build_model, normalise, pool_frames
from demos.train.packing import Packed, Packer, Row, collate
from demos.train.train_vit import run_tower
from demos.train.training import Optimisers, append_record, mean_where, save_checkpoint, split_matrices

MUON_LR, ADAM_LR = 0.01, 1.5e-3
WARMUP_STEPS, DECAY_FROM = 50, 0.38
SCENES_PER_BATCH, CLIPS_PER_BATCH = 8, 3
QUESTIONS = 14  # per scene
LONG_SHARE = {"read": 0.7, "caption": 0.3, "tour": 0.15, "list": 0.2}  # of the rows; the rest are short questions
KEEP, KEEP_CELLS = 96, 30  # visual tokens of an image, pooled cells of a clip, until FULL_FROM
FULL_FROM = 0.75  # share of the steps after which all visual tokens are in the row
CLIPS_FROM, CLIP_SHARE = 0.15, 0.25  # clips come in after the first lookups have formed
SHAPES_FROM = 0.3  # when other row shapes (turns, system message, question first) come in
ATTENTION_WEIGHT = 0.5
PREVIOUS_WEIGHT = 0.2
HEADS = ((1, 0), (1, 1), (3, 2), (3, 3))  # (layer, head) of each look slot: asked thing, second thing, written, after
PREVIOUS_HEAD = (0, 3)  # in clips, every visual token looks at its own place one frame earlier
MIX_EVERY = 100


@dataclass
class Batch:
    packed: Packed
    questions: list[Question]
    items: list[int]  # which scenes or clips
    clip: bool


# ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Features:
    """Tower features on disk: scenes (N, 256, D) and the frames of clips (M, 256, D) with each clip's first frame."""

    def __init__(self, folder: Path) -> None:
        self.info = json.loads((folder / "features.json").read_text())
        self.scenes = self.open(folder / "scenes.bin")
        self.folder, self.clips = folder, None
        lengths = [sample_clip(seed).num_frames for seed in range(self.info["clips"])]
        self.first_frame = [0, *np.cumsum(lengths)]

    def open(self, path: Path) -> Tensor:
        size = path.stat().st_size // 2
        flat = torch.from_file(str(path), shared=False, size=size, dtype=torch.bfloat16)
        return flat.view(-1, self.info["tokens"], self.info["width"])

    def clip(self, seed: int) -> Tensor:
        if self.clips is None:  # opened at the first use: it may still be written while the first steps run
            self.clips = self.open(self.folder / "clips.bin")
        return self.clips[self.first_frame[seed] : self.first_frame[seed + 1]]


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
        done = step / self.num_steps
        full, plain = done >= FULL_FROM, done < SHAPES_FROM
        if self.info["clips"] and done >= CLIPS_FROM and rng.random() < CLIP_SHARE:
            return self.clips(rng.integers(self.info["clips"], size=CLIPS_PER_BATCH).tolist(), rng, full, plain)
        return self.scenes(rng.integers(self.info["scenes"], size=SCENES_PER_BATCH).tolist(), rng, full, plain)

    def scenes(self, seeds: list[int], rng: np.random.Generator, full: bool, plain: bool) -> Batch:
        rows, kept, questions, starts = [], [], [], []
        for seed in seeds:
            asker = SceneAsker(sample_scene(seed), rng)
            marked = {p for patches in asker.patches + asker.characters for p in patches}
            kept.append(choose(marked, IMAGE_TOKENS, IMAGE_TOKENS if full else KEEP, rng))
            kinds = [kind for kind, share in LONG_SHARE.items() if rng.random() < share]
            weights = self.mix.numpy() / self.mix.sum().item()
            kinds += rng.choice(SHORT_KINDS, size=QUESTIONS - len(kinds), p=weights / weights.sum()).tolist()
            asked = [q for kind in kinds if (q := asker.ask(kind))]
            rng.shuffle(asked)
            starts.append(len(questions))
            questions += asked
            rows.append(self.packer.pack(asked, IMAGE_TOKENS, kept[-1], rng, plain))
        return Batch(collate(rows, np.stack(kept), IMAGE_TOKENS, starts), questions, seeds, clip=False)

    def clips(self, seeds: list[int], rng: np.random.Generator, full: bool, plain: bool) -> Batch:
        packed_rows: list[Row] = []
        kept, questions, starts = [], [], []
        most = 0
        for seed in seeds:
            clip = sample_clip(seed)
            asker = ClipAsker(clip, rng)
            cells = set()
            for frame in range(clip.num_frames):
                for i in range(len(clip.things)):
                    cells |= {token % FRAME_TOKENS for token in asker.tokens(i, frame)}
            chosen = choose(cells, FRAME_TOKENS, FRAME_TOKENS if full else KEEP_CELLS, rng)
            tokens = (np.arange(clip.num_frames)[:, None] * FRAME_TOKENS + chosen).ravel()
            asked = [q for kind in CLIP_KINDS for _ in range(2) if (q := asker.ask(kind))]
            rng.shuffle(asked)
            starts.append(len(questions))
            questions += asked
            packed_rows.append(self.packer.pack(asked, clip.num_frames * FRAME_TOKENS, tokens, rng, plain))
            kept.append(tokens)
            most = max(most, len(tokens))
        padded = np.stack([np.pad(tokens, (0, most - len(tokens)), constant_values=-1) for tokens in kept])
        return Batch(collate(packed_rows, padded, 16 * FRAME_TOKENS, starts), questions, seeds, clip=True)


def choose(marked: set[int], total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of `total` tokens, ascending: the marked ones first, others at random."""
    if count >= total:
        return np.arange(total)
    score = rng.random(total)
    score[list(marked)] += 1
    return np.sort(np.argsort(-score)[:count])


# ── model ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def visual_tokens(model: LlavaForConditionalGeneration, features: Features, batch: Batch, device: str) -> list[Tensor]:
    """Projected tokens (n, D) of each item, those that are kept."""
    projector = model.model.multi_modal_projector
    if not batch.clip:
        picked = torch.stack([features.scenes[i][k] for i, k in zip(batch.items, batch.packed.kept, strict=True)])
        return list(projector(picked.to(device)))
    result = []
    for item, kept in zip(batch.items, batch.packed.kept, strict=True):
        kept = kept[kept >= 0]
        frames = features.clip(item)
        if len(kept) == len(frames) * FRAME_TOKENS:
            result.append(pool_frames(projector(frames.to(device))))
            continue
        frame, cell = kept // FRAME_TOKENS, kept % FRAME_TOKENS
        row, column = cell // (GRID // POOL) * FRAME_POOL, cell % (GRID // POOL) * FRAME_POOL
        four = [frames[frame, (row + dy) * GRID + column + dx] for dy in range(FRAME_POOL) for dx in range(FRAME_POOL)]
        result.append(projector(torch.stack(four).to(device)).mean(0))
    return result


def splice(
    model: LlavaForConditionalGeneration, packed: Packed, visual: list[Tensor], dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Embeddings (B, T, D) of the rows with the visual tokens in their places."""
    embeds = model.model.language_model.embed_tokens(packed.ids).to(dtype)
    rows = []
    for row, tokens, at in zip(embeds, visual, packed.visual_at.tolist(), strict=True):
        rows.append(torch.cat([row[:at], tokens.to(row.dtype), row[at + len(tokens) :]]))
    return torch.stack(rows)


def run_layer(
    layer: torch.nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor
) -> tuple[Tensor, Tensor]:
    """A decoder layer written out: (output (B, T, D), masked logits (B, H, T, T)); on a CPU faster than SDPA."""
    attention, shape = layer.self_attn, (*hidden.shape[:2], -1, layer.self_attn.head_dim)
    states = layer.input_layernorm(hidden)
    query, key = (f(states).view(shape).transpose(1, 2) for f in (attention.q_proj, attention.k_proj))
    value = attention.v_proj(states).view(shape).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    key, value = (x.repeat_interleave(attention.num_key_value_groups, dim=1) for x in (key, value))
    logits = query @ key.mT * attention.scaling + mask
    mixed = (logits.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
    hidden = hidden + attention.o_proj(mixed)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), logits


def attention_loss(logits: Tensor, packed: Packed, slot: int) -> Tensor:
    """Sum over the looks of one slot of -log(attention mass on the tokens to look at); logits (B, T, T), masked."""
    mine = packed.look_slot == slot
    log_mass = logits[packed.look_row[mine], packed.look_place[mine]].float().log_softmax(-1)
    return -log_mass.masked_fill(~packed.look_at[mine], -math.inf).logsumexp(-1).sum()


def previous_frame_loss(logits: Tensor, packed: Packed) -> Tensor:
    """Mean over clip tokens of -log(attention to the same cell one frame earlier)."""
    losses = []
    for row, at, kept in zip(logits, packed.visual_at.tolist(), packed.kept, strict=True):
        kept = kept[kept >= 0]
        cells = int((kept < FRAME_TOKENS).sum())
        places = at + torch.arange(cells, len(kept), device=row.device)
        losses.append(F.cross_entropy(row[places].float(), places - cells))
    return torch.stack(losses).mean()


def run_decoder(
    model: LlavaForConditionalGeneration, embeds: Tensor, packed: Packed, clip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits at the targets (S, vocab), attention loss, previous-frame loss), layer by layer."""
    decoder = model.model.language_model
    rotary = decoder.rotary_emb(embeds, packed.positions)
    mask = torch.zeros_like(packed.mask, dtype=embeds.dtype).masked_fill(~packed.mask, -math.inf)
    hidden, look_loss, previous_loss = embeds, embeds.new_zeros(()).float(), embeds.new_zeros(()).float()
    for i, layer in enumerate(decoder.layers):
        hidden, logits = run_layer(layer, hidden, rotary, mask)
        for slot, (at, head) in enumerate(HEADS):
            if at == i and (packed.look_slot == slot).any():
                look_loss = look_loss + attention_loss(logits[:, head], packed, slot)
        if clip and i == PREVIOUS_HEAD[0]:
            previous_loss = previous_frame_loss(logits[:, PREVIOUS_HEAD[1]], packed)
    states = decoder.norm(hidden)[packed.target_row, packed.target_place]
    return model.lm_head(states), look_loss / max(1, len(packed.look_slot)), previous_loss


def to_device(packed: Packed, device: str) -> Packed:
    return Packed(**{f.name: getattr(packed, f.name).to(device) for f in fields(Packed)})


def exact(logits: Tensor, packed: Packed, questions: list[Question]) -> list[tuple[str, bool]]:
    """(kind, whether every token of the answer is the most likely one) of the questions that the batch asks."""
    right = torch.ones(len(questions), dtype=torch.bool)
    wrong = logits.argmax(-1).cpu() != packed.target_token.cpu()
    target_question = packed.target_question.cpu()
    right[target_question[wrong]] = False
    asked = set(target_question.tolist())
    return [(q.kind, bool(right[i])) for i, q in enumerate(questions) if i in asked]


# ── held-out check, teacher-forced ────────────────────────────────────────────────────────────────────────────────────


class HeldOut:
    """Features and questions of held-out scenes and clips, all visual tokens in; made once."""

    def __init__(
        self, batches: Batches, tower: torch.nn.Module, device: str, *, scenes: int = 96, clips: int = 24
    ) -> None:
        seeds, rng = [HELD_OUT + i for i in range(max(scenes, clips))], np.random.default_rng(0)
        self.features = Features.__new__(Features)
        pictures = [np.stack([draw_scene(sample_scene(s)) for s in seeds[:scenes]])]
        pictures += [draw_clip(sample_clip(s)) for s in seeds[:clips]]
        blocks = []
        for block in pictures:
            with torch.no_grad(), torch.autocast(device, torch.bfloat16):
                parts = [
                    run_tower(tower, normalise(part).to(device))[:, 1:]
                    for part in np.array_split(block, -(-len(block) // 16))
                ]
            blocks.append(torch.cat(parts).to("cpu", torch.bfloat16))
        self.features.scenes, self.features.clips = blocks[0], torch.cat(blocks[1:])
        self.features.first_frame = [0, *np.cumsum([len(b) for b in blocks[1:]])]
        self.batches = []
        for start in range(0, scenes, 8):
            self.batches.append(batches.scenes(seeds[start : min(scenes, start + 8)], rng, True, True))
        for start in range(0, clips, 3):
            self.batches.append(batches.clips(seeds[start : min(clips, start + 3)], rng, True, True))
        for batch in self.batches:
            batch.items = [s - HELD_OUT for s in batch.items]

    @torch.no_grad()
    def accuracy(self, model: LlavaForConditionalGeneration, device: str) -> dict[str, float]:
        found: dict[str, list[bool]] = {}
        for batch in self.batches:
            packed = to_device(batch.packed, device)
            with torch.autocast(device, torch.bfloat16):
                embeds = splice(model, packed, visual_tokens(model, self.features, batch, device))
                logits, _, _ = run_decoder(model, embeds, packed, batch.clip)
            for kind, right in exact(logits, packed, batch.questions):
                found.setdefault(f"clip {kind}" if batch.clip else kind, []).append(right)
        return {kind: round(float(np.mean(rights)), 3) for kind, rights in sorted(found.items())}


# ── run ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True, help="folder with the tokenizer")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="continue RUN/lm.pt; --steps may be larger than before")
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--attention-weight", type=float, default=ATTENTION_WEIGHT, help="0: train without that loss")
    parser.add_argument("--stop-at", type=int, help="leave early, the schedule being that of --steps")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    features = Features(args.run)
    model = build_model(build_config()).to(args.device)
    model.model.vision_tower.load_state_dict(torch.load(args.run / "vit.pt", map_location=args.device)["tower"])
    with torch.no_grad():  # the projector wants inputs of about unit size
        model.model.multi_modal_projector.linear_1.weight.div_(features.info["scale"])
    decoder, projector = model.model.language_model, model.model.multi_modal_projector
    matrices, others = split_matrices(decoder, decoder.layers)
    optimisers = Optimisers(
        matrices,
        others + list(projector.parameters()),
        muon_lr=MUON_LR,
        adam_lr=ADAM_LR,
        num_steps=args.steps,
        warmup_steps=WARMUP_STEPS,
        decay_from=DECAY_FROM,
    )
    mix, first = torch.ones(len(SHORT_KINDS)).share_memory_(), 0
    if args.resume:
        state = torch.load(args.run / "lm.pt", map_location=args.device)
        model.load_state_dict(state["model"])
        optimisers.load_state_dict(state["optimisers"])
        mix.copy_(state["mix"])
        first = state["step"]

    tokenizer = AutoTokenizer.from_pretrained(args.start)
    batches = Batches(tokenizer, features.info, first, args.steps, mix)
    held_out = HeldOut(batches, model.model.vision_tower, args.device)
    recent: dict[str, list[bool]] = {}
    loader = DataLoader(batches, batch_size=None, num_workers=1)
    bar = tqdm(loader, initial=first, total=args.steps, mininterval=10)
    for step, batch in enumerate(bar, start=first):
        packed = to_device(batch.packed, args.device)
        with torch.autocast(args.device, torch.bfloat16):
            embeds = splice(model, packed, visual_tokens(model, features, batch, args.device))
            logits, look_loss, previous_loss = run_decoder(model, embeds, packed, batch.clip)
        losses = F.cross_entropy(logits.float(), packed.target_token, reduction="none")
        answer_loss = mean_where(losses, packed.target_weight)
        (answer_loss + args.attention_weight * (look_loss + PREVIOUS_WEIGHT * previous_loss)).backward()
        optimisers.step(step)
        for kind, right in exact(logits, packed, batch.questions):
            recent.setdefault(f"clip {kind}" if batch.clip else kind, []).append(right)
        if step % 20 == 0:
            look = round(look_loss.item(), 3)
            bar.set_postfix_str(f"answer {answer_loss.item():.3f} look {look:.3f}", refresh=False)
            record = {"answer_loss": round(answer_loss.item(), 4), "look_loss": look, "clip": batch.clip}
            append_record(args.run / "lm.jsonl", step=step, **record)
        last = step + 1 == (args.stop_at or args.steps)
        if (step + 1) % MIX_EVERY == 0:
            seen = {kind: round(float(np.mean(rights)), 3) for kind, rights in sorted(recent.items())}
            mix.copy_(torch.tensor([0.15 + 1 - seen.get(kind, 0.5) for kind in SHORT_KINDS]))
            append_record(args.run / "lm.jsonl", step=step + 1, train=seen)
            tqdm.write(f"step {step + 1} train {seen}")
            recent = {}
        if (step + 1) % args.eval_every == 0 or last:
            scores = held_out.accuracy(model, args.device)
            append_record(args.run / "lm.jsonl", step=step + 1, held_out=scores)
            tqdm.write(f"step {step + 1} held out {scores}")
            save_checkpoint(
                args.run / "lm.pt",
                model=model.state_dict(),
                optimisers=optimisers.state_dict(),
                mix=mix.clone(),
                step=step + 1,
            )
        if last:
            break


if __name__ == "__main__":
    main()
