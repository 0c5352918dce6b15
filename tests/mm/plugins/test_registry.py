"""The registry: a plugin of another distribution is found like our own, and a broken one harms only who names it."""

from __future__ import annotations

import io
import json
import sys

import httpx
import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

import mm
from mm.build import build_encode_parts
from mm.config import ModelConfig
from mm.data.request import VisionOptions
from mm.encode.policy import resolve_reducer
from mm.errors import BrokenPlugin, InvalidOption, MissingPackage, PluginError, UnknownPlugin
from mm.plugins import registry
from mm.plugins.registry import create, describe, get, names, reason_of
from mm.plugins.spec import reducer_spec, refresh
from serve.api.routes import create_app
from serve.cli.app import app
from serve.config import ServeConfig
from serve.stages import build_local_runtime
from tests.helpers.distributions import on_path, registered, write_distribution

MODULES = {
    "raising.py": "raise RuntimeError('boom at import')\n",
    "misspelt.py": "class Right:\n    'Well.'\n",
    "needing.py": "import no_such_package_anywhere\n",
    "leaving.py": "raise SystemExit(3)\n",
    "unreadable.py": "def f(:\n",
    "plain.py": "def reducer(): ...\n",
    "undeclared.py": "class Undeclared:\n    'Says nothing.'\n",
    "half.py": (
        "from mm.plugins.reducer import Stage\n\n\n"
        "class Half:\n    'Has no method for its stage.'\n\n"
        "    acts_at, needs, query_aware, count = (Stage.PRE_LLM,), frozenset(), False, 'fixed'\n"
    ),
    "silent.py": (
        "from mm.plugins.reducer import Stage\nfrom pruning.pre_llm.uniform import Uniform\n\n\n"
        "class Silent(Uniform):\n    'Has a method that nobody calls.'\n\n"
        "    def in_prefill(self, layer, view): ...\n"
    ),
}
BROKEN = {
    "raising": ("raising:Reducer", "boom at import"),
    "misspelt": ("misspelt:Wrong", "has no attribute 'Wrong'"),
    "needing": ("needing:Reducer", "no_such_package_anywhere"),
    "leaving": ("leaving:Reducer", "SystemExit"),
    "unreadable": ("unreadable:Reducer", "SyntaxError"),
    "absent": ("no_such_module_at_all:Reducer", "no_such_module_at_all"),
    "garbled": ("not a reference", "AttributeError"),
    "plain": ("plain:reducer", "function and not a class"),
    "undeclared": ("undeclared:Undeclared", "acts_at"),
    "half": ("half:Half", "no method 'plan'"),
    "silent": ("silent:Silent", "does not declare that it acts at in_prefill"),
    "twice": ("", "registered 2 times"),
}


@pytest.fixture(scope="module", autouse=True)
def broken(tmp_path_factory):
    """A distribution per broken plugin."""
    folders = [tmp_path_factory.mktemp(name) for name in BROKEN]
    for folder, (name, (value, _)) in zip(folders, BROKEN.items(), strict=True):
        if name != "twice":
            module = f"{name}.py"
            sources = {module: MODULES[module]} if module in MODULES else {}
            write_distribution(folder, f"dist-{name}", {"reducer": {name: value}}, sources)
    for i, folder in enumerate(folders[-2:]):
        target = f"pruning.pre_llm.{['uniform:Uniform', 'random:Random'][i]}"
        write_distribution(folder, f"dist-twice-{i}", {"reducer": {"twice": target}})
    with on_path(*folders):
        yield


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_one_clear_error_for_who_names_it(name):
    for _ in range(2):
        with pytest.raises(PluginError) as caught:
            get("reducer", name)
        assert BROKEN[name][1] in reason_of(caught.value)
        assert repr(name) in str(caught.value)
    with pytest.raises(PluginError, match=name):
        reducer_spec(f"{name} + uniform")


def test_what_an_import_raised_is_for_the_operator_only():
    with pytest.raises(BrokenPlugin) as caught:
        get("reducer", "raising")
    assert "boom" not in str(caught.value)
    assert "dist-raising 1.0" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(MissingPackage):
        get("reducer", "needing")


def test_each_broken_plugin_is_listed_with_its_reason_and_the_others_are_listed():
    rows = {row["name"]: row for row in describe("reducer")}
    for name, (_, reason) in BROKEN.items():
        assert reason in rows[name]["unavailable"]
    assert rows["uniform"]["stage"] == "pre_llm"
    assert rows["mustdrop"]["stage"] == "pre_llm"
    for arguments in (["plugins"], ["plugins", "--json"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        for name, (_, reason) in BROKEN.items():
            assert name in result.output
            assert reason in result.output.replace("\\\\", "\\")
    listed = {row["name"] for row in json.loads(result.output) if "unavailable" in row}
    assert listed == set(BROKEN)


def test_others_answer_and_nothing_broken_is_imported():
    for name in ("raising", "misspelt", "needing"):
        sys.modules.pop(name, None)
    refresh()
    model = mm.load("tiny", dtype="float32", num_threads=1)
    for reducer in ("none", "divprune", "divprune + fastv"):
        answer = model.generate("What is it?", images=[picture()], reducer=reducer, max_new_tokens=2)
        assert answer.reducer == reducer_spec(reducer).canonical
    assert "misspelt" not in sys.modules
    with pytest.raises(PluginError, match="raising"):
        model.generate("What is it?", images=[picture()], reducer="raising", max_new_tokens=2)


async def test_the_server_answers_and_refuses_a_broken_plugin_by_name():
    config = ServeConfig(model=ModelConfig(dtype="float32", num_threads=1))
    runtime = build_local_runtime(config)
    transport = httpx.ASGITransport(app=create_app(runtime, config))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        for reducer in ("none", "divprune"):
            answer = await client.post("/v1/chat/completions", json=body | {"vision": {"reducer": reducer}})
            assert answer.status_code == 200, answer.text
        for name in ("raising", "misspelt", "needing"):
            refused = await client.post("/v1/chat/completions", json=body | {"vision": {"reducer": name}})
            assert refused.status_code == 400
            assert repr(name) in refused.json()["error"]["message"]
            assert "boom" not in refused.text
    runtime.close()


def picture() -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(file, "png")
    return file.getvalue()


def test_a_spec_loads_only_what_it_names(monkeypatch):
    loaded = []
    load = registry.importlib.metadata.EntryPoint.load
    monkeypatch.setattr(registry.importlib.metadata.EntryPoint, "load", lambda p: (loaded.append(p.name), load(p))[1])
    refresh()
    assert reducer_spec("uniform:keep_ratio=0.5 + fastv:layer=7").canonical.startswith("uniform:")
    assert set(loaded) <= {"uniform", "fastv", "pipeline"}


def test_a_request_s_reducer_is_parsed_and_built_once(monkeypatch):
    parts = build_encode_parts(ModelConfig(dtype="float32"))
    vision = VisionOptions(reducer="divprune:keep_ratio=0.125,joint=true")
    first = resolve_reducer(vision, parts)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a known text was parsed or built again")

    monkeypatch.setattr("mm.plugins.spec.parse_spec", refuse)
    monkeypatch.setattr("mm.plugins.spec.create", refuse)
    assert resolve_reducer(vision, parts) is first


def test_listing_names_imports_nothing(tmp_path):
    with registered(tmp_path / "more", "drafter", {"stranger": "no_such_module_at_all:Drafter"}):
        assert "stranger" in names("drafter")
    assert "stranger" not in names("drafter")


def test_a_distribution_whose_entry_points_cannot_be_read_is_left_out(tmp_path, caplog):
    write_distribution(tmp_path, "dist-damaged", {"reducer": {}})
    (tmp_path / "dist_damaged-1.0.dist-info/entry_points.txt").write_text("[mm.reducers]\nno equals sign here\n")
    with on_path(tmp_path):
        assert reducer_spec("divprune + fastv").capabilities.query_aware
    assert "dist-damaged" in caplog.text


def test_mistakes_name_the_nearest():
    with pytest.raises(UnknownPlugin, match="did you mean 'uniform'"):
        create("reducer", "unifrom")
    with pytest.raises(InvalidOption, match="did you mean 'keep_ratio'"):
        create("reducer", "uniform", keepratio=0.5)
    with pytest.raises(InvalidOption, match="options: none"):
        reducer_spec("none:keep_ratio=0.5")
