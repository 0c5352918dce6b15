"""R10, R14, R15, R16: faults inside: no memory, plugins at fault, killed jobs, folders that want to run code."""

from __future__ import annotations

import base64
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from demos.bench.reliability.attacks import ask, judged
from demos.bench.reliability.checks import Figure, Settings, at_least, at_most, check
from demos.bench.reliability.load import picture
from demos.bench.reliability.processes import resident_mb
from demos.bench.reliability.server import Server, server
from mm.models.checkpoint import find
from tests.helpers.distributions import write_distribution

IN_PROCESS = ("--in-process", "--kv-cache-gb", "0.1")


def image(seed: int, side_px: int = 96) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": picture(seed, side_px)}}


# ── R10 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@check("R10")
def no_memory(settings: Settings) -> Iterator[Figure]:
    """The server's address space ends a little above what it uses, while pictures and long answers are asked for."""
    rng = random.Random(f"{settings.seed} R10")
    question = {"temperature": 0, "max_tokens": 8}
    with (
        server(*IN_PROCESS, "--cache-bytes", "0") as running,
        httpx.Client(base_url=running.url, timeout=120) as client,
    ):
        before = _text(ask(client, image(7), **question))
        answers = []
        for _ in range(settings.size(30, 500)):
            with _limited(running, rng.randrange(0, 64 << 20)):
                pictures = [image(rng.randrange(2**32), rng.choice((96, 900))) for _ in range(rng.randint(0, 12))]
                answers.append(ask(client, *pictures, max_tokens=rng.choice((1, 64))))
        after = _text(ask(client, image(7), **question))
        is_running = running.process.poll() is None
    hung = sum(answer is None for answer in answers)
    failed = sum(answer is not None and not answer.is_success for answer in answers)
    yield at_least(f"requests of {len(answers)} that had no memory and said so", failed, 1)
    yield at_most("requests without an answer", hung, 0)
    yield at_least("the server runs on, and answers as before", float(is_running and before == after != ""), 1)


class _limited:
    """Leaves the server so much more address space while the context is open."""

    def __init__(self, running: Server, num_bytes: int) -> None:
        self._pid, self._num_bytes = running.process.pid, num_bytes

    def __enter__(self) -> None:
        used = int(Path(f"/proc/{self._pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(self._pid, resource.RLIMIT_AS, (used + self._num_bytes, resource.RLIM_INFINITY))

    def __exit__(self, *_: object) -> None:
        resource.prlimit(self._pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _text(answer: httpx.Response | None) -> str:
    return answer.json()["choices"][0]["message"]["content"] if answer is not None and answer.is_success else ""


# ── R14 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

PLUGIN = '''
import time
from dataclasses import dataclass
from typing import ClassVar
from pruning.base import BaseReducer

def misbehave(how):
    if how == "exits":
        raise SystemExit(3)
    if how == "raises":
        raise RuntimeError("no")
    if how == "fills":
        raise MemoryError
    while how == "loops":
        pass
    while how == "sleeps":
        time.sleep(1)

@dataclass(frozen=True, kw_only=True)
class Bad(BaseReducer):
    """At fault."""
    how: str = "raises"
    def reduce(self, tokens, text=None):
        misbehave(self.how)
'''


@check("R14")
def plugins(settings: Settings) -> Iterator[Figure]:
    """A reducer that raises, exits, loops or sleeps, while others ask without it."""
    with tempfile.TemporaryDirectory() as folder:
        write_distribution(Path(folder), "bad", {"reducer": {"bad": "bad_plugin:Bad"}}, {"bad_plugin.py": PLUGIN})
        options = (*IN_PROCESS, "--reducer-timeout-s", "1", "--plugin-retry-s", "2")
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH", "")]))
        with server(*options, env={"PYTHONPATH": path}) as running:
            yield from _with_plugins(settings, running)


def _with_plugins(settings: Settings, running: Server) -> Iterator[Figure]:
    with httpx.Client(base_url=running.url, timeout=120) as client:
        own, others, off = [], [], set[str]()
        for turn in range(settings.size(3, 40)):
            for how in ("raises", "exits", "fills", "loops", "sleeps"):
                own.append(ask(client, image(turn), vision={"reducer": f"bad:how={how}"}))
                off |= {one["name"] for one in client.get("/health").json().get("plugins_off", ())}
                others.append(ask(client, image(turn + 1000)))
        health = client.get("/health").json()
    failed = sum(answer is not None and answer.status_code >= 400 for answer in own)
    yield at_least(f"requests of {len(own)} with the plugin that failed, and said why", failed, len(own))
    yield from judged("requests without the plugin", others)
    yield at_most("of them not answered", sum(a is None or not a.is_success for a in others), 0)
    yield at_least("the plugin is switched off meanwhile, by its registered name", float(off == {"bad"}), 1)
    yield at_least("the server is healthy", float(health["status"] == "ok"), 1)


# ── R15 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@check("R15")
def killed_jobs(settings: Settings) -> Iterator[Figure]:
    """A caption job that is killed again and again, and resumed."""
    rng = random.Random(f"{settings.seed} R15")
    count, kills = settings.size(40, 400), settings.size(3, 25)
    with tempfile.TemporaryDirectory() as folder:
        pictures, out = Path(folder) / "in", Path(folder) / "out"
        pictures.mkdir()
        for i in range(count):
            (pictures / f"{i}.png").write_bytes(base64.b64decode(picture(rng.randrange(2**32)).partition(",")[2]))
        command = [
            sys.executable,
            "-m",
            "serve.cli.app",
            "caption",
            str(pictures),
            "--out",
            str(out),
            "--model",
            "tiny",
        ]
        command += ["--threads", "1", "--kv-cache-gb", "0.1"]
        lost, last = 0, 0
        for _ in range(kills):
            job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            wanted = last + rng.randint(1, max(1, count // (kills + 2)))
            while job.poll() is None and len(_captions(out)) < wanted:
                time.sleep(0.02)
            job.kill()
            job.wait()
            lost, last = lost + max(0, last - len(_captions(out))), len(_captions(out))
        code = subprocess.run(command, capture_output=True, timeout=600, check=False).returncode
        paths = [record["path"] for record in _captions(out)]
    yield at_most(f"captions lost in {kills} kills", lost, 0)
    yield at_most("exit code of the last run", code, 0)
    yield at_least(
        f"pictures of {count} with exactly one caption", len(set(paths)) - (len(paths) - len(set(paths))), count
    )


def _captions(out: Path) -> list[dict[str, Any]]:
    path = out / "captions.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


# ── R16 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@check("R16")
def supply_chain(settings: Settings) -> Iterator[Figure]:
    """Folders that ask for code, memory or time, and damaged ones, through the command line."""
    marker = Path(tempfile.gettempdir()) / f"mm-reliability-{settings.seed}"
    code = f"open({str(marker)!r}, 'w').close()\n"
    named = {"auto_map": {"AutoConfig": "evil.A", "AutoTokenizer": ["evil.A", None], "AutoProcessor": "evil.A"}}
    wrong: list[str] = []
    cases: list[tuple[str, dict[str, Any] | bytes]] = [
        ("config.json", named),
        ("processor_config.json", named),
        ("tokenizer_config.json", named),
        ("preprocessor_config.json", named),
        ("config.json", b'{"model_type": '),
        ("tokenizer.json", b"{}"),
        ("generation_config.json", b"[]"),
        ("chat_template.jinja", b"{{ 'a' | center(3000000000) }}"),
    ]
    for file, change in cases:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(shutil.copytree(find("tiny"), Path(folder) / "model"))
            (model / "evil.py").write_text(code)
            path = model / file
            found = json.loads(path.read_text()) if path.exists() and path.suffix == ".json" else {}
            path.write_bytes(change if isinstance(change, bytes) else json.dumps(found | change).encode())
            wrong += _refusal_problem(file, ["serve", str(model), "--in-process", "--port", "0"])
    yield at_most(f"of {len(cases)} folders not refused in one line ({'; '.join(wrong)[:200]})", len(wrong), 0)
    yield at_most("code of a folder that ran", float(marker.exists()), 0)


def _refusal_problem(file: str, arguments: list[str]) -> list[str]:
    command = [sys.executable, "-m", "serve.cli.app", *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    peak_mb = 0.0
    deadline = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline:
        peak_mb = max(peak_mb, resident_mb(process.pid))
        time.sleep(0.1)
    if process.poll() is None:
        process.kill()
    _, said = process.communicate("y\n")
    errors = [line for line in said.splitlines() if line.startswith("mm: the model folder")]
    if process.returncode == 1 and len(errors) == 1 and "Traceback" not in said and peak_mb < 2500:
        return []
    return [f"{file}: {process.returncode}, {peak_mb:.0f} MB, {said[-120:]!r}"]
