"""What is checked before anything is loaded: packages, the port, and whether the model and its plugins exist."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import click

from mm.errors import InvalidOption, UnknownPlugin
from mm.models.shipped import REAL_MODEL, limits_of
from mm.settings import settings_of

if TYPE_CHECKING:
    from mm.config import ModelConfig
    from serve.config import ServeConfig

MAX_PORT = 65_535
NAME = re.compile(r"[A-Za-z0-9_.-]+")


def need(package: str, extra: str, *, or_else: str = "") -> None:
    """End the command with the name of the extra that installs a missing package, and of an option without it."""
    if importlib.util.find_spec(package) is None:
        other = f", or {or_else}" if or_else else ""
        click.echo(f"mm: this command needs {package}: pip install 'mm-serving[{extra}]'{other}", err=True)
        sys.exit(1)


def check_port(host: str, port: int) -> int:
    """Refuse a port that is taken or that nobody can listen on, before anything is loaded.

    Returns:
        The port; for 0 a free one.
    """
    if not 0 <= port <= MAX_PORT:
        raise InvalidOption("serve", "port", f"was {port}; it has to be 0 to {MAX_PORT}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            return int(listener.getsockname()[1])
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no such address"
        click.echo(f"mm: cannot listen on {host}:{port} ({reason}); choose another with --host or --port", err=True)
        raise SystemExit(1) from None


def check_no_process_settings(given: Iterable[str]) -> None:
    """Refuse the setting that only means something in one process, where Ray serves."""
    if "header_timeout_s" in given:
        what = "belongs to --in-process: on Ray the proxy reads headers; leave it out"
        raise InvalidOption("serve", "header_timeout_s", what)


def check_no_ray_settings(cls: type, given: Iterable[str]) -> None:
    """Refuse settings that only mean something on Ray, where one process serves without it."""
    ray_only = {one.name for one in settings_of(cls) if one.bounds.ray_only}
    if wrong := next((name for name in given if name in ray_only), None):
        raise InvalidOption("serve", wrong, "belongs to Ray, and --in-process serves without it; leave one of them out")


def warn_of_limits(model: str) -> None:
    """Say on stderr what a shipped model cannot do, and name one that can."""
    if limits := limits_of(model):
        click.echo(f"mm: {limits} For those give a general model, such as {REAL_MODEL}.", err=True)


def check_early(config: ModelConfig, *, is_local: bool = True) -> None:
    """Refuse what can be seen to be wrong without torch, which takes seconds to import.

    Args:
        is_local: The model runs on this machine, and not on a cluster's nodes.

    Raises:
        MmError: Names what is wrong: the device, the model's folder, its template, or a plugin's name.
    """
    from mm.models.locate import check_complete, find, is_on_hub, read_template

    if is_local:
        check_device_name(config.device)
    if config.engine == "vllm" and is_local and importlib.util.find_spec("vllm") is None:
        what = "was 'vllm', which is not installed; docs/engines.md says how to install it, or take native"
        raise InvalidOption("model", "engine", what)
    template = read_template(config.chat_template)
    on_cpu = config.device == "cpu" and is_local
    if config.kv_cache_gb is not None and on_cpu and config.kv_cache_gb > (free := _free_gib()):
        raise InvalidOption("model", "kv_cache_gb", f"was {config.kv_cache_gb:g}; {free:.1f} GiB are free")
    for kind, texts in (("reducer", (config.reducer,)), ("drafter", config.speculation.offered)):
        _check_names(kind, texts)
    if not is_on_hub(config.model):
        check_complete(find(config.model), template)


def check_device_name(device: str) -> None:
    """Refuse a GPU that this machine does not have.

    Raises:
        InvalidOption: Says what there is.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return
    num_gpus = count_gpus()
    if not num_gpus:
        raise InvalidOption(
            "model", "device", f"was {device!r}, but this machine has no GPU that CUDA can use; try cpu"
        )
    if index and not (index.isdecimal() and int(index) < num_gpus):
        names = ", ".join(f"cuda:{i}" for i in range(num_gpus))
        raise InvalidOption("model", "device", f"was {device!r}; this machine has {names}")


def count_gpus() -> int:
    """GPUs that CUDA can use here, asked of the driver itself."""
    import ctypes

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    found = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if found else 0


def _free_gib() -> float:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)


def _check_names(kind: str, texts: Iterable[str]) -> None:
    """Refuse plugins that nobody registered, by the names of the entry points."""
    known = sorted({point.name for point in entry_points(group=f"mm.{kind}s")})
    for text in texts:
        for part in re.split(r"\s\+\s", text):
            name = part.partition(":")[0].strip()
            if NAME.fullmatch(name) and name not in known:
                raise UnknownPlugin(kind, name, known)


def check_gpus(config: ServeConfig) -> None:
    """Refuse replicas that would wait without end for GPUs or CPUs that Ray does not have.

    Raises:
        InvalidOption: Names the setting.
    """
    for name, share in (("encoder_gpus", config.encoder_gpus), ("decoder_gpus", config.decoder_gpus)):
        if share and share > (num_gpus := count_gpus()):
            raise InvalidOption("serve", name, f"was {share:g}; this machine has {num_gpus} GPUs")
    if config.ray_cpus is not None and config.ray_cpus < config.total_cpus:
        what = f"was {config.ray_cpus:g}, but the replicas reserve {config.total_cpus:g}; give more, or reserve less"
        raise InvalidOption("serve", "ray_cpus", what)


def check_model(config: ModelConfig) -> None:
    """Refuse a wrong model, reducer or drafter in one line, before replicas fail to start over it."""
    from mm.device import check_device
    from mm.models.locate import check_complete, find, read_config, read_template
    from mm.plugins.registry import get
    from mm.plugins.spec import bind, build_drafter, configured_reducer
    from mm.vllm.capabilities import check_reducer, check_settings

    folder = find(config.model)
    read_config(folder)
    check_complete(folder, read_template(config.chat_template))
    check_device(config.device)
    if config.tensor_parallel > 1:
        from mm.build import check_tensor_parallel

        check_tensor_parallel(config)
    bind(configured_reducer(config), folder)
    for name in config.reducers.allowed:
        get("reducer", name)
    for drafter in (config.speculation.drafter, *config.speculation.drafters):
        build_drafter(drafter)
    if config.engine == "vllm":
        check_settings(config)
        check_reducer(config)
