"""Where bytes come from: every shape of source, every limit, and no connection to an address that is not public."""

from __future__ import annotations

import base64
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import PIL.Image
import pytest

from mm.config import SourcePolicy
from mm.data.media import FrameSampling, Image, MediaFile, MediaSource, Video
from mm.errors import MediaError
from mm.media import decode, fetch, fetch_item, remote

ANY_HOST = SourcePolicy(allowed_domains=("*",), fetch_timeout_s=2.0)
PATHS = SourcePolicy(allow_paths=True)


def image(source: bytes | str | Path) -> MediaSource:
    return MediaSource(kind="image", source=source, param="messages[0].content[1]")


def reason(source: bytes | str | Path, policy: SourcePolicy, budget) -> str:
    with pytest.raises(MediaError) as caught:
        fetch(image(source), policy, budget)
    assert caught.value.param == "messages[0].content[1]"
    assert "0x" not in str(caught.value)
    return caught.value.reason


def data_url(data: bytes, header: str = "image/png;base64") -> str:
    return f"data:{header},{base64.b64encode(data).decode()}"


def test_bytes_draw_from_the_budget(make_budget):
    budget = make_budget(max_image_bytes=10, max_request_bytes=15, max_images=3)
    assert fetch(image(b"x" * 10), SourcePolicy(), budget) == b"x" * 10
    assert reason(b"x" * 11, SourcePolicy(), budget) == "too_many_bytes"
    assert reason(data_url(b"x" * 6), SourcePolicy(), budget) == "too_many_bytes"
    assert reason(b"x", SourcePolicy(), budget) == "too_many_items"
    assert reason(b"", SourcePolicy(), make_budget()) == "empty"
    assert reason("data:;base64,", SourcePolicy(), make_budget()) == "empty"


def test_videos_have_their_own_count_and_size(make_budget):
    budget = make_budget(max_image_bytes=1, max_video_bytes=9, max_videos=1)
    clip = MediaSource(kind="video", source=b"x" * 9)
    assert fetch(clip, SourcePolicy(), budget) == b"x" * 9
    with pytest.raises(MediaError) as caught:
        fetch(clip, SourcePolicy(), budget)
    assert (caught.value.reason, caught.value.param) == ("too_many_items", None)


def test_paths(make_budget, tmp_path):
    file = tmp_path / "a: picture.bin"
    file.write_bytes(b"abc")
    for path in (file, str(file)):
        assert fetch(image(path), PATHS, make_budget()) == b"abc"
        assert reason(path, SourcePolicy(), make_budget()) == "bad_source"
        assert reason(path, PATHS, make_budget(max_image_bytes=2)) == "too_many_bytes"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "pipe", Path("/dev/zero"), Path("nul\0")):
        assert reason(path, PATHS, make_budget()) == "file_not_found"


@pytest.mark.parametrize(
    "url",
    ["file:///etc/hostname", "FILE:/etc/hostname", "ftp://example.com/x", "gopher://x", "s3://b/k", "javascript:x"],
)
def test_other_schemes_are_refused_even_where_paths_are_allowed(budget, url):
    assert reason(url, PATHS, budget) == "bad_source"


def test_fetching_and_decoding_name_the_field(budget, make_clip):
    def load(source: MediaSource) -> Image | Video:
        file = fetch_item(source, SourcePolicy(), budget)
        assert isinstance(file, MediaFile)
        return decode(file, budget, FrameSampling(num_frames=2))

    png = BytesIO()
    PIL.Image.new("RGB", (16, 9), "red").save(png, "PNG")
    assert load(image(data_url(png.getvalue()))).kind == "image"
    video = load(MediaSource(kind="video", source=make_clip()))
    assert isinstance(video, Video)
    assert len(video.frames) == 2
    with pytest.raises(MediaError) as caught:
        load(image(b"broken"))
    assert (caught.value.reason, caught.value.param) == ("undecodable", "messages[0].content[1]")


class Canary:
    """A listener that counts connections and answers with what it is told to."""

    def __init__(self) -> None:
        self.num_connections = 0
        self.requests: list[bytes] = []
        self.answers: list[bytes | Callable[[socket.socket], None]] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.num_connections += 1
            with connection:
                self.requests.append(connection.recv(4096))
                answer = self.answers.pop(0) if self.answers else b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"
                try:
                    answer(connection) if callable(answer) else connection.sendall(answer)
                except OSError:
                    continue

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join(5)


@pytest.fixture
def canary(monkeypatch) -> Iterator[Canary]:
    """Listens on a port that is allowed, so that only the address check stands between us and it."""
    listener = Canary()
    monkeypatch.setattr(remote, "PORTS", {"http": listener.port, "https": 443})
    yield listener
    listener.close()


SPELLINGS = [
    "http://127.0.0.1:{port}/",
    "http://127.1:{port}/",
    "http://127.0.1:{port}/",
    "http://2130706433:{port}/",
    "http://0x7f000001:{port}/",
    "http://0x7f.0.0.1:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://017700000001:{port}/",
    "http://0:{port}/",
    "http://0.0.0.0:{port}/",
    "http://127.0.0.1.:{port}/",
    "http://localhost:{port}/",
    "http://LOCALHOST.:{port}/",
    "http://127.8.8.8:{port}/",
    "http://[::1]:{port}/",
    "http://[::]:{port}/",
    "http://[0:0:0:0:0:0:0:1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://[::127.0.0.1]:{port}/",
    "http://[64:ff9b::7f00:1]:{port}/",
    "http://[2002:7f00:1::]:{port}/",
    "http://[2001:0:7f00:1::]:{port}/",
    "http://[fe80::1%25lo]:{port}/",
    "http://[fc00::1]:{port}/",
    "http://10.0.0.1:{port}/",
    "http://169.254.169.254:{port}/latest/meta-data/",
    "http://192.168.0.1:{port}/",
    "http://172.16.0.1:{port}/",
    "http://100.64.0.1:{port}/",
    "http://224.0.0.1:{port}/",
    "http://255.255.255.255:{port}/",
    "http://user@127.0.0.1:{port}/",
    "http://example.com@127.0.0.1:{port}/",
    "http://example.com:80@127.0.0.1:{port}/",
    "http://:@127.0.0.1:{port}/",
    "http://@127.0.0.1:{port}/",
    "http://example.com\\@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}\\@example.com/",
    "http:\\\\127.0.0.1:{port}\\",
    "http:/127.0.0.1:{port}/",
    "http:127.0.0.1:{port}/",
    "http:///127.0.0.1:{port}/",
    "http://127.0.0.1:{port}#@example.com/",
    "http://127.0.0.1:{port}?@example.com/",
    "http://127。0。0。1:{port}/",
    "http://①②⑦.⓪.⓪.①:{port}/",
    "http://ⓛocalhost:{port}/",
    "http://127.0.0.1%00.example.com:{port}/",
    "http://%31%32%37.0.0.1:{port}/",
    "http://127.0.0.1:{port}\r\nHost: example.com/",
    "http://127.0.0.1 :{port}/",
    " http://127.0.0.1:{port}/",
    "http://\t127.0.0.1:{port}/",
    "HTTP://127.0.0.1:{port}/",
    "http://[::1:{port}/",
    "http://]:{port}/",
    "http://127.0.0.1:{port}:80/",
    "http://127.0.0.1:99999/",
    "http://127.0.0.1:22/",
    "http://" + "a" * 70 + ":{port}/",
    "http://.:{port}/",
    "http://",
]
REFUSALS = {"bad_source", "domain_not_allowed", "fetch_failed"}


def test_no_spelling_reaches_a_local_address(canary, make_budget, monkeypatch):
    monkeypatch.setattr(remote, "CONNECT_TIMEOUT_S", 0.05)
    known = ("127.", "0", "10.", "169.", "192.", "172.", "100.", "224.", "255.", "2130706433", "localhost", "LOCALHOST")
    real = socket.getaddrinfo

    def offline(host: str, *args: object, **kwargs: object) -> list:
        if not (host.startswith(known) or ":" in host):
            raise socket.gaierror  # no name leaves this machine during the tests
        return real(host, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    for spelling in SPELLINGS:
        for kind in ("image", "video"):
            with pytest.raises(MediaError) as caught:
                fetch(MediaSource(kind=kind, source=spelling.format(port=canary.port)), ANY_HOST, make_budget())
            assert caught.value.reason in REFUSALS, spelling
    assert canary.num_connections == 0


def test_one_private_answer_among_public_ones_is_enough(canary, budget, monkeypatch):
    monkeypatch.setattr(remote, "resolve", lambda *_: ["93.184.216.34", "127.0.0.1"])
    assert reason(f"http://rebind.example:{canary.port}/", ANY_HOST, budget) == "domain_not_allowed"
    assert canary.num_connections == 0


@pytest.fixture
def served(canary, monkeypatch) -> Canary:
    """The canary as a public server: the name pic.example leads to it, every other name keeps its real answer."""
    monkeypatch.setattr(remote, "is_public", lambda address: address == "127.0.0.1")
    real = remote.resolve
    monkeypatch.setattr(remote, "resolve", lambda host, *rest: ["127.0.0.1"] if host == "pic.example" else ["10.0.0.9"])
    assert real is not remote.resolve
    return canary


def ok(body: bytes, extra: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\n" + extra + b"Content-Length: %d\r\n\r\n" % len(body) + body


def moved(location: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


def test_download(served, budget, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    served.answers = [ok(b"abc")]
    assert fetch(image(f"http://pic.example:{served.port}/a%20b?c=d#e"), ANY_HOST, budget) == b"abc"
    request = served.requests[0].decode()
    assert request.startswith("GET /a%20b?c=d HTTP/1.1\r\n")
    assert f"Host: pic.example:{served.port}\r\n" in request
    assert "cookie" not in request.lower()


def test_redirects_are_followed_and_counted(served, make_budget):
    url = f"http://pic.example:{served.port}/"
    served.answers = [moved("/a"), moved("b"), moved(url), ok(b"abc")]
    assert fetch(image(url), ANY_HOST, make_budget()) == b"abc"
    served.answers = [moved("/a")] * 4
    assert reason(url, ANY_HOST, make_budget()) == "fetch_failed"
    assert served.num_connections == 8


@pytest.mark.parametrize(
    "location",
    [
        "http://other.example:{port}/",
        "//other.example:{port}/",
        "file:///etc/hostname",
        "http://u:p@pic.example:{port}/",
        "http://pic.example:22/",
        "\\\\x",
    ],
)
def test_each_redirect_is_checked_like_the_first_address(served, budget, location):
    served.answers = [moved(location.format(port=served.port)), ok(b"abc")]
    assert reason(f"http://pic.example:{served.port}/", ANY_HOST, budget) in ("bad_source", "domain_not_allowed")
    assert served.num_connections == 1


def test_domains_are_listed_by_name(served, make_budget):
    policy = SourcePolicy(allowed_domains=("Pic.example",))
    served.answers = [ok(b"abc"), moved(f"http://other.example:{served.port}/")]
    assert fetch(image(f"http://PIC.example:{served.port}/"), policy, make_budget()) == b"abc"
    for host in ("other.example", "xpic.example", "pic.example.evil.example", "127.0.0.1", "pic.example"):
        assert reason(f"http://{host}:{served.port}/", policy, make_budget()) == "domain_not_allowed"
    assert served.num_connections == 2
    assert reason(f"http://pic.example:{served.port}/", SourcePolicy(), make_budget()) == "remote_disabled"
    assert served.num_connections == 2


def test_downloads_are_cut_at_the_byte_limit(served, make_budget):
    url = f"http://pic.example:{served.port}/"
    sent: list[int] = []

    def endless(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            sent.append(connection.send(bytes(1000)))

    served.answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n", endless]
    assert reason(url, ANY_HOST, make_budget(max_image_bytes=1000)) == "too_many_bytes"
    assert reason(url, ANY_HOST, make_budget(max_image_bytes=1000)) == "too_many_bytes"
    assert sum(sent) < 64 << 20


@pytest.mark.parametrize("part", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["header", "body"])
def test_a_server_that_drips_is_left_at_the_deadline(served, budget, part):
    def drip(connection: socket.socket) -> None:
        connection.sendall(part)
        for _ in range(100):
            connection.sendall(b"x")
            time.sleep(0.05)

    served.answers = [drip]
    began = time.monotonic()
    policy = SourcePolicy(allowed_domains=("*",), fetch_timeout_s=0.4)
    assert reason(f"http://pic.example:{served.port}/", policy, budget) == "fetch_failed"
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
        ok(b"abc", b"Content-Encoding: gzip\r\n"),
        b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: \xff\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nabc",
    ],
)
def test_bad_answers(served, budget, answer):
    served.answers = [answer]
    assert reason(f"http://pic.example:{served.port}/", ANY_HOST, budget) == "fetch_failed"


def test_a_resolver_that_hangs_is_left_at_the_deadline(canary, budget, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(1.0) or [])
    began = time.monotonic()
    policy = SourcePolicy(allowed_domains=("*",), fetch_timeout_s=0.2)
    assert reason(f"http://slow.example:{canary.port}/", policy, budget) == "fetch_failed"
    assert time.monotonic() - began < 0.8


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:4700::1111", "::ffff:93.184.216.34"])
def test_public_addresses_are_public(address):
    assert remote.is_public(address)


@pytest.mark.parametrize(
    "address", ["64:ff9b::7f00:1", "2002:7f00:1::", "::127.0.0.1", "::ffff:10.0.0.1", "fe80::1%lo", "ff02::1"]
)
def test_addresses_that_lead_inside_are_not_public(address):
    assert not remote.is_public(address)


@pytest.mark.parametrize(
    "url", ["http://ⓛocalhost/", "http://127。0。0。1/", "http://a b/", "http://a\\b/", "http://ex%00.example/\x7f"]
)
def test_urls_that_parsers_disagree_on_are_refused_by_their_form(url):
    with pytest.raises(MediaError) as caught:
        remote.parse(url, "image", ANY_HOST)
    assert caught.value.reason == "bad_source"
