"""What cannot be spread over processes is refused by name before one is started, and no process outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import mm
from mm.build import check_tensor_parallel
from mm.config import model_config
from mm.data.arrays import to_tensor
from mm.engine.tensor_parallel.messages import Operation, decode, encode
from mm.errors import InvalidOption, MmError
from mm.models.attention import AttentionMetadata
from tests.helpers.checkpoints import random_generic
from tests.helpers.decoders import random_llava_with

REFUSED = {
    "heads": ("llama", {}, {"tensor_parallel": 3}, "4 heads, 2 key/value heads .* can be split into 1, 2, 4 equal"),
    "key/value heads": (
        "llama",
        {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8},
        {"tensor_parallel": 2},
        "into 1, 3, 6 equal parts",
    ),
    "experts": (
        "mixtral",
        {"num_local_experts": 4, "sliding_window": None},
        {"tensor_parallel": 2},
        "leave the option",
    ),
    "other layers": ("granite", {}, {"tensor_parallel": 2}, "layers of the kind GraniteDecoderLayer; split can be: Ll"),
    "8 bits": ("llama", {}, {"tensor_parallel": 2, "quantize": "int8"}, "'quantize' cannot be used with tensor_paral"),
    "compiled": ("llama", {}, {"tensor_parallel": 2, "compile": True}, "'compile' cannot be used with tensor_paral"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_refused(tmp_path, name):
    kind, settings, options, words = REFUSED[name]
    folder = random_llava_with(tmp_path, kind, **settings)
    with pytest.raises(InvalidOption, match=words):
        check_tensor_parallel(model_config(model=str(folder), device="cpu", **options))


def test_families_that_load_in_their_own_way_are_refused(tmp_path):
    folder = random_generic(tmp_path)
    with pytest.raises(InvalidOption, match="'transformers' loads its decoder in its own way"):
        check_tensor_parallel(model_config(model=str(folder), tensor_parallel=2))


def test_more_members_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("mm.build.check_device", lambda _: None)
    with pytest.raises(InvalidOption, match="was 4 from cuda on, but this machine has 2 GPUs"):
        check_tensor_parallel(model_config(model="tiny", device="cuda", tensor_parallel=4))
    with pytest.raises(InvalidOption, match="was 2 from cuda:1 on"):
        check_tensor_parallel(model_config(model="tiny", device="cuda:1", tensor_parallel=2))
    check_tensor_parallel(model_config(model="tiny", device="cuda", tensor_parallel=2))


def test_messages_arrive_as_they_were_sent():
    mask = torch.tensor([[True, False], [True, True]])
    metadata = AttentionMetadata.of([3, 1], [2, 1], masks={0: mask})
    metadata.windowed_masks = {1: ~mask}
    calls = [
        ("append_slots", (1, 2, 0, None)),
        ("share", (0, metadata.query_lens)),
        ("truncate", (metadata.seq_indices[0], 0, 4)),
    ]
    arguments = {"start": 1, "metadata": metadata, "token_ids": torch.arange(3)}
    sent = Operation(name="run", arguments=arguments, cache_calls=calls)
    found = decode(encode(sent), torch.device("cpu"))
    assert (found.name, found.arguments["start"]) == ("run", 1)
    assert [name for name, _ in found.cache_calls] == ["append_slots", "share", "truncate"]
    assert found.cache_calls[0][1] == [1, 2, 0, None]
    assert to_tensor(found.cache_calls[1][1][1]).tolist() == [2, 1]
    assert found.cache_calls[2][1] == [3, 0, 4]
    assert found.arguments["token_ids"].tolist() == [0, 1, 2]
    theirs = found.arguments["metadata"]
    assert (theirs.seq_indices.tolist(), theirs.query_starts.tolist()) == ([3, 1], [0, 2])
    assert torch.equal(theirs.masks[0], mask)
    assert torch.equal(theirs.windowed_masks[1], ~mask)


PARENT = """
import mm, sys
model = mm.load("tiny", tensor_parallel=2, num_threads=1)
print(model.engine._gang._children[0].process.pid, flush=True)
print(model.generate("hello", max_new_tokens=2).text, flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, None])
def test_members_end_with_their_parent(how):
    """However it ends: killed, or by coming to its end without having closed the model."""
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        member = int(parent.stdout.readline())
        os.kill(member, 0)
        parent.stdout.readline()
        if how is None:
            parent.stdin.close()
        else:
            parent.send_signal(how)
        parent.wait(30)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(member, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the member is still there")


@pytest.mark.slow
def test_a_closed_model_says_so():
    model = mm.load("tiny", tensor_parallel=2, num_threads=1)
    assert model.generate("hello", max_new_tokens=2).token_ids[0]
    children = [child.process for child in model.engine._gang._children]
    model.close()
    assert [child.poll() is not None for child in children] == [True]
    with pytest.raises(MmError, match="was closed"):
        model.generate("hello", max_new_tokens=2)
