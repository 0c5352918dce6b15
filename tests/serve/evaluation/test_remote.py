"""The client of `mm eval --url`: what goes over the wire, and what each way of refusal is called."""

from __future__ import annotations

import base64
import json
import threading
import time

import httpx2 as httpx
import pytest

from serve.evaluation.client import EvalRequest
from serve.evaluation.remote import NUM_TRIES, RemoteBackend, ServerRefuses

IMAGE = EvalRequest(item_id="a-1", question="Which color?", media=b"\x89PNG...", media_type="image/png")
CLIP = EvalRequest(item_id="b-1", question="What happens?", media=b"....ftyp", media_type="video/mp4")


class Server:
    """Answers with the question; remembers the bodies and how many were open at once."""

    def __init__(self, owner="someone", answer=None, delay_s=0.0):
        self.owner, self.answer, self.delay_s = owner, answer, delay_s
        self.bodies, self.paths, self.headers = [], [], []
        self.open = self.most_open = 0
        self.lock = threading.Lock()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(str(request.url))
        self.headers.append(request.headers)
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "big", "owned_by": self.owner}, {"id": "other"}]})
        body = json.loads(request.content)
        with self.lock:
            self.bodies.append(body)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            number = len(self.bodies)
        time.sleep(self.delay_s * (1 + number % 3))
        with self.lock:
            self.open -= 1
        if self.answer is not None:
            return self.answer(number)
        text = body["messages"][0]["content"][1]["text"]
        vision = {"vision": {"visual_tokens_in": 256, "visual_tokens_kept": 64}} if self.owner == "mm" else {}
        return httpx.Response(200, json={"choices": [{"message": {"content": text}}]} | vision)


def reach(server, url="http://host:1/v1", **options):
    return RemoteBackend(url, transport=httpx.MockTransport(server), **options)


def test_media_travel_as_data_urls_in_openai_form():
    server = Server()
    replies = list(reach(server, api_key="secret").answers([IMAGE, CLIP], None))
    assert [reply.text for reply in replies] == ["Which color?", "What happens?"]
    image, clip = sorted(server.bodies, key=lambda body: body["messages"][0]["content"][0]["type"])
    media, text = image["messages"][0]["content"]
    assert media == {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(IMAGE.media).decode()},
    }
    assert text == {"type": "text", "text": "Which color?"}
    assert clip["messages"][0]["content"][0]["video_url"]["url"].startswith("data:video/mp4;base64,")
    assert image["temperature"] == 0.0
    assert image["model"] == "big"
    assert "vision" not in image | clip
    assert server.headers[-1]["authorization"] == "Bearer secret"
    assert server.paths[-1] == "http://host:1/v1/chat/completions"


@pytest.mark.parametrize("url", ["http://host:1", "http://host:1/", "http://host:1/v1/", "http://host:1/v1"])
def test_the_path_may_be_left_out(url):
    server = Server()
    reach(server, url)
    assert server.paths == ["http://host:1/v1/models"]


def test_a_server_of_ours_is_reported_frames_and_reducer_and_counts_tokens():
    server = Server(owner="mm")
    (image, _) = reach(server, num_frames=12).answers([IMAGE, CLIP], "divprune:keep_ratio=0.25")
    assert (image.num_visual_tokens_in, image.num_visual_tokens_kept) == (256, 64)
    visions = {body["messages"][0]["content"][0]["type"]: body["vision"] for body in server.bodies}
    assert visions == {
        "image_url": {"reducer": "divprune:keep_ratio=0.25"},
        "video_url": {"reducer": "divprune:keep_ratio=0.25", "num_frames": 12},
    }


def test_another_server_is_not_asked_for_a_reducer():
    with pytest.raises(ServerRefuses, match="would ignore the reducer"):
        list(reach(Server()).answers([IMAGE], "divprune"))


def test_a_few_requests_at_a_time_and_answers_in_order():
    server = Server(delay_s=0.01)
    requests = [EvalRequest(item_id=str(i), question=f"{i}?", media=b"x", media_type="image/png") for i in range(30)]
    replies = list(reach(server, concurrency=3).answers(requests, None))
    assert [reply.text for reply in replies] == [ask.question for ask in requests]
    assert server.most_open == 3


SOON = {"retry-after": "0.02"}
NOT_AGAIN = {"x-should-retry": "false"}


def test_a_busy_server_is_asked_again_after_the_time_it_names():
    ok = httpx.Response(200, json={"choices": [{"message": {"content": "red"}}]})
    busy = [httpx.Response(429, headers=SOON), httpx.Response(503, headers=SOON), ok]
    server = Server(answer=lambda number: busy[number - 1])
    start = time.monotonic()
    assert [reply.text for reply in reach(server).answers([IMAGE], None)] == ["red"]
    assert time.monotonic() - start >= 2 * 0.02
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (httpx.Response(400, json={"error": {"message": "no video here"}}), "'a-1'.*status 400: no video here"),
        (httpx.Response(422, json={"detail": "x"}), "status 422"),
        (httpx.Response(401, json={"error": {"message": "who?"}}), "status 401: who\\?; give a key with --api-key"),
        (httpx.Response(500, text="<html>", headers=NOT_AGAIN), "status 500, without a message"),
        (httpx.Response(200, json={"choices": []}), "not of OpenAI's form"),
        (httpx.Response(200, text="hello"), "status 200, without a message"),
    ],
)
def test_a_refusal_is_reported_in_the_servers_words(response, message):
    with pytest.raises(ServerRefuses, match=message):
        list(reach(Server(answer=lambda number: response)).answers([IMAGE], None))


def test_a_server_that_stays_busy_is_given_up():
    loading = {"error": {"message": "loading"}}
    server = Server(answer=lambda number: httpx.Response(503, json=loading, headers=SOON))
    with pytest.raises(ServerRefuses, match="status 503: loading"):
        list(reach(server).answers([IMAGE], None))
    assert len(server.bodies) == NUM_TRIES


def test_addresses_and_models_that_lead_nowhere():
    with pytest.raises(ServerRefuses, match="no model 'small' at http://host:1/v1; it offers: big, other"):
        reach(Server(), model="small")
    with pytest.raises(ServerRefuses, match=r"no server can be reached at http://127\.0\.0\.1:9/v1"):
        RemoteBackend("http://127.0.0.1:9")
    with pytest.raises(ServerRefuses, match="write http://host:port/v1"):
        RemoteBackend("localhost:8000")
    with pytest.raises(ServerRefuses, match="offers no model"):
        reach(lambda request: httpx.Response(200, json={"data": []}))
    with pytest.raises(ServerRefuses, match="not of OpenAI's form"):
        reach(lambda request: httpx.Response(200, json={"models": []}))


def test_nothing_of_the_environment_is_sent(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "mine")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    server = Server()
    assert len(list(reach(server).answers([IMAGE], None))) == 1
    for headers in server.headers:
        assert not {"authorization", "openai-organization", "openai-project"} & set(headers)
        assert "mine" not in headers.values()
