"""Options that several commands share, what they configure, and what is checked before anything is loaded.

Imports nothing heavy; see `serve.cli.app`.
"""

from __future__ import annotations

import importlib.util
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mm.config import ModelConfig

ModelArgument = Annotated[str, typer.Argument(help='"tiny" (the shipped model), a folder, or a hub name.')]
ModelOption = Annotated[str, typer.Option("--model", help='"tiny" (the shipped model), a folder, or a hub name.')]
ReducerOption = Annotated[
    str, typer.Option(help="Default reducer, e.g. divprune:keep_ratio=0.25 or a file of `mm tune`.")
]
AllowedReducersOption = Annotated[
    list[str] | None, typer.Option("--allow-reducer", help="Requests may use this reducer; repeat. All when not given.")
]
MinKeepRatioOption = Annotated[
    float | None, typer.Option(help="Requests may not keep a smaller share of visual tokens than this.")
]
LenientOption = Annotated[
    bool,
    typer.Option("--lenient-reducers", help="Where a reducer fails keep all tokens and say so, instead of an error."),
]
DeviceOption = Annotated[str, typer.Option(help="Torch device: cpu, cuda, cuda:1.")]
DtypeOption = Annotated[
    str, typer.Option(help="auto (bfloat16 where the device computes in it), float32, bfloat16 or float16.")
]
DecoderOption = Annotated[str, typer.Option(help="pyav, or decord for files you trust.")]
FramesOption = Annotated[int, typer.Option(help="Frames sampled from a clip, evenly over its length.")]
FpsOption = Annotated[float | None, typer.Option(help="Sample by frames per second of clip time instead.")]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads per process; torch decides when not given.")]
CacheOption = Annotated[
    float | None, typer.Option(help="GiB of the decoder's KV cache; a share of free memory when not given.")
]
SeqsOption = Annotated[int, typer.Option(min=1, help="Answers decoded at a time.")]
BatchTokensOption = Annotated[
    int | None, typer.Option(min=1, help="Rows of one decoder pass; 512 on a CPU and 4096 on a GPU when not given.")
]
WaitingOption = Annotated[int, typer.Option(min=1, help="Requests that may wait for a decoder; more are refused.")]
PrefixOption = Annotated[
    bool,
    typer.Option(
        "--prefix-caching/--no-prefix-caching", help="Begin prompts with what earlier ones left in the cache."
    ),
]

GraphsOption = Annotated[
    bool,
    typer.Option("--cuda-graphs/--no-cuda-graphs", help="On a GPU, record decoding steps at start and replay them."),
]
CompileOption = Annotated[
    bool, typer.Option("--compile/--no-compile", help="Put the decoder's layers through torch.compile.")
]


DrafterOption = Annotated[
    str, typer.Option(help='Drafter ahead of the decoder, e.g. "copy" or "copy + recycle"; `mm plugins` lists them.')
]
AllowDrafterOption = Annotated[
    list[str] | None, typer.Option(help="A further drafter that requests may ask for; repeat for several.")
]
DraftTokensOption = Annotated[int, typer.Option(min=1, max=255, help="Drafted tokens per answer and pass at most.")]


def model_config(
    *,
    allowed_domains: tuple[str, ...] = (),
    allow_paths: bool = False,
    allowed_reducers: tuple[str, ...] = (),
    min_keep_ratio: float | None = None,
    lenient_reducers: bool = False,
    drafter: str = "none",
    drafters: Sequence[str] | None = None,
    max_draft_tokens: int = 15,
    **fields: Any,
) -> ModelConfig:
    """The configuration that a command's options describe; `fields` are those of `ModelConfig`."""
    from mm.config import ModelConfig, ReducerPolicy, SourcePolicy, SpeculationLimits

    if "reducer" in fields:
        fields["reducer"] = read_reducer(fields["reducer"])
    return ModelConfig(
        **fields,
        speculation=SpeculationLimits(
            drafter=drafter, drafters=tuple(drafters or ()), max_draft_tokens=max_draft_tokens
        ),
        sources=SourcePolicy(allowed_domains=allowed_domains, allow_paths=allow_paths),
        reducers=ReducerPolicy(
            allowed=allowed_reducers,
            min_keep_ratio=min_keep_ratio,
            on_error="keep_all" if lenient_reducers else "fail",
        ),
    )


def read_reducer(given: str) -> str:
    """A reducer's specification: as given, or what a file of `mm tune` says. Requests cannot name files."""
    from mm.errors import InvalidOption

    if not given.endswith(".json"):
        return given
    try:
        spec = json.loads(Path(given).read_text(encoding="utf-8"))["reducer"]
    except OSError as error:
        raise InvalidOption("reducer", given, f"cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        spec = None
    if not isinstance(spec, str):
        raise InvalidOption("reducer", given, 'is no file of a reducer: it has to be JSON such as {"reducer": "fastv"}')
    return spec


def need(package: str, extra: str) -> None:
    """Stop with the name of the extra that brings a missing package."""
    if importlib.util.find_spec(package) is None:
        typer.echo(f"mm: this command needs {package}: pip install 'mm-serving[{extra}]'", err=True)
        raise typer.Exit(1)


def check_port(host: str, port: int) -> None:
    """Refuse a taken port before anything is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
    except OSError as error:
        typer.echo(
            f"mm: cannot listen on {host}:{port} ({error.strerror}); choose another with --host or --port", err=True
        )
        raise typer.Exit(1) from None


def check_model(config: ModelConfig) -> None:
    """Refuse a wrong model, reducer or drafter in one line, before replicas fail to start over it."""
    from mm.models.checkpoint import find, read_config
    from mm.plugins.registry import get
    from mm.plugins.spec import build_drafter, build_reducer

    read_config(find(config.model))
    build_reducer(config.reducer)
    for name in config.reducers.allowed:
        get("reducer", name)
    for drafter in (config.speculation.drafter, *config.speculation.drafters):
        build_drafter(drafter)
