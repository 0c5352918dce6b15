"""`mm embed`: one vector per picture or clip, in one NumPy file.

A vector is the mean of the visual tokens that the encoder and the reducer leave. No language model is loaded.

The file holds one row per item that could be embedded, in the order of the inputs:

    embeddings (N, D) float32    paths (N,) text    kinds (N,) text
    num_tokens_in (N,) int64, visual tokens before the reducer    num_tokens (N,) int64, those that were kept
    encoder, reducer: texts
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mm.api import build_request
from mm.build import build_encode_parts
from mm.config import ModelConfig
from mm.encode.parts import EncodeParts
from mm.encode.pipeline import encode
from mm.encode.pooling import mean_embedding
from mm.errors import RequestError
from serve.jobs.discover import Item, find_items
from serve.jobs.job import JobError

SUFFIX = ".npz"


@dataclass(frozen=True, kw_only=True)
class EmbedJob:
    """One run of `mm embed`.

    Attributes:
        inputs: Files, folders and glob patterns.
        out: The file to write; its name ends in .npz.
        model: A checkpoint whose encoder is used, the reducer, the frame sampling and the limits.
        encoder: An encoder by name, such as "timm:model_name=vit_tiny_patch16_224", in place of the checkpoint's.
        prompt: Question for reducers that read it.
    """

    inputs: tuple[str, ...]
    out: Path
    model: ModelConfig = field(default_factory=ModelConfig)
    encoder: str | None = None
    prompt: str = ""

    def __post_init__(self) -> None:
        if self.out.suffix != SUFFIX:
            raise JobError(f"the results would go to {self.out}; give a name that ends in {SUFFIX}")
        if not self.out.resolve().parent.is_dir():
            raise JobError(f"the folder {self.out.resolve().parent} does not exist")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The result of one item; see the module docstring."""

    item: Item
    embedding: npt.NDArray[np.float32]
    num_tokens_in: int
    num_tokens: int
    reducer: str


def run_embed(job: EmbedJob) -> int:
    """Embed every item and write the file.

    Returns:
        0 when every item was embedded, 3 when some failed, 1 when none could be embedded. Errors of single items were
        written to stderr.

    Raises:
        MmError: The encoder or the reducer cannot be used, or there is nothing to embed.
    """
    found = find_items(job.inputs)
    for problem in found.problems:
        _warn(problem)
    if not found.items:
        raise JobError("no images or clips were found in: " + ", ".join(job.inputs))
    parts = build_encode_parts(job.model, job.encoder)
    if getattr(parts.encoder, "has_random_weights", False):
        _warn(f"{parts.host} has random weights, for tests only; give pretrained=true or checkpoint=FILE")
    rows = list(_rows(found.items, job, parts))
    if rows:
        _write(job.out, rows, parts.host)
    sys.stdout.write(f"{len(rows)} of {len(found.items)} items embedded in {job.out}\n" if rows else "")
    if not rows:
        return 1
    return 3 if len(rows) < len(found.items) or found.problems else 0


def _rows(items: Sequence[Item], job: EmbedJob, parts: EncodeParts) -> Iterator[Row]:
    for item in items:
        path = Path(item.path)
        request = build_request(job.prompt, **{f"{item.kind}s": [path]})
        try:
            media = encode(request, parts)
        except RequestError as error:
            _warn(f"{item.path}: {error}")
            continue
        (encoded,) = media.items
        yield Row(
            item=item,
            embedding=mean_embedding(media).numpy(),
            num_tokens_in=encoded.tokens.num_tokens_in,
            num_tokens=encoded.tokens.num_tokens,
            reducer=media.reducer,
        )


def _write(out: Path, rows: Sequence[Row], encoder: str) -> None:
    """Write the whole file or nothing."""
    temporary = out.with_name(f".{out.name}.new{SUFFIX}")
    try:
        np.savez(
            temporary,
            embeddings=np.stack([row.embedding for row in rows]),
            paths=np.array([row.item.path for row in rows]),
            kinds=np.array([row.item.kind for row in rows]),
            num_tokens_in=np.array([row.num_tokens_in for row in rows]),
            num_tokens=np.array([row.num_tokens for row in rows]),
            encoder=np.array(encoder),
            reducer=np.array(rows[0].reducer),
        )
        os.replace(temporary, out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise JobError(f"cannot write {out}: {error.strerror or error}") from None


def _warn(text: str) -> None:
    sys.stderr.write(f"mm: {text}\n")
