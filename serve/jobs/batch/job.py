"""The settings of a job over rows, and what it asks about each."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from mm.config import ModelConfig
from mm.errors import shown
from serve.jobs.batch.rows import COLUMNS, Row
from serve.jobs.batch.sinks import FORMATS
from serve.jobs.job import DEFAULT_PROMPTS, JobError

ANSWER = "text"
"""The column of the answer where there is one prompt."""
DEDUP = ("exact", "near", "none")
"""Rows of equal content share an answer, those of pictures that look the same too (see `near`), or none do."""
MAX_WORKERS = 256
MIN_WINDOW_S = 0.1
RESERVED = frozenset(
    {
        "id",
        "source",
        "content_hash",
        "finish_reason",
        "same_as",
        "reducer",
        "model",
        "media",
        "clip",
        "start_s",
        "end_s",
    }
)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is asked of each row.

    Attributes:
        name: Of the column that holds the answer.
        text: None asks for a description.
        schema: A JSON schema that the answer has to fit.
        max_tokens: Longest answer; None takes the job's.
    """

    name: str = ANSWER
    text: str | None = None
    schema: Mapping[str, Any] | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class BatchJob:
    """One run over rows.

    Attributes:
        inputs: Tables, archives, dataset folders, or media.
        out: Folder of the results.
        form: One of `FORMATS`.
        prompts: What is asked of each row.
        columns: Our names of columns to the tables' own.
        model: Loaded here where there is no `url`.
        workers: Processes of this machine that answer, each with an engine; None answers in this process.
        url, api_key: Of a server that answers instead.
        served_model: Its model; None asks it.
        concurrency: Requests under way at a time at most; with workers, of each of them.
        window_s: Clips are cut into windows of so many seconds, each a row; None takes them whole.
        dedup: One of `DEDUP`: which rows share an answer.
        limit: Only so many rows, the first ones.
    """

    inputs: tuple[str, ...]
    out: Path
    form: str = "jsonl"
    prompts: tuple[Prompt, ...] = (Prompt(),)
    columns: Mapping[str, str] = field(default_factory=lambda: {name: name for name in COLUMNS})
    model: ModelConfig = field(default_factory=ModelConfig)
    workers: int | None = None
    url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    served_model: str | None = None
    max_tokens: int = 128
    patterns: tuple[str, ...] = ()
    window_s: float | None = None
    limit: int | None = None
    concurrency: int = 32
    shard_rows: int = 512
    timeout_s: float = 600.0
    retry_failed: bool = False
    skip_existing: bool = False
    restart: bool = False
    dedup: str = "exact"
    quiet: bool = False
    as_json: bool = False
    progress_json: bool = False
    name: str = "run-batch"

    def __post_init__(self) -> None:
        if self.form not in FORMATS:
            raise JobError(f"the form was {self.form!r}; allowed: {', '.join(FORMATS)}")
        if self.dedup not in DEDUP:
            raise JobError(f"dedup was {self.dedup!r}; allowed: {', '.join(DEDUP)}")
        for name in ("max_tokens", "concurrency", "shard_rows"):
            if getattr(self, name) < 1:
                raise JobError(f"{name} was {getattr(self, name)}; give at least 1")
        if self.limit is not None and self.limit < 1:
            raise JobError(f"limit was {self.limit}; give at least 1")
        if self.skip_existing and self.form not in ("txt", "json"):
            raise JobError("skip_existing is about files beside the media; it goes with the forms txt and json")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise JobError(f"url was {self.url!r}; it has to begin with http:// or https://")
        if self.window_s is not None and not (math.isfinite(self.window_s) and self.window_s >= MIN_WINDOW_S):
            raise JobError(f"window was {self.window_s:g}; give at least {MIN_WINDOW_S:g} seconds")
        if self.window_s is not None and self.form == "openai":
            raise JobError("--window cuts clips of rows, and requests of an OpenAI batch stay as they are")
        if self.workers is not None:
            self._check_workers(self.workers)

    def _check_workers(self, workers: int) -> None:
        if self.url is not None:
            raise JobError("workers are processes of this machine, and --url asks a server; leave one of them out")
        if self.model.tensor_parallel > 1:
            raise JobError("tensor_parallel spreads one engine over GPUs, and each worker has one of its own; take one")
        cores = len(os.sched_getaffinity(0))
        most = cores if self.model.device == "cpu" else MAX_WORKERS
        if not 1 <= workers <= most:
            why = f", which has {cores} cores" if most == cores else ""
            raise JobError(f"workers was {workers}; allowed on this machine{why}: 1 to {most}")

    @property
    def num_together(self) -> int:
        """Requests under way at a time at most."""
        return self.concurrency * (self.workers or 1)

    def settings(self) -> dict[str, Any]:
        """What decides the answers, JSON-ready. Records of one folder share all of it."""
        asked = {p.name: {"text": p.text, "schema": p.schema, "max_tokens": p.max_tokens} for p in self.prompts}
        model = self.model
        here = {
            "model": str(Path(model.model).resolve()) if Path(model.model).is_dir() else model.model,
            "dtype": model.dtype,
            "quantize": model.quantize,
            "engine": model.engine,
            "reducer": model.reducer,
            "keep_ratio": model.keep_ratio,
            "frames": model.num_frames if model.fps is None else f"{model.fps:g} per second",
            "chat_template": model.chat_template,
        }
        there = {"model": self.served_model, "reducer": model.reducer, "keep_ratio": model.keep_ratio}
        window = {} if self.window_s is None else {"window_s": self.window_s}
        if window and self.url is not None:
            window["frames"] = here["frames"]
        near = {"dedup": "near"} if self.dedup == "near" else {}
        return {
            **window,
            **near,
            "form": self.form,
            "prompts": asked,
            "max_tokens": self.max_tokens,
            **(here if self.url is None else there),
        }

    def body(self, row: Row, prompt: Prompt, model: str) -> dict[str, Any]:
        """The chat request about a row. Its media have been loaded."""
        parts: list[dict[str, Any]] = []
        for medium in row.media:
            name = f"{medium.kind}_url"
            parts.append({"type": name, name: {"url": medium.address}})
        text = row.prompt or prompt.text or DEFAULT_PROMPTS[row.media[0].kind or "image"]
        parts.append({"type": "text", "text": text})
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": prompt.max_tokens or self.max_tokens,
            "temperature": 0,
        }
        if prompt.schema is not None:
            form = {"name": "answer", "schema": prompt.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        vision = dict(row.vision)
        if self.url is not None and "reducer" not in vision and self.model.reducer != "none":
            vision["reducer"] = self.model.reducer
        if self.url is not None and "keep_ratio" not in vision and self.model.keep_ratio is not None:
            vision["keep_ratio"] = self.model.keep_ratio
        return body | ({"vision": vision} if vision else {})


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Named prompts from a YAML or JSON file: a name to a text, or to an object with text, schema and max_tokens.

    Raises:
        JobError: It cannot be read, or a prompt cannot be used.
    """
    found = _read_object(path)
    if not found:
        raise JobError(f"{path} holds no prompts; write a name and a text in each line")
    return tuple(_prompt(str(name), value, path) for name, value in found.items())


def read_schema(path: Path) -> dict[str, Any]:
    """A JSON schema from a file.

    Raises:
        JobError: It cannot be read.
    """
    return _read_object(path)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            found: object = json.loads(text)
        else:
            import yaml

            found = yaml.safe_load(text)
    except OSError as error:
        raise JobError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # each of the two libraries has its own tree of errors
        raise JobError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(found, dict):
        raise JobError(f"{path} holds {shown(found)}; it has to hold an object")
    return cast("dict[str, Any]", found)


def _prompt(name: str, value: object, path: Path) -> Prompt:
    if name in RESERVED or name.startswith("num_") or not name.isidentifier():
        raise JobError(f"{path}: a prompt cannot be called {name!r}; its name is a column of the results")
    if isinstance(value, str):
        return Prompt(name=name, text=value)
    given = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    unknown = given.keys() - {"text", "schema", "max_tokens"}
    text, schema, most = given.get("text"), given.get("schema"), given.get("max_tokens")
    if unknown or not isinstance(text, str) or not isinstance(schema, dict | None) or not isinstance(most, int | None):
        what = "it has to be a text, or an object with text, and perhaps schema (an object) and max_tokens (a number)"
        raise JobError(f"{path}: the prompt {name!r} was {shown(value)}; {what}")
    return Prompt(name=name, text=text, schema=schema, max_tokens=most)
