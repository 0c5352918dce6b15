"""A stand-in that speaks the public HTTP API and knows no model: it answers with the question and keeps tokens by rule.

Random reduction keeps every fourth token by default, so a test can say which cells a map has to dim. The drafter "echo"
drafts the question, the others nothing.
"""

from __future__ import annotations

import base64
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

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
            return answer(body)
        except MmError as error:
            return refusal(str(error), getattr(error, "code", "error"))
        except KeyError as error:
            return refusal(f"no reducer named {error.args[0]!r}", "unknown_plugin")

    return app


def refusal(message: str, code: str) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, 400)


def answer(body: dict[str, Any]) -> dict[str, Any]:
    media, text = body["messages"][0]["content"]
    vision = body["vision"]
    kind = media["type"].removesuffix("_url")
    data = base64.b64decode(media[media["type"]]["url"].partition(",")[2])
    if kind == "image":
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
