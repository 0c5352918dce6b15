"""Requests to an OpenAI-compatible server, through the `openai` package: the demo page and `mm eval --url` use it.

Nothing of the environment is used: no proxy, no key and no organisation, only the address and the key that were given.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit

import openai
from openai import AsyncOpenAI, Omit, OpenAI

from mm.data.media import Kind
from mm.errors import MmError

if TYPE_CHECKING:
    import httpx


CONNECT_TIMEOUT_S = 10.0
STANDARD_FIELDS = frozenset({"model", "messages", "max_tokens", "temperature", "seed"})
"""Fields that are arguments of `openai`; others, such as `vision`, are sent beside them."""

JsonObject = dict[str, Any]
Reason = Literal["address", "unreachable", "timeout", "broken", "refused", "no_json"]


class ServerError(MmError):
    """A request to a server failed.

    Args:
        reason: "address": the URL is none. "unreachable": nothing listens there. "timeout": it did not answer in time.
            "broken": the connection ended early. "refused": it answered with an error. "no_json": it answered with
            something that is no JSON object.
        detail: What the library reports, where it helps.
        status: Of the response, with the last two reasons.
        error: The `error` object of the response, if it has one.
    """

    code = "server_error"

    def __init__(
        self, reason: Reason, url: str, detail: str = "", status: int = 0, error: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(reason, url, detail, status, error)
        self.reason, self.url, self.detail, self.status = reason, url, detail, status
        self.error = dict(error or {})

    @property
    def message(self) -> str | None:
        """The server's own message."""
        text = self.error.get("message")
        return text if isinstance(text, str) else None

    def __str__(self) -> str:
        return f"{self.url}: {self.message or self.detail or self.reason}"


class ServerClient:
    """One server. Safe to share between threads.

    Args:
        url: Address of the API, such as http://127.0.0.1:8000/v1.
        num_retries: How often a request is repeated that failed for a while; a server's `Retry-After` is respected.
        transport: Used in place of the network, by tests.

    Raises:
        ServerError: The address is none.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        num_retries: int = 0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url
        if not _is_address(url):
            raise ServerError("address", url)
        timeout = openai.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
        self._headers: Any = {} if api_key else {"Authorization": Omit()}
        unset: Any = {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
        self._http: Any = {"transport": transport, "timeout": timeout, "trust_env": False}
        self._settings: Any = {
            "base_url": url,
            "api_key": api_key or "none",
            "timeout": timeout,
            "max_retries": num_retries,
            "default_headers": unset,
        }
        self._openai = OpenAI(**self._settings, http_client=openai.DefaultHttpxClient(**self._http))

    def close(self) -> None:
        self._openai.close()

    def models(self) -> JsonObject:
        """The list of models. Not repeated when it fails.

        Raises:
            ServerError: See the class.
        """
        models = self._openai.with_options(max_retries=0).models.with_raw_response
        return self._json("/models", lambda: models.list(extra_headers=self._headers))

    def complete(self, body: Mapping[str, Any]) -> JsonObject:
        """The completion of a chat request.

        Args:
            body: The request's JSON object.

        Raises:
            ServerError: See the class.
        """
        standard: Any = {name: value for name, value in body.items() if name in STANDARD_FIELDS}
        extra = {name: value for name, value in body.items() if name not in STANDARD_FIELDS}
        create = self._openai.chat.completions.with_raw_response.create
        return self._json(
            "/chat/completions", lambda: create(**standard, extra_body=extra, extra_headers=self._headers)
        )

    async def stream(self, body: Mapping[str, Any]) -> AsyncGenerator[JsonObject]:
        """The chunks of a chat request's answer, as they come. Closing the generator ends the request.

        Args:
            body: The request's JSON object, without `stream`.

        Raises:
            ServerError: See the class.
        """
        standard: Any = {name: value for name, value in body.items() if name in STANDARD_FIELDS}
        extra = {name: value for name, value in body.items() if name not in STANDARD_FIELDS}
        # A client of its own: its connections belong to the event loop in which it is used.
        async with AsyncOpenAI(**self._settings, http_client=openai.DefaultAsyncHttpxClient(**self._http)) as client:
            with _translated(f"{self.url}/chat/completions"):
                create: Any = client.chat.completions.create
                answer = await create(**standard, stream=True, extra_body=extra, extra_headers=self._headers)
                async with answer:
                    async for chunk in answer:
                        yield chunk.to_dict()

    def count(self, body: Mapping[str, Any]) -> JsonObject:
        """The tokens that a chat request would cost.

        Args:
            body: The request's JSON object.

        Raises:
            ServerError: See the class.
        """
        path = "/chat/completions/count"
        address = f"{self.url}{path}"
        post: Any = self._openai.with_options(max_retries=0).post
        with _translated(address):
            answer = post(path, cast_to=object, body=dict(body), options={"headers": self._headers})
        if isinstance(answer, dict):
            return cast(JsonObject, answer)
        raise ServerError("no_json", address)

    def _json(self, path: str, send: Callable[[], Any]) -> JsonObject:
        address = f"{self.url}{path}"
        with _translated(address):
            response = send().http_response
        if body := _body(response):
            return body
        raise ServerError("no_json", address, status=response.status_code)


@contextlib.contextmanager
def _translated(address: str) -> Generator[None]:
    """Errors of the library as a `ServerError`."""
    try:
        yield
    except openai.APITimeoutError as error:
        reached = type(error.__cause__).__name__ != "ConnectTimeout"
        raise ServerError("timeout" if reached else "unreachable", address, "no answer") from None
    except openai.APIConnectionError as error:
        reached = type(error.__cause__).__name__ != "ConnectError"
        raise ServerError("broken" if reached else "unreachable", address, _detail(error)) from None
    except openai.APIStatusError as error:
        found = _body(error.response)
        fields = found.get("error", found)
        fields = fields if isinstance(fields, dict) else {"message": fields}
        raise ServerError("refused", address, status=error.status_code, error=fields) from None
    except openai.APIError as error:  # in the middle of a stream
        fields = error.body if isinstance(error.body, dict) else {"message": error.message}
        raise ServerError("refused", address, error=fields) from None
    except openai.OpenAIError as error:
        raise ServerError("broken", address, str(error)) from None


def media_part(kind: Kind, mime: str, data: bytes) -> JsonObject:
    """The content part of an image or a clip, with its bytes as a data: URL."""
    name = f"{kind}_url"
    return {"type": name, name: {"url": data_url(mime, data)}}


def data_url(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _body(response: Any) -> JsonObject:
    """The JSON object of a response; empty if there is none."""
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _detail(error: Exception) -> str:
    return str(error.__cause__ or error) or type(error.__cause__).__name__
