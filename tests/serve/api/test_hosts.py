"""Which hosts and web pages are answered."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from mm.errors import InvalidOption
from serve.api.errors import HostNotAllowed, OriginNotAllowed
from serve.api.hosts import HostPolicy, KnownHosts
from serve.config import ServeConfig


def outcome(policy: HostPolicy, *headers: tuple[str, str]) -> str:
    try:
        policy.check(Headers(raw=[(name.encode(), value.encode("latin-1")) for name, value in headers]))
    except HostNotAllowed:
        return "host"
    except OriginNotAllowed:
        return "origin"
    return "answered"


LOCAL = HostPolicy("127.0.0.1")
PUBLIC = HostPolicy("0.0.0.0", ("mm.example.org", "*.inside"), ("https://app.example.org",))

KNOWN = [
    "localhost",
    "LOCALHOST:8000",
    "localhost.",
    "x.localhost:1",
    "127.0.0.1",
    "127.0.0.1:8000",
    "[::1]",
    "[::1]:8000",
]
KNOWN += ["192.168.0.7:8000", "[fe80::1%25eth0]:80", "[2001:db8::1]"]
FOREIGN = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "localhost@evil",
    "",
]
FOREIGN += [
    "2130706433",
    "0x7f.1",
    "localhost:99999999",
    "localhost/x",
    "[::1",
    "::1",
    "evil\xe9",
    "localhost,evil.example",
]


@pytest.mark.parametrize("host", KNOWN)
def test_addresses_and_localhost_are_answered(host) -> None:
    assert outcome(LOCAL, ("host", host)) == outcome(PUBLIC, ("host", host)) == "answered"


@pytest.mark.parametrize("host", FOREIGN)
def test_foreign_names_are_refused(host) -> None:
    assert outcome(LOCAL, ("host", host)) == outcome(PUBLIC, ("host", host)) == "host"


def test_one_foreign_name_among_several_is_refused() -> None:
    assert outcome(LOCAL, ("host", "localhost"), ("host", "evil.example")) == "host"


@pytest.mark.parametrize("host", ["mm.example.org", "MM.example.org:443", "a.b.inside", "inside.inside."])
def test_names_that_the_operator_allows_are_answered(host) -> None:
    assert outcome(PUBLIC, ("host", host)) == "answered"
    assert outcome(LOCAL, ("host", host)) == "host"
    assert outcome(HostPolicy("127.0.0.1", ("*",)), ("host", host)) == "answered"


def test_a_server_that_others_reach_answers_to_its_machine_s_name(monkeypatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "Box7")
    assert outcome(HostPolicy("0.0.0.0"), ("host", "box7:8000")) == "answered"
    assert outcome(HostPolicy("::"), ("host", "box7:8000")) == "answered"
    assert outcome(HostPolicy("127.0.0.1"), ("host", "box7:8000")) == "host"


@pytest.mark.parametrize(
    ("host", "origin", "expected"),
    [
        ("localhost:8000", "http://localhost:8000", "answered"),
        ("[::1]:8000", "http://[::1]:8000", "answered"),
        ("localhost", "http://localhost:80", "answered"),
        ("mm.example.org", "https://mm.example.org", "answered"),
        ("mm.example.org", "https://app.example.org", "answered"),
        ("mm.example.org", "HTTPS://APP.EXAMPLE.ORG", "answered"),
        ("mm.example.org", "http://app.example.org", "origin"),
        ("localhost:8000", "http://localhost:3000", "origin"),
        ("localhost:8000", "http://127.0.0.1:8000", "origin"),
        ("localhost:8000", "https://evil.example", "origin"),
        ("localhost:8000", "null", "origin"),
        ("localhost:8000", "", "origin"),
        ("localhost:8000", "http://localhost:8000@evil.example", "origin"),
        ("localhost:8000", "http://localhost:x", "origin"),
        ("localhost:8000", "http://[", "origin"),
    ],
)
def test_only_known_pages_are_answered(host, origin, expected) -> None:
    assert outcome(PUBLIC, ("host", host), ("origin", origin)) == expected


@pytest.mark.parametrize(
    ("site", "mode", "expected"),
    [
        ("cross-site", "no-cors", "origin"),
        ("same-site", "no-cors", "origin"),
        ("cross-site", "navigate", "answered"),
        ("same-origin", "cors", "answered"),
        ("none", "navigate", "answered"),
    ],
)
def test_pictures_and_scripts_of_other_pages_are_refused(site, mode, expected) -> None:
    fetch = (("host", "localhost"), ("sec-fetch-site", site), ("sec-fetch-mode", mode))
    assert outcome(LOCAL, *fetch) == expected


def test_the_middleware_refuses_requests_and_web_sockets() -> None:
    client = TestClient(KnownHosts(PlainTextResponse("inside"), LOCAL), base_url="http://localhost")
    assert client.get("/").text == "inside"
    refused = client.get("/", headers={"origin": "https://evil.example"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "origin_not_allowed")
    with pytest.raises((WebSocketDisconnect, WebSocketDenialResponse)):
        client.websocket_connect("/queue", headers={"host": "evil.example"}).__enter__()


@pytest.mark.parametrize(("name", "value"), [("allowed_hosts", "http://x"), ("allowed_origins", "example.org")])
def test_what_is_no_name_or_origin_is_refused_at_the_start(name, value) -> None:
    with pytest.raises(InvalidOption, match=name):
        ServeConfig(**{name: (value,)})
