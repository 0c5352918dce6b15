"""Where a drafter's training gets its answers: pictures and questions of the generator, answered by the frozen target.

Nothing is stored. A seed gives a picture and its questions, the engine answers them, and one more forward of the target
over prompt and answer gives the hidden states that a drafter reads.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demos.train.data.clips import draw_clip, sample_clip
from demos.train.data.questions import CLIP_KINDS, SCENE_KINDS, ClipAsker, SceneAsker
from demos.train.data.scenes import draw_scene, sample_scene
from demos.train.drafting import Sample
from mm.api import Model, build_request
from mm.data.media import Video
from mm.data.tokens import Prompt
from mm.encode.pipeline import encode
from mm.engine.attention.gather import GatherAttention
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.spec_decode.drafters.eagle.feature_rows import prompt_features, visual_context
from mm.models.attention import AttentionMetadata

LONG_KINDS = {"caption": 0.5, "tour": 0.17, "list": 0.17}  # of the questions on scenes; the rest are the other kinds
PER_PICTURE = 4
CLIP_SHARE = 0.15
SAMPLED_SHARE = 0.25  # of the answers are drawn at temperature 1, the others are greedy
FRAMES_PER_S = 8
MAX_NEW_TOKENS = 160


@dataclass(frozen=True)
class Asked:
    """A question about a picture (uint8) or a clip."""

    media: np.ndarray | Video
    text: str
    task: str

    @property
    def options(self) -> dict[str, Any]:
        return {"videos": [self.media], "num_frames": 16} if isinstance(self.media, Video) else {"images": [self.media]}


def questions(seed: int, takes_clips: bool) -> list[Asked]:
    """What is asked about the picture or clip of a seed."""
    rng = np.random.default_rng([13, seed])
    if takes_clips and rng.random() < CLIP_SHARE:
        clip = ClipAsker(sample_clip(seed), rng)
        frames = draw_clip(clip.clip)
        times = tuple(i / FRAMES_PER_S for i in range(len(frames)))
        media = Video(
            frames=frames, timestamps_s=times, duration_s=len(frames) / FRAMES_PER_S, content_hash=f"clip {seed}"
        )
        asked = [clip.ask(str(kind)) for kind in rng.choice(CLIP_KINDS, size=PER_PICTURE)]
        return [Asked(media, q.text, f"clip-{q.kind}") for q in asked if q]
    scene = SceneAsker(sample_scene(seed), rng)
    picture = draw_scene(scene.scene)
    short = [kind for kind in SCENE_KINDS if kind not in LONG_KINDS]
    kinds, shares = [*LONG_KINDS, *short], list(LONG_KINDS.values())
    shares += [(1 - sum(shares)) / len(short)] * len(short)
    asked = [scene.ask(str(kind)) for kind in rng.choice(kinds, size=PER_PICTURE, p=shares)]
    return [Asked(picture, q.text, q.kind) for q in asked if q]


class Target:
    """The frozen model: answers questions, and gives its hidden states on the answers.

    Args:
        taps: Layers whose inputs are the states that a drafter reads; empty for the last hidden state.
    """

    def __init__(self, model: Model, taps: tuple[int, ...] = ()) -> None:
        self.model, self.taps = model, taps
        self.family = model.engine.family
        self.language = self.family.language

    @property
    def head(self) -> Tensor:
        return self.language.head_weight

    @property
    def embedding(self) -> Tensor:
        return self.language.model.get_input_embeddings().weight

    def answers(self, asked: list[Asked], *, greedy: bool, reducer: str = "none", seed: int = 0) -> list[Sample]:
        """One sample per question, in order. Those whose answer has a single token teach nothing and are left out."""
        sampling = {"temperature": 0.0} if greedy else {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": seed}
        requests = [
            build_request(one.text, **one.options, **sampling, reducer=reducer, max_new_tokens=MAX_NEW_TOKENS)
            for one in asked
        ]
        tokens: dict[int, list[int]] = {}
        for at, events in self.model.run_batch(iter(requests)):
            if isinstance(events, Exception):
                raise events
            tokens[at] = [t for event in events for t in getattr(event, "token_ids", ())]
        samples = []
        for i, (one, request) in enumerate(zip(asked, requests, strict=True)):
            if len(tokens[i]) > 1:
                encoded = encode(request, self.model.encode_parts).items
                prompt = self.family.splice(request.messages, [item.tokens for item in encoded])
                samples.append(self.sample(prompt, tokens[i], greedy, one.task))
        return samples

    @torch.no_grad()
    def sample(self, prompt: Prompt, answer: list[int], greedy: bool, task: str) -> Sample:
        """What the engine would give to a drafter for this answer."""
        ids = torch.tensor(answer, device=prompt.token_ids.device)
        after = torch.arange(prompt.next_position, prompt.next_position + len(answer) - 1)
        embeddings = torch.cat([prompt.embeddings, self.language.embed(ids[:-1])])
        positions = torch.cat([prompt.positions, after.to(ids.device).expand(len(prompt.positions), -1)], dim=1)
        last, states = self.states(embeddings, positions)
        every = torch.arange(len(last), device=ids.device)
        context = visual_context(prompt, every[: prompt.length], last[: prompt.length])
        return Sample(
            context=dataclasses.replace(context, embeddings=context.embeddings.float()),
            rows=prompt_features(prompt, ids, every, states),
            answer_states=last[prompt.length - 1 :],
            greedy=greedy,
            task=task,
        )

    def states(self, embeddings: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Last hidden states (n, D) of a sequence's tokens, and what a drafter reads of them (n, F)."""
        shape = self.language.kv_cache_spec
        cache = KVCache(shape, num_blocks=shape.num_blocks(len(embeddings)) * shape.num_layers, max_num_seqs=1)
        attention = GatherAttention(cache)
        seq_index = cache.allocate()
        cache.append_slots(seq_index, len(embeddings))
        batch = AttentionMetadata.of([seq_index], [len(embeddings)])
        rotary = self.language.rotary(positions)
        hidden, tapped = embeddings.clone(), []
        for index in range(self.language.num_layers):
            if index in self.taps:
                tapped.append(hidden.clone())
            hidden = self.language.layer(index, hidden, batch, rotary, attention)
        last = self.language.model.norm(hidden).float()
        return last, torch.cat(tapped, dim=-1).float() if tapped else last


def stream(
    target: Target,
    first_seed: int,
    *,
    batch: int = 16,
    reducers: tuple[str, ...] = ("none",),
    sampled_share: float = SAMPLED_SHARE,
) -> Iterator[list[Sample]]:
    """Batches of samples of new seeds, without end; each batch has one reducer."""
    takes_clips = "video" in target.family.kinds
    for number in itertools.count():
        rng = np.random.default_rng([14, first_seed, number])
        seeds = range(first_seed + number * batch, first_seed + (number + 1) * batch)
        asked = [one for seed in seeds for one in questions(seed, takes_clips)]
        reducer = str(rng.choice(reducers))
        yield target.answers(asked, greedy=rng.random() >= sampled_share, reducer=reducer, seed=first_seed + number)
