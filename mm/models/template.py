"""Renders chat templates as transformers does, and keeps track of which characters a request brought.

The environment has what templates expect of transformers: `raise_exception`, `strftime_now`, `tojson`, loop controls
and the `generation` block. What it adds is that no operation loses the marks of `mm.models.user_text`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, NoReturn, cast

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mm.models.user_text import as_users, seen, unmarked

_WITHOUT_MARKS = frozenset({"e", "escape", "float", "forceescape", "int", "pprint", "striptags", "title"}) | frozenset(
    {"tojson", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr"}
)
"""Filters that look at single characters. They get the unmarked string, and all that they return is the request's."""


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Compiles chat templates. What they render is a `UserText` where a request's text is in it."""

    intercepted_binops = frozenset({"+", "*", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.code_generator_class = _CodeGenerator
        self.concat = _concat
        its_filters, its_globals = cast("tuple[dict[str, Any], dict[str, Any]]", (self.filters, self.globals))  # pyright: ignore[reportUnknownMemberType]
        for name, function in {**its_filters, "tojson": _tojson}.items():
            its_filters[name] = _wrapped(function, without_marks=name in _WITHOUT_MARKS)
        its_globals.update(raise_exception=_raise, strftime_now=_strftime_now, dict=_dict, namespace=_SafeNamespace)

    def call(self, context: Context, obj: object, *args: object, **options: object) -> object:
        return seen(super().call(context, obj, *args, **options))

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        return seen(super().call_binop(context, operator, left, right))


class _CodeGenerator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """`a ~ b` through the environment's `concat`."""
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("str(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training. Here it only renders its content."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _SafeNamespace(Namespace):
    """A namespace without attributes that begin with an underscore."""

    def __init__(*args: Any, **attributes: Any) -> None:  # `self` may be an attribute
        for name in dict(*args[1:], **attributes):
            _check_attribute(name)
        Namespace.__init__(*args, **attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")


def _concat(pieces: Iterable[str]) -> str:
    return seen("".join(pieces))


def _wrapped(function: Callable[..., Any], *, without_marks: bool) -> Callable[..., Any]:
    """A filter whose result keeps the marks."""

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        if without_marks:
            return as_users(function(*map(unmarked, args), **unmarked(options)))
        return seen(function(*args, **options))

    return wrapped


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML's escapes, unlike Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # local time, as in transformers


def _dict(*args: Any, **items: Any) -> dict[Any, Any]:
    return dict(*args, **items)
