"""`mm embed`: images and clips to vectors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mm.config import ModelConfig
from serve.cli.checks import check_device_name, need
from serve.cli.options import build_config, setting_options

SETTINGS = ("model", "device", "dtype", "reducer", "keep_ratio", "frames", "fps", "threads")


@click.command()
@click.argument("inputs", metavar="FILES...", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write; its name ends in .npz.")
@click.option(
    "--encoder",
    help='Encoder by name, such as "timm:model_name=vit_tiny_patch16_224", in place of the model\'s own. '
    "`mm plugins` lists them. timm's weights are random unless pretrained=true or checkpoint=FILE is given.",
)
@click.option("--prompt", default="", help="Question, for reducers that read it.")
@setting_options(ModelConfig, only=SETTINGS)
def embed(inputs: tuple[str, ...], settings: dict[str, Any], **options: Any) -> None:
    """Embed images and clips with a vision encoder.

    FILES are files, folders and glob patterns. A vector is the mean of the visual tokens that the encoder and the
    reducer leave. No language model is loaded. The exit code is 0, 3 (some items failed) or 1 (none could be embedded).
    """
    need("transformers", "models")
    model = build_config(ModelConfig, settings, cache_bytes=0, allow_paths=True)
    check_device_name(model.device)
    from serve.jobs.embed import EmbedJob, run_embed

    sys.exit(run_embed(EmbedJob(inputs=inputs, model=model, **options)))
