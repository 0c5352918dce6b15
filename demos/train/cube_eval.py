"""Cubes measured: accuracy per task beside uniform cubes, true cuts and no reduction, and where borders are placed."""

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from demos.train.compare import Answers, answers_by_row, mean_of, paired, summary
from demos.train.cube_data import Asked, CubeBatches, Prompt, build_prompt, event_frames, frame_tokens
from demos.train.cubing import CubeNetwork, border_errors, num_borders, uniform_borders
from demos.train.data.questions import CLIP_KINDS
from demos.train.frozen import FrozenFeatures
from demos.train.train_lm import run_decoder, splice, to_device

EVENT_TASKS = tuple(f"clip {kind}" for kind in CLIP_KINDS if kind not in ("frames", "color", "where"))
BATCH = 4


def true_borders(asked: Asked, count: int) -> list[int]:
    """The frames at which events begin, then those at which they end, then others, as many as are allowed."""
    ends = [event.after_frame for event in asked.clip.events]
    wanted = [*event_frames(asked.clip), *ends, *range(1, asked.clip.num_frames)]
    return [0, *sorted(list(dict.fromkeys(wanted))[:count])]


def every_frame(frames: Tensor) -> Prompt:
    """No reduction: the tokens of all frames at consecutive positions."""
    tokens = frames.flatten(0, 1)
    return Prompt(tokens, list(range(len(tokens))), [-1] * len(tokens), len(tokens))


def prompt_of(
    network: CubeNetwork, frames: Tensor, asked: Asked, variant: str, per_cube: int
) -> tuple[Prompt, list[int]]:
    if variant == "none":
        return every_frame(frames), []
    count = num_borders(len(frames), per_cube)
    given = {"uniform": uniform_borders(len(frames), count), "true": true_borders(asked, count)}.get(variant)
    cubes = network(frames, per_cube, borders=given)
    return build_prompt(network.shape, cubes), cubes.borders


@torch.no_grad()
def ask_all(
    model: nn.Module, network: CubeNetwork, batches: CubeBatches, features: FrozenFeatures, variant: str, per_cube: int
) -> tuple[Answers, list[tuple[list[int], list[int]]], float]:
    """(task, right) of each question per clip; (borders, event frames) per clip; visual tokens per frame."""
    device, rng = model.device.type, np.random.default_rng(32)
    answers: Answers = []
    borders, tokens, frames_seen = [], 0, 0
    for start in range(0, features.info["clips"], BATCH):
        items = range(start, min(start + BATCH, features.info["clips"]))
        asked = [batches.ask(item, rng, unseen=bool(item % 2)) for item in items]
        with torch.autocast(device, torch.bfloat16):
            frames = [frame_tokens(model, features, item, device) for item in items]
            made = [prompt_of(network, f, a, variant, per_cube) for f, a in zip(frames, asked, strict=True)]
            prompts = [prompt for prompt, _ in made]
            batch = batches.pack(asked, prompts)
            packed = to_device(batch.packed, device)
            visual = [p.embeddings(model.model.language_model.embed_tokens, batches.digits) for p in prompts]
            logits, *_ = run_decoder(model, splice(model, packed, visual), packed, clip=False)
        answers += answers_by_row(logits, batch)
        borders += [(own, event_frames(a.clip)) for (_, own), a in zip(made, asked, strict=True)]
        tokens += sum(len(p.places) for p in prompts)
        frames_seen += sum(len(f) for f in frames)
    return answers, borders, tokens / frames_seen


def border_figures(borders: list[tuple[list[int], list[int]]]) -> dict[str, float]:
    """Share of events with a border within one frame, and of clips in which all have one."""
    near = [[error <= 1 for error in border_errors(own, events)] for own, events in borders]
    flat = [value for clip in near for value in clip]
    return {"events": round(float(np.mean(flat)), 4), "clips": round(float(np.mean([all(c) for c in near])), 4)}


def evaluate(
    model: nn.Module,
    base: dict[str, Tensor],
    network: CubeNetwork,
    tokenizer: PreTrainedTokenizerBase,
    features: FrozenFeatures,
    budgets: tuple[int, ...],
    *,
    short: bool = False,
) -> dict:
    """Every variant at every number of frames per cube; short: without the base model and the interval."""
    decoder, result = model.model.language_model, {}
    batches, own = CubeBatches(tokenizer, features.info), {n: t.clone() for n, t in decoder.state_dict().items()}
    for per_cube in budgets:
        answers = {}
        for variant in ("cubes", "uniform") if short else ("cubes", "uniform", "true"):
            answers[variant], borders, tokens = ask_all(model, network, batches, features, variant, per_cube)
            row = {"events": round(mean_of(answers[variant], EVENT_TASKS), 4), "tokens_per_frame": round(tokens, 2)}
            row |= {"borders": border_figures(borders), **({} if short else summary(answers[variant]))}
            result[f"{variant}, {per_cube} frames per cube"] = row
        if not short:
            result[f"cubes - uniform, {per_cube} frames per cube"] = paired(
                answers["cubes"], answers["uniform"], EVENT_TASKS
            )
    if not short:
        for name, state in (("none", base), ("adapted decoder, all tokens", own)):
            decoder.load_state_dict(state)
            found, _, tokens = ask_all(model, network, batches, features, "none", budgets[0])
            result[name] = {
                "events": round(mean_of(found, EVENT_TASKS), 4),
                "tokens_per_frame": tokens,
                **summary(found),
            }
        decoder.load_state_dict(own)
    return result
