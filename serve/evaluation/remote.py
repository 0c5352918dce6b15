"""Answers from any OpenAI-compatible server: media are sent as data: URLs, a few requests at a time.

To a server of ours the `vision` object says how many frames to take and which reducer to use, if one is given. Other
servers do not get it and choose frames in their own way. Asking them for a reducer is an error: they would ignore it,
and the table would not show that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from serve.client import JsonObject, ServerClient, ServerError, media_part
from serve.evaluation.client import EvalRequest, Reply
from serve.evaluation.items import EvaluationError

if TYPE_CHECKING:
    import httpx


NUM_TRIES = 5
"""How often one request is sent while the server is busy or the connection fails."""


class ServerRefuses(EvaluationError):
    """The server cannot be reached, refuses a request, or returns something else than a chat completion."""

    code = "server_refuses"


class RemoteBackend:
    """A server.

    Args:
        url: Its address; without a path, /v1 is meant.
        model: Name to ask for; the first that the server lists if None.
        concurrency: Requests at a time.
        num_frames: Frames taken of a clip, by a server of ours.
        transport: Used in place of the network, by tests.

    Raises:
        ServerRefuses: There is no such server or model.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 4,
        num_frames: int = 16,
        max_tokens: int = 192,
        timeout_s: float = 600.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._url = _with_path(url)
        self._concurrency, self._num_frames, self._max_tokens = concurrency, num_frames, max_tokens
        try:
            self._client = ServerClient(
                self._url, api_key=api_key, timeout_s=timeout_s, num_retries=NUM_TRIES - 1, transport=transport
            )
            offered = _offered(self._client)
        except ServerError as error:
            raise _refusal(error) from None
        self._model = model or next(iter(offered))
        if self._model not in offered:
            raise ServerRefuses(f"no model {self._model!r} at {self._url}; it offers: {', '.join(offered)}")
        self._is_ours = offered[self._model] == "mm"

    def close(self) -> None:
        self._client.close()

    def metadata(self) -> dict[str, Any]:
        frames = self._num_frames if self._is_ours else None
        return {"model": self._model, "through": self._url, "num_frames": frames, "max_tokens": self._max_tokens}

    def answers(self, requests: Iterable[EvalRequest], reducer: str | None) -> Iterator[Reply]:
        if reducer is not None and not self._is_ours:
            raise ServerRefuses(
                f"the server at {self._url} does not run `mm serve`, so it would ignore the reducer {reducer!r}; "
                "leave --reducer out"
            )
        sent: deque[Future[Reply]] = deque()
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="eval")
        try:
            for request in requests:
                sent.append(pool.submit(self._answer, request, reducer))
                if len(sent) >= 2 * self._concurrency:  # enough to keep all of them busy
                    yield sent.popleft().result()
            while sent:
                yield sent.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _answer(self, request: EvalRequest, reducer: str | None) -> Reply:
        try:
            body = self._client.complete(self._body(request, reducer))
        except ServerError as error:
            raise ServerRefuses(f"at item {request.item_id!r}: {_refusal(error)}") from None
        try:
            text = body["choices"][0]["message"]["content"] or ""
            vision = body.get("vision") or {}
            counts = {f"num_{name}": int(vision.get(name, 0)) for name in ("visual_tokens_in", "visual_tokens_kept")}
        except (LookupError, TypeError, ValueError, AttributeError):
            raise ServerRefuses(f"at item {request.item_id!r}: the answer is not of OpenAI's form") from None
        return Reply(text=str(text), **counts)

    def _body(self, request: EvalRequest, reducer: str | None) -> JsonObject:
        media = media_part(request.kind, request.media_type, request.media)
        body: JsonObject = {
            "model": self._model,
            "messages": [{"role": "user", "content": [media, {"type": "text", "text": request.question}]}],
            "max_tokens": self._max_tokens,
            "temperature": 0.0,
        }
        if self._is_ours:
            frames = {"num_frames": self._num_frames} if request.kind == "video" else {}
            body["vision"] = frames | ({} if reducer is None else {"reducer": reducer})
        return body


def _offered(client: ServerClient) -> dict[str, str]:
    """Names of the served models, and who owns each."""
    body = client.models()
    try:
        models = {str(entry["id"]): str(entry.get("owned_by", "")) for entry in body["data"]}
    except (LookupError, TypeError, AttributeError):
        raise ServerRefuses(f"the list of models at {client.url}/models is not of OpenAI's form") from None
    if not models:
        raise ServerRefuses(f"the server at {client.url} offers no model")
    return models


def _with_path(url: str) -> str:
    url = url.rstrip("/")
    return f"{url}/v1" if url.count("/") == 2 else url


def _refusal(error: ServerError) -> ServerRefuses:
    """The error in words for the command line."""
    hint = "; give a key with --api-key" if error.status in (401, 403) else ""
    reason = f": {error.message}" if error.message else ", without a message that can be read"
    texts = {
        "address": f"{error.url!r} is not an address; write http://host:port/v1",
        "unreachable": f"no server can be reached at {error.url} ({error.detail})",
        "timeout": f"{error.url} did not answer in time",
        "broken": f"the connection to {error.url} broke: {error.detail}",
    }
    status = f"{error.url} answered with status {error.status}{reason}{hint}"
    return ServerRefuses(texts.get(error.reason, status))
