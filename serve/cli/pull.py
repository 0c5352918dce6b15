"""`mm pull`: download a model, after a look at whether it can be served here."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import click

GB = 1e9
READ_BYTES = 256_000_000


@click.command()
@click.argument("model")
@click.option("--force", is_flag=True, help="Download it even if `mm check` says that it cannot be served.")
def pull(model: str, force: bool) -> None:
    """Download MODEL, a hub name such as owner/name, so that `mm serve MODEL` starts at once.

    Its settings come first and are checked as `mm check` does; only then its weights do. What is here already is not
    downloaded again. The exit code is 1 if the model cannot be served or not be downloaded.
    """
    from mm.models.locate import find, is_on_hub, planned_download

    if not is_on_hub(model):
        click.echo(f"{model} needs no download; it is in {find(model)}")
        return
    plan = planned_download(model)
    _say(f"{model}: {len(plan.sizes)} files, {_gb(plan.num_bytes)}; {_gb(plan.num_missing_bytes)} are not here yet")
    _check_room(plan.num_missing_bytes)
    folder = find(model, weights=False)
    memory = _check(folder, force)
    folder = find(model)
    click.echo(folder)
    if memory is not None:
        _say(_expectation(memory))
    _say(f"ready: mm serve {model}")


def _say(text: str) -> None:
    sys.stderr.write(f"mm: {text}\n")


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / GB:.2f} GB"


def _check_room(num_bytes: int) -> None:
    from huggingface_hub import constants

    from mm.errors import InvalidOption

    cache = Path(constants.HF_HUB_CACHE)
    disk = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if free < num_bytes:
        what = f"needs {_gb(num_bytes)} and {disk} has {_gb(free)} free; set HF_HOME to a folder on another disk"
        raise InvalidOption("pull", "model", what)


def _check(folder: Path, force: bool) -> dict[str, int] | None:
    """Bytes of the model's parts, None if they are not known.

    Raises:
        InvalidOption: The model cannot be served.
    """
    from mm.check import check_model
    from mm.errors import InvalidOption

    found = check_model(folder)
    reasons = [f"{name}: {answer}" for name, answer in found.items() if str(answer).startswith("no: ")]
    if reasons and not force:
        raise InvalidOption("pull", "model", f"cannot be served ({'; '.join(reasons)}); --force downloads it anyhow")
    for reason in reasons:
        _say(reason)
    memory: Any = found.get("memory")
    return memory if isinstance(memory, dict) else None


def _expectation(memory: dict[str, int]) -> str:
    """What the weights take, and how fast a CPU could read them at most, measured here."""
    encoder, decoder = memory["encoder_bytes"], memory["decoder_bytes"]
    seconds = decoder / _read_bytes_per_s()
    return (
        f"in float32 its encoder takes {_gb(encoder)} and its decoder {_gb(decoder)}. On one core of this CPU a token "
        f"takes at least {seconds:.3f} s, to read the decoder; half in bfloat16, a quarter with --quantize int8"
    )


def _read_bytes_per_s() -> float:
    """The rate at which one core reads memory."""
    import numpy as np

    data, best = np.ones(READ_BYTES // 8), float("inf")
    for _ in range(3):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best
