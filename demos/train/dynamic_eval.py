"""Dynamic-LLaVA measured with masks: accuracy of every variant on held-out questions, shares of FLOPs and of the cache.

Teacher-forced: an answer is right if every token is the most likely one after the true ones before it, which is what
greedy decoding gives for all answers that have one wording.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from demos.train.frozen import CHECK_SEED, FrozenBatches, FrozenFeatures
from demos.train.lm_data import Batch
from demos.train.sparse import Decide, Predictors, by_answer, prefill_share, run_sparse
from demos.train.train_lm import exact, splice, to_device, visual_tokens

MEDIUM_TOKENS, LONG_TOKENS = 20, 40  # answers of so many tokens and more are counted by themselves


class HeldOut:
    """Questions on held-out scenes and clips, with their features; made once."""

    def __init__(self, model: LlavaForConditionalGeneration, batches: FrozenBatches, scenes: int, clips: int) -> None:
        self.features = FrozenFeatures.of_seeds(model, scenes, clips, CHECK_SEED)
        batches, rng = FrozenBatches(batches.tokenizer, self.features.info), np.random.default_rng(22)
        self.batches = [
            batches.draw(kind, list(range(i, min(i + size, count))), rng, unseen=bool((i // size) % 2))
            for kind, count, size in (("scenes", scenes, 8), ("clips", clips, 2))
            for i in range(0, count, size)
        ]


@torch.no_grad()
def accuracy(
    model: nn.Module, predictors: Predictors, held_out: HeldOut, decide: Decide, chosen: str = ""
) -> tuple[dict[str, float], dict]:
    """(share of right answers per task, counts of kept answer tokens); teacher-forced, so exact as greedy decoding.

    chosen: "random" or "uniform" image tokens instead of the predictor's.
    """
    device, rng = model.device.type, np.random.default_rng(23)
    found: dict[str, list[bool]] = {}
    kept: Counter[str] = Counter()
    for batch in held_out.batches:
        packed = to_device(batch.packed, device)
        here = replace(decide, images=decide.images and not batch.clip)  # clips keep their visual tokens
        if chosen and not batch.clip:
            here = replace(
                here, fixed=torch.from_numpy(other_choice(batch, chosen, decide.image_ratio, rng)).to(device)
            )
        with torch.autocast(device, torch.bfloat16):
            embeds = splice(model, packed, visual_tokens(model, held_out.features, batch, device))
            logits, decisions = run_sparse(model, predictors, embeds, packed, here)
        for kind, right in exact(logits, batch):
            found.setdefault(kind, []).append(right)
        if decisions.output is not None and not batch.clip:
            count, share = by_answer(packed, decisions.output)
            for name, where in (
                ("long", count >= LONG_TOKENS),
                ("medium", count >= MEDIUM_TOKENS),
                ("all", count > 0),
            ):
                kept[name] += int(count[where].sum())
                kept[f"{name} kept"] += round(float((count * share)[where].sum()))
    return {kind: round(float(np.mean(rights)), 4) for kind, rights in sorted(found.items())}, dict(kept)


def other_choice(batch: Batch, chosen: str, keep_ratio: float, rng: np.random.Generator) -> np.ndarray:
    kept = (batch.packed.kept >= 0).numpy()
    result = np.zeros(kept.shape, dtype=np.float32)
    for row, num in zip(result, kept.sum(1), strict=True):
        count = max(1, int(num * keep_ratio))
        row[rng.permutation(num)[:count] if chosen == "random" else np.arange(count) * num // count] = 1
    return result


def mean_of(scores: dict[str, float], clips: bool) -> float:
    return round(float(np.mean([v for kind, v in scores.items() if kind.startswith("clip ") == clips] or [0])), 4)


def cache_share(predictors: Predictors, num_layers: int, kept: dict, name: str) -> float:
    """Bytes of keys and values of generated tokens / those without dropping."""
    below = predictors.shape.text_layer
    share = kept.get(f"{name} kept", 0) / max(1, kept.get(name, 0))
    return round((below + (num_layers - below) * share) / num_layers, 4)


def report(
    model: nn.Module, base: dict[str, Tensor], predictors: Predictors, held_out: HeldOut, image_ratio: float
) -> dict:
    """Accuracy of every variant, shares of FLOPs and cache bytes; the decoder's weights are left as they were."""
    own = {name: t.clone() for name, t in model.model.language_model.state_dict().items()}
    full, sparse = Decide(images=False, text=False), Decide(image_ratio=image_ratio)
    variants = {"dynamic": ("own", sparse, ""), "dynamic, image only": ("own", replace(sparse, text=False), "")}
    variants |= {"dynamic, output only": ("own", Decide(images=False), ""), "adapted, all kept": ("own", full, "")}
    variants |= {"none": ("base", full, ""), "base, predicted image tokens": ("base", replace(sparse, text=False), "")}
    variants |= {f"base, {c} image tokens": ("base", replace(sparse, text=False), c) for c in ("random", "uniform")}
    variants |= {f"adapted, {c} image tokens": ("own", replace(sparse, text=False), c) for c in ("random", "uniform")}
    result: dict = {"accuracy": {}}
    for name, (weights, decide, chosen) in variants.items():
        model.model.language_model.load_state_dict(own if weights == "own" else base)
        scores, kept = accuracy(model, predictors, held_out, decide, chosen)
        result["accuracy"][name] = {"pictures": mean_of(scores, False), "clips": mean_of(scores, True), **scores}
        if name == "dynamic":
            result["kept_answer_tokens"] = kept
    model.model.language_model.load_state_dict(own)
    config = model.config.text_config
    visual = model.config.image_seq_length
    text = text_tokens(held_out)
    result["prefill_flops_share"] = round(prefill_share(config, predictors, visual, text, image_ratio), 4)
    for name in ("long", "medium", "all"):
        result[f"decode_cache_share_{name}"] = cache_share(
            predictors, config.num_hidden_layers, result["kept_answer_tokens"], name
        )
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
