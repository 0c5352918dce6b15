"""Pictures that look the same, though their bytes differ: other sizes, other formats, stronger compression.

A picture's mark is its perceptual hash and its colours. The hash is `imagehash.phash` with 64 bits, of the picture's
brightness: two pictures are near where at most MAX_BITS of them differ. As it knows no colour, the mean colours of
4 x 4 fields have to be near too, each channel within MAX_COLOR of 255.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mm.config import MediaLimits
from mm.errors import MmError
from mm.media import MediaBudget, decode_image
from serve.jobs.batch.rows import Row

MAX_BITS = 4
"""Bits of 64 that may differ."""
MAX_COLOR = 12
"""Largest difference of a channel of a field's mean colour, of 255."""
FIELDS = 4
POP_COUNT = np.array([bin(i).count("1") for i in range(1 << 16)], np.uint8)


class Mark(NamedTuple):
    """What a picture looks like.

    Attributes:
        bits: Perceptual hash as four uint16.
        colors: Mean colours (4, 4, 3) of its fields, uint8, flat.
    """

    bits: npt.NDArray[np.uint16]
    colors: npt.NDArray[np.uint8]

    @property
    def text(self) -> str:
        """As a record keeps it."""
        return self.bits.tobytes().hex() + self.colors.tobytes().hex()

    @classmethod
    def parse(cls, text: str) -> Mark:
        data = bytes.fromhex(text)
        return cls(np.frombuffer(data[:8], np.uint16), np.frombuffer(data[8:], np.uint8))


def mark_of(row: Row, limits: MediaLimits) -> Mark | None:
    """The mark of a row's picture; None where it has not exactly one picture that can be decoded."""
    import imagehash
    from PIL import Image

    if len(row.media) != 1 or row.media[0].kind != "image" or row.media[0].data is None:
        return None
    try:
        pixels = decode_image(row.media[0].data, MediaBudget(limits)).pixels
    except MmError:
        return None  # it fails where it is asked about
    picture: Any = Image.fromarray(pixels)
    bits = np.packbits(imagehash.phash(picture).hash.reshape(-1)).view(np.uint16)
    colors = np.asarray(picture.resize((FIELDS, FIELDS), Image.Resampling.BOX), np.uint8).reshape(-1)
    return Mark(bits, colors)


@dataclass
class Marks:
    """The marks of the pictures that were asked about with one question."""

    names: list[str] = field(default_factory=list[str])
    bits: npt.NDArray[np.uint16] = field(default_factory=lambda: np.empty((64, 4), np.uint16))
    colors: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty((64, FIELDS * FIELDS * 3), np.uint8))

    def add(self, mark: Mark, name: str) -> None:
        """Keep a mark under a name."""
        count = len(self.names)
        if count == len(self.bits):
            self.bits = np.concatenate([self.bits, np.empty_like(self.bits)])
            self.colors = np.concatenate([self.colors, np.empty_like(self.colors)])
        self.bits[count], self.colors[count] = mark.bits, mark.colors
        self.names.append(name)

    def nearest(self, mark: Mark) -> tuple[str, int] | None:
        """The name of the nearest picture that is near, and how many bits differ."""
        count = len(self.names)
        apart = POP_COUNT[self.bits[:count] ^ mark.bits].sum(axis=1, dtype=np.uint8)
        near = np.flatnonzero(apart <= MAX_BITS)
        off = np.abs(self.colors[near].astype(np.int16) - mark.colors).max(axis=1, initial=0)
        near = near[off <= MAX_COLOR]
        if not len(near):
            return None
        best = int(near[apart[near].argmin()])
        return self.names[best], int(apart[best])
