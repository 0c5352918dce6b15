"""Trained drafters: one decoder layer that reads the target's hidden states and predicts its next tokens.

Papers    EAGLE, EAGLE-2, EAGLE-3, MSD, ViSpec, HiViS, SpecVLM, SpecFLASH; see the module `head` beside this one and
          `mm.engine.spec_decode.drafters.eagle.vision_adapters` for what was taken from which.
Reads     The target's last hidden states, or the inputs of several layers, and the prompt's visual tokens.
Cost      One step of one layer over the new tokens per draft, and one per further level. FLASH has no further levels.
Differs   Observations are read when a draft is proposed, so that a sequence without drafts costs nothing. Trees run
          the ancestors of a level's nodes again, instead of masking the cache.

A drafter is a folder that demos/train/train_drafter.py wrote. A name is looked up in the target's own folder, under
drafters/. At a temperature, drafts are sampled with the verifier's own noise. The text stays the same and more tokens
are accepted (Daliri, Musco and Suresh, arXiv:2408.07978).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from mm.data.tokens import Prompt
from mm.engine.kv_cache.blocks import OutOfBlocks
from mm.engine.spec_decode.drafters.eagle.feature_rows import generated_features, prompt_features, visual_context
from mm.engine.spec_decode.drafters.eagle.head import load_draft_head
from mm.engine.spec_decode.drafters.eagle.layer import DraftLayer, last_of
from mm.engine.spec_decode.drafters.eagle.pending import (
    PendingInputs,
    concatenated,
    features_before,
    layer_inputs,
)
from mm.engine.spec_decode.drafters.eagle.tree_builder import EagleSession, TreeBuilder
from mm.errors import InvalidOption
from mm.models.linear import prepack_linears
from mm.plugins.drafter import NO_DRAFT, Draft, DraftBudget, DraftTarget, Observation

log = logging.getLogger(__name__)

FOLDER = "drafters"
MAX_PENDING = 256
"""Steps that a sequence may go without a draft. After more of them its session drafts no more."""


@dataclass(frozen=True, kw_only=True)
class Eagle:
    """Drafts with a trained head that reads the target's states.

    Attributes:
        weights: A drafter's name in the target's folder, or a folder.
        width: Children of a node and nodes of a level; 1 drafts chains.
        depth: Largest number of levels.
        stop_below: A path with a lower estimated probability is not drafted further.
        cache_mb: Size of the drafter's own KV cache in MiB.
        max_sessions: Number of sequences that are drafted for at a time.
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
    """Drafts with every visual token as an input."""

    weights: str = "msd"


@dataclass(frozen=True, kw_only=True)
class ViSpec(Eagle):
    """Drafts with one input and one global feature per picture."""

    weights: str = "vispec"


@dataclass(frozen=True, kw_only=True)
class SpecVlm(Eagle):
    """Drafts with visual tokens that a gate prunes, pools, convolves, resamples or leaves out."""

    weights: str = "specvlm"


@dataclass(frozen=True, kw_only=True)
class Flash(Eagle):
    """Drafts several tokens per step, with visual states pooled by learned queries."""

    weights: str = "flash"
    depth: int = 8


class LoadedEagle:
    """The network with its KV cache, and its state of each sequence."""

    def __init__(self, options: Eagle, target: DraftTarget) -> None:
        self._options, self._target = options, target
        folder = drafter_folder(options.weights, target.name)
        embedding = target.embed(torch.arange(target.vocab_size, device=target.device)).clone()
        self.network = load_draft_head(folder, embedding, target.head_weight()).requires_grad_(False)
        prepack_linears(self.network)
        layers = self.network.config.feature_layers
        self.needs = frozenset({"last_hidden", *(f"hidden:{layer}" for layer in layers)})
        self._layer = DraftLayer(
            self.network, target.dtype, target.device, int(options.cache_mb * 2**20), options.max_sessions
        )
        self._layer.warm()
        self._builder = TreeBuilder(
            self._layer,
            width=options.width,
            depth=options.depth,
            stop_below=options.stop_below,
            excluded=target.placeholder_ids,
            source=options.weights,
        )

    @property
    def num_sessions(self) -> int:
        """Number of sessions with tokens in the drafter's cache."""
        return self._options.max_sessions - self._layer.cache.num_free_seqs

    # ── sessions ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def open(self, prompt: Prompt, *, private: bool = False) -> EagleSession:
        seq_index = self._layer.cache.allocate() if self._layer.cache.num_free_seqs else None
        if seq_index is None:
            log.warning("no room for a draft session: max_sessions=%d", self._options.max_sessions)
        return EagleSession(prompt, seq_index)

    def close(self, session: EagleSession) -> None:
        self._stop(session)

    def observe(self, sessions: Sequence[EagleSession], seen: Sequence[Observation]) -> None:
        for session, observation in zip(sessions, seen, strict=True):
            if session.seq_index is not None:
                session.pending.append(observation)
                if len(session.pending) > MAX_PENDING:
                    self._stop(session)

    def _stop(self, session: EagleSession) -> None:
        """Draft no more for a session, and free its blocks."""
        if session.seq_index is not None:
            self._layer.cache.free(session.seq_index)
        session.seq_index, session.pending, session.output = None, [], None

    # ── reading observations ──────────────────────────────────────────────────────────────────────────────────────────

    def _refresh(self, sessions: Sequence[EagleSession]) -> None:
        """Add prompts and the target's states to the cache. A session for which there is no room drafts no more."""
        found: list[PendingInputs] = []
        for session in sessions:
            if not session.pending:
                continue
            one = self._read(session)
            try:
                self._layer.append_slots(one.seq_index, one.num_tokens)
            except OutOfBlocks:
                log.warning("the drafter's cache is full: cache_mb=%g", self._options.cache_mb)
                self._stop(session)
                continue
            found.append(one)
        if found:
            counts = [one.num_tokens for one in found]
            wanted = last_of(counts, self._target.device)
            positions = concatenated([part for one in found for part in one.positions])
            inputs = layer_inputs(self.network, found)
            outputs = self._layer.run(inputs, positions, [one.seq_index for one in found], counts, wanted)
            for one, output in zip(found, outputs.unbind(), strict=True):
                one.session.output = output

    def _read(self, session: EagleSession) -> PendingInputs:
        """The pending observations. A prompt's visual tokens are compressed here."""
        assert session.seq_index is not None
        found = PendingInputs(session, session.seq_index)
        for observation in session.pending:
            states, prompt = self._states(observation), session.prompt
            # Tokens that came while no states were captured have none. They are left out.
            ids = torch.tensor(observation.token_ids[-max(1, len(observation.token_indices)) :], device=states.device)
            if observation.is_prompt:
                context = visual_context(prompt, observation.token_indices, observation.hidden["last_hidden"])
                visual = self.network.vision_adapter.compress(context)
                found.visual = visual.inputs
                found.positions.append(visual.positions)
                session.item = context.num_items - 1
                session.global_feature = None if visual.global_features is None else visual.global_features[-1]
                features = prompt_features(prompt, ids, observation.token_indices, states)
                found.add(features, features_before(visual.global_features, features.items))
            else:
                features = generated_features(prompt, ids, observation.token_indices, states, session.item)
                feature = session.global_feature
                found.add(features, None if feature is None else feature.expand(len(ids), -1))
        session.pending = []
        session.next_position = int(found.positions[-1][-1]) + 1
        return found

    def _states(self, observation: Observation) -> Tensor:
        layers = self.network.config.feature_layers
        if not layers:
            return observation.hidden["last_hidden"]
        return torch.cat([observation.hidden[f"hidden:{layer}"] for layer in layers], dim=-1)

    # ── drafting ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.inference_mode()
    def propose(self, sessions: Sequence[EagleSession], budgets: Sequence[DraftBudget]) -> list[Draft]:
        drafting = [
            i
            for i, (session, budget) in enumerate(zip(sessions, budgets, strict=True))
            if session.seq_index is not None and budget.max_tokens and budget.max_depth
        ]
        self._refresh([sessions[i] for i in drafting])
        ready = [i for i in drafting if sessions[i].output is not None]
        drafts = [NO_DRAFT] * len(sessions)
        found = self._builder.build([sessions[i] for i in ready], [budgets[i] for i in ready])
        for i, draft in zip(ready, found, strict=True):
            drafts[i] = draft
        return drafts


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
