"""Where a setting's value comes from: command line, environment, file, default; in this order."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from mm.config import ModelConfig
from mm.errors import InvalidOption
from mm.settings import settings_of
from serve.cli.app import app
from serve.cli.checks import check_early
from serve.cli.options import build_config, config_option, read_settings, setting_options
from serve.config import ServeConfig

KNOWN = {one.name: one for one in settings_of(ServeConfig)}
SOURCES = {"line": "5", "environment": "6", "file": "7"}
"""A source of a value for max_num_seqs, and the value it gives."""


def configured(arguments: list[str], environment: dict[str, str] | None = None) -> ServeConfig:
    """What a command with the settings of a server makes of its arguments."""
    made: list[ServeConfig] = []

    @click.command()
    @setting_options(ServeConfig, model_argument=True)
    @config_option(ServeConfig)
    def command(settings: dict[str, Any]) -> None:
        made.append(build_config(ServeConfig, settings))

    result = CliRunner().invoke(command, arguments, env=environment)
    if result.exception is not None:
        raise result.exception
    return made[0]


@pytest.mark.parametrize("sources", [c for n in range(4) for c in itertools.combinations(SOURCES, n)])
def test_the_first_source_counts(sources: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "mm.yaml"
    file.write_text(f"max-num-seqs: {SOURCES['file']}\n")
    arguments = ["--config", str(file)] if "file" in sources else []
    arguments += ["--max-num-seqs", SOURCES["line"]] if "line" in sources else []
    environment = {"MM_MAX_NUM_SEQS": SOURCES["environment"]} if "environment" in sources else {}
    expected = int(SOURCES[sources[0]]) if sources else ModelConfig().max_num_seqs
    assert configured(arguments, environment).model.max_num_seqs == expected


def test_every_setting_can_be_given_in_every_way(tmp_path: Path) -> None:
    """A value other than the default arrives, by option, environment variable and file alike."""
    for one in (one for one in KNOWN.values() if not one.bounds.hidden):
        value = other_than_default(one)
        path = tmp_path / "mm.json"
        path.write_text(json.dumps({one.name: value}))
        words = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        environment = json.dumps(value) if isinstance(value, list) else "1" if one.bounds.flag else words[0]
        option = f"--{one.name.replace('_', '-')}"
        arguments = list(itertools.chain.from_iterable((option, word) for word in words))
        if isinstance(value, bool):
            arguments = [option if value else f"--no-{option.removeprefix('--')}"]
        arguments = words if one.name == "model" else [option] if one.bounds.flag else arguments
        for config in (
            configured(arguments),
            configured([], {f"MM_{one.name.upper()}": environment}),
            configured(["--config", str(path)]),
        ):
            assert one.value_in(config) == (tuple(value) if isinstance(value, list) else value), one.name


def other_than_default(one: Any) -> Any:
    if one.name == "allow_host":
        return ["mm.example.org", "b"]
    if one.name in ("encoder_label", "prefill_label", "decoder_label"):
        return ["zone=b", "kind=in(T4,L4)"]
    if one.name in ("address", "route_prefix"):
        return {"address": "10.0.0.4:6379", "route_prefix": "/tiny"}[one.name]
    if one.name in ("chat_template", "batch_dir", "record_trace"):  # a path is made absolute
        return "/other"
    if one.name == "allow_origin":
        return ["https://app.example.org", "http://b"]
    if one.is_list:
        return ["copy + recycle", "b"]
    if one.kind is bool:
        return not one.default
    if one.kind is str:
        return next((choice for choice in one.bounds.choices if choice != one.default), "other")
    return one.kind(one.default or 0) + 1 if one.bounds.max != 1 else 0.5


@pytest.mark.parametrize(("given", "expected"), [("1", "keep_all"), ("true", "keep_all"), ("0", "fail")])
def test_a_flag_that_stands_for_a_choice_is_on_or_off(given: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "mm.yaml"
    path.write_text(f"lenient_reducers: {'true' if given != '0' else 'false'}")
    assert configured([], {"MM_LENIENT_REDUCERS": given}).model.reducers.on_error == expected
    assert configured(["--config", str(path)]).model.reducers.on_error == expected


def test_keys_may_be_several() -> None:
    assert configured([], {"MM_API_KEY": "one two"}).api_keys == ("one", "two")
    assert configured(["--api-key", "three"], {"MM_API_KEY": "one two"}).api_keys == ("three",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_num_sqs: 4", "option 'max_num_sqs' is unknown; did you mean 'max_num_seqs'?"),
        ("max_num_seqs: 0", "option 'max_num_seqs' was 0; it has to be at least 1"),
        ("max_num_seqs: many", "option 'max_num_seqs' was 'many'; it has to be a whole number, at least 1"),
        ("allow_drafter: copy", "option 'allow_drafter' was 'copy'; it has to be a list of texts"),
        ("frames: 4\nnum_frames: 5", "option 'num_frames' is given twice"),
        ("- 1", "it has to hold one name and value per line"),
        ("a: b: c", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_its_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mm.yaml"
    path.write_text(text)
    with pytest.raises(InvalidOption) as refused:
        read_settings(path, ServeConfig)
    assert str(path) in str(refused.value)
    assert message in str(refused.value)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match=r"absent\.yaml.*cannot be read"):
        read_settings(tmp_path / "absent.yaml", ServeConfig)


def test_the_settings_are_printed_with_their_origin(tmp_path: Path) -> None:
    path = tmp_path / "mm.yaml"
    path.write_text("max_waiting: 9\napi_key: [secret]\n")
    arguments = ["serve", "--config", str(path), "--port", "81", "--print-config"]
    result = CliRunner().invoke(app, arguments, env={"MM_DTYPE": "float32"})
    lines = result.output.splitlines()
    assert {
        "port: 81  # command line",
        'dtype: "float32"  # environment',
        "max_waiting: 9  # file",
        "max_num_seqs: 64  # default",
        "api_key: (hidden)  # file",
    } <= set(lines)
    assert "secret" not in result.output
    path.write_text("\n".join(line for line in lines if "hidden" not in line))
    assert configured(["--config", str(path)]).model.max_waiting == 9


def test_what_this_machine_lacks_a_cluster_may_have(monkeypatch):
    monkeypatch.setattr("serve.cli.checks.count_gpus", lambda: 0)
    for config in (ModelConfig(device="cuda"), ModelConfig(kv_cache_gb=1e6)):
        check_early(config, is_local=False)
        with pytest.raises(InvalidOption):
            check_early(config)
