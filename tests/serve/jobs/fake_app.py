"""An application for workers: it answers about a picture with the hash of its bytes, or does what the picture says."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request

from serve.jobs.job import JobError
from tests.serve.jobs.rows_server import _completion, answer_of

LOG = "FAKE_APP_LOG"
"""Environment variable with a file: a line for each answer, with the process and the answer."""


def lines() -> list[list[str]]:
    """Process and answer, in the order of the answers."""
    path = Path(os.environ[LOG])
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


@contextlib.asynccontextmanager
async def application(config: object) -> AsyncIterator[FastAPI]:
    app = FastAPI()
    app.add_api_route("/v1/chat/completions", _answer, methods=["POST"])
    yield app


@contextlib.asynccontextmanager
async def broken(config: object) -> AsyncIterator[FastAPI]:
    raise JobError("the model is broken")
    yield


@contextlib.asynccontextmanager
async def dying(config: object) -> AsyncIterator[FastAPI]:
    os._exit(9)
    yield


async def _answer(request: Request) -> Any:
    content = (await request.json())["messages"][0]["content"]
    data = base64.b64decode(content[0]["image_url"]["url"].partition(",")[2])
    if b"kill" in data:
        os.kill(os.getpid(), signal.SIGKILL)
    if b"raise" in data:
        raise ValueError("a fault of the application")
    if b"slow" in data:
        await asyncio.sleep(0.1)
    if b"wait for" in data:  # so many other answers
        wanted = int(data.rpartition(b" ")[2])
        for _ in range(1000):
            if len(lines()) >= wanted:
                break
            time.sleep(0.01)  # nothing else is answered by this process meanwhile
        else:
            return _completion("waited in vain")
    with open(os.environ[LOG], "a") as log:
        log.write(f"{os.getpid()} {answer_of(data)}\n")
    return _completion(answer_of(data))
