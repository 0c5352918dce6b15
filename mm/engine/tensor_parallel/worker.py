"""The process of one member but rank 0: it does what it is told, and ends when its pipe closes.

`python -m mm.engine.tensor_parallel.worker`, started by `Gang`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from mm.data.arrays import IntArray, to_tensor
from mm.engine.attention.base import AttentionBackend, build_attention
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.tensor_parallel.messages import decode
from mm.models.collectives import Collectives
from mm.models.pretrained import model_config
from mm.models.tensor_parallel import ShardedLanguageModel
from mm.processes.child import private_stdout
from mm.processes.wire import WireClosed, read_exactly, read_header, write_message

PARENT_S = 1.0
"""How often a member looks whether its parent is there: on a GPU it may wait in a sum and read no pipe."""


class Member:
    """One member's part of the decoder and of its cache.

    Args:
        group: The members.
        device: This one's.
        pipe_out: Takes answers.
    """

    model: ShardedLanguageModel
    cache: KVCache
    attention: AttentionBackend

    def __init__(self, group: Collectives, device: torch.device, pipe_out: BinaryIO) -> None:
        self._group, self._device, self._pipe_out = group, device, pipe_out

    def load(self, folder: str, dtype: str) -> None:
        """Read this member's part of a decoder."""
        path, kind = Path(folder), getattr(torch, dtype)
        self.model = ShardedLanguageModel(path, model_config(path), str(self._device), kind, self._group)
        write_message(self._pipe_out, {"done": "load", "num_layer_bytes": self.model.num_layer_bytes})

    def cache_of(self, num_blocks: int, max_num_seqs: int, block_size: int) -> None:
        """Make the cache, as large as that of rank 0."""
        shape = self.model.kv_cache_spec
        assert shape.block_size == block_size
        self.cache = KVCache(shape, num_blocks=num_blocks, max_num_seqs=max_num_seqs)
        self.attention = build_attention(self.cache)
        write_message(self._pipe_out, {"done": "cache"})

    def read_cache(self, layer: int, seq_index: int) -> None:
        """Give rank 0 the keys and values of a sequence."""
        for states in self.cache.read(layer, seq_index):
            self._group.gather(states, 1)

    def follow(self, calls: Sequence[tuple[str, Sequence[object]]]) -> None:
        """Do to the cache what rank 0 did to its own."""
        for method, arguments in calls:
            if method == "keep_tokens":
                arguments = [*arguments[:-1], to_tensor(cast(IntArray, arguments[-1]))]
            getattr(self.cache, method)(*arguments)

    def do(self, name: str, arguments: dict[str, Any]) -> None:
        """Do what rank 0 says: make something, or compute an operation together with the other members."""
        if name == "load":
            self.load(**arguments)
        elif name == "cache":
            self.cache_of(**arguments)
        elif name == "prepack":
            self.model.prepack()
        else:
            with torch.inference_mode():  # not above: what is made there has to be changed later
                self._compute(name, arguments)

    def _compute(self, name: str, arguments: dict[str, Any]) -> None:
        if name == "read_cache":
            self.read_cache(**arguments)
        elif name == "run":
            self.model.run(self.attention, **arguments)
        elif name == "embed":
            self.model.embed(to_tensor(arguments["token_ids"]))
        else:
            assert name in ("finish", "project", "gather_head")
            getattr(self.model, name)(**arguments)


def main() -> None:
    """Join a group, and follow its rank 0 until the pipe closes."""
    pipe_in, pipe_out = sys.stdin.buffer, private_stdout()
    parent = os.getppid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        start = read_header(pipe_in)
        torch.set_num_threads(start["num_threads"])
        device = torch.device(start["device"])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        write_message(pipe_out, {"done": "started"})
        group = Collectives(Path(start["meeting"]), start["rank"], start["size"], device)
        write_message(pipe_out, {"done": "joined"})
        member = Member(group, device, pipe_out)
        while True:
            operation = decode(read_exactly(pipe_in, read_header(pipe_in)["num_bytes"]), device)
            member.follow(operation.cache_calls)
            member.do(operation.name, dict(operation.arguments))
    except WireClosed:
        os._exit(0)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_S)
    os._exit(1)


if __name__ == "__main__":
    main()
