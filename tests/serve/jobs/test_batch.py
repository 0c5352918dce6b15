"""Jobs over rows: every kind of input and of output, kills, retries and equal rows."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm.config import ModelConfig
from serve.jobs.batch.job import BatchJob, Prompt, read_prompts
from serve.jobs.batch.progress import Counts, Progress
from serve.jobs.batch.rows import COLUMNS, parse_columns
from serve.jobs.batch.run import run_batch
from serve.jobs.job import JobError
from tests.serve.jobs.rows_server import BAD, answer_of, rows_server

MM = [sys.executable, "-c", "from serve.cli.app import main; main()"]


@pytest.fixture
def server():
    with rows_server() as running:
        yield running


def picture(i: int) -> bytes:
    return b"\x89PNG" + str(i).encode()


def records_of(out: Path, form: str = "jsonl") -> list[dict]:
    """The records in the shards that the manifest names, which are all that there are."""
    named = [shard["file"] for shard in json.loads((out / "manifest.json").read_text())["shards"]]
    assert sorted(path.name for path in out.glob("part-*")) == sorted(named)
    read = {
        "parquet": lambda path: pq.read_table(path).to_pylist(),
        "jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
    }[form]
    return [record for name in named for record in read(out / name)]


def failures_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]


def run(inputs, out, server, **options) -> int:
    names = inputs if isinstance(inputs, tuple) else (str(inputs),)
    return run_batch(BatchJob(inputs=names, out=out, url=server.url, quiet=True, **options))


def write_inputs(folder: Path) -> dict[str, list]:
    """The same three pictures in every kind of input; for each the ids that its records have."""
    data = [picture(i) for i in range(3)]
    for i, content in enumerate(data):
        (folder / f"p{i}.png").write_bytes(content)
    pq.write_table(pa.table({"id": [7, 8, 9], "image": data}), folder / "bytes.parquet")
    pq.write_table(pa.table({"media": [f"p{i}.png" for i in range(3)]}), folder / "paths.parquet")
    structs = [{"bytes": content, "path": None} for content in data]
    (folder / "hub").mkdir()
    (folder / "hub" / "state.json").write_text("{}")
    table = pa.table({"image": structs, "id": ["a", "b", "c"]})
    with (
        pa.OSFile(str(folder / "hub" / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table)
    with open(folder / "table.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([("id", "image", "max_visual_tokens"), *((f"c{i}", f"p{i}.png", "5") for i in range(3))])
    (folder / "lines.jsonl").write_text("".join(json.dumps({"id": i, "image": f"p{i}.png"}) + "\n" for i in range(3)))
    (folder / "list.txt").write_text("# pictures\n" + "".join(f"p{i}.png\n" for i in range(3)))
    with tarfile.open(folder / "web.tar", "w") as archive:
        for i, content in enumerate(data):
            for name, body in ((f"s{i}.png", content), (f"s{i}.txt", b"x")):
                entry = tarfile.TarInfo(name)
                entry.size = len(body)
                archive.addfile(entry, io.BytesIO(body))
    return {
        "bytes.parquet": [7, 8, 9],
        "paths.parquet": [0, 1, 2],
        "hub": ["a", "b", "c"],
        "table.csv": ["c0", "c1", "c2"],
        "lines.jsonl": [0, 1, 2],
        "list.txt": ["p0.png", "p1.png", "p2.png"],
        "web.tar": ["s0", "s1", "s2"],
        "*.png": ["p0.png", "p1.png", "p2.png"],
        ".": ["p0.png", "p1.png", "p2.png"],
    }


def test_every_kind_of_input_gives_the_same_answers_with_its_own_ids(tmp_path, server, monkeypatch):
    ids = write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, expected in ids.items():
        out = tmp_path / "out" / name.replace("*", "glob")
        inputs = ("p0.png", "p1.png", "p2.png") if name == "." else (name,)
        assert run(inputs, out, server) == 0, name
        found = {record["id"]: record["text"] for record in records_of(out)}
        assert found == {key: answer_of(picture(i)) for i, key in enumerate(expected)}, name
    assert [b["vision"] for b in server.bodies if "vision" in b] == [{"max_visual_tokens": 5}] * 3


def test_every_form_of_output_holds_every_row(tmp_path, server, monkeypatch):
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    answers = {f"p{i}.png": answer_of(picture(i)) for i in range(3)}
    assert run("*.png", tmp_path / "o1", server, form="parquet") == 0
    assert {record["id"]: record["text"] for record in records_of(tmp_path / "o1", "parquet")} == answers
    assert run("*.png", tmp_path / "o2", server, form="webdataset") == 0
    with tarfile.open(tmp_path / "o2" / "part-00000.tar") as archive:
        content = {member.name: archive.extractfile(member).read() for member in archive}
    assert content["p1.png"] == picture(1)
    assert content["p1.txt"].decode() == answers["p1.png"]
    assert json.loads(content["p1.json"])["id"] == "p1.png"
    assert run("*.png", tmp_path / "o3", server, form="txt") == 0
    assert (tmp_path / "o3" / "p2.txt").read_text() == answers["p2.png"] + "\n"
    assert run("*.png", tmp_path / "o4", server, form="json") == 0
    assert json.loads((tmp_path / "o4" / "p2.json").read_text())["text"] == answers["p2.png"]
    count = len(server.bodies)
    assert run("*.png", tmp_path / "o3", server, form="txt", skip_existing=True, restart=True) == 0
    assert len(server.bodies) == count, "all had a file"


def test_rows_whose_files_would_be_one_are_refused_and_dots_of_ids_stay(tmp_path, server):
    data = [picture(i) for i in range(4)]
    pq.write_table(pa.table({"id": ["a.png", "a.jpg", "v1.2", "v1.3"], "image": data}), tmp_path / "rows.parquet")
    for _ in range(2):  # the second run finds the same
        assert run(tmp_path / "rows.parquet", tmp_path / "out", server, form="txt") == 3
        found = {path.name: path.read_text().strip() for path in (tmp_path / "out").glob("*.txt")}
        assert found == {f"{name}.txt": answer_of(data[i]) for i, name in ((0, "a"), (2, "v1.2"), (3, "v1.3"))}
        (failure,) = failures_of(tmp_path / "out" / ".mm")
        assert (failure["id"], 'the row "a.png" already' in failure["message"]) == ("a.jpg", True)


def test_models_that_answer_otherwise_are_other_settings():
    changes = [{"quantize": "int8"}, {"engine": "vllm"}, {"dtype": "bfloat16"}, {"keep_ratio": 0.5}, {"num_frames": 3}]
    jobs = [BatchJob(inputs=("x",), out=Path("y"), model=ModelConfig(**change)) for change in ({}, *changes)]
    assert len({json.dumps(job.settings(), sort_keys=True) for job in jobs}) == len(jobs)


def test_a_batch_of_openai_comes_back_in_its_form(tmp_path, server):
    def line(name, **changes):
        body = {"model": "x", "messages": [{"role": "user", "content": name}]}
        return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body} | changes)

    (tmp_path / "in.jsonl").write_text("\n".join([line("one"), line("two"), line("three", url="/v1/audio"), "{]"]))
    assert run(tmp_path / "in.jsonl", tmp_path / "out", server, form="openai") == 3
    found = {record["custom_id"]: record for record in records_of(tmp_path / "out")}
    assert found.keys() == {"one", "two"}
    answer = found["two"]["response"]
    assert (answer["status_code"], found["two"]["error"]) == (200, None)
    assert answer["body"]["choices"][0]["message"]["content"] == "TWO"
    assert {failure["id"] for failure in failures_of(tmp_path / "out")} == {"three", 3}


def test_equal_rows_are_asked_once_and_failures_are_tried_again_on_request(tmp_path, server):
    data = [picture(0), picture(0), BAD, BAD, picture(1)]
    pq.write_table(pa.table({"image": data, "id": ["a", "b", "c", "d", "a"]}), tmp_path / "rows.parquet")
    out = tmp_path / "out"
    assert run(tmp_path / "rows.parquet", out, server) == 3
    records = records_of(out)
    assert sorted(record["id"] for record in records) == ["a", "b"]
    assert len({record["text"] for record in records}) == 1
    assert [record["same_as"] for record in records if record["same_as"]] in (["a"], ["b"])
    failed = {failure["id"]: failure for failure in failures_of(out)}
    assert failed.keys() == {"c", "d", "rows.parquet:4#4"}
    assert (failed["c"]["stage"], failed["c"]["code"], failed["c"]["attempts"]) == ("load", "media_undecodable", 1)
    count = len(server.bodies)
    assert run(tmp_path / "rows.parquet", out, server) == 3
    assert len(server.bodies) == count, "nothing is asked again"
    assert run(tmp_path / "rows.parquet", out, server, retry_failed=True) == 3
    assert {failure["id"]: failure["attempts"] for failure in failures_of(out)}["c"] == 2
    assert sorted(record["id"] for record in records_of(out)) == ["a", "b"]


def test_named_prompts_are_columns_and_schemas_are_sent(tmp_path, server):
    (tmp_path / "prompts.yaml").write_text(
        "short: Say it shortly.\nfacts: {text: Give facts., schema: {type: object}, max_tokens: 9}\n"
    )
    pq.write_table(pa.table({"image": [picture(0)]}), tmp_path / "rows.parquet")
    prompts = read_prompts(tmp_path / "prompts.yaml")
    assert run(tmp_path / "rows.parquet", tmp_path / "out", server, prompts=prompts, form="parquet") == 0
    record = records_of(tmp_path / "out", "parquet")[0]
    assert record["short"] == record["facts"] == answer_of(picture(0))
    assert (record["id"], record["num_prompt_tokens"]) == (0, 18)
    short, facts = server.bodies
    assert short["messages"][0]["content"][1]["text"] == "Say it shortly."
    assert (facts["response_format"]["json_schema"]["schema"], facts["max_tokens"]) == ({"type": "object"}, 9)
    (tmp_path / "wrong.json").write_text('{"id": "x"}')
    with pytest.raises(JobError, match="column of the results"):
        read_prompts(tmp_path / "wrong.json")


def test_other_settings_do_not_mix_and_a_restart_begins_anew(tmp_path, server, capsys):
    pq.write_table(pa.table({"image": [picture(0)]}), tmp_path / "rows.parquet")
    assert run(tmp_path / "rows.parquet", tmp_path / "out", server) == 0
    other = {"prompts": (Prompt(text="What else?"),)}
    assert run(tmp_path / "rows.parquet", tmp_path / "out", server, **other) == 1
    assert "other settings" in capsys.readouterr().err
    assert run(tmp_path / "rows.parquet", tmp_path / "out", server, restart=True, **other) == 0
    assert len(records_of(tmp_path / "out")) == 1


def test_a_full_server_is_asked_less_and_again_and_a_dead_one_ends_the_job(tmp_path, capsys):
    pq.write_table(pa.table({"image": [picture(i) for i in range(40)]}), tmp_path / "rows.parquet")
    with rows_server(full_each=5) as full:
        assert run(tmp_path / "rows.parquet", tmp_path / "out", full) == 0
        assert full.num_refused > 5
    assert sorted(record["id"] for record in records_of(tmp_path / "out")) == list(range(40))
    assert run(tmp_path / "rows.parquet", tmp_path / "other", full) == 1
    assert "cannot be reached" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["uid=id", "id", "id=", "imagee=x"])
def test_columns_that_do_not_exist_are_named(text):
    with pytest.raises(Exception, match="--columns"):
        parse_columns(text)
    assert parse_columns("id=uid") == {name: "uid" if name == "id" else name for name in COLUMNS}


def test_progress_fits_eighty_columns_and_says_the_same_as_json():
    counts = Counts(
        total=1_000_000_000, done=999_999_999, failed=12_345, num_visual_tokens_in=7, num_visual_tokens_kept=1
    )
    shown = io.StringIO()
    line = Progress(counts, out=shown).line(time.monotonic() + 3)
    assert len(line) < 80
    assert [line.index(word) for word in ("1,000,012,344/", "/s", "12,345 failed", "ETA")] == sorted(
        line.index(word) for word in ("1,000,012,344/", "/s", "12,345 failed", "ETA")
    )
    fields = json.loads(Progress(counts, as_json=True, out=shown).line(time.monotonic() + 3))
    assert (fields["seen"], fields["failed"], fields["total"]) == (1_000_012_344, 12_345, 1_000_000_000)


def assert_all_files_parse(out: Path) -> None:
    for path in out.glob("*"):
        if path.suffix == ".parquet":
            pq.read_table(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text().splitlines()]


def test_kills_at_random_points_lose_and_double_no_row(tmp_path):
    chance = random.Random(4)
    pictures = [picture(i) for i in range(100)]
    data = [BAD if i % 31 == 7 else chance.choice(pictures) if i % 3 == 0 else picture(1000 + i) for i in range(240)]
    pq.write_table(pa.table({"uid": [f"u{i}" for i in range(240)], "image": data}), tmp_path / "rows.parquet")
    out = tmp_path / "out"
    arguments = [
        "run-batch",
        str(tmp_path / "rows.parquet"),
        "--columns",
        "id=uid",
        "--to",
        "parquet",
        "--out",
        str(out),
    ]
    with rows_server(delay_s=0.002) as server:
        arguments += ["--url", server.url, "--shard-rows", "16", "--concurrency", "8", "--quiet"]
        for kill in range(1, 4):
            at = kill * 45 + chance.randrange(20)
            process = subprocess.Popen([*MM, *arguments])
            server.on_request = lambda count, p=process, at=at: os.kill(p.pid, signal.SIGKILL) if count == at else None
            assert process.wait(60) == -signal.SIGKILL
            assert_all_files_parse(out)
        server.on_request = lambda count: None
        assert subprocess.run([*MM, *arguments], timeout=60, check=False).returncode == 3
        assert len(server.bodies) <= 240 + 3 * 8, "nothing that was kept is asked for again"
    records = records_of(out, "parquet")
    bad = {f"u{i}" for i, content in enumerate(data) if content == BAD}
    assert sorted([record["id"] for record in records] + [failure["id"] for failure in failures_of(out)]) == sorted(
        f"u{i}" for i in range(240)
    )
    assert {failure["id"] for failure in failures_of(out)} == bad
    assert all(record["text"] == answer_of(data[int(record["id"][1:])]) for record in records)
    assert (out / ".pending.jsonl").stat().st_size == 0
