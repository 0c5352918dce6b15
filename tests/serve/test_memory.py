"""The line that says what bounds the memory of each process."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from serve.config import ServeConfig
from serve.memory import bounds_text, memory_bounds, ray_bounds_text

GIB = 1 << 30
CONFIG = ServeConfig(
    model=replace(ServeConfig().model, kv_cache_gb=2.0, cache_bytes=3 * GIB), num_encoders=3, num_decoders=2
)
PARTS = {
    "none": {"decoder (2)": ("feature cache", "decoded pictures", "KV"), "ingress (1)": ("arriving bodies",)},
    "ep": {
        "encoder (3)": ("feature cache", "decoded pictures"),
        "decoder (2)": ("KV",),
        "ingress (1)": ("arriving bodies",),
    },
    "epd": {
        "encoder (3)": ("feature cache", "decoded pictures"),
        "prefill replica (1)": ("KV",),
        "decoder (2)": ("KV",),
        "ingress (1)": ("arriving bodies",),
    },
}


@pytest.mark.parametrize("split", PARTS)
def test_each_process_on_ray_is_named_with_what_it_holds(split: str) -> None:
    text = ray_bounds_text(replace(CONFIG, split=split))
    found = dict(part.split(": ", 1) for part in text.partition("for each ")[2].split("; "))
    assert found.keys() == PARTS[split].keys()
    names = {name for parts in PARTS[split].values() for name in parts}
    for process, parts in PARTS[split].items():
        assert {name for name in names if name in found[process]} == set(parts)


def test_sizes_are_those_of_the_settings() -> None:
    text = ray_bounds_text(CONFIG)
    assert re.search(
        r"KV and prefix cache 2048 MiB .*feature cache 3072 MiB|feature cache 3072 MiB.*cache 2048 MiB", text
    )
    without = ray_bounds_text(replace(CONFIG, model=replace(CONFIG.model, kv_cache_gb=None)))
    assert "a share of the memory that is free when it starts" in without


def test_in_one_process_the_parts_are_summed() -> None:
    text = bounds_text(CONFIG, 5 * GIB)
    assert f"together {sum(memory_bounds(CONFIG, 5 * GIB).values()) >> 20} MiB" in text
