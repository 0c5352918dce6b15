"""What the members of a tensor-parallel group compute together: sums, copies and joins of tensors.

A group is an object of its own and not torch's default group, so several models of one process may each have one.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

WAIT = datetime.timedelta(minutes=10)
"""How long members wait for each other inside of a step. Between steps they wait for a message, as long as it takes."""


class Collectives:
    """A group of processes with one rank each. Every member makes the same calls in the same order.

    Args:
        meeting: A file that does not exist yet, by which the members find each other.
        rank, size: This member, of how many.
        device: Where the tensors are. GPUs use NCCL, CPUs gloo.

    Attributes:
        rank, size: As given.
    """

    def __init__(self, meeting: Path, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size = rank, size
        store = cast(Any, dist).FileStore(str(meeting), size)
        store.set_timeout(WAIT)
        build = _nccl if device.type == "cuda" else _gloo
        self._group = build(store, rank, size)
        self.all_reduce(torch.zeros(1, device=device))  # nobody needs the file any more

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all members, in place."""
        self._group.allreduce([tensor]).wait()
        return tensor

    def broadcast(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors of rank 0. Those of other members only say of which shapes and dtypes they are."""
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        packed = torch.cat([tensor.contiguous().view(torch.uint8).flatten() for tensor in tensors])
        self._group.broadcast([packed], options).wait()
        if self.rank == 0:
            return list(tensors)
        parts = torch.split(packed, [tensor.nbytes for tensor in tensors])
        return [part.view(like.dtype).view(like.shape) for part, like in zip(parts, tensors, strict=True)]

    def gather(self, tensor: Tensor, dim: int, stride: int = 1) -> Tensor:
        """On rank 0 the tensors of all members, or of every `stride`-th one, joined along a dimension.

        Other members get their own tensor back.
        """
        options = dist.GatherOptions()
        options.rootRank = 0
        own = tensor.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)] if self.rank == 0 else []
        self._group.gather([parts] if parts else [], [own], options).wait()
        return torch.cat(parts[::stride], dim) if parts else tensor

    def abort(self) -> None:
        """End what waits for members that are gone. gloo needs no help: it sees closed connections."""
        if hasattr(dist, "ProcessGroupNCCL") and isinstance(self._group, dist.ProcessGroupNCCL):
            self._group.abort()


def _gloo(store: object, rank: int, size: int) -> Any:
    """All members are on this machine, so they meet on its loopback interface and nobody else can reach them."""
    gloo = cast(Any, dist.ProcessGroupGloo)
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = WAIT
    return gloo(store, rank, size, options)


def _nccl(store: object, rank: int, size: int) -> Any:
    nccl = cast(Any, dist.ProcessGroupNCCL)
    options = nccl.Options()
    options._timeout = WAIT
    return nccl(store, rank, size, options)
