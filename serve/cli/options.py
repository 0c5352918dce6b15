"""Options that are made from settings, and where their values come from.

A value on the command line counts before an environment variable (`MM_<NAME>`), that before the file of `--config`, and
that before the default.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from mm.errors import InvalidOption
from mm.settings import VARIABLE, Setting, build, plain_settings, settings_of

T = TypeVar("T")
Command = Callable[..., Any]

EPILOG = (
    "Every setting can also be given as the environment variable MM_<NAME>, or in the file of --config with its name "
    "as key. The command line counts first, then the environment, then the file."
)
SOURCES = {
    ParameterSource.COMMANDLINE: "command line",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "file",
}


class TextType(click.ParamType[str]):
    """One text of a list. In an environment variable a list is JSON, or words with spaces between them."""

    name = "text"

    def split_envvar_value(self, rv: str) -> list[str]:
        if not rv.lstrip().startswith("["):
            return rv.split()
        try:
            return [str(item) for item in json.loads(rv)]
        except ValueError:
            raise click.BadParameter(f"{rv!r} is no JSON list") from None


def setting_options(
    cls: type,
    *,
    only: tuple[str, ...] | None = None,
    leave_out: tuple[str, ...] = (),
    model_argument: bool = False,
) -> Callable[[Command], Command]:
    """Give a command an option for each setting of `cls`; it gets what was given as the mapping `settings`.

    Args:
        only: Names of the settings to take; None takes all that the command line shows.
        leave_out: Names of settings that the command has no use for.
        model_argument: Whether `model` is an argument and not an option.
    """
    known = {one.name: one for one in settings_of(cls)}
    names = only if only is not None else [name for name, one in known.items() if not one.bounds.hidden]
    chosen = [known[name] for name in names if name not in leave_out]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def with_settings(**values: Any) -> Any:
            return command(settings=_given(chosen, values), **values)

        decorated: Command = with_settings
        for one in reversed(chosen):
            is_argument = model_argument and one.name == "model"
            decorated = (_argument if is_argument else _option)(one)(decorated)
        return decorated

    return decorate


def _given(chosen: list[Setting], values: dict[str, Any]) -> dict[str, Any]:
    """Take the settings out of `values`, and return those that were given."""
    context = click.get_current_context()
    taken = {one.name: _plain(one, values.pop(one.name)) for one in chosen}
    return {name: value for name, value in taken.items() if context.get_parameter_source(name) in SOURCES}


def _plain(one: Setting, value: Any) -> Any:
    """The setting's value; a flag that stands for a choice is on or off here."""
    return value if one.bounds.flag is None else one.bounds.flag if value else one.default


def _argument(one: Setting) -> Callable[[Command], Command]:
    return click.argument(one.name, required=False, envvar=VARIABLE + one.name.upper())


def _option(one: Setting) -> Callable[[Command], Command]:
    option = f"--{one.name.replace('_', '-')}"
    common: dict[str, Any] = {"help": _help(one), "envvar": VARIABLE + one.name.upper(), "default": None}
    if one.kind is bool or one.bounds.flag is not None:
        return click.option(f"{option}/--no-{option.removeprefix('--')}", one.name, **common)
    if one.is_list:
        return click.option(option, one.name, multiple=True, type=TextType(), **common)
    metavar = f"[{'|'.join(one.bounds.choices)}]" if one.bounds.choices else None
    return click.option(option, one.name, type=one.kind, metavar=metavar, **common)


def _help(one: Setting) -> str:
    """The setting's help text with its default and its range."""
    default = ("on" if one.default else "off") if one.kind is bool else one.default
    shown = "" if one.default is None or one.is_list or one.bounds.flag else f"default: {default}"
    facts = "; ".join(filter(None, [shown, one.bounds.allowed]))
    return f"{one.bounds.help}  [{facts}]" if facts else one.bounds.help


def config_option(cls: type) -> Callable[[Command], Command]:
    """Give a command `--config`: a file with settings of `cls`, used where neither options nor environment say more."""

    def read(context: click.Context, _: click.Parameter, path: Path | None) -> None:
        if path is not None:
            context.default_map = read_settings(path, cls)

    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=read,
        help="YAML or JSON file with settings.",
    )


def read_settings(path: Path, cls: type) -> dict[str, Any]:
    """The settings of `cls` in a YAML or JSON file, by public name; keys may be field names too, with - or _.

    Raises:
        InvalidOption: The file cannot be read, a key is unknown, or a value cannot be used.
    """
    settings = plain_settings(cls, _content(path), str(path))
    flags = {one.name: one.bounds.flag for one in settings_of(cls) if one.bounds.flag is not None}
    return {name: value == flags[name] if name in flags else value for name, value in settings.items()}


def _content(path: Path) -> Any:
    """What the file holds; JSON is read without PyYAML."""
    owner = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOption(owner, "config", f"cannot be read: {error}") from None
    try:
        if path.suffix == ".json":
            return json.loads(text)
        import yaml

        return yaml.safe_load(text)
    except ModuleNotFoundError:
        raise InvalidOption(owner, "config", "needs PyYAML: pip install 'mm-serving[models]', or write JSON") from None
    except Exception as error:  # each of the two libraries has its own tree of errors
        raise InvalidOption(owner, "config", f"cannot be read: {' '.join(str(error).split())}") from None


def print_settings(config: object) -> None:
    """Print the settings of `config` as YAML, each with its origin. Secrets are left out."""
    context = click.get_current_context()
    for one in settings_of(type(config)):
        if not one.bounds.hidden:
            value = one.value_in(config)
            source = context.get_parameter_source(one.name)
            origin = SOURCES.get(source, "default") if source else "default"
            click.echo(f"{one.name}: {'(hidden)' if one.bounds.secret and value else json.dumps(value)}  # {origin}")


def build_config(cls: type[T], settings: Mapping[str, Any], **fixed: Any) -> T:
    """The configuration that a command's settings describe; `fixed` are those that the command decides.

    Raises:
        InvalidOption: A value cannot be used.
    """
    values = {**settings, **fixed}
    if "reducer" in values:
        values["reducer"] = read_reducer(values["reducer"])
    for name in ("chat_template", "batch_dir", "record_trace"):  # a replica may run in another folder
        if values.get(name):
            values[name] = str(Path(values[name]).expanduser().resolve())
    return build(cls, values, "model")


def read_reducer(given: str) -> str:
    """A reducer's specification: `given`, or what a file of `mm tune` holds. Requests cannot name files.

    Raises:
        InvalidOption: The file cannot be read, or does not name a reducer.
    """
    if not given.endswith(".json"):
        return given
    try:
        spec = json.loads(Path(given).read_text(encoding="utf-8"))["reducer"]
    except OSError as error:
        raise InvalidOption("reducer", given, f"cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        spec = None
    if not isinstance(spec, str):
        raise InvalidOption("reducer", given, 'does not name a reducer; it has to be JSON such as {"reducer": "fastv"}')
    return spec
