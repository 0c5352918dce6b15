"""Where rows are answered, and what becomes of an answer: the record of a row, or a line of OpenAI's batch output."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mm.media.hashing import framed_hash
from serve.jobs.batch.asking import Asker, AskError, Gate, local_client, remote_client, transport_client
from serve.jobs.batch.job import BatchJob
from serve.jobs.batch.rows import Row
from serve.jobs.batch.sinks import Record
from serve.jobs.job import JobError

if TYPE_CHECKING:
    import httpx
    from fastapi import FastAPI

    from mm.config import ModelConfig
    from serve.config import ServeConfig

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
        record: Record = {"id": row.id, "source": row.source, **row.facts}
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
async def answerer(job: BatchJob, say: Callable[[str], None]) -> AsyncIterator[Answerer]:
    """Who answers a job: a server elsewhere, workers of this machine, or the same application in this process.

    Args:
        say: Told what the user should know meanwhile.

    Raises:
        JobError: The server cannot be reached, or serves no model; or workers cannot start.
        MmError: The model cannot be loaded.
    """
    if job.url is not None:
        async with remote_client(job.url, job.api_key, job.timeout_s, job.concurrency) as client:
            model = job.served_model or await _first_model(client, job.url)
            yield Answerer(job=job, asker=Asker(client, Gate(most=job.concurrency)), model=model)
        return
    async with _workers(job, say) if job.workers else _here(job) as client:
        asker = Asker(client, Gate(most=job.num_together, limit=job.num_together))
        yield Answerer(job=job, asker=asker, model=local_config(job, job.model).names[0])


@contextlib.asynccontextmanager
async def _here(job: BatchJob) -> AsyncIterator[httpx.AsyncClient]:
    async with application(local_config(job, job.model)) as app, local_client(app) as client:
        yield client


@contextlib.asynccontextmanager
async def _workers(job: BatchJob, say: Callable[[str], None]) -> AsyncIterator[httpx.AsyncClient]:
    from serve.jobs.batch.workers import Workers

    configs = [local_config(job, model) for model in shares(job.model, job.workers or 1)]
    workers = Workers(application, configs, job.concurrency, say)
    async with transport_client(workers) as client:
        await workers.ready()
        yield client


def local_config(job: BatchJob, model: ModelConfig) -> ServeConfig:
    """How an application is configured that answers a job alone."""
    from serve.config import ServeConfig

    return ServeConfig(
        model=replace(model, cache_bytes=0),
        max_body_bytes=MAX_BODY_BYTES,
        max_arriving_bytes=MAX_BODY_BYTES,
        request_timeout_s=max(3600.0, job.timeout_s),
    )


@contextlib.asynccontextmanager
async def application(config: ServeConfig) -> AsyncIterator[FastAPI]:
    """The application with its model, in this process."""
    from serve.api.routes import create_app
    from serve.stages import build_local_runtime

    runtime = await asyncio.to_thread(build_local_runtime, config)
    try:
        yield create_app(runtime, config)
    finally:
        runtime.close()


def shares(model: ModelConfig, num_workers: int) -> list[ModelConfig]:
    """What each worker of this machine is built from: its GPU and its share of it, or its share of the CPU's cores."""
    import torch

    num_gpus = torch.cuda.device_count() if model.device in ("cuda", "auto") else 0
    num_threads = model.num_threads or max(1, len(os.sched_getaffinity(0)) // num_workers)
    found: list[ModelConfig] = []
    for i in range(num_workers):
        device = f"cuda:{i % num_gpus}" if num_gpus else model.device
        num_beside = math.ceil(num_workers / num_gpus) if num_gpus else num_workers
        found.append(replace(model, device=device, gpu_share=model.gpu_share / num_beside, num_threads=num_threads))
    return found


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
