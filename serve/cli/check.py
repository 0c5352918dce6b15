"""`mm check`: what of a model can be served, without loading its weights."""

from __future__ import annotations

import json
import sys
from typing import Any

import click


@click.command()
@click.argument("model")
@click.option("--size", default="480x640", show_default=True, help="Height x width of the picture that is counted.")
@click.option("--frames", default=8, show_default=True, type=click.IntRange(min=1), help="Frames of the clip.")
@click.option("--dtype", default="bfloat16", show_default=True, type=click.Choice(["float32", "bfloat16", "float16"]))
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def check(model: str, size: str, frames: int, dtype: str, as_json: bool) -> None:
    """Say what of MODEL, a folder or a hub name, can be served, and why not where something cannot.

    No weights are read. The exit code is 1 if the model cannot be served.
    """
    import torch

    from mm.check import check_model
    from mm.errors import InvalidOption
    from mm.models.checkpoint import find

    height, _, width = size.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise InvalidOption("check", "size", f"was {size!r}; give height x width in pixels, such as 480x640")
    sides = {"height": int(height), "width": int(width)}
    found = check_model(find(model, weights=False), **sides, num_frames=frames, dtype=getattr(torch, dtype))
    click.echo(json.dumps(found, indent=2) if as_json else _lines(found))
    sys.exit(0 if found["served"] else 1)


def _lines(found: dict[str, Any]) -> str:
    from serve.cli.matrix import aligned  # it imports torch, and help has to be instant

    lines: list[str] = []
    for name, answer in found.items():
        if name == "engines" and isinstance(answer, dict):
            # Why the native engine cannot run a reducer was said above.
            rows = [[f"  {row}", cells["native"].partition(":")[0], cells["vllm"]] for row, cells in answer.items()]
            lines += aligned([["engines:", *next(iter(answer.values()))], *rows])
        elif isinstance(answer, dict):
            lines += [f"{name}:", *(f"  {key}: {value}" for key, value in answer.items())]
        else:
            lines.append(f"{name}: {', '.join(answer) if isinstance(answer, list) else answer}")
    return "\n".join(lines)
