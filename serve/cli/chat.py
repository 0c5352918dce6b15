"""`mm chat`: a conversation in the terminal, with pictures and clips by their paths."""

from __future__ import annotations

import mimetypes
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from mm.config import ModelConfig
from serve.cli.checks import check_early, need, warn_of_limits
from serve.cli.options import build_config, setting_options

SETTINGS = ("reducer", "keep_ratio", "device", "dtype", "threads", "frames", "chat_template")
HELP = "Write a question. Paths of pictures and clips in it are sent along. /clear begins anew, /quit ends."
Messages = list[dict[str, Any]]
Answer = Callable[[Messages], Iterator[str]]


@click.command()
@click.argument("model", required=False)
@click.option("--url", help="Ask this OpenAI-compatible server instead of loading a model here.")
@click.option("--api-key", envvar="MM_API_KEY", help="Key that the server asks for.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Longest answer.")
@setting_options(ModelConfig, only=SETTINGS)
def chat(model: str | None, settings: dict[str, Any], url: str | None, api_key: str | None, max_tokens: int) -> None:
    """Talk to a model about pictures and clips, whose paths may stand in the question.

    MODEL is "tiny" (the shipped model, and the default), a folder, or a hub name; with --url the name served there.
    """
    if url is not None:
        need("openai", "batch")
        answer = _remote(url, api_key, model, max_tokens)
    else:
        need("transformers", "models")
        config = build_config(ModelConfig, settings, model=model or "tiny", allow_paths=True)
        check_early(config)
        warn_of_limits(config.model)
        click.echo(f"mm: loading {config.model}", err=True)
        answer = _local(config, max_tokens)
    click.echo(HELP, err=True)
    talk(answer, sys.stdin.isatty())


def talk(answer: Answer, shows_prompt: bool) -> None:
    """Read questions until the end of the input, and write the answers as they come.

    Args:
        shows_prompt: Whether a person types.
    """
    from mm.errors import MmError

    messages: Messages = []
    while True:
        try:
            line = input("> " if shows_prompt else "")
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip() in ("/quit", "/exit"):
            return
        if line.strip() == "/clear":
            messages = []
        if not line.strip() or line.startswith("/clear"):
            continue
        try:
            messages.append({"role": "user", "content": content_of(line)})
            text = ""
            for piece in answer(messages):
                text += piece
                click.echo(piece, nl=False)
            click.echo()
            messages.append({"role": "assistant", "content": text})
        except KeyboardInterrupt:
            click.echo("\n(stopped)", err=True)
            messages.pop()
        except (MmError, OSError) as error:
            click.echo(f"mm: {error}", err=True)
            messages.pop()


def content_of(line: str) -> list[dict[str, Any]]:
    """The parts of a message: the media whose paths stand in the line, and the rest of it.

    Raises:
        OSError: A file cannot be read.
    """
    from serve.client import media_part
    from serve.jobs.discover import EXTENSIONS

    try:
        words = shlex.split(line)
    except ValueError:  # a lone quote, as in "what's this"
        words = line.split()
    media: list[dict[str, Any]] = []
    rest = line
    for word in words:
        path = Path(word).expanduser()
        kind = EXTENSIONS.get(os.path.splitext(word)[1].lower())
        if kind is not None and path.is_file():
            mime = mimetypes.guess_type(word)[0] or f"{kind}/*"
            media.append(media_part(kind, mime, path.read_bytes()))
            for spelled in (f"'{word}'", f'"{word}"', shlex.quote(word), word):
                rest = rest.replace(spelled, "", 1) if spelled in rest else rest
    text = " ".join(rest.split()) or "Describe this."
    return [*media, {"type": "text", "text": text}]


def _local(config: ModelConfig, max_tokens: int) -> Answer:
    from mm.api import Model
    from mm.data.outputs import Delta

    model = Model(config)

    def answer(messages: Messages) -> Iterator[str]:
        for event in model.stream(messages, max_new_tokens=max_tokens, temperature=0.0):
            if isinstance(event, Delta):
                yield event.text

    return answer


def _remote(url: str, api_key: str | None, model: str | None, max_tokens: int) -> Answer:
    import openai

    from mm.errors import MmError

    client = openai.OpenAI(base_url=f"{url.rstrip('/').removesuffix('/v1')}/v1", api_key=api_key or "none")

    def answer(messages: Messages) -> Iterator[str]:
        asked: Any = messages
        try:
            name = model or next(iter(client.models.list())).id
            for chunk in client.chat.completions.create(model=name, messages=asked, max_tokens=max_tokens, stream=True):
                if chunk.choices and chunk.choices[0].delta.content:
                    yield chunk.choices[0].delta.content
        except openai.OpenAIError as error:
            raise MmError(f"{url}: {error}") from None

    return answer
