"""`mm doctor`: whether this installation and this machine are fit to serve, and what to do where they are not."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

import click

EXTRAS = ("models", "server", "serve", "batch", "demo")
"""Extras whose packages are looked for, and the commands that need them."""
COMMANDS = {
    "models": "everything that loads a model",
    "server": "mm serve --in-process",
    "serve": "mm serve on Ray",
    "batch": "mm caption, mm run-batch and mm eval",
    "demo": "mm demo and mm serve --ui",
}
GIB = 1 << 30
LEAST_MEMORY_GIB, LEAST_DISK_GIB, LEAST_SHM_MIB = 2.0, 5.0, 256
REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(?:>=\s*([0-9.]+))?")


class Finding(NamedTuple):
    """One thing that was looked at. `advice` is empty where it is as it should be."""

    name: str
    value: str
    advice: str = ""
    is_fatal: bool = False


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def doctor(as_json: bool) -> None:
    """Look at this installation and this machine, and say what is missing. Imports nothing heavy.

    The exit code is 1 if no model can be loaded.
    """
    findings = [*_python(), *_packages(), *_machine(), *_models()]
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        for finding in findings:
            mark = "FAIL" if finding.is_fatal else "note" if finding.advice else "ok"
            advice = f"; {finding.advice}" if finding.advice else ""
            click.echo(f"{mark:4}  {finding.name}: {finding.value}{advice}")
    sys.exit(any(finding.is_fatal for finding in findings))


def _python() -> list[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    is_right = (3, 11) <= sys.version_info[:2] < (3, 14)
    return [Finding("Python", found, "" if is_right else "use 3.11 to 3.13", not is_right)]


def _packages() -> list[Finding]:
    """The packages of each extra; one line for an extra that is whole."""
    lines = requires("mm-serving") or []
    findings = [_extra("", lines), *(_extra(extra, lines) for extra in EXTRAS)]
    return [finding for finding in findings if finding is not None]


def _extra(extra: str, lines: list[str]) -> Finding | None:
    own = [line for line in lines if (f'extra == "{extra}"' in line if extra else "extra ==" not in line)]
    problems = [problem for line in own if (problem := _problem(line))]
    name, needed_by = extra or "base", COMMANDS.get(extra, "everything")
    if not problems:
        return Finding(f"packages [{name}]", f"{len(own)} as needed for {needed_by}")
    advice = f"pip install 'mm-serving[{extra or 'models'}]'"
    return Finding(f"packages [{name}]", f"{', '.join(problems)}, for {needed_by}", advice, extra in ("", "models"))


def _problem(line: str) -> str:
    """What is wrong with one requirement."""
    found = REQUIREMENT.match(line)
    if found is None or found[1] == "mm-serving":
        return ""
    try:
        installed = version(found[1])
    except PackageNotFoundError:
        return f"{found[1]} is missing"
    least = found[2] or ""
    return f"{found[1]} is {installed}, and {least} or later is needed" if _parts(installed) < _parts(least) else ""


def _parts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


def _machine() -> list[Finding]:
    from serve.cli.checks import count_gpus

    free_gib = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    place = next((path for path in (cache, *cache.parents) if path.exists()), Path("/"))
    disk_gib = shutil.disk_usage(place).free / GIB
    few = "other processes take most of it" if free_gib < LEAST_MEMORY_GIB else ""
    full = "models of the hub need more" if disk_gib < LEAST_DISK_GIB else ""
    gpus = count_gpus()
    findings = [
        Finding("CPUs", str(len(os.sched_getaffinity(0)))),
        Finding("free memory", f"{free_gib:.1f} GiB", few),
        Finding("free disk for models", f"{disk_gib:.0f} GiB at {place}", full),
        Finding("GPUs", str(gpus), "" if gpus else "models run on the CPU (--device cpu)"),
    ]
    if Path("/dev/shm").is_dir():
        shm_mib = shutil.disk_usage("/dev/shm").total >> 20
        small = "in a container give it more with --shm-size" if shm_mib < LEAST_SHM_MIB else ""
        findings.append(Finding("shared memory for Ray", f"{shm_mib} MiB", small))
    return findings


def _models() -> list[Finding]:
    from mm.models.shipped import REAL_MODEL, SHIPPED, shipped_models

    whole = [name for name in shipped_models() if (SHIPPED / name / "model.safetensors").is_file()]
    hub = "off (HF_HUB_OFFLINE): only models that were downloaded" if os.environ.get("HF_HUB_OFFLINE") else "on"
    return [
        Finding("shipped models", ", ".join(whole) or "none", "" if whole else "install the package again"),
        Finding("downloads from the hub", hub, "" if hub == "on" else f"unset it to use {REAL_MODEL}"),
    ]
