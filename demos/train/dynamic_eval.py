"""Dynamic-LLaVA measured with masks: accuracy of every variant on held-out questions, shares of FLOPs and of the cache.

Teacher-forced: an answer is right if every token is the most likely one after the true ones before it, which is what
greedy decoding gives for all answers that have one wording.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from demos.train.compare import Answers, answers_by_row, paired, summary
from demos.train.frozen import FrozenBatches, FrozenFeatures
from demos.train.lm_data import Batch
from demos.train.packing import Packed
from demos.train.sparse import Decide, Predictors, by_answer, prefill_share, run_sparse
from demos.train.train_lm import splice, to_device, visual_tokens

KEPT_SHARES = (0.5, 0.65, 0.8, 0.95)  # of generated tokens: thresholds are set so that about so many stay
MEDIUM_TOKENS, LONG_TOKENS = 20, 40  # answers of so many tokens and more are counted by themselves


class HeldOut:
    """Questions on held-out scenes and clips, with their features; made once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, features: FrozenFeatures) -> None:
        self.features = features
        batches, rng = FrozenBatches(tokenizer, features.info), np.random.default_rng(22)
        self.batches = [
            batches.draw(kind, list(range(i, min(i + size, count))), rng, unseen=bool((i // size) % 2))
            for kind, count, size in (("scenes", features.info["scenes"], 8), ("clips", features.info["clips"], 2))
            for i in range(0, count, size)
        ]


@torch.no_grad()
def ask(
    model: nn.Module, predictors: Predictors, held_out: HeldOut, decide: Decide, chosen: str = ""
) -> tuple[Answers, Answers, dict[str, int]]:
    """Answers about pictures, about clips, and counts of kept answer tokens.

    chosen: "random" or "uniform" image tokens instead of the predictor's. Clips keep their visual tokens.
    """
    device, rng = model.device.type, np.random.default_rng(23)
    pictures, clips, kept = [], [], Counter()
    for batch in held_out.batches:
        packed, here = to_device(batch.packed, device), replace(decide, images=decide.images and not batch.clip)
        if chosen and not batch.clip:
            fixed = torch.from_numpy(other_choice(batch, chosen, decide.image_ratio, rng))
            here = replace(here, fixed=fixed.to(device))
        with torch.autocast(device, torch.bfloat16):
            embeds = splice(model, packed, visual_tokens(model, held_out.features, batch, device))
            logits, decisions = run_sparse(model, predictors, embeds, packed, here)
        (clips if batch.clip else pictures).extend(answers_by_row(logits, batch))
        if decisions.output is not None and not batch.clip:
            kept.update(count_kept(packed, decisions.output))
    return pictures, clips, dict(kept)


def count_kept(packed: Packed, output: Tensor) -> Counter[str]:
    """Answer tokens, and those of them that are kept, in long, medium and all answers."""
    kept, (count, share) = Counter(), by_answer(packed, output)
    for name, least in (("long", LONG_TOKENS), ("medium", MEDIUM_TOKENS), ("all", 1)):
        where = count >= least
        kept[name] += int(count[where].sum())
        kept[f"{name} answers"] += int(where.sum())
        kept[f"{name} kept"] += round(float((count * share)[where].sum()))
    return kept


def other_choice(batch: Batch, chosen: str, keep_ratio: float, rng: np.random.Generator) -> np.ndarray:
    kept = (batch.packed.kept >= 0).numpy()
    result = np.zeros(kept.shape, dtype=np.float32)
    for row, num in zip(result, kept.sum(1), strict=True):
        count = max(1, int(num * keep_ratio))
        row[rng.permutation(num)[:count] if chosen == "random" else np.arange(count) * num // count] = 1
    return result


def cache_shares(
    predictors: Predictors, config: Any, kept: dict, image_ratio: float, prompt: tuple[int, float]
) -> dict:
    """Bytes of keys and values / those without dropping: of generated tokens, and of the whole cache at the end.

    prompt: visual tokens and others. Of answers of LONG_TOKENS and more.
    """
    shape, layers = predictors.shape, config.num_hidden_layers
    share = kept["long kept"] / max(1, kept["long"])
    generated = (shape.text_layer + (layers - shape.text_layer) * share) / layers
    visual, text = prompt
    reduced = math.floor(visual * image_ratio)
    prefill = text + (shape.image_layer * visual + (layers - shape.image_layer) * reduced) / layers
    length = kept["long"] / max(1, kept["long answers"])
    whole = (prefill + length * generated) / (visual + text + length)
    return {"generated": round(generated, 4), "whole": round(whole, 4), "mean_length": round(length, 1)}


@dataclass
class Recorded(Decide):
    """Decides as its base does and keeps the scores of generated tokens, logit 0 - logit 1."""

    scores: list[Tensor] = field(default_factory=list)

    def output(self, logits: Tensor) -> Tensor:
        self.scores.append((logits[..., 0] - logits[..., 1]).float())
        return super().output(logits)


def thresholds_for(model: nn.Module, predictors: Predictors, held_out: HeldOut, image_ratio: float) -> list[float]:
    """Thresholds at which about KEPT_SHARES of the generated tokens of held-out answers stay, the highest first."""
    decide = Recorded(image_ratio=image_ratio)
    ask(model, predictors, held_out, decide)
    scores = torch.cat(decide.scores)
    return [round(float(scores.quantile(1 - share)), 2) for share in KEPT_SHARES]


def variants(image_ratio: float, thresholds: Sequence[float]) -> dict[str, tuple[str, Decide, str]]:
    """Name: (whose decoder, how is decided, which image tokens instead of the predictor's)."""
    full, sparse = Decide(images=False, text=False), Decide(image_ratio=image_ratio)
    image = replace(sparse, text=False)
    found = {"none": ("base", full, ""), "dynamic": ("own", sparse, ""), "dynamic, image only": ("own", image, "")}
    found |= {"dynamic, output only": ("own", Decide(images=False), ""), "adapted, all kept": ("own", full, "")}
    found |= {f"dynamic, threshold {t}": ("own", replace(sparse, threshold=t), "") for t in thresholds}
    found |= {"base, predicted image tokens": ("base", image, "")}
    found |= {f"base, {c} image tokens": ("base", image, c) for c in ("random", "uniform")}
    return found


def report(
    model: nn.Module, base: dict[str, Tensor], predictors: Predictors, held_out: HeldOut, image_ratio: float
) -> dict:
    """Accuracy of every variant, shares of FLOPs and cache bytes; the decoder's weights are left as they were."""
    decoder, result, pictures = model.model.language_model, {}, {}
    own = {name: t.clone() for name, t in decoder.state_dict().items()}
    config, prompt = model.config.text_config, (model.config.image_seq_length, text_tokens(held_out))
    thresholds = thresholds_for(model, predictors, held_out, image_ratio)
    for name, (weights, decide, chosen) in variants(image_ratio, thresholds).items():
        decoder.load_state_dict(own if weights == "own" else base)
        pictures[name], clips, kept = ask(model, predictors, held_out, decide, chosen)
        result[name] = {"pictures": summary(pictures[name]), "clips": summary(clips)}
        if decide.text and decide.images:
            result[name] |= {"kept": kept, "cache": cache_shares(predictors, config, kept, image_ratio, prompt)}
    decoder.load_state_dict(own)
    for name in [name for name in pictures if name != "none"]:
        result[f"{name} - none"] = paired(pictures[name], pictures["none"])
    result["prefill_flops_share"] = round(prefill_share(config, predictors, *prompt, image_ratio), 4)
    result["prompt"] = {"visual": prompt[0], "text": round(prompt[1], 2)}
    return result


def text_tokens(held_out: HeldOut) -> float:
    """Mean number of prompt tokens other than visual ones: <s><|user|> question<|assistant|>."""
    lengths = []
    for packed in (batch.packed for batch in held_out.batches if not batch.clip):
        asked = packed.target_question
        first = torch.cat([torch.ones(1, dtype=torch.bool), asked[1:] != asked[:-1]])
        position = packed.positions[packed.target_row[first], packed.target_place[first]]
        lengths += (position + 1 - packed.kept.shape[1]).tolist()
    return float(np.mean(lengths))
