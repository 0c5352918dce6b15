"""Pictures that the generator did not draw, in batches beside its own ones, and how often a model refuses them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from demos.train.data.clip_questions import FRAME_TOKENS
from demos.train.limits_data import LimitsBatches
from demos.train.lm_data import Batch, Features
from demos.train.model import SIDE_PX, normalise, pool_frames
from demos.train.other_pictures import on_ground
from demos.train.packing import Packed
from demos.train.train_lm import exact, splice, to_device
from demos.train.train_vit import run_tower


def patches(model: LlavaForConditionalGeneration, pixels: np.ndarray) -> Tensor:
    """(n, 256, D) of uint8 pictures (n, 224, 224, 3)."""
    device = model.device
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        return run_tower(model.model.vision_tower, normalise(pixels).to(device))[:, 1:].to(torch.bfloat16)


def frames_of(model: nn.Module, distinct: Tensor, frames: Tensor) -> Tensor:
    """(T * 64, D) visual tokens of a clip."""
    pooled = pool_frames(model.model.multi_modal_projector(distinct)).view(len(distinct), FRAME_TOKENS, -1)
    return pooled[frames].flatten(0, 1)


def visual(model: nn.Module, features: Features | None, batch: Batch, strange: list[Tensor]) -> list[Tensor]:
    """Visual tokens of each row; those of the last rows come from other pictures, (n, 256, D) each."""
    own, device = batch.items[: len(batch.items) - len(strange)], model.device
    if not batch.clip:
        drawn = [features.scenes[item].to(device) for (item,) in own]
        return list(model.model.multi_modal_projector(torch.stack([*drawn, *(s[0] for s in strange)])))
    clips = [features.clip(item) for (item,) in own]
    rows = [frames_of(model, distinct.to(device), frames.to(device)) for distinct, frames in clips]
    for kept, distinct in zip(batch.packed.kept[len(own) :], strange, strict=True):
        count = int((kept >= 0).sum()) // FRAME_TOKENS
        rows.append(frames_of(model, distinct, torch.arange(count, device=device) * len(distinct) // count))
    return rows


def held_out_refusals(
    model: LlavaForConditionalGeneration,
    batches: LimitsBatches,
    pictures: Path,
    run: Callable[[Tensor, Packed], Tensor],
) -> dict[str, list[float]]:
    """Of each held-out source: [share of refusals, number of pictures], asked in wordings that no training uses.

    pictures: the folder that `demos.train.other_pictures` wrote. run: embeddings (B, T, D) to logits at the targets.
    """
    found = {}
    for folder in sorted(pictures.glob("held_out/*")):
        pixels, rights = np.stack([squared(path) for path in sorted(folder.glob("*.png"))]), []
        for at in range(0, len(pixels), 8):
            rights += ask_others(model, batches, pixels[at : at + 8], run)
        found[folder.name] = [round(float(np.mean(rights)), 4), len(pixels)]
    return found


def squared(path: Path) -> np.ndarray:
    """uint8 (224, 224, 3), a cut-out on white."""
    with Image.open(path) as file:
        ground = on_ground(file.convert(file.mode), (255, 255, 255))
    return np.asarray(ground.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC))


@torch.no_grad()
def ask_others(
    model: LlavaForConditionalGeneration,
    batches: LimitsBatches,
    pixels: np.ndarray,
    run: Callable[[Tensor, Packed], Tensor],
) -> list[bool]:
    """Whether each answer about pictures (n, 224, 224, 3) from elsewhere is a refusal."""
    rng, count = np.random.default_rng(32), len(pixels)
    items = (np.arange(count) % batches.info["scenes"]).tolist()
    batch = batches.draw_with("scenes", items, count, rng, unseen=True, plain=True)
    device = model.device.type
    packed = to_device(batch.packed, device)
    with torch.autocast(device, torch.bfloat16):
        strange = list(patches(model, pixels).split(1))
        embeds = splice(model, packed, visual(model, None, batch, strange))
        logits = run(embeds, packed)
    return [right for _, right in exact(logits, batch)]
