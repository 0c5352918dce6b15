"""A stand-in that speaks the public HTTP API and knows no model: it answers with the question and keeps tokens by rule.

Random reduction keeps every fourth token by default, so a test can say which cells a map has to dim. The drafter "echo"
drafts the question, the others nothing. A question that ends in "slowly" is answered word by word until it is stopped.
Its model can use all reducers but pool2.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from mm.config import MediaLimits
from mm.errors import MmError
from mm.media import MediaBudget, decode_image

GRID = (16, 16)
FRAME_GRID = (8, 8)


def kept_indices(num_tokens: int, keep_ratio: float) -> list[int]:
    """Evenly spread, the first one first."""
    k = max(1, round(num_tokens * keep_ratio))
    return [i * num_tokens // k for i in range(k)]


def fake_app() -> FastAPI:
    """The application; `app.state.requests` collects the bodies it was sent."""
    app = FastAPI()
    app.state.requests = []

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        card = {"id": "fake", "object": "model", "default_drafter": "echo", "drafters": ["none", "echo", "other"]}
        return {"object": "list", "data": [card]}

    @app.post("/v1/chat/completions")
    async def chat(http: Request) -> Any:
        body = await http.json()
        app.state.requests.append(body)
        try:
            whole = answer(body)
        except MmError as error:
            return refusal(str(error), getattr(error, "code", "error"))
        except KeyError as error:
            return refusal(f"no reducer named {error.args[0]!r}", "unknown_plugin")
        return StreamingResponse(chunks(app, body, whole)) if body.get("stream") else whole

    @app.post("/v1/chat/completions/count")
    async def count(http: Request) -> Any:
        if (await http.json())["vision"]["reducer"] == "pool2":
            return refusal("pool2 cannot be used with fake, which does not supply: a grid", "incompatible_plugin")
        return {"object": "chat.completion.count"}

    return app


async def chunks(app: FastAPI, body: dict[str, Any], whole: dict[str, Any]) -> AsyncIterator[bytes]:
    """The answer as a stream of events: its first run word by word, then the others, then the figures."""
    base = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "fake"}
    app.state.open = getattr(app.state, "open", 0) + 1
    try:
        is_slow = body["messages"][-1]["content"][-1]["text"].endswith("slowly")
        for run in whole["speculation"]["pieces"][0]:
            choice = {"index": 0, "delta": {"content": run["text"]}, "finish_reason": None}
            counts = {"tokens": run["tokens"], "accepted_tokens": run["accepted_tokens"]}
            yield event(base | {"choices": [choice], "speculation": counts})
            while is_slow:
                await asyncio.sleep(0.05)
                choice = {"index": 0, "delta": {"content": "on "}, "finish_reason": None}
                yield event(base | {"choices": [choice], "speculation": {"tokens": 1, "accepted_tokens": 0}})
        yield event(base | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        drafting = {name: value for name, value in whole["speculation"].items() if name != "pieces"}
        last = {"choices": [], "usage": whole["usage"], "vision": whole["vision"], "speculation": drafting}
        yield event(base | last)
        yield b"data: [DONE]\n\n"
    finally:
        app.state.open -= 1


def event(fields: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def refusal(message: str, code: str) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, 400)


def answer(body: dict[str, Any]) -> dict[str, Any]:
    parts = [part for message in body["messages"] for part in message["content"] if isinstance(part, dict)]
    media = [part for part in parts if part["type"] != "text"][-1]
    text = body["messages"][-1]["content"][-1]
    vision = body["vision"]
    kind = media["type"].removesuffix("_url")
    data = base64.b64decode(media[media["type"]]["url"].partition(",")[2])
    if kind == "image" and body["messages"][-1]["content"][0] is media:
        decode_image(data, MediaBudget(MediaLimits()))
    grid = (1, *GRID) if kind == "image" else (vision["num_frames"], *FRAME_GRID)
    num_tokens = grid[0] * grid[1] * grid[2]
    name = vision["reducer"].partition(":")[0]
    ratio = {"none": 1.0, "uniform": vision.get("keep_ratio"), "random": vision.get("keep_ratio")}[name]
    kept = kept_indices(num_tokens, ratio)
    work_s = len(kept) / 10_000
    drafts = body["speculation"].get("drafter", "echo") == "echo"
    return {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": f"{name}: {text['text']}"},
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": len(kept) + 20,
            "completion_tokens": 7,
            "total_tokens": len(kept) + 27,
            "prompt_tokens_details": {"cached_tokens": len(kept)},
        },
        "speculation": {
            "drafts": int(drafts),
            "mean_acceptance_length": 6.0 if drafts else None,
            "pieces": [
                [
                    {"text": f"{name}: ", "tokens": 2, "accepted_tokens": 0},
                    {"text": text["text"], "tokens": 5, "accepted_tokens": 5 * drafts},
                ]
            ],
        },
        "vision": {
            "reducer": vision["reducer"],
            "visual_tokens_in": num_tokens,
            "visual_tokens_kept": len(kept),
            "kv_bytes": 4096 * len(kept),
            "items": [{"kind": kind, "grid": list(grid), "kept": kept}],
            "timings": {
                "load_s": 0.004,
                "encode_s": 0.06,
                "reduce_s": 0.0 if name == "none" else 0.002,
                "queue_s": 0.00001,
                "prefill_s": work_s,
                "decode_s": 0.03,
            },
        },
    }
