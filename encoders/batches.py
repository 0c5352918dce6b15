"""Runs a model over many pictures in batches that fit the device."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from mm.core.errors import CapacityError

log = logging.getLogger(__name__)


def in_batches(forward: Callable[[Tensor], dict[str, Tensor]], pixels: Tensor, max_batch: int) -> dict[str, Tensor]:
    """`forward` of all `pixels` (B, ...), at most `max_batch` at a time, results joined along the first axis.

    When the device runs out of memory the batch is halved and tried again.

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
            raise CapacityError(
                "the device has no memory left for one picture; send fewer or smaller media, or try later"
            )
        size = tried // 2
        log.warning("event=encode_out_of_memory batch=%d retry_batch=%d", tried, size)
    return {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]} if outputs else {}


def _unless_out_of_memory(forward: Callable[[Tensor], dict[str, Tensor]], pixels: Tensor) -> dict[str, Tensor] | None:
    try:
        return forward(pixels)
    except torch.OutOfMemoryError:
        # The exception holds the frames, and they hold tensors: memory is given back after this clause, not inside.
        pass
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
