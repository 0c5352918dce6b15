"""Renders chat templates in child processes, so that no template can take the server's memory or time.

A child answers one request after the other, so most renderings cost a message and its answer, about 0.2 ms. A child
whose template takes too much ends, and the next request starts another.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from mm.data.request import MAX_BYTES_PER_CHAR
from mm.errors import InvalidRequest, PluginFault
from mm.models.template_child import MAX_REASON_CHARS
from mm.processes.child import Child
from mm.processes.wire import OUT_OF_MEMORY_STATUS, WireClosed, read_exactly, read_header, write_message

MEMORY_BYTES = 512 << 20
"""Memory that one template may use."""
MAX_CHILDREN = 4
"""Templates that are rendered at a time."""
END_S = 1.0
"""From the end of a child's pipe to its own."""


class TemplateRefused(Exception):
    """The template raised, or cannot be compiled. The text may hold marks."""


class RenderedTooLong(Exception):
    """The template made a text of `num_chars` characters."""

    def __init__(self, num_chars: int) -> None:
        super().__init__(num_chars)
        self.num_chars = num_chars


class Renderer:
    """Children that render. Thread-safe.

    Args:
        memory_bytes: Memory that a template may use.
        cpu_s: CPU seconds that it may take to be compiled and rendered.
        wall_s: Seconds that it may take, for machines that are very busy.
    """

    def __init__(self, memory_bytes: int = MEMORY_BYTES, cpu_s: float = 5.0, wall_s: float = 60.0) -> None:
        limits = map(str, (memory_bytes, cpu_s, wall_s))
        self._command = (sys.executable, "-m", "mm.models.template_child", *limits)
        self._ends = {
            OUT_OF_MEMORY_STATUS: f"needed more than {memory_bytes >> 20} MiB of memory",
            -signal.SIGPROF: f"took more than {cpu_s:g} s of CPU time",
            -signal.SIGALRM: f"took longer than {wall_s:g} s",
        }
        self.forget()

    def forget(self) -> None:
        """Begin without children. After a fork they belong to the parent process."""
        self._lock, self._places = threading.Lock(), threading.BoundedSemaphore(MAX_CHILDREN)
        self._idle: list[Child] = []

    def start(self) -> None:
        """Start a child if there is none, so that the first rendering need not wait for it."""
        with self._lock:
            if not self._idle:
                self._idle.append(Child(self._command))

    def compile(self, source: str) -> None:
        """Check that a template can be compiled.

        Raises:
            TemplateRefused: It cannot.
            PluginFault: It took too much memory or time.
        """
        self._ask({"source": source, "messages": None, "alphabet": "", "taken": []}, 0)

    def render(
        self,
        source: str,
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        *,
        alphabet: str,
        taken: frozenset[str],
        max_chars: int,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The conversation as the template writes it, with marks in the text of the messages.

        Args:
            options: Further variables of the template.
            alphabet, taken: See `Marks`.
            max_chars: Longer results are refused.
            tools: What the template gets as `tools`. Every text in it is the request's.
            variables: Variables that the request sets; `options` count before them.

        Raises:
            TemplateRefused: The template raised an error.
            RenderedTooLong: The result is longer than `max_chars`.
            InvalidRequest: The text cannot be marked.
            PluginFault: The template took too much memory or time.
        """
        request = {"source": source, "messages": messages, "options": options, "max_chars": max_chars}
        request |= {"tools": tools, "variables": dict(variables)}
        return self._ask(request | {"alphabet": alphabet, "taken": sorted(taken)}, max_chars)

    def _ask(self, request: Mapping[str, Any], max_chars: int) -> str:
        body = json.dumps(request, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
        with self._child() as child:
            kind, text = self._answer(child, body, max_chars)
        if kind == "refused":
            raise TemplateRefused(text)
        if kind == "invalid":
            raise InvalidRequest(text)
        if kind == "too_long":
            raise RenderedTooLong(int(text))
        return text

    def _answer(self, child: Child, body: bytes, max_chars: int) -> tuple[str, str]:
        try:
            write_message(child.pipe_in, {"type": "render"}, body)
            header = read_header(child.pipe_out)
            if header["num_bytes"] > (max_chars + MAX_REASON_CHARS) * MAX_BYTES_PER_CHAR:
                raise WireClosed
            return header["type"], read_exactly(child.pipe_out, header["num_bytes"]).decode("utf-8", "surrogatepass")
        except (WireClosed, OSError) as error:
            status = _status(child)
            reason = self._ends.get(status, f"ended its process (status {status})")
            raise PluginFault("chat", "template", f"{reason} and was stopped") from error

    @contextmanager
    def _child(self) -> Generator[Child]:
        """A child, which is kept if all went well."""
        with self._places:
            with self._lock:
                child = self._idle.pop() if self._idle else None
            if child is not None and not child.is_alive:
                child.close()
                child = None
            child = child or Child(self._command)
            try:
                yield child
            except BaseException:
                child.close()
                raise
            with self._lock:
                self._idle.append(child)

    def close(self) -> None:
        """End all children that are idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for child in idle:
            child.close()


def _status(child: Child) -> int:
    """The exit status of a child that closed its pipe."""
    try:
        return child.process.wait(END_S)
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL


RENDERER = Renderer()
"""That of this process."""

atexit.register(RENDERER.close)
os.register_at_fork(after_in_child=RENDERER.forget)
