"""The benchmark against other engines: its ratios, its page, its protocol, and what it refuses. No network."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from demos.bench.peers import child, environments, prepare
from demos.bench.peers.__main__ import parse, threads_of
from demos.bench.peers.environments import Peer, Unavailable, chosen, environment, read_peers
from demos.bench.peers.page import ROWS, agreement, quartiles, ratio, section
from demos.bench.peers.rounds import Entry, Measured, Plan, Rounds
from tests.helpers.checkpoints import QWEN_TEMPLATE, qwen_tokenizer

PEERS = read_peers()


def measured(scale: float, answers: list[list[int]]) -> Measured:
    """Three rounds in which everything takes `scale` times 1, 2 and 3 seconds; rates are the inverse."""
    times = [scale, 2 * scale, 3 * scale]
    cpu = {row.key: [1 / time for time in times] if row.is_rate else times for row in ROWS}
    return Measured(cpu=cpu, wall=cpu, answers=answers)


def test_quartiles_are_those_of_the_values() -> None:
    found = quartiles([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]).low == quartiles([7.0]).high == 7.0
    with pytest.raises(ValueError, match="at least one round"):
        quartiles([])


def test_a_ratio_is_taken_round_by_round_and_below_one_means_ahead() -> None:
    assert ratio([1.0, 10.0], [2.0, 20.0]).median == 0.5
    assert ratio([100.0], [50.0], is_rate=True).median == 0.5
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0, 2.0], [1.0])


def test_the_best_peer_of_a_row_is_bold_and_absent_ones_have_a_line() -> None:
    answers = [[1, 2, 3]]
    every = {"ours": measured(1.0, answers), "slow": measured(4.0, answers), "fast": measured(0.5, answers)}
    text = section("1 thread", every, {"lost": "it cannot be installed"}, "Limits: none.")
    rows = [line for line in text.splitlines() if line.startswith(("| first token", "| requests at once"))]
    assert rows[0] == "| first token | 0.25 (0.25-0.25) | **2.00 (2.00-2.00)** |"
    assert rows[1] == "| requests at once | 0.25 (0.25-0.25) | **2.00 (2.00-2.00)** |"
    assert "- lost is missing: it cannot be installed" in text
    assert "- fast: 1 of 1 answers have our tokens." in text


def test_the_first_difference_of_the_answers_is_named() -> None:
    ours, theirs = Measured(answers=[[1, 2], [3, 4]]), Measured(answers=[[1, 2], [3, 5]])
    assert agreement(ours, "x", theirs) == (
        "x: 1 of 2 answers have our tokens; the first difference is token 1 of answer 1: ours 4, theirs 5"
    )


def test_every_peer_is_pinned_and_has_an_engine() -> None:
    assert set(PEERS) == {"hf", "openvino", "llamacpp", "vllm"}
    for name in PEERS:
        assert (Path(child.__file__).parent / "engines" / f"{name}.py").is_file()


def test_a_package_without_a_version_is_refused(tmp_path: Path) -> None:
    pins = tmp_path / "peers.toml"
    pins.write_text('[a]\nwhat = "x"\npackages = ["one==1"]\noverride = ["two"]\n')
    with pytest.raises(ValueError, match="without a version: two"):
        read_peers(pins)


@pytest.mark.parametrize(("text", "words"), [("hf,nobody", "unknown nobody; allowed: hf"), (" , ", "at least one")])
def test_unknown_peers_are_refused(text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=words):
        chosen(text, PEERS)
    with pytest.raises(SystemExit):
        parse(["--peers", text])
    assert words in capsys.readouterr().err


def test_peers_and_threads_are_read() -> None:
    assert [peer.name for peer in chosen("openvino, hf,openvino", PEERS)] == ["openvino", "hf"]
    assert threads_of("1, 1") == [1, 1]
    for wrong in ("0", "one", "", "1,999"):
        with pytest.raises(ValueError, match="--threads was"):
            threads_of(wrong)
    with pytest.raises(SystemExit):
        parse(["--tokens", "1"])


def test_an_environment_is_made_again_when_its_pins_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []

    def uv(*arguments: str) -> None:
        calls.append(arguments)
        if arguments[0] == "venv":
            Path(arguments[-1]).mkdir(parents=True)

    monkeypatch.setattr(environments, "_uv", uv)

    def make(version: str) -> Path:
        peer = Peer("a", "what", (f"one=={version}",), ("two==2",))
        return environment(peer, tmp_path)

    first = make("1")
    assert [call[0] for call in calls] == ["venv", "pip"]
    assert calls[1][-1] == "one==1"
    assert (first.parents[1] / "overrides.txt").read_text() == "two==2\n"
    assert make("1") == first
    assert len(calls) == 2
    assert make("2") != first
    assert len(calls) == 4


def test_what_uv_says_last_is_why_a_peer_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "uv", lambda: sys.executable)
    with pytest.raises(Unavailable, match=r"uv nonsense failed: .*--quiet"):
        environments._uv("nonsense")


def test_names_of_tower_weights_become_the_old_ones() -> None:
    new = "vision_tower.encoder.layers.0.layer_norm1.bias"
    assert prepare.old_name(new) == "vision_tower.vision_model.encoder.layers.0.layer_norm1.bias"
    for name in ("vision_tower.vision_model.post_layernorm.bias", "language_model.norm.weight"):
        assert prepare.old_name(name) == name


def test_the_model_with_old_names_is_written_once(tmp_path: Path) -> None:
    base = tmp_path / "model"
    base.mkdir()
    save_file({"vision_tower.a": torch.ones(1), "b": torch.zeros(1)}, base / "model.safetensors")
    first = prepare.with_old_names(base)
    assert set(load_file(first / "model.safetensors")) == {"vision_tower.vision_model.a", "b"}
    (first / "mark").touch()
    assert prepare.with_old_names(base) == first
    assert (first / "mark").is_file()


def test_a_model_without_new_names_is_not_copied(tmp_path: Path) -> None:
    save_file({"b": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert prepare.with_old_names(tmp_path) == tmp_path


def test_a_folder_that_was_not_finished_is_made_again(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise Unavailable("stopped")

    with pytest.raises(Unavailable):
        prepare._once(tmp_path / "models" / "a", fail)
    made = prepare._once(tmp_path / "models" / "a", lambda folder: folder.mkdir())
    assert made == tmp_path / "models" / "a"
    assert not any(made.iterdir())
    assert prepare._once(made, fail) == made


def test_sizes_of_square_pictures_are_said_in_openvinos_way(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    for size, expected in (
        ({"height": 8, "width": 8}, {"shortest_edge": 8}),
        ({"height": 8, "width": 9}, {"height": 8, "width": 9}),
    ):
        path.write_text(json.dumps({"size": size, "other": 1}))
        prepare._with_shortest_edge(path)
        assert json.loads(path.read_text()) == {"size": expected, "other": 1}


def test_prompts_of_the_prepared_model_have_a_line_break_after_the_picture(tmp_path: Path) -> None:
    template = (prepare.base_model("tiny", tmp_path) / prepare.TEMPLATE).read_text()
    assert "'<image>\\n'" in template
    assert "'<image>'" not in template


def test_pictures_differ_and_are_the_same_again(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in prepare.write_pictures(tmp_path, 2, 0, 32)]
    assert first[0] != first[1]
    with Image.open(tmp_path / "0.png") as picture:
        assert picture.size == (32, 32)
    assert prepare.write_pictures(tmp_path, 1, 1, 32)[0].read_bytes() == first[1]


class Echo:
    """An engine that answers with numbers, some too few."""

    def __init__(self, missing: int = 0) -> None:
        self.missing = missing

    def ask(self, picture: str, question: str, num_tokens: int, stamp: Callable[[], None]) -> list[int]:
        ids = list(range(num_tokens - self.missing))
        for _ in ids:
            stamp()
        return ids

    def ask_all(self, pictures: list[str], question: str, num_tokens: int) -> list[list[int]]:
        return [list(range(num_tokens)) for _ in pictures]


def served(engine: Any, *commands: dict[str, Any]) -> list[dict[str, Any]]:
    answers = io.StringIO()
    child.serve(engine, io.StringIO("".join(json.dumps(command) + "\n" for command in commands)), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_a_process_answers_each_line() -> None:
    one = {"do": "ask", "picture": "x", "question": "?", "num_tokens": 4}
    many = {"do": "ask_all", "pictures": ["x", "y"], "question": "?", "num_tokens": 4}
    ready, asked, together, spent = served(Echo(), one, many, {"do": "spent"})
    assert ready["ready"]
    assert asked["ids"] == [0, 1, 2, 3]
    assert 0 <= asked["cpu"]["first"] <= asked["cpu"]["whole"]
    assert set(asked["wall"]) == {"first", "token", "whole"}
    assert together["ids"] == [[0, 1, 2, 3]] * 2
    assert spent["cpu_s"] >= ready["cpu_s"]
    assert spent["resident_mb"] > 1


def test_an_answer_with_too_few_tokens_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="has 3 tokens; 4 were asked for"):
        served(Echo(missing=1), {"do": "ask", "picture": "x", "question": "?", "num_tokens": 4})


def test_rounds_ask_everybody_the_same_and_a_peer_that_fails_has_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[Any]] = {"ours": [], "a": [], "broken": []}
    order: list[str] = []

    class Fake:
        def __init__(self, name: str, *_: Any) -> None:
            self.name, self.ready = name, {"cpu_s": 1.0}
            if name == "broken":
                raise Unavailable("no such thing")

        def do(self, kind: str, **arguments: Any) -> dict[str, Any]:
            if kind == "spent":
                return {"cpu_s": 2.0, "resident_mb": 3.0}
            asked[self.name].append((kind, *map(str, arguments.values())))
            order.append(self.name)
            times = {"many": 5.0} if kind == "ask_all" else {"first": 1.0, "token": 0.5, "whole": 4.0}
            ids = [[1]] if kind == "ask_all" else [1]
            return {"ids": ids, "cpu": times, "wall": times}

        def close(self) -> None:
            order.append(f"{self.name} closed")

    monkeypatch.setattr("demos.bench.peers.rounds.Child", Fake)
    entries = [Entry(name, Path("python"), Path("model")) for name in asked]
    rounds = Rounds(entries, {}, Plan(rounds=2, starts=2, tokens=4, at_once=2, side=16), tmp_path)
    rounds.run()
    assert rounds.failed == {"broken": "no such thing"}
    assert set(rounds.measured) == {"ours", "a"}
    assert asked["ours"] == asked["a"]
    pictures = [one[1] for one in asked["ours"] if one[0] == "ask"]
    assert len(set(pictures)) == 6  # three starts, then three rounds, whose two questions share a picture
    found = rounds.measured["ours"].cpu
    assert {name: len(values) for name, values in found.items()} == {
        "ready": 2, "start": 2, "resident": 2, "first": 2, "token": 2, "whole": 2, "second": 2, "many": 2
    }  # fmt: skip
    cases = [name for name in order if "closed" not in name][-12:]
    assert cases == ["a", "ours"] * 3 + ["ours", "a"] * 3  # whoever is first in a round is not in the next
    assert order[-2:] == ["ours closed", "a closed"]


def test_a_family_that_is_not_written_as_gguf_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(Unavailable, match=r"of Qwen2\.5-VL alone, and not of llava"):
        prepare.gguf(Path("python"), tmp_path, "none")


def test_the_prompt_for_llamacpp_has_places_for_picture_and_question(tmp_path: Path) -> None:
    qwen_tokenizer().save_pretrained(tmp_path)
    (tmp_path / prepare.TEMPLATE).write_text(QWEN_TEMPLATE)
    text = prepare.prompt_of(tmp_path)
    assert text.endswith("<|im_start|>user\n{picture}{question}<|im_end|>\n<|im_start|>assistant\n")


class Writer:
    """Keeps what it is given instead of a GGUF."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values, **named: self.given.update({name: values})


def test_tokens_are_filled_up_to_the_size_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace())
    from demos.bench.peers.write_gguf import add_tensor, add_tokenizer

    writer = Writer()
    tokenizer = {
        "model": {"vocab": {"<e>": 0, "a": 1, "b": 2}, "merges": [["a", "b"], "b a"]},
        "added_tokens": [{"id": 0, "content": "<e>"}],
    }
    add_tokenizer(writer, tokenizer, {"vocab_size": 4, "eos_token_id": 0})
    assert writer.given["add_token_list"] == (["<e>", "a", "b", "[unused3]"],)
    assert writer.given["add_token_types"] == ([3, 1, 1, 1],)
    assert writer.given["add_token_merges"] == (["a b", "b a"],)
    with pytest.raises(ValueError, match="no name"):
        add_tensor(writer, None, np.zeros(1), "f32")
