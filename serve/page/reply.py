"""What a server answers: a whole reply, or the chunks of one that streams, put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mm.data.outputs import KeptMap
from mm.data.tokens import Cube
from mm.errors import MmError


class ServerProblem(MmError):
    """The server cannot be reached, refuses the request, or returns something else than the API promises."""

    code = "server_problem"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of an answer's text whose tokens were all drafted and accepted, or were all not drafted."""

    text: str
    num_tokens: int
    is_drafted: bool


@dataclass(frozen=True, kw_only=True)
class Partial:
    """An answer that is still being written."""

    text: str
    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer of a server.

    Attributes:
        num_cached_tokens: Prompt tokens found in the prefix cache; 0 also when the server does not report them.
        num_visual_tokens_in, num_visual_tokens_kept: None when the server does not report them.
        kept: One map per media item; empty when the server does not report them.
        pieces: The text in runs; empty when the server does not report them.
        mean_acceptance_length: Tokens per step with a draft; None without any.
        reducer_faults: Errors of the reducer, after which all its tokens were kept.
        timings_s: Seconds by stage ("encode", "prefill", ...); empty when the server does not report them.
        kv_bytes: Of the KV cache when the first token came; None when the server does not report it.
        wall_s: Seconds from sending the request to receiving the answer.
    """

    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_completion_tokens: int
    wall_s: float
    num_cached_tokens: int = 0
    num_visual_tokens_in: int | None = None
    num_visual_tokens_kept: int | None = None
    kept: tuple[KeptMap, ...] = ()
    pieces: tuple[Piece, ...] = ()
    mean_acceptance_length: float | None = None
    reducer_faults: tuple[str, ...] = ()
    timings_s: Mapping[str, float] = field(default_factory=dict)
    kv_bytes: int | None = None


class Assembly:
    """The chunks of a streamed completion, put together to the body of one that was not streamed."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._runs: list[dict[str, Any]] = []
        self._finish_reason: str | None = None
        self._last: dict[str, Any] = {}

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Take one chunk.

        Raises:
            ServerProblem: It does not have the promised form.
        """
        try:
            for choice in chunk["choices"]:
                self._add_text(str(choice["delta"].get("content") or ""), chunk.get("speculation"))
                self._finish_reason = choice.get("finish_reason") or self._finish_reason
            if not chunk["choices"]:
                self._last |= {name: chunk[name] for name in ("usage", "vision", "speculation") if chunk.get(name)}
            elif chunk.get("usage"):
                self._last["usage"] = chunk["usage"]
        except (LookupError, TypeError, AttributeError):
            raise ServerProblem("A part of the server's answer does not have the promised form.") from None

    def _add_text(self, text: str, run: Mapping[str, int] | None) -> None:
        self._text.append(text)
        if run is None:
            return
        if self._runs and bool(self._runs[-1]["accepted_tokens"]) == bool(run["accepted_tokens"]):
            last = self._runs[-1]
            last["text"] += text
            last["tokens"] += run["tokens"]
            last["accepted_tokens"] += run["accepted_tokens"]
        else:
            self._runs.append({"text": text, "tokens": run["tokens"], "accepted_tokens": run["accepted_tokens"]})

    def partial(self) -> Partial:
        return Partial(text="".join(self._text), pieces=tuple(_piece(run) for run in self._runs))

    def reply(self, wall_s: float) -> Reply:
        """The whole answer.

        Raises:
            ServerProblem: The stream ended before it was whole.
        """
        if self._finish_reason is None:
            raise ServerProblem("The server's answer ended before it was whole.")
        choice = {"message": {"content": "".join(self._text)}, "finish_reason": self._finish_reason}
        drafting = {**self._last.get("speculation", {}), "pieces": [self._runs]}
        return parse_reply({**self._last, "choices": [choice], "speculation": drafting}, wall_s)


def parse_reply(body: Any, wall_s: float) -> Reply:
    """A `Reply` from a response's JSON.

    Raises:
        ServerProblem: A field is missing or of another type.
    """
    try:
        choice, usage, vision = body["choices"][0], body["usage"], body.get("vision") or {}
        timings, drafting = vision.get("timings") or {}, body.get("speculation") or {}
        length = drafting.get("mean_acceptance_length")
        return Reply(
            text=str(choice["message"]["content"] or ""),
            finish_reason=str(choice.get("finish_reason") or ""),
            num_prompt_tokens=int(usage["prompt_tokens"]),
            num_completion_tokens=int(usage["completion_tokens"]),
            wall_s=wall_s,
            num_cached_tokens=int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
            num_visual_tokens_in=_count(vision.get("visual_tokens_in")),
            num_visual_tokens_kept=_count(vision.get("visual_tokens_kept")),
            kept=tuple(_kept_map(item) for item in vision.get("items") or ()),
            pieces=tuple(_piece(piece) for runs in (drafting.get("pieces") or ())[:1] for piece in runs),
            mean_acceptance_length=None if length is None else float(length),
            reducer_faults=tuple(str(fault) for fault in vision.get("reducer_faults") or ()),
            timings_s={stage.removesuffix("_s"): float(value) for stage, value in timings.items()},
            kv_bytes=_count(vision.get("kv_bytes")),
        )
    except (LookupError, TypeError, ValueError, AttributeError):
        raise ServerProblem("The server's answer does not have the promised form.") from None


def _count(value: Any) -> int | None:
    return None if value is None else int(value)


def _piece(piece: Any) -> Piece:
    num_tokens = int(piece["tokens"])
    return Piece(text=str(piece["text"]), num_tokens=num_tokens, is_drafted=int(piece["accepted_tokens"]) > 0)


def _kept_map(item: Any) -> KeptMap:
    t, h, w = (int(n) for n in item["grid"])
    kept = tuple(int(index) for index in item["kept"])
    if min(t, h, w) < 1 or any(not 0 <= index < t * h * w for index in kept):
        raise ValueError("kept tokens outside of their grid")
    cubes = tuple(
        Cube(
            first_frame=int(cube["first_frame"]),
            num_frames=int(cube["num_frames"]),
            start_s=float(cube["start_s"]),
            end_s=float(cube["end_s"]),
        )
        for cube in item.get("cubes") or ()
    )
    return KeptMap(kind=item["kind"], grid=(t, h, w), kept=kept, cubes=cubes)
