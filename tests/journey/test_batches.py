"""Files and batches with the OpenAI SDK: from an upload to its results, cancelled, restarted, and what is wrong."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager

import openai
import pytest
from fastapi.testclient import TestClient

from tests.journey.conftest import FakeEngine, build


@contextmanager
def served(folder, engine, key="none", **options):
    app, runtime = build(engine, batch_dir=str(folder), **options)
    try:
        with TestClient(app, base_url="http://127.0.0.1") as http:
            yield openai.OpenAI(base_url="http://127.0.0.1/v1", api_key=key, http_client=http, max_retries=0)
    finally:
        runtime.close()


def line(i, **body):
    body = {"model": "tiny", "messages": [{"role": "user", "content": f"Question {i}"}]} | body
    return json.dumps({"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body})


def begin(client, lines, **options):
    file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    given = {"endpoint": "/v1/chat/completions", "completion_window": "24h", **options}
    return client.batches.create(input_file_id=file.id, **given)


def wait_for(client, batch, *statuses, seconds=30):
    end = time.monotonic() + seconds
    while (found := client.batches.retrieve(batch.id)).status not in statuses:
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return found


def lines_of(client, file_id):
    return [json.loads(text) for text in client.files.content(file_id).text.splitlines()]


def test_a_batch_from_upload_to_results(tmp_path):
    engine = FakeEngine()
    with served(tmp_path, engine) as client:
        wrong = line(99, temperature=9)
        batch = begin(client, [*(line(i) for i in range(20)), wrong, ""], metadata={"for": "test"})
        assert batch.status in ("validating", "in_progress")
        done = wait_for(client, batch, "completed")
        assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (21, 20, 1)
        assert (done.metadata, done.errors) == ({"for": "test"}, None)
        assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
        results = lines_of(client, done.output_file_id)
        assert [result["custom_id"] for result in results] == [f"r{i}" for i in range(20)]
        assert results[0]["response"]["body"]["choices"][0]["message"]["content"] == "A red circle✓."
        (failed,) = lines_of(client, done.error_file_id)
        assert (failed["custom_id"], failed["response"]["status_code"]) == ("r99", 400)
        assert "temperature" in failed["response"]["body"]["error"]["message"]
        assert [b.id for b in client.batches.list()] == [batch.id]
        assert {f.id for f in client.files.list()} == {done.input_file_id, done.output_file_id, done.error_file_id}
        assert client.files.delete(done.input_file_id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(done.input_file_id)


def test_a_batch_that_was_cancelled_keeps_what_it_has(tmp_path):
    engine = FakeEngine(delay_s=0.01)
    with served(tmp_path, engine) as client:
        batch = begin(client, [line(i) for i in range(300)])
        while client.batches.retrieve(batch.id).request_counts.completed < 5:
            time.sleep(0.02)
        assert client.batches.cancel(batch.id).status == "cancelling"
        done = wait_for(client, batch, "cancelled")
        assert 5 <= done.request_counts.completed < 300
        assert len(lines_of(client, done.output_file_id)) == done.request_counts.completed
        with pytest.raises(openai.BadRequestError, match="cancelled already"):
            client.batches.cancel(batch.id)


def test_a_restart_goes_on_and_asks_nothing_twice(tmp_path):
    first = FakeEngine(delay_s=0.005)
    with served(tmp_path, first) as client:
        batch = begin(client, [line(i) for i in range(60)])
        while client.batches.retrieve(batch.id).request_counts.completed < 10:
            time.sleep(0.01)
    second = FakeEngine()
    with served(tmp_path, second) as client:
        done = wait_for(client, batch, "completed")
        assert done.request_counts.completed == 60
        results = [result["custom_id"] for result in lines_of(client, done.output_file_id)]
        assert results == [f"r{i}" for i in range(60)]
    assert second.num_closed <= 50


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (["{]"], "invalid_json_line"),
        ([line(1), line(1)], "duplicate_custom_id"),
        ([line(1).replace("POST", "GET")], "invalid_method"),
        ([line(1).replace("/v1/chat/completions", "/v1/embeddings")], "mismatched_endpoint"),
        ([" "], "empty_file"),
    ],
)
def test_a_file_that_cannot_be_used_fails_the_batch_by_line(tmp_path, lines, code):
    with served(tmp_path, FakeEngine()) as client:
        done = wait_for(client, begin(client, lines), "failed")
        assert done.errors.data[0].code == code
        assert done.errors.data[0].line == len(lines)


def test_what_is_wrong_with_a_request_is_named(tmp_path):
    with served(tmp_path, FakeEngine(), max_batch_file_bytes=1000) as client:
        for options, param in (({"endpoint": "/v1/x"}, "endpoint"), ({"completion_window": "1h"}, "completion_window")):
            with pytest.raises(openai.BadRequestError) as caught:
                begin(client, [line(1)], **options)
            assert caught.value.param == param
        with pytest.raises(openai.NotFoundError):
            client.batches.create(input_file_id="file-no", endpoint="/v1/completions", completion_window="24h")
        with pytest.raises(openai.BadRequestError):
            client.files.create(file=("x", b"x"), purpose="fine-tune")
        with pytest.raises(openai.APIStatusError) as large:
            client.files.create(file=("x", b"x" * 2000), purpose="batch")
        assert large.value.status_code == 413


def test_keys_do_not_see_each_others_files(tmp_path):
    keys = {"api_keys": ("one", "two")}
    with served(tmp_path, FakeEngine(), key="one", **keys) as client:
        done = wait_for(client, begin(client, [line(1)]), "completed")
        other = client.with_options(api_key="two")
        assert list(other.files.list()) == list(other.batches.list()) == []
        for ask in (lambda: other.files.content(done.output_file_id), lambda: other.batches.retrieve(done.id)):
            with pytest.raises(openai.NotFoundError):
                ask()


def test_without_a_folder_the_option_is_named():
    app, runtime = build(FakeEngine())
    with TestClient(app, base_url="http://127.0.0.1") as http:
        answer = http.post("/v1/batches", json={})
        assert (answer.status_code, "--batch-dir" in answer.json()["error"]["message"]) == (404, True)
        limits = http.get("/v1/limits").json()
        assert limits["media"]["max_images"] == 16
        assert limits["text"]["max_context_tokens"] == 2048
    runtime.close()
