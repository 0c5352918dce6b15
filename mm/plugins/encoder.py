"""The protocols of encoders: pixels to visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from mm.data.media import Image, Kind, Prepared, Video
from mm.data.tokens import Grid, VisualTokens
from mm.plugins.reducer import BeforeTower, InTower


class Encoder(Protocol):
    """Pixels to the visual tokens that a decoder was trained on.

    The class's `provides` and `kinds` are what a checkpoint may have, so that `mm plugins` can tell without loading
    one. An instance's are what this checkpoint has. An encoder is built with `folder`, `device` and `dtype` where its
    name is a checkpoint's `model_type`.

    Attributes:
        provides: Names of the auxiliary features that it can supply, see `mm.plugins.features`.
        kinds: What it takes: "image", "video" or both.
        lacks: Optional, a feature that it does not provide to the reason, for errors.
        frames_apart: Optional, True where a clip's tokens are those of its parts, in order: frames are encoded apart.
        fingerprint: Names weights, preprocessing and dtype, for cache keys. Equal only where the tokens are equal.
    """

    @property
    def provides(self) -> frozenset[str]: ...

    @property
    def kinds(self) -> frozenset[Kind]: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, items: Sequence[Image | Video], needs: frozenset[str] = frozenset()) -> list[VisualTokens]:
        """One `VisualTokens` per item, in order. An item's tokens do not depend on the other items.

        Args:
            needs: Names of auxiliary features. The result's `aux_features` hold at least those that belong to tokens.

        Raises:
            MediaError: An item of a kind that it does not take.
            CapacityError: The device has no memory for one item.
        """
        ...


@runtime_checkable
class PreparesItems(Protocol):
    """An encoder that makes single items ready for its tower. Their decoded pixels are then freed before the next.

    Its `encode` takes what `prepare` returns in place of the item, with the same result.
    """

    def prepare(self, item: Image | Video) -> Prepared:
        """The item resized and cut, without a reference to its pixels.

        Raises:
            MediaError: An item that it does not take.
        """
        ...


@runtime_checkable
class ReadsCompany(Protocol):
    """An encoder that prepares a picture in another way when its prompt has several, if `reads_company` is true."""

    @property
    def reads_company(self) -> bool: ...

    def prepare(self, item: Image | Video, *, in_company: bool = False) -> Prepared:
        """As `PreparesItems.prepare`.

        Args:
            in_company: Whether the prompt has other pictures.
        """
        ...


class ChangesResolution(PreparesItems, Protocol):
    """An encoder that provides `RESOLUTION`: its checkpoint takes pictures of any size."""

    def prepare(self, item: Image | Video, resolution: float | None = None) -> Prepared:
        """As `PreparesItems.prepare`.

        Args:
            resolution: Tokens / tokens that the item would have by itself, at most; None changes nothing.
        """
        ...


@runtime_checkable
class CountsTokens(PreparesItems, Protocol):
    """An encoder that knows an item's visual tokens before its tower runs."""

    def grid_of(self, prepared: Prepared) -> Grid:
        """The grid that the tokens of what `prepare` returned will have."""
        ...


class HostsReducer(Encoder, Protocol):
    """An encoder that provides `BLOCK_KEYS`: a reducer may merge tokens in the blocks of its tower.

    Attributes:
        merges: Kinds of media with which it may. All that it takes where the attribute is not there.
    """

    def encode(
        self, items: Sequence[Image | Video], needs: frozenset[str] = frozenset(), merging: InTower | None = None
    ) -> list[VisualTokens]:
        """As `Encoder.encode`.

        Args:
            merging: Called in each block. The auxiliary features that can then be supplied are those of
                `mm.plugins.capabilities.SUPPLIED_AFTER_MERGING`.
        """
        ...


class SparesCells(Encoder, Protocol):
    """An encoder that provides `PATCHES`: a reducer may remove cells before its tower sees them."""

    def encode(
        self, items: Sequence[Image | Video], needs: frozenset[str] = frozenset(), dropping: BeforeTower | None = None
    ) -> list[VisualTokens]:
        """As `Encoder.encode`, with the tokens of the kept cells only, at their places in the whole grid.

        Args:
            dropping: Called once per item. Items that lose nothing have the same tokens as without it, bit for bit.
        """
        ...


class ReadsText(Encoder, Protocol):
    """An encoder that provides `TEXT_EMBEDDINGS`."""

    def embed_text(self, text: str) -> Tensor:
        """(T, D): the text's tokens as the model's decoder embeds them; (0, D) for an empty text."""
        ...


class ReadsClipText(Encoder, Protocol):
    """An encoder that provides `CLIP_TEXT`."""

    def embed_clip_text(self, text: str) -> Tensor:
        """(S, P): the text as CLIP's text tower embeds it, in pieces that its context holds; (0, P) for none."""
        ...
