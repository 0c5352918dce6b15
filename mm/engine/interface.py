"""What serving needs of a decoder's engine. `mm.engine.engine` is the native one; `build_engine` chooses.

An engine takes requests whose media are encoded, and gives their events to a sink. `submit` and `abort` may be called
from any thread. Whoever runs it calls `step` again and again: see `mm.engine.loop`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mm.data.request import Request, TextLimits
from mm.data.tokens import EncodedMedia, ItemCount, Positions
from mm.engine.kv_transfer.messages import ReceivedKV
from mm.engine.sequence import EngineRequest, OutputSink
from mm.engine.stats import EngineStats
from mm.errors import MmError
from mm.plugins.calls import PluginCalls
from mm.plugins.capabilities import INSIDE_DECODER, capabilities_of, decoder_weights, names_of, parts_of
from mm.plugins.reducer import Reducer, Stage
from mm.plugins.registry import name_of

USE_NATIVE = "the native engine can (--engine native)"


@dataclass(frozen=True, kw_only=True)
class EngineCapabilities:
    """What an engine can do with a model, beside generating text.

    Attributes:
        name: As `--engine` names it.
        stages: Stages inside the decoder at which it lets reducers act.
        positions: What a request may ask of one-dimensional positions.
        keeps_grid_positions: Whether the tokens that a reducer leaves keep their places in time, height and width, in
            models with such positions.
        trains_layers: Whether a learned reducer may bring layers of the decoder.
        drafts: Whether our drafters propose tokens.
        has_planes: Whether it adds the planes of models with DeepStack to its layers.
        has_masks: Whether tokens of a prompt may attend to later ones.
        resumes: Whether a request may go on that another decoder began.
        hands_over: Whether a request may begin at one engine and go on at another, with its keys and values.
    """

    name: str
    stages: frozenset[Stage] = frozenset(INSIDE_DECODER)
    positions: frozenset[Positions] = frozenset({"kept", "compact"})
    keeps_grid_positions: bool = True
    trains_layers: bool = True
    drafts: bool = True
    has_planes: bool = True
    has_masks: bool = True
    resumes: bool = True
    hands_over: bool = False

    def problem_with_reducer(self, reducer: Reducer, num_position_rows: int = 1) -> str:
        """Why the engine cannot serve requests with this reducer, and what to do; empty where it can.

        Args:
            num_position_rows: Rows of the model's positions: 1, or 3 for M-RoPE.
        """
        if not (why := self.reason_against(reducer, num_position_rows)):
            return ""
        who = " + ".join(name_of(part) for part in parts_of(reducer))
        return f"the engine {self.name} cannot run {who}, which {why}; name another reducer, or {USE_NATIVE}"

    def reason_against(self, reducer: Reducer, num_position_rows: int = 1) -> str:
        """What of this reducer the engine cannot do; empty where it can do all of it."""
        stages = capabilities_of(reducer).stages
        if inside := [stage.value for stage in stages if stage in INSIDE_DECODER and stage not in self.stages]:
            return f"acts inside the decoder ({', '.join(inside)})"
        if decoder_weights(reducer) is not None and not self.trains_layers:
            return "was trained together with layers of the decoder"
        reduces = names_of(reducer) != ("none",) and set(stages) != {Stage.PIXELS}
        if num_position_rows > 1 and not self.keeps_grid_positions and reduces:
            return "leaves tokens whose positions in time, height and width are not those of a whole grid"
        return ""

    def problem_with_drafter(self, drafter: str) -> str:
        """Why the engine cannot use this drafter, and what to do; empty where it can."""
        if drafter == "none" or self.drafts:
            return ""
        return f"the engine {self.name} does not use the drafter {drafter!r}; name none, or {USE_NATIVE}"


NATIVE = EngineCapabilities(name="native", hands_over=True)


class RequestInputs(Protocol):
    """What an engine knows of prompts before their media are encoded. Safe to use from several threads."""

    def check_length(self, params: Request) -> None:
        """Refuse a request whose text alone is too long.

        Raises:
            ContextTooLong, InvalidRequest: It is, or the template does not take it.
        """
        ...

    def prompt_length(self, params: Request, items: Sequence[ItemCount]) -> int:
        """Tokens of the prompt of a request, given how many its items have."""
        ...

    def token_ids(self, params: Request) -> list[int]:
        """Token ids of a request without media."""
        ...

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text that tokens stand for, control tokens included."""
        ...


class DecoderEngine(Protocol):
    """An engine as `mm.engine.loop` runs it.

    Attributes:
        calls: Calls plugins, and knows which of them are switched off.
        wake: Set when something arrived or was aborted.
    """

    calls: PluginCalls
    wake: threading.Event

    @property
    def capabilities(self) -> EngineCapabilities: ...

    @property
    def inputs(self) -> RequestInputs: ...

    @property
    def text_limits(self) -> TextLimits:
        """How long the text of a conversation may be."""
        ...

    def submit(self, params: Request, media: EncodedMedia, sink: OutputSink) -> EngineRequest:
        """Accept a request; its events go to `sink`. May wait for a schema to be compiled: not for the event loop.

        Raises:
            ContextTooLong, InvalidRequest, MediaError: It cannot be served as asked.
            CapacityError: Too many requests wait already, or the engine is draining.
        """
        ...

    def abort(self, request: EngineRequest, *, wait: bool = False) -> None:
        """End a request and free what it holds, at once or before the next step.

        Args:
            wait: Wait for a step that is running.
        """
        ...

    def step(self) -> bool:
        """Compute one step. Returns whether there was anything to do."""
        ...

    def step_unless(self, condition: Callable[[], bool]) -> None:
        """Compute one step, unless another thread's step has made `condition` true while this one waited for it."""
        ...

    @property
    def has_work(self) -> bool: ...

    @property
    def stats(self) -> EngineStats:
        """What the engine holds now and has done so far. May be read from any thread."""
        ...

    @property
    def held_prefixes(self) -> dict[str, int]:
        """Tokens of the beginnings of prompts that the prefix cache holds, by their senders' names for them."""
        ...

    @property
    def prefills_ahead(self) -> bool:
        """Whether a prompt may be computed before its media are complete, for a later request to find."""
        ...

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the engine cannot go on and has to be replaced; empty while it can."""
        ...

    def fail_all(self, error: MmError) -> None:
        """End all requests with an error."""
        ...

    def drain(self) -> None:
        """Refuse new requests. Those that were accepted are completed."""
        ...

    def close(self) -> None:
        """Stop threads and processes, and free what they hold."""
        ...


class HandingEngine(DecoderEngine, Protocol):
    """An engine whose `capabilities.hands_over`: a request may begin at one such engine and go on at another."""

    def submit(self, params: Request, media: EncodedMedia | ReceivedKV, sink: OutputSink) -> EngineRequest:
        """As `DecoderEngine.submit`.

        Args:
            media: With what another engine has computed of the request, if one has.
            sink: A `KVSink` takes the request over once each choice has its next token.
        """
        ...
