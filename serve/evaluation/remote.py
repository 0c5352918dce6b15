"""Answers from any OpenAI-compatible server: media travel as data: URLs, a few requests at a time.

To a server of ours the `vision` object says how many frames to take and, if asked, which reducer to use. Other servers
get none of it and choose frames as they do; asking them for a reducer is an error, since they would ignore it and the
table would not tell.
"""

from __future__ import annotations

import base64
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx

from serve.evaluation.asking import Ask, Reply
from serve.evaluation.items import EvaluationError

CONNECT_TIMEOUT_S = 10.0
NUM_TRIES = 5
MAX_WAIT_S = 30.0
BUSY = (408, 429, 502, 503, 504)
"""Statuses after which the same request may succeed."""


class ServerRefuses(EvaluationError):
    """The server cannot be reached, refuses a request, or answers something else than a chat completion."""

    code = "server_refuses"


class RemoteAnswerer:
    """A server.

    Args:
        url: Its address; without a path, /v1 is meant.
        model: Name to ask for; the first that the server lists if None.
        transport: How requests travel; tests hand in their own.

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
        # trust_env: no proxy or netrc credentials get between us and the address that was given
        self._http = httpx.Client(
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=concurrency),
            transport=transport,
            trust_env=False,
        )
        try:
            self._model, self._is_ours = self._choose(model)
        except ServerRefuses:
            self.close()
            raise

    def close(self) -> None:
        self._http.close()

    def facts(self) -> dict[str, Any]:
        frames = self._num_frames if self._is_ours else None
        return {"model": self._model, "through": self._url, "num_frames": frames, "max_tokens": self._max_tokens}

    def answers(self, asks: Iterable[Ask], reducer: str | None) -> Iterator[Reply]:
        if reducer is not None and not self._is_ours:
            raise ServerRefuses(
                f"the server at {self._url} is none of `mm serve`, so it would ignore the reducer {reducer!r}; "
                "leave --reducer out"
            )
        waiting: deque[Future[Reply]] = deque()
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="ask")
        try:
            for ask in asks:
                waiting.append(pool.submit(self._ask, ask, reducer))
                if len(waiting) >= 2 * self._concurrency:  # enough to keep all of them busy
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _choose(self, model: str | None) -> tuple[str, bool]:
        """The model to ask for, and whether the server is one of ours."""
        offered = self._models()
        name = model or next(iter(offered))
        if name not in offered:
            raise ServerRefuses(f"no model {name!r} at {self._url}; it offers: {', '.join(offered)}")
        return name, offered[name] == "mm"

    def _models(self) -> dict[str, str]:
        """Names of the served models, and who owns each."""
        body = self._call("GET", "/models")
        try:
            models = {str(entry["id"]): str(entry.get("owned_by", "")) for entry in body["data"]}
        except (LookupError, TypeError, AttributeError):
            raise ServerRefuses(f"the list of models at {self._url}/models is not of OpenAI's form") from None
        if not models:
            raise ServerRefuses(f"the server at {self._url} offers no model")
        return models

    def _ask(self, ask: Ask, reducer: str | None) -> Reply:
        try:
            body = self._call("POST", "/chat/completions", self._payload(ask, reducer))
        except ServerRefuses as error:
            raise ServerRefuses(f"at item {ask.item_id!r}: {error}") from None
        try:
            text = body["choices"][0]["message"]["content"] or ""
            vision = body.get("vision") or {}
            counts = {f"num_{name}": int(vision.get(name, 0)) for name in ("visual_tokens_in", "visual_tokens_kept")}
        except (LookupError, TypeError, ValueError, AttributeError):
            raise ServerRefuses(f"at item {ask.item_id!r}: the answer is not of OpenAI's form") from None
        return Reply(text=str(text), **counts)

    def _payload(self, ask: Ask, reducer: str | None) -> dict[str, Any]:
        url = f"data:{ask.media_type};base64,{base64.b64encode(ask.media).decode()}"
        kind = f"{ask.kind}_url"
        payload: dict[str, Any] = {
            "model": self._model,
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": kind, kind: {"url": url}}, {"type": "text", "text": ask.question}],
                }
            ],
            "max_tokens": self._max_tokens,
            "temperature": 0.0,
        }
        if self._is_ours:
            frames = {"num_frames": self._num_frames} if ask.kind == "video" else {}
            payload["vision"] = frames | ({} if reducer is None else {"reducer": reducer})
        return payload

    def _call(self, method: str, path: str, payload: Mapping[str, Any] | None = None) -> Any:
        """The JSON of a response; waits and tries again while the server is busy."""
        for attempt in range(NUM_TRIES):
            response = self._send(method, path, payload)
            if response.status_code not in BUSY or attempt == NUM_TRIES - 1:
                break
            time.sleep(_wait_s(response, attempt))
        return _body(response, f"{self._url}{path}")

    def _send(self, method: str, path: str, payload: Mapping[str, Any] | None) -> httpx.Response:
        address = f"{self._url}{path}"
        try:
            return self._http.request(method, address, json=payload)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol):
            raise ServerRefuses(f"{self._url!r} is not an address; write http://host:port/v1") from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ServerRefuses(f"no server can be reached at {self._url} ({error})") from None
        except httpx.TimeoutException:
            raise ServerRefuses(f"{address} did not answer in time") from None
        except httpx.HTTPError as error:
            raise ServerRefuses(f"the connection to {address} broke: {error or type(error).__name__}") from None


def _with_path(url: str) -> str:
    url = url.rstrip("/")
    return f"{url}/v1" if url.count("/") == 2 else url


def _wait_s(response: httpx.Response, attempt: int) -> float:
    try:
        asked = float(response.headers["retry-after"])
    except (KeyError, ValueError):
        asked = 0.5 * 2**attempt
    return min(max(asked, 0.0), MAX_WAIT_S)


def _body(response: httpx.Response, address: str) -> Any:
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.is_success and isinstance(body, dict):
        return body
    error = body.get("error", body) if isinstance(body, dict) else None
    told = error.get("message") if isinstance(error, dict) else error
    reason = f": {told}" if isinstance(told, str) else ", without a message that can be read"
    hint = "; give a key with --api-key" if response.status_code in (401, 403) else ""
    raise ServerRefuses(f"{address} answered with status {response.status_code}{reason}{hint}")
