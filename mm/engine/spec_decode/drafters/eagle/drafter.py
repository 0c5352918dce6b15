"""Trained drafters: one decoder layer that reads the target's states and guesses what it will say.

Papers    EAGLE, EAGLE-2, EAGLE-3, MSD, ViSpec, HiViS, SpecVLM, SpecFLASH; see the module `head` beside this one and
          `mm.engine.spec_decode.drafters.eagle.vision_adapters` for what was taken from which.
Reads     The target's last hidden states, or several layers' inputs, and visual tokens as the prompt holds them.
Cost      One pass of one layer over the new tokens per round, and one per further level; FLASH has none of the latter.
Differs   What an answer's passes gave is read when a draft is asked for, so that an answer which is not drafted for
          costs nothing. Trees run the ancestors of a level's nodes again, instead of masking what the cache holds.

A drafter is a folder that demos/train/train_drafter.py wrote. A name is looked for in the target's own folder, under
drafters/. At a temperature the drafts are drawn with the verifier's own noise, which keeps the output as it is and
makes draws agree more often (Daliri, Musco and Suresh, arXiv:2408.07978).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from mm.data.tokens import Prompt
from mm.engine.kv_cache.blocks import OutOfBlocks
from mm.engine.spec_decode.drafters.eagle.feature_rows import FeatureRows, answer_rows, prompt_rows, sight_of
from mm.engine.spec_decode.drafters.eagle.head import load_draft_head
from mm.engine.spec_decode.drafters.eagle.layer import DraftLayer, last_of
from mm.engine.spec_decode.drafters.eagle.tree_builder import EagleSession, Guesser
from mm.errors import InvalidOption
from mm.models.linear import prepack_linears
from mm.plugins.drafter import NO_DRAFT, Draft, DraftBudget, DraftTarget, Observation

log = logging.getLogger(__name__)

FOLDER = "drafters"
MAX_PENDING = 256
"""Passes that an answer may go without a draft; behind that its session falls silent."""


@dataclass(frozen=True, kw_only=True)
class Eagle:
    """Drafts with a trained head that reads the target's states.

    Attributes:
        weights: A drafter's name in the target's folder, or a folder.
        width: Children of a node and nodes of a level; 1 drafts chains.
        depth: Levels, at most; of a drafter of several tokens per pass, at most so many.
        stop_below: Estimated probability of a path below which it is not drafted further.
        cache_mb: Size of the drafter's own KV cache.
        max_sessions: Answers drafted for at a time.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"last_hidden"})
    trained: ClassVar[bool] = True
    weights: str = "eagle"
    width: int = 1
    depth: int = 6
    stop_below: float = 0.2
    cache_mb: float = 64.0
    max_sessions: int = 256

    def __post_init__(self) -> None:
        for option, least in (("width", 1), ("depth", 1), ("cache_mb", 0), ("max_sessions", 1)):
            if getattr(self, option) < least:
                raise InvalidOption("eagle", option, f"was {getattr(self, option)}; it has to be {least} or more")

    @torch.inference_mode(False)
    def load(self, target: DraftTarget) -> LoadedEagle:
        return LoadedEagle(self, target)


@dataclass(frozen=True, kw_only=True)
class Eagle3(Eagle):
    """Drafts from the states of three of the target's layers."""

    weights: str = "eagle3"


@dataclass(frozen=True, kw_only=True)
class Msd(Eagle):
    """Drafts with every visual token in sight."""

    weights: str = "msd"


@dataclass(frozen=True, kw_only=True)
class ViSpec(Eagle):
    """Drafts with each picture as one row and a vector that text is told."""

    weights: str = "vispec"


@dataclass(frozen=True, kw_only=True)
class SpecVlm(Eagle):
    """Drafts with visual rows that a gate has pruned, pooled, convolved, resampled or left out."""

    weights: str = "specvlm"


@dataclass(frozen=True, kw_only=True)
class Flash(Eagle):
    """Drafts several tokens per pass, with visual states gathered by learned queries."""

    weights: str = "flash"
    depth: int = 8


class LoadedEagle:
    """The network with its cache, and what it knows of each answer."""

    def __init__(self, options: Eagle, target: DraftTarget) -> None:
        self._options, self._target = options, target
        folder = drafter_folder(options.weights, target.name)
        embedding = target.embed(torch.arange(target.vocab_size, device=target.device)).clone()
        self.network = load_draft_head(folder, embedding, target.head_weight).requires_grad_(False)
        prepack_linears(self.network)
        taps = self.network.config.taps
        self.needs = frozenset({"last_hidden", *(f"hidden:{layer}" for layer in taps)})
        self._layer = DraftLayer(
            self.network, target.dtype, target.device, int(options.cache_mb * 2**20), options.max_sessions
        )
        self._layer.warm()
        self._guesser = Guesser(
            self._layer,
            width=options.width,
            depth=options.depth,
            stop_below=options.stop_below,
            barred=target.placeholder_ids,
            source=options.weights,
        )

    @property
    def num_sessions(self) -> int:
        """Answers that hold rows in the drafter's cache."""
        return self._options.max_sessions - self._layer.cache.num_free_seqs

    # ── sessions ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def open(self, prompt: Prompt, *, private: bool = False) -> EagleSession:
        slot = self._layer.cache.allocate() if self._layer.cache.num_free_seqs else None
        if slot is None:
            log.warning("no slot for a draft session: max_sessions=%d", self._options.max_sessions)
        return EagleSession(prompt, slot)

    def close(self, session: EagleSession) -> None:
        self._silence(session)

    def observe(self, sessions: Sequence[EagleSession], seen: Sequence[Observation]) -> None:
        for session, observation in zip(sessions, seen, strict=True):
            if session.slot is not None:
                session.pending.append(observation)
                if len(session.pending) > MAX_PENDING:
                    self._silence(session)

    def _silence(self, session: EagleSession) -> None:
        if session.slot is not None:
            self._layer.cache.free(session.slot)
        session.slot, session.pending, session.output = None, [], None

    # ── reading what was observed ─────────────────────────────────────────────────────────────────────────────────────

    def _refresh(self, sessions: Sequence[EagleSession]) -> None:
        """Take in what is pending: prompts, and true states in the place of guesses. Who finds no room falls silent."""
        news = []
        for session in sessions:
            if not session.pending:
                continue
            one = self._read(session)
            try:
                self._layer.grow(one.slot, one.num_rows)
            except OutOfBlocks:
                log.warning("the drafter's cache is full: cache_mb=%g", self._options.cache_mb)
                self._silence(session)
                continue
            news.append(one)
        if news:
            counts = [one.num_rows for one in news]
            wanted = last_of(counts, self._target.device)
            positions = _cat([part for one in news for part in one.positions])
            outputs = self._layer.run(self._inputs(news), positions, [one.slot for one in news], counts, wanted)
            for one, output in zip(news, outputs.unbind(), strict=True):
                one.session.output = output

    def _read(self, session: EagleSession) -> _News:
        """What is pending, as rows; a prompt's visual ones are looked at here."""
        assert session.slot is not None
        news = _News(session, session.slot)
        for observation in session.pending:
            states, prompt = self._states(observation), session.prompt
            # Tokens that came while nothing was kept have no states: their rows are left out.
            ids = torch.tensor(observation.token_ids[-max(1, len(observation.rows)) :], device=states.device)
            if observation.is_prompt:
                sight = sight_of(prompt, observation.rows, observation.hidden["last_hidden"])
                seen = self.network.seeing.look(sight)
                news.seen = seen.inputs
                news.positions.append(seen.positions)
                session.item = sight.num_items - 1
                session.told = None if seen.told is None else seen.told[-1]
                rows = prompt_rows(prompt, ids, observation.rows, states)
                news.add(rows, None if seen.told is None else _before(seen.told, rows.items))
            else:
                rows = answer_rows(prompt, ids, observation.rows, states, session.item)
                news.add(rows, None if session.told is None else session.told.expand(len(ids), -1))
        session.pending = []
        session.next_position = int(news.positions[-1][-1]) + 1
        return news

    def _inputs(self, news: Sequence[_News]) -> Tensor:
        """Of the layer, for all rows (R, D); the text of all answers is embedded at once."""
        network = self.network
        features = network.features(_cat([states for one in news for states in one.states]))
        told = None
        if any(part is not None for one in news for part in one.told):
            nothing = features.new_zeros(1, features.shape[1])
            pairs = [pair for one in news for pair in zip(one.told, one.token_ids, strict=True)]
            told = _cat([nothing.expand(len(ids), -1) if part is None else part for part, ids in pairs])
        token_ids = _cat([ids for one in news for ids in one.token_ids])
        text = network.inputs(network.seeing.tell(features, told), token_ids)
        if all(one.seen is None for one in news):
            return text
        parts = zip(news, text.split([one.num_text for one in news]), strict=True)
        return torch.cat([rows for one, own in parts for rows in (one.seen, own) if rows is not None])

    def _states(self, observation: Observation) -> Tensor:
        taps = self.network.config.taps
        if not taps:
            return observation.hidden["last_hidden"]
        return torch.cat([observation.hidden[f"hidden:{layer}"] for layer in taps], dim=-1)

    # ── drafting ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.inference_mode()
    def propose(self, sessions: Sequence[EagleSession], budgets: Sequence[DraftBudget]) -> list[Draft]:
        asked = [
            i
            for i, (session, budget) in enumerate(zip(sessions, budgets, strict=True))
            if session.slot is not None and budget.max_tokens and budget.max_depth
        ]
        self._refresh([sessions[i] for i in asked])
        ready = [i for i in asked if sessions[i].output is not None]
        drafts = [NO_DRAFT] * len(sessions)
        found = self._guesser.guess([sessions[i] for i in ready], [budgets[i] for i in ready])
        for i, draft in zip(ready, found, strict=True):
            drafts[i] = draft
        return drafts


@dataclass(eq=False)
class _News:
    """What an answer's passes gave since its last draft.

    Attributes:
        seen: (n, D), inputs of the layer for a prompt's visual tokens, which stand before the text.
        states, token_ids, told: Of text, part by part: (k, F), (k,) and (k, D), what the items before tell; None is
            nothing.
        positions: Of all rows, part by part.
    """

    session: EagleSession
    slot: int
    seen: Tensor | None = None
    states: list[Tensor] = field(default_factory=list)
    token_ids: list[Tensor] = field(default_factory=list)
    told: list[Tensor | None] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)

    def add(self, rows: FeatureRows, told: Tensor | None) -> None:
        self.states.append(rows.states)
        self.token_ids.append(rows.token_ids)
        self.told.append(told)
        self.positions.append(rows.positions)

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.positions))

    @property
    def num_text(self) -> int:
        return sum(map(len, self.token_ids))


def _before(told: Tensor, items: Tensor) -> Tensor:
    """(k, D): what each row is told, of what items tell (I, D) and the item before each row (k,)."""
    return torch.cat([torch.zeros_like(told[:1]), told])[items + 1]


def drafter_folder(weights: str, target: str) -> Path:
    """The folder of a drafter's weights: a path, or a name among the target's own drafters.

    Raises:
        InvalidOption: Neither is there.
    """
    own = Path(target) / FOLDER
    if (own / weights).is_dir():
        return own / weights
    path = Path(weights).expanduser()
    if path.is_dir():
        return path
    known = ", ".join(sorted(p.name for p in own.iterdir() if p.is_dir())) if own.is_dir() else "none"
    raise InvalidOption(
        "eagle",
        "weights",
        f"was {weights!r}, which is no folder and none of this model's drafters ({known}); train one with "
        "python -m demos.train.train_drafter",
    )


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
