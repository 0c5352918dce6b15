"""The demo page's client of the public HTTP API: what a server offers, and its answers.

It uses `POST /v1/chat/completions` with its `vision` object, its `/count`, and `GET /v1/models`. It does not know how
anything is shown.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from serve.client import ServerClient, ServerError
from serve.page.reply import Assembly, Partial, Reply, ServerProblem, parse_reply
from serve.page.request import Question

if TYPE_CHECKING:
    import httpx

UNFIT = frozenset({"incompatible_plugin", "reducer_not_allowed", "unknown_plugin"})
"""Codes of refusals that say that a reducer cannot be used at all, whatever the picture."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a server offers.

    Attributes:
        kinds: Of media; both where the server does not say.
        drafters: The default first.
        default_reducer: Empty when the server does not say.
        limits: What the model cannot do, as the server describes it; empty when it says nothing.
    """

    model: str
    kinds: tuple[str, ...] = ("image", "video")
    drafters: tuple[str, ...] = ()
    default_reducer: str = ""
    limits: str = ""


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
        self.has_key = api_key is not None
        try:
            self._client = ServerClient(f"{self.url}/v1", api_key=api_key, timeout_s=timeout_s, transport=transport)
        except ServerError as error:
            raise _problem(error, self.url) from None

    def close(self) -> None:
        self._client.close()

    def offer(self) -> Offer:
        """The first model of the server, and what it can do.

        Raises:
            ServerProblem: There is no such server, or it offers no model.
        """
        try:
            card = self._client.models()["data"][0]
            kinds = tuple(kind for kind in card.get("input_modalities") or ("image", "video") if kind != "text")
            return Offer(
                model=str(card["id"]),
                kinds=kinds,
                drafters=_drafters(card),
                default_reducer=str(card.get("default_reducer") or ""),
                limits=str(card.get("description") or ""),
            )
        except ServerError as error:
            raise _problem(error, self.url) from None
        except (LookupError, TypeError):
            raise ServerProblem(f"The server at {self.url} offers no model.") from None

    def refusals(self, question: Question, reducers: Iterable[str]) -> dict[str, str]:
        """Of some reducers, those that the server's model cannot use, and why. Nothing is computed for it.

        A server that cannot say is taken to accept all.

        Raises:
            ServerProblem: The model's name cannot be learned.
        """
        found: dict[str, str] = {}
        model = self.offer().model
        for name in reducers:
            body = replace(question, reducer=name, keep_ratio=None).body(model)
            try:
                self._client.count(body)
            except ServerError as error:
                if error.status == 400 and error.error.get("code") in UNFIT:
                    found[name] = str(error.message)
                elif error.reason != "refused" or error.status == 404:
                    return {}
        return found

    def ask(self, question: Question) -> Reply:
        """Send a question and wait for the whole answer.

        Raises:
            ServerProblem: See the class.
        """
        body = question.body(self.offer().model)
        start = time.perf_counter()
        try:
            completion = self._client.complete(body)
        except ServerError as error:
            raise _problem(error, self.url) from None
        return parse_reply(completion, time.perf_counter() - start)

    async def stream(self, question: Question, model: str) -> AsyncGenerator[Partial | Reply]:
        """Send a question: the answer as it grows, and at last the whole. Closing the generator ends the request.

        Raises:
            ServerProblem: See the class.
        """
        body = question.body(model) | {"stream_options": {"include_usage": True}}
        start = time.perf_counter()
        assembly = Assembly()
        try:
            async with aclosing(self._client.stream(body)) as chunks:
                async for chunk in chunks:
                    assembly.add(chunk)
                    yield assembly.partial()
        except ServerError as error:
            raise _problem(error, self.url) from None
        yield assembly.reply(time.perf_counter() - start)


def _problem(error: ServerError, url: str) -> ServerProblem:
    """The error in words for the page."""
    if error.message:
        status = [f"status {error.status}"] if error.status else []
        facts = [*status, *(str(error.error[key]) for key in ("code", "param") if error.error.get(key))]
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
