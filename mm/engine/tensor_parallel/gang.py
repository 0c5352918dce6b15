"""The processes of a tensor-parallel decoder: rank 0 is this one, which runs the engine; the others follow it.

Rank 0 decides everything: who takes part in a step, what reducers drop, what a draft was worth, which token comes next.
It sends one small message per operation, and all members compute that operation together. The members' processes end
with this one, whatever ends it, since their pipes close. If one of them ends, the gang is over.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import tempfile
import threading
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.data.tokens import EncodedMedia
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.kv_transfer.messages import KVSink, ReceivedKV
from mm.engine.sequence import OutputSink
from mm.engine.tensor_parallel.messages import Operation, encode
from mm.errors import EngineError, InvalidOption
from mm.models.collectives import Collectives
from mm.models.kv_cache_spec import KVCacheSpec
from mm.models.pretrained import model_config
from mm.models.tensor_parallel import ShardedLanguageModel, split
from mm.plugins.threads import is_interrupt
from mm.processes.child import Child
from mm.processes.wire import WireClosed, read_header, write_message

log = logging.getLogger(__name__)

WORKER = "mm.engine.tensor_parallel.worker"
KEPT = ("CUDA_", "GLOO_", "HOME", "MKL_", "NCCL_", "NUMBA_", "NVIDIA_", "OMP_", "TMPDIR", "TORCH", "XDG_")
"""Environment variables, by their beginnings, that members need beside what every child gets."""
EXIT_S = 5.0
"""How long a broken gang waits to learn which of its members ended."""


class GangError(EngineError):
    """A tensor-parallel decoder is over, and has to be started again."""


class Gang:
    """All members, as rank 0 sees them.

    Args:
        size: Members, this process included.
        device: Of rank 0. The others take the GPUs after it.
        num_threads: CPU threads of torch in each member.

    Attributes:
        size: As given.
        weight_bytes: Per rank, the bytes of the decoder layers' weights.

    Raises:
        InvalidOption: There are fewer GPUs than members.
        GangError: A member did not start.
    """

    def __init__(self, size: int, device: str, num_threads: int | None = None) -> None:
        self.size, self._devices = size, devices(size, device)
        self._lock, self._failure, self._is_closed = threading.RLock(), "", False
        self._notes: list[tuple[str, Sequence[object]]] = []
        self.weight_bytes: list[int] = []
        self._folder = Path(tempfile.mkdtemp(prefix="mm-gang-"))  # only this user may look into it
        command = [sys.executable, "-m", WORKER]
        self._children = [Child(command, keep=KEPT, shows_errors=True) for _ in range(size - 1)]
        try:
            self._join(num_threads)
        except BaseException:
            self.close()
            raise
        for rank, child in enumerate(self._children, 1):
            threading.Thread(target=self._watch, args=(rank, child), name=f"gang-{rank}", daemon=True).start()

    def _join(self, num_threads: int | None) -> None:
        meeting = self._folder / "meeting"
        for rank, child in enumerate(self._children, 1):
            header = {"rank": rank, "size": self.size, "meeting": str(meeting), "device": self._devices[rank]}
            with self._member(rank):
                write_message(child.pipe_in, {**header, "num_threads": num_threads or torch.get_num_threads()})
        self._await("started")
        self.group = Collectives(meeting, 0, self.size, torch.device(self._devices[0]))
        self._await("joined")
        shutil.rmtree(self._folder, ignore_errors=True)

    def _await(self, what: str) -> list[dict[str, Any]]:
        """The answers of all other members."""
        found: list[dict[str, Any]] = []
        for rank, child in enumerate(self._children, 1):
            with self._member(rank):
                header = read_header(child.pipe_out)
            assert header.get("done") == what
            found.append(header)
        return found

    @contextlib.contextmanager
    def _member(self, rank: int) -> Generator[None]:
        try:
            yield
        except (WireClosed, OSError, ValueError) as error:
            raise self._broken(self._ended(rank)) from error

    # ── what the members hold ─────────────────────────────────────────────────────────────────────────────────────────

    def load(self, folder: Path, device: str, dtype: torch.dtype) -> ShardedLanguageModel:
        """Load a decoder on all members, each its own part. It takes the place of one that was loaded before.

        Raises:
            InvalidOption: It cannot be split into so many parts.
            MmError: It cannot be loaded.
        """
        assert device == self._devices[0] or device == "cuda"
        config = model_config(folder)
        split(folder, config, 0, self.size)  # before the others do: they would find the same faults
        with self.operation("load", {"folder": str(folder), "dtype": str(dtype).removeprefix("torch.")}):
            language = ShardedLanguageModel(folder, config, self._devices[0], dtype, self.group, self)
            others = self._await("load")
        self._copies = language.shard.copies
        self.weight_bytes = [language.num_layer_bytes, *(int(one["num_layer_bytes"]) for one in others)]
        log.info("tensor_parallel=%d layer_weight_bytes=%s", self.size, self.weight_bytes)
        return language

    def make_cache(self, shape: KVCacheSpec, num_blocks: int, max_num_seqs: int) -> None:
        """Give every other member a KV cache."""
        fields = {"num_blocks": num_blocks, "max_num_seqs": max_num_seqs, "block_size": shape.block_size}
        self._notes = []
        with self.operation("cache", fields):
            self._await("cache")

    def read_cache(self, cache: KVCache, layer: int, seq_index: int) -> tuple[Tensor, Tensor]:
        """As `KVCache.read`, of the heads of all members."""
        with self.operation("read_cache", {"layer": layer, "seq_index": seq_index}):
            keys, values = KVCache.read(cache, layer, seq_index)
            return self.group.gather(keys, 1, self._copies), self.group.gather(values, 1, self._copies)

    # ── operations ────────────────────────────────────────────────────────────────────────────────────────────────────

    def note(self, method: str, arguments: Sequence[object]) -> None:
        """Let the members call a method of their caches before the next operation."""
        self._notes.append((method, arguments))

    @contextlib.contextmanager
    def operation(self, name: str, arguments: Mapping[str, object]) -> Generator[None]:
        """See `mm.models.tensor_parallel.Leader`.

        Raises:
            GangError: The gang is over. What a member has not computed, the others would wait for.
        """
        with self._lock:
            self.check()
            notes, self._notes = self._notes, []
            body = encode(Operation(name=name, arguments=arguments, cache_calls=notes))
            try:
                for rank, child in enumerate(self._children, 1):
                    with self._member(rank):
                        write_message(child.pipe_in, {}, body)
                yield
            except GangError:
                raise
            except BaseException as error:
                failure = self._broken(self._first_ended() or f"{name} failed: {type(error).__name__}: {error}")
                if is_interrupt(error):
                    raise
                raise failure from error

    def check(self) -> None:
        """Raise the error that ended the gang, if one did."""
        if self._failure or self._is_closed:
            raise GangError(self._failure or "the tensor-parallel decoder was closed")

    @property
    def failure(self) -> str:
        """What ended the gang; empty while it works."""
        return self._failure

    # ── the end ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _watch(self, rank: int, child: Child) -> None:
        child.process.wait()
        if not self._is_closed:
            self._broken(self._ended(rank))

    def _first_ended(self) -> str:
        """Which member ended first, if one does within a moment: the others see its connections close before that."""
        for _ in range(int(EXIT_S / 0.05)):
            if self._failure:
                return self._failure
            for rank, child in enumerate(self._children, 1):
                if not child.is_alive:
                    return self._ended(rank)
            threading.Event().wait(0.05)
        return ""

    def _ended(self, rank: int) -> str:
        with contextlib.suppress(Exception):
            self._children[rank - 1].process.wait(EXIT_S)
        status = self._children[rank - 1].process.poll()
        how = "does not answer" if status is None else f"ended with status {status}"
        return f"member {rank} of {self.size} {how}"

    def _broken(self, why: str) -> GangError:
        """End the gang. The first reason counts."""
        if not self._failure:
            self._failure = f"the tensor-parallel decoder is over, start it again: {why}"
            log.critical("%s", self._failure)
        self._end()
        return GangError(self._failure)

    def _end(self) -> None:
        for child in self._children:
            child.kill()
        if hasattr(self, "group"):
            self.group.abort()

    def close(self) -> None:
        """End the members' processes. May be called again."""
        self._is_closed = True
        for child in self._children:
            child.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def check_gang(gang: Gang | None, media: EncodedMedia | ReceivedKV, sink: OutputSink) -> None:
    """Refuse a request that a tensor-parallel decoder cannot compute.

    Raises:
        GangError: The gang is over.
        EngineError: The request comes from another engine, or is to go on at one.
    """
    if gang is None:
        return
    gang.check()
    if isinstance(media, ReceivedKV) or isinstance(sink, KVSink):
        raise EngineError("a tensor-parallel decoder cannot take requests over or hand them over; serve without it")


def devices(size: int, device: str) -> list[str]:
    """The device of each rank.

    Raises:
        InvalidOption: There are fewer GPUs, or the device has no group operations.
    """
    kind, _, first = device.partition(":")
    if kind == "cpu":
        return ["cpu"] * size
    if kind != "cuda":
        what = f"was {size}, but only CPUs and NVIDIA's GPUs can be joined, not {device!r}; leave it out"
        raise InvalidOption("model", "tensor_parallel", what)
    count, start = torch.cuda.device_count(), int(first or 0)
    if start + size > count:
        what = f"was {size} from {device} on, but this machine has {count} GPUs; take fewer members"
        raise InvalidOption("model", "tensor_parallel", what)
    return [f"cuda:{start + rank}" for rank in range(size)]
