"""A large block is given back as it is freed, also when others of its size were freed before."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from serve.api.memory import map_large_blocks

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

if sys.argv[1] == "mapped":
    map_large_blocks()
size = 31_000_000
bytearray(b"x") * size  # once freed, glibc keeps blocks of its size
before = resident()
first, kept = bytearray(b"x") * size, bytearray(b"x") * 100_000
del first
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_large_block_is_given_back_as_it_is_freed():
    left = {}
    for how in ("mapped", "usual"):
        output = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
        left[how] = int(output.stdout)
    assert left["mapped"] < 2_000_000
    if left["usual"] < 20_000_000:
        pytest.skip("this allocator gives it back anyway")
