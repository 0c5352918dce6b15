"""R1, R2, R3, R12, R17: what a server on the open internet is sent."""

from __future__ import annotations

import base64
import copy
import io
import random
import socket
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import PIL.Image

from demos.bench.reliability.checks import Figure, Settings, at_least, at_most, check, noted
from demos.bench.reliability.load import PATH, body, picture
from demos.bench.reliability.server import server
from demos.bench.reliability.soak import clip
from tests.helpers.damage import mutated, pictures

IN_PROCESS = ("--in-process", "--kv-cache-gb", "0.1")
KEY = "sk-reliability"
HANGS_S = 60.0


def ask(client: httpx.Client, *parts: dict[str, Any], **fields: Any) -> httpx.Response | None:
    """The answer to a question with these content parts; None if there is none in time."""
    content = [*parts, {"type": "text", "text": "What is this?"}]
    request = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 1} | fields
    try:
        return client.post(PATH, json=request)
    except httpx.TimeoutException:
        return None


def medium(kind: str, data: bytes) -> dict[str, Any]:
    subtype = "png" if kind == "image" else "mp4"
    url = f"data:{kind}/{subtype};base64,{base64.b64encode(data).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def judged(what: str, answers: list[httpx.Response | None]) -> Iterator[Figure]:
    """That every answer came and none is the server's fault."""
    statuses = Counter(answer.status_code if answer is not None else 0 for answer in answers)
    seen = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    yield noted(f"{what}: requests ({seen})", len(answers))
    yield at_most(f"{what}: without an answer within {HANGS_S:g} s", statuses[0], 0)
    yield at_most(f"{what}: server errors", sum(n for status, n in statuses.items() if status >= 500), 0)


@check("R1")
def malformed(settings: Settings) -> Iterator[Figure]:
    """Damaged pictures and clips."""
    rng = random.Random(f"{settings.seed} R1")
    whole = [("image", data) for data in pictures()] + [("video", clip(rng)) for _ in range(3)]
    with server(*IN_PROCESS) as running, httpx.Client(base_url=running.url, timeout=HANGS_S) as client:
        answers = []
        for _ in range(settings.size(200, 5000)):
            kind, data = rng.choice(whole)
            answers.append(ask(client, medium(kind, mutated(data, rng))))
        yield from judged("damaged media", answers)
        last = ask(client, {"type": "image_url", "image_url": {"url": picture(1)}})
        yield at_least("a whole picture is answered afterwards", float(last is not None and last.is_success), 1)


@check("R2")
def addresses(settings: Settings) -> Iterator[Figure]:
    """Every spelling of an address of this machine, on a server that may fetch from all public hosts."""
    connections: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as trap:
        port = trap.getsockname()[1]
        threading.Thread(target=_count, args=(trap, connections), daemon=True).start()
        hosts = ["127.0.0.1", "localhost", "0.0.0.0", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "127.0.1"]
        hosts += [
            "[::1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[0:0:0:0:0:ffff:127.0.0.1]",
            "127.0.0.1.",
            "LOCALHOST",
        ]
        hosts += [
            "a@127.0.0.1",
            "example.org@127.0.0.1",
            "127.0.0.1#@example.org",
            "127.0.0.1\\@example.org",
            "①②⑦.⓪.⓪.①",
        ]
        hosts += ["169.254.169.254", "10.0.0.1", "192.168.0.1", "172.16.0.1", "100.64.0.1", "[fe80::1]", "[fd00::1]"]
        urls = [f"{scheme}://{host}:{port}/x.png" for scheme in ("http", "https", "HTTP") for host in hosts]
        urls += [f"{scheme}:///etc/passwd" for scheme in ("file", "FILE", "ftp", "gopher", "dict", "jar")]
        urls += [
            "/etc/passwd",
            "//127.0.0.1/x",
            f"http:127.0.0.1:{port}",
            f" http://127.0.0.1:{port}/",
            "http://",
            "data:",
        ]
        options = (*IN_PROCESS, "--allow-media-domain", "*")
        with server(*options) as running, httpx.Client(base_url=running.url, timeout=HANGS_S) as client:
            answers = [
                ask(client, {"type": f"{kind}_url", f"{kind}_url": {"url": url}})
                for url in urls
                for kind in ("image", "video")
            ]
    yield from judged("addresses of this machine", answers)
    answered = sum(answer is not None and answer.is_success for answer in answers)
    yield at_most("addresses of this machine: answered", answered, 0)
    yield at_most("addresses of this machine: connections", len(connections), 0)


def _count(trap: socket.socket, connections: list[str]) -> None:
    try:
        while True:
            connection, peer = trap.accept()
            connections.append(str(peer))
            connection.close()
    except OSError:  # closed
        return


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that become large."""
    for side in (5_700, 20_000, 60_000):
        packer = zlib.compressobj(9)
        row = bytes(1 + side * 3)
        rows = b"".join([*(packer.compress(row) for _ in range(min(side, 6_000))), packer.flush()])
        yield f"PNG of {side} x {side}", png(side, side, 8, 2, rows)
    yield "PNG whose data are longer than its header says", png(64, 64, 8, 2, zlib.compress(bytes(300_000_000), 9))
    buffer = io.BytesIO()
    frames = [PIL.Image.new("P", (3000, 3000), i) for i in range(60)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    yield "GIF of 60 frames of 3000 x 3000", buffer.getvalue()
    jpeg = io.BytesIO()
    PIL.Image.new("RGB", (16, 16)).save(jpeg, "JPEG")
    yield "JPEG that says 65,500 x 65,500", jpeg.getvalue().replace(b"\x00\x10\x00\x10\x03", b"\xff\xdc\xff\xdc\x03", 1)


@check("R3")
def decompression(settings: Settings) -> Iterator[Figure]:
    """Bombs, one after the other and sixteen of one kind in a request."""
    with server(*IN_PROCESS) as running, httpx.Client(base_url=running.url, timeout=HANGS_S) as client:
        ask(client, {"type": "image_url", "image_url": {"url": picture(1)}})
        answers = []
        for name, data in bombs():
            base_mb = running.reset_peak_mb()
            answers += [ask(client, medium("image", data)), ask(client, *[medium("image", data)] * 16)]
            yield at_most(f"{name}, {len(data) // 1000} kB: memory", running.peak_mb() - base_mb, 1200, "MB")
        yield from judged("bombs", answers)


VALUES: list[Any] = [None, [], {}, "", "odd", -1, 0, 1, 2**63, 1e308, -0.5, True, [1], {"a": 1}, "x" * 5000, [[[[]]]]]


def _mutate(value: Any, rng: random.Random, known: list[str]) -> Any:
    """A request with one to three places lost, replaced, doubled or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        owner, key = rng.choice(places)
        if isinstance(owner, dict) and rng.random() < 0.2:
            owner[rng.choice(known)] = rng.choice(VALUES)
        elif rng.random() < 0.25:
            del owner[key]
        elif isinstance(owner, list) and rng.random() < 0.3:
            owner.append(copy.deepcopy(owner[key]))
        else:
            owner[key] = copy.deepcopy(rng.choice(VALUES))
        if not value:
            break
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


@check("R12")
def api_fuzz(settings: Settings) -> Iterator[Figure]:
    """Bodies that are nearly right, with fields of the served schema, on every path that takes one."""
    rng = random.Random(f"{settings.seed} R12")
    with server(*IN_PROCESS) as running, httpx.Client(base_url=running.url, timeout=HANGS_S) as client:
        document = client.get("/openapi.json").json()
        known = sorted({name for schema in _schemas(document) for name in schema.get("properties", {})})
        paths = [path for path, methods in document["paths"].items() if "post" in methods]
        answers: list[httpx.Response | None] = []
        for _ in range(settings.size(400, 20_000)):
            whole = body(rng, is_stream=rng.random() < 0.3, has_picture=rng.random() < 0.5, num_tokens=2)
            path = rng.choice(paths)
            if path == "/v1/responses":
                whole = {"model": "tiny", "input": whole["messages"], "max_output_tokens": 2}
            request = _mutate(whole, rng, known)
            try:
                answers.append(client.post(path, json=request))
            except httpx.TimeoutException:
                answers.append(None)
        yield from judged(f"{len(paths)} paths", answers)
        wrong = [a for a in answers if a is not None and a.status_code >= 400 and "error" not in a.json()]
        yield at_most("refusals in another form than OpenAI's", len(wrong), 0)


def _schemas(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _schemas(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _schemas(inner)


@check("R17")
def auth(settings: Settings) -> Iterator[Figure]:
    """Every path with no key, a wrong key, and the names of foreign hosts and pages."""
    rng = random.Random(f"{settings.seed} R17")
    right = {"authorization": f"Bearer {KEY}"}
    with server(*IN_PROCESS, "--api-key", KEY) as running, httpx.Client(base_url=running.url, timeout=30) as client:
        document = client.get("/openapi.json", headers=right).json()
        paths = [*document["paths"], "/openapi.json", "/nothing", "/v1/chat/completions/", "//v1/models", "/V1/models"]
        closed = [path.replace("{model}", "tiny") for path in paths if path not in ("/health", "/ping", "/")]
        request = body(rng, is_stream=False, has_picture=False, num_tokens=1)

        def status(path: str, headers: dict[str, str]) -> int:
            return client.post(path, json=request, headers=headers).status_code

        keys: list[Callable[[], dict[str, str]]] = [
            dict,
            lambda: {"authorization": f"Bearer {KEY[:-1]}"},
            lambda: {"authorization": f"Bearer {KEY}x"},
            lambda: {"authorization": f"Basic {KEY}"},
            lambda: {"authorization": rng.randbytes(12).hex()},
            lambda: {"x-api-key": KEY},
        ]
        let_in = [(path, key()) for path in closed for key in keys if status(path, key()) != 401]
        yield noted("paths behind the key", len(closed))
        yield at_most("requests without the key that were let in", len(let_in), 0)
        yield at_least("requests with the key that were let in", float(status(PATH, right) == 200), 1)
        foreign = [{"host": "example.org"}, {"host": f"example.org:{client.base_url.port}"}, {"origin": "http://a.org"}]
        answered = [headers for headers in foreign if status(PATH, right | headers) != 403]
        yield at_most("requests for foreign hosts or from foreign pages that were answered", len(answered), 0)
