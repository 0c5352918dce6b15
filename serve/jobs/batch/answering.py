"""Where rows are answered, and what becomes of an answer: the record of a row, or a line of OpenAI's batch output."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mm.media.hashing import framed_hash
from serve.jobs.batch.asking import Asker, AskError, Gate, local_client, remote_client
from serve.jobs.batch.job import BatchJob
from serve.jobs.batch.rows import Row
from serve.jobs.batch.sinks import Record
from serve.jobs.job import JobError

if TYPE_CHECKING:
    import httpx

MAX_BODY_BYTES = 1 << 31


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """Answers the rows of a job.

    Attributes:
        model: The served name of the model.
    """

    job: BatchJob
    asker: Asker
    model: str

    async def record(self, row: Row, name: str) -> Record:
        """The record of a row: each prompt is one request."""
        record: Record = {"id": row.id, "source": row.source}
        reasons: dict[str, str] = {}
        sums = dict.fromkeys(("visual_tokens_in", "visual_tokens_kept", "prompt_tokens", "completion_tokens"), 0)
        reducer = ""
        for prompt in self.job.prompts:
            body = await asyncio.to_thread(self.job.body, row, prompt, self.model)
            answer = await self.asker.ask("/v1/chat/completions", body)
            try:
                choice, usage, vision = answer["choices"][0], answer["usage"], answer.get("vision") or {}
                record[prompt.name] = str(choice["message"]["content"] or "")
                reasons[prompt.name] = str(choice["finish_reason"])
                for name_, value in {**usage, **vision}.items():
                    if name_ in sums and isinstance(value, int):
                        sums[name_] += value
                reducer = str(vision.get("reducer") or reducer)
            except (LookupError, TypeError, AttributeError) as error:
                what = "the server's answer does not have the promised form"
                raise AskError("answer", "bad_answer", what, is_fault=True, attempts=1) from error
        shown = next(iter(reasons.values())) if len(reasons) == 1 else json.dumps(reasons)
        record |= {"finish_reason": shown, **{f"num_{key}": value for key, value in sums.items()}}
        return record | {"reducer": reducer, "model": self.model, "content_hash": name, "same_as": None}

    async def batch_record(self, row: Row) -> Record:
        """The line of OpenAI's batch output."""
        body = dict(row.body or {})
        if self.job.url is None:
            body["model"] = self.model
        answer = await self.asker.ask(row.url, body | {"stream": False})
        response = {"status_code": 200, "request_id": str(answer.get("id", "")), "body": answer}
        name = framed_hash("batch", row.key)[:24]
        return {"id": f"batch_req_{name}", "custom_id": row.id, "response": response, "error": None}


@contextlib.asynccontextmanager
async def answerer(job: BatchJob) -> AsyncIterator[Answerer]:
    """Who answers a job: a server elsewhere, or the same application in this process.

    Raises:
        JobError: The server cannot be reached, or serves no model.
        MmError: The model cannot be loaded.
    """
    if job.url is not None:
        async with remote_client(job.url, job.api_key, job.timeout_s, job.concurrency) as client:
            model = job.served_model or await _first_model(client, job.url)
            yield Answerer(job=job, asker=Asker(client, Gate(most=job.concurrency)), model=model)
        return
    from serve.api.routes import create_app
    from serve.config import ServeConfig
    from serve.stages import build_local_runtime

    config = ServeConfig(
        model=replace(job.model, cache_bytes=0),
        max_body_bytes=MAX_BODY_BYTES,
        max_arriving_bytes=MAX_BODY_BYTES,
        request_timeout_s=max(3600.0, job.timeout_s),
    )
    runtime = await asyncio.to_thread(build_local_runtime, config)
    try:
        async with local_client(create_app(runtime, config)) as client:
            asker = Asker(client, Gate(most=job.concurrency, limit=job.concurrency))
            yield Answerer(job=job, asker=asker, model=config.names[0])
    finally:
        runtime.close()


async def _first_model(client: httpx.AsyncClient, url: str) -> str:
    """The first model that a server has.

    Raises:
        JobError: It cannot be reached, or serves none.
    """
    import httpx

    try:
        response = await client.get("/v1/models")
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPError as error:
        raise JobError(f"{url} cannot be reached: {type(error).__name__}") from None
    except (ValueError, LookupError, TypeError):
        raise JobError(f"{url}/v1/models names no model; give one with --served-model") from None
