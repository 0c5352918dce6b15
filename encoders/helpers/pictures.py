"""Pictures of one size as a tower's input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mm.data.media import Kind


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """A picture, or the frames of a clip, as the tower's input.

    Attributes:
        pixels: (T, 3, h, w). A picture has T = 1.
    """

    kind: Kind
    pixels: Tensor
