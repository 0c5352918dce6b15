"""Stage 2: train projector and decoder on cached features of the frozen tower.

Rows hold many questions on one picture (see packing.py, lm_data.py). There are three losses: on the answers' tokens; an
attention loss that makes a few heads attend to the tokens an answer is read from; and read-outs by which clip tokens
encode what happens where they are. Kinds of short questions that are still answered badly are asked more often.

    python -m demos.train.train_lm --run RUN --start FOLDER --steps 4000 [--resume] [--device cuda]

RUN holds vit.pt and the cached features; lm.pt and lm.jsonl are written there, or in --out. FOLDER: what
`demos.train.model` wrote.
"""

import argparse
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoTokenizer, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from demos.train.data.clips import draw_clip, sample_clip
from demos.train.data.questions import EVENT_KINDS, FRAME_TOKENS, PICTURE_TOKENS, POOL, SHORT_KINDS
from demos.train.data.scenes import draw_scene, sample_scene
from demos.train.data.things import GRID, HELD_OUT
from demos.train.lm_data import Batch, Batches, Features
from demos.train.model import FRAME_POOL, build_config, build_model, normalise, pool_frames
from demos.train.packing import Packed
from demos.train.train_vit import run_tower
from demos.train.training import Optimisers, append_record, mean_where, save_checkpoint, split_matrices

MUON_LR, ADAM_LR = 0.01, 1.5e-3
WARMUP_STEPS, DECAY_FROM = 50, 0.38
ATTENTION_WEIGHT = 0.5
PREVIOUS_WEIGHT = 0.2
EVENT_WEIGHT = 1.0
HEADS = ((1, 0), (1, 1), (3, 2), (3, 3))  # (layer, head) of each look slot: asked thing, second thing, written, before
PREVIOUS_HEAD = (0, 3)  # in clips, every visual token attends to its own cell one frame earlier
KIND_LAYER, ORDER_LAYER = 1, 2  # layers after which the read-outs apply: what happens there, and as which event
CALM_FROM, CALM_SCALE, CALM_SHARE = 0.44, 0.2, 0.05  # see calm()
MIX_EVERY = 100


# ── model ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Readouts(nn.Module):
    """Read-outs of what happens to each clip token; thrown away after the training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kind = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 1 + len(EVENT_KINDS)))
        self.order = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 3))


def visual_tokens(model: LlavaForConditionalGeneration, features: Features, batch: Batch, device: str) -> list[Tensor]:
    """Projected tokens (n, D) of each row, those that are kept."""
    projector = model.model.multi_modal_projector
    if not batch.clip:
        picked = []
        for items, kept in zip(batch.items, batch.packed.kept, strict=True):
            pictures = features.scenes[list(items)]
            picked.append(pictures[kept // PICTURE_TOKENS, kept % PICTURE_TOKENS])
        return list(projector(torch.stack(picked).to(device)))
    result = []
    for (item,), kept in zip(batch.items, batch.packed.kept, strict=True):
        kept = kept[kept >= 0]
        distinct, frames = features.clip(item)
        if len(kept) == len(frames) * FRAME_TOKENS:
            pooled = pool_frames(projector(distinct.to(device))).view(len(distinct), FRAME_TOKENS, -1)
            result.append(pooled[frames.to(device)].flatten(0, 1))
            continue
        frame, cell = frames[kept // FRAME_TOKENS], kept % FRAME_TOKENS
        row, column = cell // (GRID // POOL) * FRAME_POOL, cell % (GRID // POOL) * FRAME_POOL
        four = [
            distinct[frame, (row + dy) * GRID + column + dx] for dy in range(FRAME_POOL) for dx in range(FRAME_POOL)
        ]
        result.append(projector(torch.stack(four).to(device)).mean(0))
    return result


def splice(
    model: LlavaForConditionalGeneration, packed: Packed, visual: list[Tensor], dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Embeddings (B, T, D) of the rows, with the visual tokens in place of their placeholders."""
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
    """Sum over the looks of one slot of -log(attention on the tokens to attend to); logits (B, T, T), masked."""
    mine = packed.look_slot == slot
    log_mass = logits[packed.look_row[mine], packed.look_place[mine]].float().log_softmax(-1)
    return -log_mass.masked_fill(~packed.look_at[mine], -math.inf).logsumexp(-1).sum()


def previous_frame_loss(logits: Tensor, packed: Packed) -> Tensor:
    """Mean over clip tokens of -log(attention to the same cell one frame earlier)."""
    losses = []
    for row, at, kept in zip(logits, packed.visual_at.tolist(), packed.kept, strict=True):
        kept = kept[kept >= 0]
        cells = int((kept < FRAME_TOKENS).sum())
        indices = at + torch.arange(cells, len(kept), device=row.device)
        losses.append(F.cross_entropy(row[indices].float(), indices - cells))
    return torch.stack(losses).mean()


def event_loss(readout: nn.Module, hidden: Tensor, packed: Packed, labels: Tensor) -> Tensor:
    """Cross-entropy of the clip tokens' read-outs; tokens where something happens weigh as much as all others."""
    losses = []
    for row, at, label in zip(hidden, packed.visual_at.tolist(), labels, strict=True):
        label = label[label >= 0]
        loss = F.cross_entropy(readout(row[at : at + len(label)].float()).float(), label, reduction="none")
        losses.append(mean_where(loss, label > 0) + mean_where(loss, label == 0))
    return torch.stack(losses).mean()


def run_decoder(
    model: LlavaForConditionalGeneration, embeds: Tensor, packed: Packed, clip: bool, readouts: Readouts | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits at the targets (S, vocab), attention loss, previous-frame loss, event loss), layer by layer."""
    decoder = model.model.language_model
    rotary = decoder.rotary_emb(embeds, packed.positions)
    mask = torch.zeros_like(packed.mask, dtype=embeds.dtype).masked_fill(~packed.mask, -math.inf)
    hidden, (look_loss, previous_loss, told_loss) = embeds, embeds.new_zeros(3).float()
    for i, layer in enumerate(decoder.layers):
        hidden, logits = run_layer(layer, hidden, rotary, mask)
        for slot, (at, head) in enumerate(HEADS):
            if at == i and (packed.look_slot == slot).any():
                look_loss = look_loss + attention_loss(logits[:, head], packed, slot)
        if clip and i == PREVIOUS_HEAD[0]:
            previous_loss = previous_frame_loss(logits[:, PREVIOUS_HEAD[1]], packed)
        if clip and readouts and i == KIND_LAYER:
            told_loss = told_loss + event_loss(readouts.kind, hidden, packed, packed.event_kind)
        if clip and readouts and i == ORDER_LAYER:
            told_loss = told_loss + event_loss(readouts.order, hidden, packed, packed.event_order)
    states = decoder.norm(hidden)[packed.target_row, packed.target_place]
    return model.lm_head(states), look_loss / max(1, len(packed.look_slot)), previous_loss, told_loss


def to_device(packed: Packed, device: str) -> Packed:
    return Packed(**{f.name: getattr(packed, f.name).to(device) for f in fields(Packed)})


def exact(logits: Tensor, batch: Batch) -> list[tuple[str, bool]]:
    """(kind, whether every token of the answer is the most likely one) of the questions that the batch asks.

    The first word of a caption picks one of several styles and does not count.
    """
    packed, right = batch.packed, torch.ones(len(batch.questions), dtype=torch.bool)
    wrong = logits.argmax(-1).cpu() != packed.target_token
    asked = packed.target_question
    begins = torch.cat([torch.ones(1, dtype=torch.bool), asked[1:] != asked[:-1]])
    styled = torch.tensor([q.kind == "caption" for q in batch.questions])
    right[asked[wrong & ~(begins & styled[asked])]] = False
    present = set(asked.tolist())
    return [(batch.name(q), bool(right[i])) for i, q in enumerate(batch.questions) if i in present]


# ── held-out check, teacher-forced ────────────────────────────────────────────────────────────────────────────────────


class HeldOut:
    """Features and questions of held-out scenes and clips, all visual tokens in; made once.

    Asked in wordings of the training, and in those that it never uses.
    """

    def __init__(
        self, batches: Batches, tower: torch.nn.Module, device: str, *, scenes: int = 64, clips: int = 24
    ) -> None:
        seeds, rng = [HELD_OUT + i for i in range(max(scenes, clips))], np.random.default_rng(0)
        self.features = Features.__new__(Features)
        pictures = [np.stack([draw_scene(sample_scene(s)) for s in seeds[:scenes]])]
        pictures += [draw_clip(sample_clip(s), distinct=True) for s in seeds[:clips]]
        blocks = []
        for block in pictures:
            with torch.no_grad(), torch.autocast(device, torch.bfloat16):
                parts = [
                    run_tower(tower, normalise(part).to(device))[:, 1:]
                    for part in np.array_split(block, -(-len(block) // 16))
                ]
            blocks.append(torch.cat(parts).to("cpu", torch.bfloat16))
        self.features.scenes, self.features.clips = blocks[0], torch.cat(blocks[1:])
        self.features.index_clips(seeds[:clips])
        self.batches: dict[str, list[Batch]] = {}
        for name, unseen in (("held_out", False), ("unseen", True)):
            made = [batches.scenes(seeds[i : min(scenes, i + 8)], rng, True, True, unseen) for i in range(0, scenes, 8)]
            made += [batches.clips(seeds[i : min(clips, i + 3)], rng, True, True, unseen) for i in range(0, clips, 3)]
            for batch in made:
                batch.items = [(seed - HELD_OUT,) for (seed,) in batch.items]
            self.batches[name] = made

    @torch.no_grad()
    def accuracy(self, model: LlavaForConditionalGeneration, device: str) -> dict[str, dict[str, float]]:
        result = {}
        for name, batches in self.batches.items():
            found: dict[str, list[bool]] = {}
            for batch in batches:
                packed = to_device(batch.packed, device)
                with torch.autocast(device, torch.bfloat16):
                    embeds = splice(model, packed, visual_tokens(model, self.features, batch, device))
                    logits, *_ = run_decoder(model, embeds, packed, batch.clip)
                for kind, right in exact(logits, batch):
                    found.setdefault(kind, []).append(right)
            result[name] = {kind: round(float(np.mean(rights)), 3) for kind, rights in sorted(found.items())}
        return result


@torch.no_grad()
def center_inputs(linear: nn.Linear, info: dict) -> None:
    """Let an untrained layer start as if its inputs had mean 0 and about unit size."""
    linear.weight.div_(info["scale"])
    linear.bias.sub_(linear.weight @ torch.tensor(info["mean"], device=linear.weight.device))


def calm(projector: nn.Module, optimisers: Optimisers) -> None:
    """Shrink visual tokens to CALM_SCALE of their size, and train the projector at CALM_SHARE of the rate from here on.

    Its inputs are large, so at the full rate its outputs grow until what the layers add to a visual token is a
    twentieth of it. The token then encodes next to nothing of those around it or of the frame before. Every layer
    normalises its input, so smaller tokens carry the same information.
    """
    with torch.no_grad():
        for weight in projector.linear_2.parameters():
            weight.mul_(CALM_SCALE)
    optimisers.calm(CALM_SHARE)


# ── run ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder with vit.pt and the cached features")
    parser.add_argument("--out", type=Path, help="folder for lm.pt and lm.jsonl; as a rule that of --run")
    parser.add_argument("--start", type=Path, required=True, help="folder with the tokenizer")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--init", type=Path, help="exported folder with this tokenizer whose decoder to start from")
    parser.add_argument("--resume", action="store_true", help="continue RUN/lm.pt; --steps may be larger than before")
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--attention-weight", type=float, default=ATTENTION_WEIGHT, help="0: train without that loss")
    parser.add_argument("--stop-at", type=int, help="leave early, the schedule being that of --steps")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    out = args.out or args.run

    features = Features(args.run)
    model = build_model(build_config()).to(args.device)
    model.model.vision_tower.load_state_dict(
        torch.load(args.run / "vit.pt", map_location=args.device, weights_only=True)["tower"]
    )
    if not args.init:
        center_inputs(model.model.multi_modal_projector.linear_1, features.info)
    if args.init:
        start = LlavaForConditionalGeneration.from_pretrained(args.init, trust_remote_code=False).float()
        for name in ("language_model", "multi_modal_projector"):
            getattr(model.model, name).load_state_dict(getattr(start.model, name).state_dict())
    decoder, projector = model.model.language_model, model.model.multi_modal_projector
    readouts = Readouts(decoder.config.hidden_size).to(args.device)
    matrices, others = split_matrices(decoder, decoder.layers)
    optimisers = Optimisers(
        matrices,
        [*others, *readouts.parameters()],
        muon_lr=MUON_LR,
        adam_lr=ADAM_LR,
        num_steps=args.steps,
        warmup_steps=WARMUP_STEPS,
        decay_from=DECAY_FROM,
        calmed=list(projector.parameters()),
    )
    mix, first = torch.ones(len(SHORT_KINDS)).share_memory_(), 0
    if args.resume:
        state = torch.load(out / "lm.pt", map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        readouts.load_state_dict(state["readouts"])
        optimisers.load_state_dict(state["optimisers"])
        mix.copy_(state["mix"])
        first = state["step"]

    tokenizer = AutoTokenizer.from_pretrained(args.start, trust_remote_code=False)
    batches = Batches(tokenizer, features.info, first, args.steps, mix)
    held_out = HeldOut(batches, model.model.vision_tower, args.device)
    recent: dict[str, list[bool]] = {}
    loader = DataLoader(batches, batch_size=None, num_workers=1)
    bar = tqdm(loader, initial=first, total=args.steps, mininterval=10)
    for step, batch in enumerate(bar, start=first):
        packed = to_device(batch.packed, args.device)
        with torch.autocast(args.device, torch.bfloat16):
            embeds = splice(model, packed, visual_tokens(model, features, batch, args.device))
            logits, look_loss, previous_loss, told_loss = run_decoder(model, embeds, packed, batch.clip, readouts)
        losses = F.cross_entropy(logits.float(), packed.target_token, reduction="none")
        answer_loss = mean_where(losses, packed.target_weight)
        attention = args.attention_weight * (look_loss + PREVIOUS_WEIGHT * previous_loss)
        (answer_loss + attention + EVENT_WEIGHT * told_loss).backward()
        optimisers.step(step)
        if optimisers.calmed_share == 1 and step + 1 >= CALM_FROM * args.steps:
            calm(projector, optimisers)
        for kind, right in exact(logits, batch):
            recent.setdefault(kind, []).append(right)
        if step % 20 == 0:
            look = round(look_loss.item(), 3)
            bar.set_postfix_str(f"answer {answer_loss.item():.3f} look {look:.3f}", refresh=False)
            record = {"answer_loss": round(answer_loss.item(), 4), "look_loss": look, "clip": batch.clip}
            record |= {"previous_loss": round(previous_loss.item(), 3), "event_loss": round(told_loss.item(), 3)}
            append_record(out / "lm.jsonl", step=step, **record)
        last = step + 1 == (args.stop_at or args.steps)
        if (step + 1) % MIX_EVERY == 0:
            seen = {kind: round(float(np.mean(rights)), 3) for kind, rights in sorted(recent.items())}
            mix.copy_(torch.tensor([0.15 + 1 - seen.get(kind, 0.5) for kind in SHORT_KINDS]))
            append_record(out / "lm.jsonl", step=step + 1, train=seen)
            tqdm.write(f"step {step + 1} train {seen}")
            recent = {}
        if (step + 1) % args.eval_every == 0 or last:
            scores = held_out.accuracy(model, args.device)
            append_record(out / "lm.jsonl", step=step + 1, **scores)
            tqdm.write(f"step {step + 1} {scores}")
            save_checkpoint(
                out / "lm.pt",
                model=model.state_dict(),
                readouts=readouts.state_dict(),
                optimisers=optimisers.state_dict(),
                mix=mix.clone(),
                step=step + 1,
            )
        if last:
            break


if __name__ == "__main__":
    main()
