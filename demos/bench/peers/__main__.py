"""How do the strongest engines for CPUs compare with this one, on the same model and the same pictures?

Run python -m demos.bench.peers [--peers hf,openvino,vllm,llamacpp] [--threads 1,2] [--rounds 7] [--out FILE]

Each peer has an environment of its own, which uv makes from the pins in peers.toml, and a process of its own. It gets
the model in the form that it reads. All processes take turns at every case: one request of `--tokens` greedy tokens
about a new picture, a second question about it, and `--at-once` requests together, each about a new picture. Times are
processor time of the process with all its threads and children; wall time stands beside it. A start is a new process
up to its first answer. A peer that cannot be installed or cannot take the model has a line that says why. Answers are
compared token by token. The page goes to demos/bench/results.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

from demos.bench.machine import facts, product_gflop_per_s, read_gb_per_s
from demos.bench.peers.environments import Peer, Unavailable, chosen, environment, read_peers
from demos.bench.peers.page import page, section
from demos.bench.peers.prepare import base_model, model_for
from demos.bench.peers.rounds import Entry, Plan, Rounds

RESULTS = Path(__file__).parents[1] / "results"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mm-peers"
FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16")
SIDES = {"tiny": 224, "qwen2.5-vl-349m": 448}
"""The side of a picture in pixels, which no engine has to resize."""


def threads_of(text: str) -> list[int]:
    """Numbers of threads from a list such as "1,2".

    Raises:
        ValueError: One of them is no number above 0, or more than the machine has cores.
    """
    parts, cores = [part.strip() for part in text.split(",")], os.cpu_count() or 1
    if not all(part.isdigit() and 0 < int(part) <= cores for part in parts):
        raise ValueError(f"--threads was {text!r}: give numbers from 1 to {cores}, the cores of this machine")
    return [int(part) for part in parts]


def limits(threads: int) -> str:
    """What this machine does at most with so many threads, in one line."""
    torch.set_num_threads(threads)
    rate, read = product_gflop_per_s(512, 1024, 1024), read_gb_per_s()
    return f"Limits measured in this run: {rate:.0f} GFLOP/s (512 x 1024 x 1024, float32), {read:.1f} GB/s read."


def about(args: argparse.Namespace, peers: list[Peer]) -> dict[str, Any]:
    """What was run, and where."""
    where, known = facts(), read_flags()
    found: dict[str, Any] = {
        "run": f"`{command_line(args)}`, {date.today()}, commit {where['commit'][:10]}",
        "model": f"{args.model}, {args.dtype}" + (f", weights {args.quantize}" if args.quantize != "none" else ""),
        "asked": f"{args.rounds} rounds, {args.tokens} tokens an answer, {args.at_once} requests at once",
        "machine": f"{where['cpu']}, {where['cores']} cores, load average {where['load_average']} before the run",
        "flags": ", ".join(flag for flag in FLAGS if flag in known) or "none of " + ", ".join(FLAGS),
        "ours": f"torch {where['torch']}, transformers {where['transformers']}, Python {where['python']}",
    }
    return found | {peer.name: f"{peer.what}: {', '.join(peer.packages[:2])}" for peer in peers}


def read_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


def command_line(args: argparse.Namespace) -> str:
    return f"python -m demos.bench.peers --peers {args.peers} --model {args.model} --threads {args.threads}"


def entries_for(peers: list[Peer], base: Path, args: argparse.Namespace) -> tuple[list[Entry], dict[str, str]]:
    """Ours and the peers that can run, and why the others cannot."""
    entries, absent = [Entry("ours", Path(sys.executable), base)], dict[str, str]()
    for peer in peers:
        try:
            python = environment(peer, args.cache)
            entries.append(Entry(peer.name, python, model_for(peer, python, base, args.quantize)))
        except Unavailable as error:
            absent[peer.name] = str(error)
            print(f"{peer.name} is missing: {error}", file=sys.stderr, flush=True)
    return entries, absent


def measure(entries: list[Entry], absent: dict[str, str], threads: int, args: argparse.Namespace) -> str:
    """The section of one number of threads."""
    settings = {"dtype": args.dtype, "quantize": args.quantize, "threads": threads}
    settings |= {"at_once": args.at_once, "kv_gb": args.kv_gb}
    plan = Plan(args.rounds, args.starts, args.tokens, args.at_once, SIDES[args.model])
    line = limits(threads)
    with tempfile.TemporaryDirectory() as folder:
        rounds = Rounds(entries, settings, plan, Path(folder))
        rounds.run()
    if "ours" in rounds.failed:
        raise SystemExit(f"our own engine failed: {rounds.failed['ours']}")
    named = f"{threads} thread" + ("s" if threads > 1 else "")
    return section(named, rounds.measured, absent | rounds.failed, line)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(read_peers()))
    parser.add_argument("--model", default="tiny", choices=sorted(SIDES))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--quantize", default="none", choices=("none", "int8"), help="the decoder's weights")
    parser.add_argument("--threads", default="1", help="one or several, such as 1,2; each has its own rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--starts", type=int, default=3, help="starts of each engine that count")
    parser.add_argument("--tokens", type=int, default=33)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--kv-gb", type=float, default=1.0, help="KV cache of every engine that has one")
    parser.add_argument("--cache", type=Path, default=CACHE, help="environments and models are kept here")
    parser.add_argument("--out", type=Path, help="the page; demos/bench/results/peers-MODEL.md without it")
    args = parser.parse_args(arguments)
    try:
        chosen(args.peers, read_peers()), threads_of(args.threads)
    except ValueError as error:
        parser.error(str(error))
    for name, least in (("rounds", 1), ("starts", 1), ("tokens", 2), ("at_once", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} was {getattr(args, name)}; it has to be {least} or more")
    return args


def main() -> None:
    args = parse()
    args.cache = args.cache.resolve()
    peers = chosen(args.peers, read_peers())
    facts_of_run = about(args, peers)
    base = base_model(args.model, args.cache)
    entries, absent = entries_for(peers, base, args)
    sections = [measure(entries, absent, threads, args) for threads in threads_of(args.threads)]
    text = page(f"{args.model} against its peers", facts_of_run, sections)
    kind = "" if args.quantize == "none" else f"-{args.quantize}"
    out = args.out or RESULTS / f"peers-{args.model}{kind}.md"
    out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
