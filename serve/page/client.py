"""The demo page's client of the public HTTP API: questions, replies and errors.

It uses `POST /v1/chat/completions` with its `vision` object, and `GET /v1/models`. It does not know how anything is
shown.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mm.data.media import Kind
from mm.data.outputs import KeptMap
from mm.data.tokens import Cube
from mm.errors import MmError
from serve.client import ServerClient, ServerError, media_part

if TYPE_CHECKING:
    import httpx


class ServerProblem(MmError):
    """The server cannot be reached, refuses the request, or returns something else than the API promises."""

    code = "server_problem"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A file as it is sent: its own bytes, not encoded again."""

    name: str
    mime: str
    data: bytes

    @property
    def kind(self) -> Kind:
        return "image" if self.mime.startswith("image/") else "video"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about one upload.

    Attributes:
        reducer: A reducer specification; empty leaves the choice to the server.
        keep_ratio: Sent only when set; for a specification that holds its own ratios leave it None.
        num_frames: Frames of a clip; not sent for an image.
        drafter: One that the server offers; None leaves the choice to it.
        salt: Shares nothing that is cached with questions of another salt, so that both sides of a comparison are
            cold. Empty shares.
    """

    text: str
    upload: Upload
    reducer: str = "none"
    keep_ratio: float | None = None
    drafter: str | None = None
    num_frames: int = 8
    seed: int = 0
    temperature: float = 0.0
    max_tokens: int = 64
    salt: str = ""

    def body(self, model: str, media_url: str | None = None) -> dict[str, Any]:
        """The request's JSON object. `media_url` stands in for the data URL of the file."""
        media = media_part(self.upload.kind, self.upload.mime, self.upload.data)
        if media_url is not None:
            media[f"{self.upload.kind}_url"] = {"url": media_url}
        content = [media, {"type": "text", "text": self.text}]
        vision: dict[str, Any] = {"return_map": True, "return_timings": True}
        if self.reducer:
            vision["reducer"] = self.reducer
        if self.keep_ratio is not None:
            vision["keep_ratio"] = self.keep_ratio
        if self.upload.kind == "video":
            vision["num_frames"] = self.num_frames
        drafting = {"drafter": self.drafter} if self.drafter is not None else {}
        salted = {"cache_salt": self.salt} if self.salt else {}
        return salted | {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "vision": vision,
            "speculation": drafting | {"return_accepted": True},
        }


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of an answer's text whose tokens were all drafted and accepted, or were all not drafted."""

    text: str
    num_tokens: int
    is_drafted: bool


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a server offers.

    Attributes:
        drafters: The default first.
        limits: What the model cannot do, as the server describes it; empty when it says nothing.
    """

    model: str
    drafters: tuple[str, ...] = ()
    limits: str = ""


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


class Client:
    """Asks one server. Safe to share between threads.

    Args:
        url: The server's address, with or without a trailing `/v1`.
        api_key: Sent with every request, if given.
        transport: Used in place of the network, by tests.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._has_key = api_key is not None
        try:
            self._client = ServerClient(f"{self.url}/v1", api_key=api_key, timeout_s=timeout_s, transport=transport)
        except ServerError as error:
            raise _problem(error, self.url) from None

    def close(self) -> None:
        self._client.close()

    def offer(self) -> Offer:
        """The first model of the server, and its drafters.

        Raises:
            ServerProblem: There is no such server, or it offers no model.
        """
        try:
            card = self._client.models()["data"][0]
            return Offer(model=str(card["id"]), drafters=_drafters(card), limits=str(card.get("description") or ""))
        except ServerError as error:
            raise _problem(error, self.url) from None
        except (LookupError, TypeError):
            raise ServerProblem(f"The server at {self.url} offers no model.") from None

    def model(self) -> str:
        """The name of the first model of the server.

        Raises:
            ServerProblem: See `offer`.
        """
        return self.offer().model

    def ask(self, question: Question) -> Reply:
        """Send a question and wait for the whole answer.

        Raises:
            ServerProblem: See the class.
        """
        body = question.body(self.model())
        start = time.perf_counter()
        try:
            completion = self._client.complete(body)
        except ServerError as error:
            raise _problem(error, self.url) from None
        return parse_reply(completion, time.perf_counter() - start)

    def curl(self, question: Question) -> str:
        """The same question as a shell command.

        Raises:
            ServerProblem: The model's name cannot be learned.
        """
        return curl_command(self.url, question, self.model(), needs_key=self._has_key)


def _problem(error: ServerError, url: str) -> ServerProblem:
    """The error in words for the page."""
    if error.message:
        facts = [
            f"status {error.status}",
            *(str(error.error[key]) for key in ("code", "param") if error.error.get(key)),
        ]
        return ServerProblem(f"{error.message[:1].upper()}{error.message[1:]}", f"({', '.join(facts)})")
    texts = {
        "address": (f"{url!r} is not the address of a server.", ""),
        "unreachable": (
            f"No server can be reached at {url}.",
            "Start one with `mm serve`, or point to another with --url.",
        ),
        "timeout": (f"The server at {url} did not answer in time.", ""),
        "broken": (f"The connection to {url} broke before the answer was there.", ""),
    }
    status = f"The server at {url} answered with status {error.status} and without a message that can be read."
    return ServerProblem(*texts.get(error.reason, (status, "Is it an OpenAI-compatible server?")))


def _drafters(card: Mapping[str, Any]) -> tuple[str, ...]:
    names = [str(name) for name in card.get("drafters") or ()]
    return tuple(dict.fromkeys([str(card["default_drafter"]), *names])) if names else ()


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


def curl_command(url: str, question: Question, model: str, *, needs_key: bool = False) -> str:
    """A command for a POSIX shell that reads the file from the current folder and asks the same.

    A key stays out of it: the command takes it from the variable MM_API_KEY.
    """
    body = question.body(model, f"data:{question.upload.mime};base64,$MEDIA")
    text = json.dumps(body, indent=2, ensure_ascii=False)
    # Inside an unquoted here-document the shell reads \ ` and $; ours is the only $ that is meant.
    for special in "\\`$":
        text = text.replace(special, f"\\{special}")
    text = text.replace(r"\$MEDIA", "$MEDIA", 1)
    key = ' -H "Authorization: Bearer $MM_API_KEY"' if needs_key else ""
    return (
        f"MEDIA=$(base64 < {shlex.quote(question.upload.name)} | tr -d '\\n')\n"
        f"curl -sS {shlex.quote(url + '/v1/chat/completions')} -H 'Content-Type: application/json'{key} "
        f"--data-binary @- <<JSON\n{text}\nJSON\n"
    )
