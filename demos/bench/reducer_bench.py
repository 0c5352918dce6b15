"""A loaded model that answers the held-out questions with any reducer, and what an answer costs, stage by stage."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import mm
from mm.api import build_request, collect
from mm.data.media import FrameSampling, Image, Video
from mm.data.outputs import Delta
from mm.data.request import Request
from mm.data.tokens import Encoded, EncodedMedia, VisualTokens
from mm.encode.pipeline import question
from mm.engine.loop import OutputQueue
from mm.media import MediaBudget, decode_image, decode_video
from mm.plugins.apply import reduce_tokens
from mm.plugins.capabilities import before_tower, in_tower
from mm.plugins.features import TEXT_EMBEDDINGS
from mm.plugins.spec import bind, reducer_spec
from pruning.base import NoReduction
from serve.evaluation.items import Item

NUM_FRAMES, MAX_TOKENS, IN_FLIGHT = 16, 192, 32

HOOKS = frozenset({"after_encode", "in_prefill", "prefill_done", "keep_tokens"})


class Timed:
    """A reducer whose decisions are timed.

    Attributes:
        select_s: CPU seconds of its decisions so far.
    """

    def __init__(self, reducer: Any) -> None:
        self._reducer, self.select_s = reducer, 0.0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._reducer, name)
        return self._timed(value) if name in HOOKS else value

    def _timed(self, decide: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.process_time()
            try:
                return decide(*args)
            finally:
                self.select_s += time.process_time() - start

        return timed


class Bench:
    """The model, its encoded pictures, and all measurements on it.

    Args:
        needs: Auxiliary features that any of the methods needs; pictures are encoded with them once.
    """

    def __init__(self, model: mm.Model, needs: frozenset[str]) -> None:
        self.model, self.encoder, self.engine = model, model.encode_parts.encoder, model.engine
        self._needs = needs
        self._media: dict[int, Image | Video] = {}
        self._tokens: dict[int, VisualTokens] = {}
        self._encode_s: dict[tuple[frozenset[str], Any], float] = {}

    def reducer(self, spec: str) -> Any:
        """The reducer of a text, with its weights for this model."""
        return bind(reducer_spec(spec), self.engine.family.folder, "cpu").plugin

    def medium(self, item: Item) -> Image | Video:
        if item.media_index not in self._media:
            budget = MediaBudget(self.model.config.limits)
            self._media[item.media_index] = (
                decode_image(item.media, budget)
                if item.kind == "image"
                else decode_video(item.media, FrameSampling(num_frames=NUM_FRAMES), budget)
            )
        return self._media[item.media_index]

    def encode(self, item: Item, reducer: Any, needs: frozenset[str]) -> VisualTokens:
        """Encode with the tower, before or in which a reducer of that stage makes tokens fewer."""
        merging, dropping = in_tower(reducer), before_tower(reducer)
        hosted: dict[str, Any] = {} if merging is None else {"merging": merging}
        hosted |= {} if dropping is None else {"dropping": dropping}
        return self.encoder.encode([self.medium(item)], needs, **hosted)[0]

    def tokens(self, item: Item, reducer: Any) -> VisualTokens:
        """The item's tokens, with the auxiliary features that the reducer needs; shared unless the tower merges."""
        needs = reducer.needs
        if changes_tower(reducer):
            return self.encode(item, reducer, needs)
        if item.media_index not in self._tokens:
            self._tokens[item.media_index] = self.encode(item, NoReduction(), self._needs)
        full = self._tokens[item.media_index]
        return replace(full, aux_features={name: full.aux_features[name] for name in needs & full.aux_features.keys()})

    def request(self, item: Item, max_new_tokens: int = MAX_TOKENS) -> Request:
        medium = self.medium(item)
        media: dict[str, Any] = {"images": [medium]} if item.kind == "image" else {"videos": [medium]}
        return build_request(item.question, temperature=0.0, max_new_tokens=max_new_tokens, return_map=False, **media)

    def reduced(self, request: Request, tokens: VisualTokens, reducer: Any) -> Encoded:
        text = self.encoder.embed_text(question(request)) if TEXT_EMBEDDINGS in reducer.needs else None
        # What a tower has merged is reduced already: it left what was planned.
        return Encoded(tokens=tokens if changes_tower(reducer) else reduce_tokens(reducer, tokens, text))

    def answers(self, items: Sequence[Item], spec: str) -> dict[str, tuple[str, int, int]]:
        """The answer to each item, with its visual tokens in and kept; many at a time."""
        waiting = iter(sorted(items, key=lambda item: item.media_index))
        running: dict[str, OutputQueue] = {}
        done: dict[str, tuple[str, int, int]] = {}
        while len(done) < len(items):
            for item in _up_to(waiting, IN_FLIGHT - len(running)):
                reducer = self.reducer(spec)
                request, feed = self.request(item), OutputQueue()
                encoded = self.reduced(request, self.tokens(item, reducer), reducer)
                self.engine.submit(request, EncodedMedia(items=(encoded,), reducer=spec), feed, reducer)
                running[item.id] = feed
            self.engine.step()
            for item_id in [key for key, feed in running.items() if feed.has_ended]:
                feed = running.pop(item_id)
                feed.raise_error()
                answer = collect(iter(feed.take()))
                usage = answer.usage
                done[item_id] = answer.text, usage.num_visual_tokens_in, usage.num_visual_tokens_kept
        return done

    def encode_s(self, items: Sequence[Item], reducer: Any, repeats: int) -> float:
        """Median CPU seconds of the tower for one of the items; measured once per set of needed features."""
        key = reducer.needs, reducer if changes_tower(reducer) else None
        if key not in self._encode_s:
            runs = []
            for turn in range(repeats + 1):
                for item in items if turn else items[:1]:
                    start = time.process_time()
                    self.encode(item, reducer, reducer.needs)
                    runs += [time.process_time() - start] if turn else []
            self._encode_s[key] = statistics.median(runs)
        return self._encode_s[key]

    def kept(self, item: Item, spec: str) -> float:
        """The share of an item's tokens that is left after the last layer that drops some."""
        reducer = self.reducer(spec)
        if before_tower(reducer) is None:
            return self.cost(item, spec)["kept"]
        tokens = self.tokens(item, reducer)
        return tokens.num_tokens / tokens.num_tokens_in

    def cost(self, item: Item, spec: str) -> dict[str, float]:
        """One encoded request alone up to its first token: CPU seconds, and tokens and bytes in the cache."""
        request, reducer, feed = self.request(item, 2), self.reducer(spec), OutputQueue()
        tokens, timed = self.tokens(item, reducer), Timed(reducer)
        start = time.process_time()
        encoded = self.reduced(request, tokens, timed)
        reduced_at = time.process_time()
        job = self.engine.submit(request, EncodedMedia(items=(encoded,), reducer=spec), feed, timed)
        while not any(isinstance(event, Delta) for event in feed.take()):
            self.engine.step()
        end = time.process_time()
        cache = self.engine.cache
        rows = cache.lengths.sum(axis=1)
        num_text = job.prompt.length - encoded.tokens.num_tokens
        self.engine.abort(job)
        return {
            "select": timed.select_s,
            "prefill": end - reduced_at,
            "reduce_and_prefill": end - start,
            "kv_bytes": int(rows.sum()) * cache.shape.token_bytes,
            "kept": (int(rows[-1]) - num_text) / tokens.num_tokens_in,
            "layers_kept": (float(rows.mean()) - num_text) / tokens.num_tokens_in,
        }


def changes_tower(reducer: Any) -> bool:
    """Whether the tower's work depends on the reducer."""
    return in_tower(reducer) is not None or before_tower(reducer) is not None


def _up_to(items: Iterator[Item], count: int) -> Iterable[Item]:
    for _ in range(max(0, count)):
        if (item := next(items, None)) is None:
            return
        yield item
