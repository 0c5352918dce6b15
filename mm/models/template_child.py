"""The process that renders chat templates: `python -m mm.models.template_child`.

A template is a program of a checkpoint. It may ask for any amount of memory and time, even while it is compiled, inside
operations that cannot be interrupted. So this process first limits its memory for good, and the kernel ends it when a
template takes too much CPU time. It must not import torch: it has to start fast and stay small.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from jinja2 import Template

from mm.errors import InvalidRequest
from mm.models.template import TemplateEnvironment
from mm.models.user_text import Marks
from mm.processes.child import lower_limit, private_stdout
from mm.processes.wire import OUT_OF_MEMORY_STATUS, WireClosed, read_exactly, read_header, write_message

MAX_REASON_CHARS = 1000
MAX_TEMPLATES = 32
"""Compiled templates that are kept."""


def main(memory_bytes: int, cpu_s: float, wall_s: float) -> None:
    """Answer requests on stdin and stdout until the parent closes the pipe.

    Args:
        memory_bytes: Memory that templates may use beyond what the process has when it starts.
        cpu_s: CPU seconds that one request may take.
        wall_s: Seconds that it may take, for machines that are very busy.
    """
    pipe_in, pipe_out = sys.stdin.buffer, private_stdout()
    confine(memory_bytes)
    try:
        while True:
            header = read_header(pipe_in)
            request = json.loads(read_exactly(pipe_in, header["num_bytes"]).decode("utf-8", "surrogatepass"))
            set_clocks(cpu_s, wall_s)
            kind, text = answer(request)
            set_clocks(0, 0)
            reply(pipe_out, kind, text)
    except MemoryError:
        os._exit(OUT_OF_MEMORY_STATUS)
    except (WireClosed, BrokenPipeError):
        os._exit(0)


def confine(memory_bytes: int) -> None:
    """Limit this process for good."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    lower_limit(resource.RLIMIT_AS, used + memory_bytes, used + memory_bytes)
    for number in (signal.SIGPROF, signal.SIGALRM):  # the parent may ignore or block them
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGPROF, signal.SIGALRM))
    lower_limit(resource.RLIMIT_CORE, 0, 0)
    lower_limit(resource.RLIMIT_FSIZE, 0, 0)


def set_clocks(cpu_s: float, wall_s: float) -> None:
    """Start the clocks, or stop them by 0. When one of them runs out, the kernel ends this process."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, wall_s)


def answer(request: Mapping[str, Any]) -> tuple[str, str]:
    """What became of a request, and the rendered text or the reason.

    The request holds the template's `source`; `messages` with text parts, or none to compile only; `options`, the
    template's other variables; `tools` and `variables`, which are the request's; `alphabet` and `taken` as of `Marks`;
    and `max_chars`, the longest text to return.
    """
    try:
        marks = Marks(request["alphabet"], frozenset(request["taken"]))
    except InvalidRequest as error:
        return "invalid", str(error)
    with marks.used():
        try:
            template = compiled(request["source"])
            if request["messages"] is None:
                return "compiled", ""
            variables = _all_marked(request.get("variables") or {}, marks, keys=False)
            variables |= {"tools": _all_marked(request.get("tools"), marks)} | request["options"]
            rendered = str.__str__(template.render(messages=_marked(request["messages"], marks), **variables))
        except MemoryError:
            raise
        except BaseException as error:  # a template can raise what it likes
            return "refused", (str.__str__(str(error)) or type(error).__name__)[:MAX_REASON_CHARS]
    return ("too_long", str(len(rendered))) if len(rendered) > request["max_chars"] else ("rendered", rendered)


@functools.lru_cache(MAX_TEMPLATES)
def compiled(source: str) -> Template:
    return TemplateEnvironment().from_string(source)


def _marked(messages: list[dict[str, Any]], marks: Marks) -> list[dict[str, Any]]:
    """The messages with the request's text marked."""
    for message in messages:
        for part in message["content"]:
            if "text" in part:
                part["text"] = marks.text(part["text"])
        for name in message.keys() - {"role", "content"}:
            message[name] = _all_marked(message[name], marks)
    return messages


def _all_marked(value: Any, marks: Marks, *, keys: bool = True) -> Any:
    """A JSON value in which every text is marked, names of fields included unless `keys` is false."""
    if isinstance(value, str):
        return marks.text(value)
    if isinstance(value, list):
        return [_all_marked(item, marks) for item in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        items: list[tuple[str, Any]] = list(value.items())  # pyright: ignore[reportUnknownArgumentType]
        return {(marks.text(name) if keys else name): _all_marked(item, marks) for name, item in items}
    return value


def reply(pipe_out: BinaryIO, kind: str, text: str) -> None:
    write_message(pipe_out, {"type": kind}, text.encode("utf-8", "surrogatepass"))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
