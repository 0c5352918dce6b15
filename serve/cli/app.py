"""The command line, and the one place where configuration becomes running parts.

Importing this module imports neither torch nor ray: every command brings in what it needs when it runs, so that help is
instant. Environment variables are read here and nowhere else.
"""

from __future__ import annotations

import json
import logging
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mm import __version__
from serve.cli.options import (
    AllowDrafterOption,
    AllowedReducersOption,
    BatchTokensOption,
    CacheOption,
    CompileOption,
    DecoderOption,
    DeviceOption,
    DrafterOption,
    DraftTokensOption,
    DtypeOption,
    FpsOption,
    FramesOption,
    GraphsOption,
    LenientOption,
    MinKeepRatioOption,
    ModelArgument,
    ModelOption,
    PrefixOption,
    ReducerOption,
    SeqsOption,
    ThreadsOption,
    WaitingOption,
    check_model,
    check_port,
    model_config,
    need,
    read_reducer,
)

if TYPE_CHECKING:
    from serve.config import ServeConfig

app = typer.Typer(
    name="mm",
    help="Serve multimodal models and cut what visual tokens cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the `mm` command: errors of ours become one line and exit code 1."""
    from mm.errors import MmError

    try:
        app()
    except MmError as error:
        sys.stderr.write(f"mm: {error}\n")
        sys.exit(1)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"mm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve multimodal models and cut what visual tokens cost."""


@app.command()
def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array instead of a table.")] = False,
) -> None:
    """List every registered plugin with its capabilities, and which reducer works with which model family."""
    from mm.plugins.registry import KINDS, describe
    from serve.cli.matrix import matrix_table, support_matrix

    matrix = support_matrix()
    support = {row["name"]: row for row in matrix}
    rows = [row for kind in KINDS for row in describe(kind)]
    if as_json:
        joined = (row | support.get(row["name"], {}) if row["kind"] == "reducer" else row for row in rows)
        typer.echo(json.dumps(list(joined), indent=2, default=str))
        return
    typer.echo(matrix_table(matrix) + "\n")
    for kind in KINDS:
        typer.echo(f"{KINDS[kind].removeprefix('mm.')}")
        of_kind = [row for row in rows if row["kind"] == kind]
        width = max((len(row["name"]) for row in of_kind), default=0)
        for row in of_kind:
            typer.echo(f"  {row['name']:{width}}  {row['summary']}")
            typer.echo(f"  {'':{width}}    {_capabilities(row)}")
        if not of_kind:
            typer.echo("  (none installed)")


def _capabilities(row: dict[str, Any]) -> str:
    shown = {k: v for k, v in row.items() if k not in ("kind", "name", "summary", "options")}
    text = "; ".join(f"{k}: {', '.join(map(str, v)) or '-' if isinstance(v, list) else v}" for k, v in shown.items())
    options = ", ".join(f"{name}={value}" for name, value in row["options"].items())
    return f"{text}; options: {options or '-'}" if text else f"options: {options or '-'}"


@app.command()
def serve(
    model: ModelArgument = "tiny",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    in_process: Annotated[bool, typer.Option("--in-process", help="One process, without Ray.")] = False,
    encoders: Annotated[int, typer.Option(min=1, help="Encoder replicas (Ray).")] = 1,
    decoders: Annotated[int, typer.Option(min=1, help="Decoder replicas (Ray).")] = 1,
    max_decoders: Annotated[
        int | None, typer.Option(min=1, help="Start up to so many decoders while requests fill them (Ray).")
    ] = None,
    ingresses: Annotated[int, typer.Option(min=1, help="HTTP replicas (Ray).")] = 1,
    encoder_gpus: Annotated[float, typer.Option(min=0, help="GPUs, or a fraction of one, per encoder (Ray).")] = 0.0,
    decoder_gpus: Annotated[float, typer.Option(min=0, help="GPUs, or a fraction of one, per decoder (Ray).")] = 0.0,
    ray_cpus: Annotated[float | None, typer.Option(help="CPUs that the Ray started here may use.")] = None,
    reducer: ReducerOption = "none",
    allow_reducer: AllowedReducersOption = None,
    min_keep_ratio: MinKeepRatioOption = None,
    lenient_reducers: LenientOption = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    frames: FramesOption = 8,
    fps: FpsOption = None,
    video_decoder: DecoderOption = "pyav",
    threads: ThreadsOption = None,
    kv_cache_gb: CacheOption = None,
    max_num_seqs: SeqsOption = 64,
    max_batch_tokens: BatchTokensOption = None,
    max_waiting: WaitingOption = 256,
    prefix_caching: PrefixOption = True,
    cuda_graphs: GraphsOption = True,
    compile: CompileOption = False,
    drafter: DrafterOption = "none",
    allow_drafter: AllowDrafterOption = None,
    max_draft_tokens: DraftTokensOption = 15,
    served_model_name: Annotated[list[str] | None, typer.Option(help="Name in the API; repeat for aliases.")] = None,
    allow_media_domain: Annotated[
        list[str] | None, typer.Option(help="Fetch media from this host; repeat. Without it remote URLs are off.")
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar="MM_API_KEY", help="Key that clients have to send; repeat for several.")
    ] = None,
) -> None:
    """Serve a model through OpenAI-compatible endpoints, on Ray Serve or in one process."""
    from serve.config import ServeConfig

    _log_to_stderr()
    if not in_process:
        need("ray", "serve")
    need("fastapi", "server")
    config = ServeConfig(
        model=model_config(
            model=model,
            reducer=reducer,
            device=device,
            dtype=dtype,
            num_frames=frames,
            fps=fps,
            video_decoder=video_decoder,
            num_threads=threads,
            kv_cache_gb=kv_cache_gb,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            max_waiting=max_waiting,
            prefix_caching=prefix_caching,
            cuda_graphs=cuda_graphs,
            compile=compile,
            drafter=drafter,
            drafters=allow_drafter,
            max_draft_tokens=max_draft_tokens,
            allowed_domains=tuple(allow_media_domain or ()),
            allowed_reducers=tuple(allow_reducer or ()),
            min_keep_ratio=min_keep_ratio,
            lenient_reducers=lenient_reducers,
        ),
        host=host,
        port=port,
        num_encoders=encoders,
        num_decoders=decoders,
        max_decoders=max_decoders,
        num_ingress=ingresses,
        encoder_gpus=encoder_gpus,
        decoder_gpus=decoder_gpus,
        ray_cpus=ray_cpus,
        served_model_names=tuple(served_model_name or ()),
        api_keys=tuple(api_key or ()),
    )
    check_port(host, port)
    check_model(config.model)
    if host not in ("127.0.0.1", "localhost", "::1") and not config.api_keys:
        typer.echo(f"mm: listening on {host} without an API key: everyone who can reach it may use it", err=True)
    ready = partial(_say_ready, config)
    if in_process:
        from serve.api.server import run_in_process

        run_in_process(config, ready)
    else:
        from serve.deployments.application import run_on_ray

        typer.echo("mm: starting Ray and loading the model; this takes up to a minute", err=True)
        run_on_ray(config, ready)


@app.command()
def caption(
    inputs: Annotated[list[str], typer.Argument(help="Files, folders and glob patterns of images and clips.")],
    out: Annotated[Path, typer.Option(help="Folder of the results; the same folder again resumes.")],
    prompt: Annotated[str | None, typer.Option(help="Asked about every item; a description by default.")] = None,
    model: ModelOption = "tiny",
    reducer: ReducerOption = "none",
    lenient_reducers: LenientOption = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest caption.")] = 128,
    pattern: Annotated[list[str] | None, typer.Option(help='Names to take from folders, e.g. "*.png"; repeat.')] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many items.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed items again.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard the folder's earlier results.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; errors and failed items only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line with the counts on stdout.")] = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    frames: FramesOption = 8,
    fps: FpsOption = None,
    video_decoder: DecoderOption = "pyav",
    threads: ThreadsOption = None,
    kv_cache_gb: CacheOption = None,
    max_num_seqs: SeqsOption = 64,
    max_batch_tokens: BatchTokensOption = None,
    prefix_caching: PrefixOption = True,
    cuda_graphs: GraphsOption = True,
    compile: CompileOption = False,
    drafter: DrafterOption = "none",
    max_draft_tokens: DraftTokensOption = 15,
) -> None:
    """Caption images and clips into JSON lines; run again to resume. Exits with 0, 3 (some failed) or 1 (none ran)."""
    need("transformers", "batch")
    from serve.jobs.caption import run_caption
    from serve.jobs.job import CaptionJob

    job = CaptionJob(
        inputs=tuple(inputs),
        out=out,
        prompt=prompt,
        model=model_config(
            model=model,
            reducer=reducer,
            lenient_reducers=lenient_reducers,
            device=device,
            dtype=dtype,
            num_frames=frames,
            fps=fps,
            video_decoder=video_decoder,
            num_threads=threads,
            kv_cache_gb=kv_cache_gb,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            prefix_caching=prefix_caching,
            cuda_graphs=cuda_graphs,
            compile=compile,
            drafter=drafter,
            max_draft_tokens=max_draft_tokens,
            allow_paths=True,
        ),
        max_tokens=max_tokens,
        patterns=tuple(pattern or ()),
        limit=limit,
        retry_failed=retry_failed,
        restart=restart,
        quiet=quiet,
        as_json=as_json,
    )
    raise typer.Exit(run_caption(job))


@app.command()
def compare(
    file: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture or a clip.")],
    prompt: Annotated[str, typer.Option(help="What is asked about it.")],
    reducer: Annotated[
        list[str] | None, typer.Option(help="Specification of a reducer; repeat for several. `none` is always there.")
    ] = None,
    model: ModelOption = "tiny",
    out: Annotated[
        Path | None, typer.Option(help="Folder for overlays of the kept tokens and comparison.json.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object in place of the table.")] = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    frames: FramesOption = 8,
    fps: FpsOption = None,
    video_decoder: DecoderOption = "pyav",
    threads: ThreadsOption = None,
) -> None:
    """Ask once with every visual token and once with each reducer: answers, tokens, times, memory, kept tokens."""
    need("transformers", "batch")
    from serve.compare.command import Comparison, run_compare

    config = model_config(
        model=model,
        device=device,
        dtype=dtype,
        num_frames=frames,
        fps=fps,
        video_decoder=video_decoder,
        num_threads=threads,
        cache_bytes=0,
        prefix_caching=False,
        allow_paths=True,
    )
    job = Comparison(
        path=file,
        prompt=prompt,
        reducers=tuple(reducer or ("divprune:keep_ratio=0.25",)),
        model=config,
        max_tokens=max_tokens,
        out=out,
        as_json=as_json,
    )
    run_compare(job)


@app.command(name="eval")
def evaluate(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help='"tiny" (the default), a folder, or a hub name; with --url the name served there.'
        ),
    ] = None,
    reducer: Annotated[
        list[str] | None, typer.Option(help="Specification of a reducer; repeat for one column each.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this task; repeat for several.")] = None,
    wording: Annotated[str | None, typer.Option(help="Only items in this wording: trained or unseen.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many items of each task and wording.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Parquet file of your own; see the README for its columns.")] = None,
    control: Annotated[bool, typer.Option(help="Ask everything once more about another item's medium.")] = True,
    suffix: Annotated[str, typer.Option(help='Put after every question, such as "Answer in one word."')] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    answers: Annotated[Path | None, typer.Option(help="Write every answer here, one JSON line each.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    url: Annotated[str | None, typer.Option(help="Ask an OpenAI-compatible server, e.g. http://host:8000/v1.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="MM_API_KEY", help="Key that the server wants.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to the server at a time.")] = 4,
    frames: Annotated[
        int, typer.Option(min=1, help="Frames taken of a clip, evenly; those we ship have up to 16.")
    ] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 192,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Ask the held-out set and count the right answers, by task, wording, number of objects and reducer."""
    for package in ("pyarrow", "rich", "transformers"):
        need(package, "batch")
    from serve.evaluation.command import Evaluation, run_evaluation

    job = Evaluation(
        data=data,
        reducers=tuple(map(read_reducer, reducer or ())),
        tasks=tuple(task or ()),
        wording=wording,
        limit=limit,
        control=control,
        suffix=suffix,
        json_file=json_file,
        answers_file=answers,
        quiet=quiet,
        url=url,
        served_model=model,
        api_key=api_key,
        concurrency=concurrency,
        model=model_config(model=model or "tiny", device=device, dtype=dtype, num_frames=frames, num_threads=threads),
        num_frames=frames,
        max_tokens=max_tokens,
    )
    run_evaluation(job)


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help='"tiny" (the shipped model), a folder, or a hub name.')],
    data: Annotated[
        Path | None, typer.Argument(help="Parquet file as `mm eval` reads it; the shipped set when not given.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="FLOPs of the prefill / FLOPs with every visual token, for the sigmoid search.")
    ] = None,
    search: Annotated[
        str, typer.Option(help="sigmoid (under a budget), or greedy (as few as do not hurt).")
    ] = "sigmoid",
    tolerance: Annotated[float, typer.Option(help="Share of items that greedy may lose.")] = 0.01,
    trials: Annotated[int, typer.Option(min=1, help="Schedules that the sigmoid search tries.")] = 20,
    out: Annotated[Path, typer.Option(help="The reducer's file; the same again resumes.")] = Path("reducer.json"),
    task: Annotated[list[str] | None, typer.Option(help="Only this task; repeat for several.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many items of each task and wording.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    frames: Annotated[int, typer.Option(min=1, help="Frames taken of a clip, evenly.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Search how many visual tokens each layer needs; the result is a file for --reducer. Run again to resume."""
    for package in ("pyarrow", "rich", "transformers"):
        need(package, "batch")
    if search not in ("greedy", "sigmoid"):
        raise typer.BadParameter(f"was {search!r}; allowed: greedy, sigmoid", param_hint="--search")
    if search == "sigmoid":
        need("sklearn", "tune")
    from serve.tuning.command import Tuning, run_tuning

    job = Tuning(
        data=data,
        out=out,
        search="greedy" if search == "greedy" else "sigmoid",
        budget=budget,
        tolerance=tolerance,
        num_trials=trials,
        tasks=tuple(task or ()),
        limit=limit,
        quiet=quiet,
        model=model_config(model=model, device=device, dtype=dtype, num_frames=frames, num_threads=threads),
        num_frames=frames,
        max_tokens=max_tokens,
    )
    run_tuning(job)


@app.command()
def demo(
    url: Annotated[str | None, typer.Option(help="A running server; without it one is started here.")] = None,
    host: Annotated[str, typer.Option(help="Address of the page.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the page.")] = 7860,
    model: ModelOption = "tiny",
    reducer: ReducerOption = "none",
    lenient_reducers: LenientOption = False,
    drafter: DrafterOption = "none",
    allow_drafter: AllowDrafterOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    api_key: Annotated[str | None, typer.Option(envvar="MM_API_KEY", help="Key that the server wants.")] = None,
) -> None:
    """Open a page that compares the full and the reduced answer and shows which tokens were kept and which drafted.

    Without a drafter option the page offers the model's own drafters and those that need no training.
    """
    from serve.config import ServeConfig
    from serve.page.choices import with_drafters
    from serve.page.launch import DemoConfig, run_demo

    _log_to_stderr()
    need("gradio", "demo")
    config = model_config(
        model=model,
        reducer=reducer,
        lenient_reducers=lenient_reducers,
        device=device,
        dtype=dtype,
        num_threads=threads,
        drafter=drafter,
        drafters=allow_drafter,
    )
    if url is None:
        check_model(config)
        config = with_drafters(config)
    run_demo(DemoConfig(url=url, api_key=api_key, server=ServeConfig(model=config), host=host, port=port))


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpcore", "transformers", "ray"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


SAMPLE = Path(__file__).resolve().parent.parent / "demos" / "samples" / "many_shapes.png"
QUESTION = "What color is the star?"


def _say_ready(config: ServeConfig) -> None:
    """Say that requests can be answered, and how to ask the first one."""
    url, name = f"http://{config.host}:{config.port}", config.names[0]
    content = f'{{"type": "text", "text": "{QUESTION}"}}'
    if SAMPLE.is_file():
        image = f"data:image/png;base64,$(base64 < '{SAMPLE}' | tr -d '\\n')"
        content += f', {{"type": "image_url", "image_url": {{"url": "{image}"}}}}'
    key = '-H "Authorization: Bearer $MM_API_KEY" ' if config.api_keys else ""
    typer.echo(
        f"mm: ready at {url}, serving {name}. Try:\n\n"
        f"curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' {key}-d @- <<EOF\n"
        f'{{"model": "{name}", "max_tokens": 64, "messages": [{{"role": "user", "content": [{content}]}}]}}\nEOF\n'
    )


if __name__ == "__main__":
    main()
