"""Runs a model over many pictures in batches that fit the device."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mm.errors import CapacityError

log = logging.getLogger(__name__)

FULL = "the device has no memory left for one picture; send fewer or smaller media, or try later"

Item = TypeVar("Item")
Input = TypeVar("Input")
Output = TypeVar("Output")


def in_batches(forward: Callable[[Tensor], dict[str, Tensor]], pixels: Tensor, max_batch: int) -> dict[str, Tensor]:
    """`forward` of all `pixels` (B, ...), at most `max_batch` at a time, results joined along the first axis.

    When the device runs out of memory, the batch is halved and tried again.

    Raises:
        CapacityError: A batch of one does not fit either.
    """
    outputs: list[dict[str, Tensor]] = []
    start, size = 0, max_batch
    while start < len(pixels):
        output = _unless_out_of_memory(forward, pixels[start : start + size])
        if output is not None:
            outputs.append(output)
            start += size
            continue
        tried = min(size, len(pixels) - start)
        if tried == 1:
            raise CapacityError(FULL)
        size = tried // 2
        log.warning("event=encode_out_of_memory batch=%d retry_batch=%d", tried, size)
    return {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]} if outputs else {}


def in_groups(
    forward: Callable[[Sequence[Item]], list[Output]], items: Sequence[Item], sizes: Sequence[int], max_size: int
) -> list[Output]:
    """`forward` of items of unequal size; one result per item, in order.

    Neighbours are batched together up to `max_size`. A larger item is a batch of its own. When the device runs out of
    memory, the batch is halved and tried again.

    Raises:
        CapacityError: A batch of one does not fit either.
    """
    outputs: list[Output] = []
    waiting = deque(_groups(sizes, max_size))
    while waiting:
        start, stop = waiting.popleft()
        output = _unless_out_of_memory(forward, items[start:stop])
        if output is not None:
            outputs += output
            continue
        if stop - start == 1:
            raise CapacityError(FULL)
        middle = (start + stop) // 2
        waiting.extendleft([(middle, stop), (start, middle)])
        log.warning("event=encode_out_of_memory batch=%d retry_batch=%d", stop - start, middle - start)
    return outputs


def _groups(sizes: Sequence[int], max_size: int) -> Iterator[tuple[int, int]]:
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and total + size > max_size:
            yield start, i
            start, total = i, 0
        total += size
    if start < len(sizes):
        yield start, len(sizes)


def _unless_out_of_memory(forward: Callable[[Input], Output], batch: Input) -> Output | None:
    try:
        return forward(batch)
    except torch.OutOfMemoryError:
        # The exception holds stack frames, and these hold tensors. Memory is free only after this clause.
        pass
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
