"""Pages about each reducer in docs/methods: what it says of itself, when to take it, and its figures on `tiny`.

    python -m demos.bench.method_pages [--check]

Nothing on the pages is written by hand but `methods.toml` beside this script. The rest comes from the reducers' modules
(docstrings, options, declarations) and from demos/bench/results. `--check` writes nothing and fails where a page is not
what would be written; a test runs it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import textwrap
import tomllib
from pathlib import Path
from typing import Any

from mm.plugins.registry import get, names, options_of
from mm.plugins.spec import reducer_spec

PAGES, WORDS, RESULTS = Path("docs/methods"), Path("demos/bench/methods.toml"), Path("demos/bench/results")
HEADINGS = ("Paper", "Source", "Stage", "Needs", "Cost", "Equation", "Positions", "Differs")
RATIOS = (0.5, 0.25, 0.1, 0.05)
LEFT_OUT = frozenset({"pipeline"})
CHANGED = frozenset[str]()
"""Methods that have changed since the results were measured: their figures are left out."""


def sections(module: str) -> dict[str, str]:
    """The parts of a module's docstring by their first word."""
    heading = rf"(?<=\S) {{2,}}(?=(?:{'|'.join(HEADINGS)}) )"
    lines = [part for line in module.splitlines()[1:] for part in re.split(heading, line)]
    found, name = dict[str, str](), ""
    for line in lines:
        if match := re.match(rf"({'|'.join(HEADINGS)})\s+(.*)", line):
            name = match[1]
            found[name] = match[2]
        elif name and line.strip():
            found[name] += "\n" + line.strip()
    return found


def right_share(line: dict[str, Any]) -> float:
    return len(line["right"]) / len(line["asked"])


def figures(name: str) -> list[str]:
    """A table of the method's measurements on the shipped model, pictures and clips."""
    rows = []
    if name in CHANGED:
        return rows
    for kind, what in (("image", "pictures"), ("video", "clips")):
        path = RESULTS / f"reducers-tiny-{kind}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        full = right_share(next(line for line in lines if line["method"] == "none"))
        for ratio in RATIOS:
            found = [line for line in lines if line["method"] == name and line["keep_ratio"] == ratio]
            for line in found:
                share, cost = right_share(line), line["cost"]
                rows.append(
                    f"| {what} | {line['kept']:.0%} | {share:.1%} | {share / full:.0%} | {1e3 * cost['encode']:.0f} | "
                    f"{1e3 * cost['select']:.1f} | {cost['ttft_over_none']:.2f} | {cost['kv_bytes_over_none']:.2f} |"
                )
    if not rows:
        return []
    head = "| on | kept | right | of all tokens' | encode ms | select ms | TTFT | KV bytes |"
    return [head, "|" + "---|" * 8, *rows]


def page(name: str, words: dict[str, str]) -> str:
    plugin = get("reducer", name)
    module = inspect.getmodule(plugin)
    assert module is not None
    doc = inspect.getdoc(module) or ""
    own = module.__name__ != "pruning.base"
    said = sections(doc) if own else {}
    spec = reducer_spec(name).capabilities
    title = (inspect.getdoc(plugin) or "").splitlines()[0]
    kept = {"fixed": "exactly what its budget says", "bounded": "at most what its budget says"}[spec.count]
    rows = {
        "Consumes": f"visual tokens of one item; {', '.join(sorted(spec.needs)) or 'nothing else'}"
        + ("; the question" if spec.query_aware else ""),
        "Produces": f"fewer tokens, {kept}",
        "Acts at": ", ".join(stage.value for stage in spec.stages),
        "On": " and ".join({"image": "pictures", "video": "clips"}[kind] for kind in sorted(spec.kinds)),
        "Cost": said.get("Cost", "-").replace("\n", " "),
        "When to take it": words["take"],
        "Too high": words["high"],
        "Too low": words["low"],
        "Beside official code": words["official"],
    }
    parts = [f"# `{name}`", title]
    if "Paper" in said:
        parts.append("Paper: " + said["Paper"].replace("\n", " "))
    parts.append("\n".join(["| | |", "|---|---|", *(f"| {key} | {_cell(text)} |" for key, text in rows.items())]))
    for heading, section in (("Equation", "Equation"), ("Positions", "Positions"), ("What differs", "Differs")):
        if section in said:
            parts += [f"## {heading}", textwrap.fill(said[section].replace("\n", " "), 140)]
    if options := options_of(plugin):
        described = _attributes(inspect.getdoc(plugin) or "")
        listed = [f"- `{option}`: {described.get(option, '')}".rstrip(": ") for option in options]
        parts += ["## Options", "\n".join(textwrap.fill(line, 140, subsequent_indent="  ") for line in listed)]
    if table := figures(name):
        parts += ["## On the shipped model", "\n".join(table)]
        parts.append(
            "TTFT (encoding, selecting, prefill) and KV bytes are shares of those of `none`; seconds are CPU time of "
            "one core. [All methods](../reducers.md)."
        )
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _attributes(doc: str) -> dict[str, str]:
    """What a class's docstring says of its attributes."""
    _, _, tail = doc.partition("Attributes:\n")
    found, name = dict[str, str](), ""
    for line in tail.splitlines():
        if match := re.match(r"    (\w+(?:, \w+)*): (.*)", line):
            name = match[1]
            found |= dict.fromkeys(name.split(", "), match[2])
        elif name and line.startswith("        "):
            for each in name.split(", "):
                found[each] += " " + line.strip()
        elif line.strip():
            break
    return found


def official_table() -> str:
    """What the authors' code gave beside ours, method by method."""
    words = tomllib.loads(WORDS.read_text())
    rows = [f"| [`{name}`](methods/{name}.md) | {_cell(of['official'])} |" for name, of in words.items()]
    return "\n".join(
        ["| method | official code, commit: result |", "|---|---|", *(row for row in rows if "| - |" not in row)]
    )


def index(pages: list[str]) -> str:
    lines = [
        f"- [`{name}`]({name}.md): {(inspect.getdoc(get('reducer', name)) or '').splitlines()[0]}" for name in pages
    ]
    return (
        "# Reducers, one by one\n\nWhich to take: [reducers.md](../reducers.md). "
        "Made by `python -m demos.bench.method_pages`.\n\n" + "\n".join(lines) + "\n"
    )


def written() -> dict[str, str]:
    """File name to content, of all pages."""
    words = tomllib.loads(WORDS.read_text())
    pages = [name for name in names("reducer") if name not in LEFT_OUT and _is_ours(name)]
    if missing := sorted(set(pages) ^ set(words)):
        raise SystemExit(f"{WORDS} and the registered reducers differ in: {', '.join(missing)}")
    return {f"{name}.md": page(name, words[name]) for name in pages} | {"README.md": index(pages)}


def _is_ours(name: str) -> bool:
    return get("reducer", name).__module__.startswith("pruning.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a page is stale")
    args = parser.parse_args()
    PAGES.mkdir(exist_ok=True)
    pages = written()
    stale = [name for name, text in pages.items() if not (PAGES / name).exists() or (PAGES / name).read_text() != text]
    if args.check and stale:
        raise SystemExit(f"run python -m demos.bench.method_pages; stale: {', '.join(stale)}")
    for name, text in pages.items() if not args.check else ():
        (PAGES / name).write_text(text)


if __name__ == "__main__":
    main()
