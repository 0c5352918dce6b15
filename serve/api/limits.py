"""`GET /v1/limits`: every bound of the server that a client may run into, by the name of its setting."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import FastAPI
from starlette.responses import Response

from mm.data.response_format import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH
from mm.data.sampling_params import MAX_STOP_STRINGS, MAX_TOP_LOGPROBS
from serve.api.render import JsonObject, to_json
from serve.config import ServeConfig
from serve.runtime import Runtime

REQUESTS = (
    *("max_body_bytes", "body_timeout_s", "min_body_bytes_per_s", "max_arriving_per_address"),
    *("max_choices", "request_timeout_s", "send_timeout_s"),
)


def limits_of(config: ServeConfig, max_context_tokens: int) -> JsonObject:
    """The bounds, in the units that their names say."""
    model = config.model
    return {
        "object": "limits",
        "requests": {name: getattr(config, name) for name in REQUESTS},
        "media": asdict(model.limits) | {"remote_domains": list(model.sources.allowed_domains)},
        "text": {
            "max_context_tokens": max_context_tokens,
            "max_stop_strings": MAX_STOP_STRINGS,
            "max_top_logprobs": MAX_TOP_LOGPROBS,
            "max_schema_bytes": MAX_SCHEMA_BYTES,
            "max_schema_depth": MAX_SCHEMA_DEPTH,
        },
        "queue": {
            "max_num_seqs": model.max_num_seqs,
            "max_waiting": model.max_waiting,
            "max_in_flight": config.max_in_flight,
        },
        "reducers": {
            "allowed": list(model.reducers.allowed),
            "min_keep_ratio": model.reducers.min_keep_ratio,
            "detail_low_tokens": model.reducers.detail_low_tokens,
            "budget_by": model.reducers.budget_by,
        },
        "drafters": {
            "offered": list(model.speculation.offered),
            "max_draft_tokens": model.speculation.max_draft_tokens,
        },
    }


def add_limits(app: FastAPI, runtime: Runtime, config: ServeConfig) -> None:
    """Add the route."""

    @app.get("/v1/limits")
    async def limits() -> Response:
        info = await runtime.info()
        return Response(to_json(limits_of(config, info.max_context_tokens)), media_type="application/json")
