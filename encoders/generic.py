"""Any checkpoint that transformers has an image-text-to-text model for: its own processor and its own features.

Tower and projector are those of transformers, loaded without the decoder. Visual tokens are what `get_image_features`
and `get_video_features` return, item by item. Towers differ too much to supply more: reducers get tokens, their grid
where it is known, and the question. Reducers that need attention or keys of the tower are refused by name.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoders.helpers.batches import in_groups
from encoders.helpers.fingerprint import fingerprint
from encoders.helpers.knobs import has_knob, settings_for
from encoders.helpers.text import TextEmbeddings
from mm.data.media import Image, Video
from mm.data.tokens import Grid, VisualTokens
from mm.errors import InvalidRequest, MediaError
from mm.models.checkpoint import BadCheckpoint, check_depths, find
from mm.models.folder import reading
from mm.models.media_processor import MediaProcessor, ProcessedItem
from mm.models.pretrained import model_config
from mm.models.probe import WholeModel, accepted
from mm.plugins.features import RESOLUTION, TEXT_EMBEDDINGS


class TransformersEncoder:
    """Pictures and clips to the tokens that a checkpoint's decoder was trained on.

    Args:
        folder: A checkpoint: a local folder or a hub name.
        device, dtype: Where and in what the tower computes.

    Raises:
        BadCheckpoint: transformers has no such model, or weights are missing.
    """

    provides: frozenset[str] = frozenset({TEXT_EMBEDDINGS, RESOLUTION})
    kinds: frozenset[str] = frozenset({"image", "video"})
    fingerprint: str

    def __init__(
        self, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.path = find(folder)
        check_depths(self.path)
        self.device, self.dtype = torch.device(device), dtype
        self.config: Any = model_config(self.path)
        self.processor = MediaProcessor(self.path)
        self.whole = WholeModel(self.path, self.config)
        weights = self.whole.load_encoder(self.device, dtype)
        settings = json.dumps(self.processor.settings(), sort_keys=True, default=str)
        config = (self.path / "config.json").read_text()
        self.fingerprint = fingerprint(self.config.model_type, config, settings, str(dtype), tensors=weights.items())
        self._sides: dict[str, int] = {}
        with reading(self.path, "a file of its processors"):
            self.kinds = frozenset(self.processor.samples)
            if not all(has_knob(self.processor.of_kind(kind)) for kind in self.processor.samples):
                self.provides -= {RESOLUTION}
                self.lacks = {RESOLUTION: "this checkpoint's processor has no setting for fewer tokens"}
            self._check_samples()
        self._text = functools.cache(self._text_embeddings)

    def _check_samples(self) -> None:
        """Encode a small item of each kind: what is wrong is said at load and not with the first request."""
        for kind, item in self.processor.samples.items():
            if self.whole.features(item.inputs) is None:
                raise BadCheckpoint(str(self.path), f"has no method that makes features of a {kind}")
            (tokens,) = self.encode([item])
            if math.prod(self.grid_of(item)) != tokens.num_tokens:
                raise BadCheckpoint(
                    str(self.path),
                    f"has a processor that writes {math.prod(self.grid_of(item))} placeholders for a {kind} of "
                    f"{tokens.num_tokens} visual tokens",
                )
            if (0 if tokens.layer_planes is None else len(tokens.layer_planes)) != self.whole.num_planes:
                raise BadCheckpoint(
                    str(self.path), "has an encoder whose planes for decoder layers are of a kind that is not known"
                )

    def embed_text(self, text: str) -> Tensor:
        """(T, D) float32: the text's tokens as the decoder embeds them.

        Raises:
            InvalidRequest: The text is longer than the decoder's context.
        """
        return self._text()(text)

    def _text_embeddings(self) -> TextEmbeddings:
        return TextEmbeddings(self.path, self.config.get_text_config().max_position_embeddings, self.device)

    @property
    def reads_company(self) -> bool:
        """Whether a picture's tokens depend on there being other pictures in the prompt."""
        return self.processor.reads_company

    def prepare(
        self, item: Image | Video, *, in_company: bool = False, resolution: float | None = None
    ) -> ProcessedItem:
        """The item as the tower's input, by the checkpoint's processor.

        Args:
            in_company: Whether the prompt has other pictures.
            resolution: At most so many of the item's own tokens, by a setting of the processor.

        Raises:
            InvalidRequest: No setting of the processor makes so few.
            MediaError: An item of a kind or a shape that it does not take.
        """
        if item.kind not in self.kinds:
            raise MediaError("not_supported", item.kind)
        try:
            own = self.processor.process(item, in_company=in_company)
            if resolution is None or resolution >= 1:
                return own
            most = max(1, int(math.prod(self.grid_of(own)) * resolution))
            for settings in settings_for(self.processor.of_kind(item.kind), own, resolution):
                found = self.processor.process(item, in_company=in_company, settings=settings)
                if math.prod(self.grid_of(found)) <= most:
                    return replace(found, inputs={**settings, **found.inputs})  # some towers read a setting too
            raise InvalidRequest(
                f"no setting of this checkpoint's processor makes at most {most} of the {math.prod(self.grid_of(own))} "
                f"visual tokens of this {item.kind}; ask for more, or name a reducer that acts after the projector"
            )
        except ValueError as error:  # such as a clip of fewer frames than become one step
            frames, (height, width) = (
                ("", item.pixels.shape[:2])
                if isinstance(item, Image)
                else (f"{len(item.frames)} frames of ", item.frames.shape[1:3])
            )
            raise MediaError("bad_shape", item.kind, allowed=f"{frames}{width} x {height} pixels") from error

    def grid_of(self, prepared: ProcessedItem) -> Grid:
        """Cells of an item: those that the processor names, or square pieces as the tower makes them, or one row.

        There are as many as the text that stands for the item has placeholders.
        """
        config = self.config
        names = [getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")]
        placeholders = {*names, *getattr(config, "visual_indicator_token_ids", ())}
        ids: list[int] = self.processor.tokenizer.encode(prepared.text, add_special_tokens=False)  # pyright: ignore[reportUnknownMemberType]
        return _grid(sum(token in placeholders for token in ids), self._sides.get(prepared.kind), prepared)

    def encode(
        self, items: Sequence[Image | Video | ProcessedItem], needs: frozenset[str] = frozenset()
    ) -> list[VisualTokens]:
        """One `VisualTokens` per item, in order.

        Raises:
            MediaError: An item of a kind that it does not take.
            CapacityError: The device has no memory for one item.
        """
        prepared = [item if isinstance(item, ProcessedItem) else self.prepare(item) for item in items]
        return in_groups(self._forward, prepared, [1] * len(prepared), 1)

    @torch.inference_mode()
    def _forward(self, items: Sequence[ProcessedItem]) -> list[VisualTokens]:
        return [self._tokens(item) for item in items]

    def _tokens(self, item: ProcessedItem) -> VisualTokens:
        method = self.whole.features(item.inputs)
        assert method is not None
        inputs = {name: self._placed(value) for name, value in item.inputs.items()}
        output: Any = method(**accepted(method, inputs), return_dict=True)
        embeddings, shape = _rows(output.pooler_output)
        named: Tensor | None = getattr(output, "visual_indicator_features", None)
        if named is not None:
            embeddings, shape = self._among_named(embeddings, named, item.text), ()
        planes: Any = getattr(output, "deepstack_features", None)
        if len(shape) == 2 and math.isqrt(shape[1]) ** 2 == shape[1]:
            self._sides.setdefault(item.kind, math.isqrt(shape[1]))
        grid = self.grid_of(item)
        if math.prod(grid) != len(embeddings):  # the family refuses it, by both numbers
            grid = (1, 1, len(embeddings))
        tokens = VisualTokens.full(embeddings, grid, item.kind)
        return replace(
            tokens,
            layer_planes=torch.stack([_rows(plane)[0] for plane in planes]) if planes else None,
            text=item.text,
            layout=item.layout,
        )

    def _among_named(self, rows: Tensor, named: Tensor, text: str) -> Tensor:
        """The rows of an item with those of control tokens around and between them, in the order of the item's text.

        Args:
            named: (n, D), the rows of `config.visual_indicator_token_ids`.
        """
        of_id = dict(zip(self.config.visual_indicator_token_ids, named, strict=True))
        ids: list[int] = self.processor.tokenizer.encode(text, add_special_tokens=False)  # pyright: ignore[reportUnknownMemberType]
        left = iter(rows)
        own = [i for i in ids if i in of_id or i == self.config.image_token_id]
        return torch.stack([of_id[i] if i in of_id else next(left) for i in own])

    def _placed(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else None)


def _rows(features: Tensor | Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    """(N, D) of one item, whatever form a model returns them in, and the shape of its pieces, if all are equal."""
    pieces = [features] if isinstance(features, Tensor) else list(features)
    shape = tuple(pieces[0].shape[:-1]) if len(pieces) == 1 else ()
    return torch.cat([piece.flatten(0, -2) for piece in pieces]), shape


def _grid(num_tokens: int, side: int | None, item: ProcessedItem) -> Grid:
    """Cells of an item of so many tokens.

    Args:
        side: Of the square pieces in which the tower makes tokens of this kind of item; None where it makes others.
    """
    for name, value in item.layout.items():
        if name.endswith("grid_thw") and len(value) == 1:
            steps, height, width = (int(length) for length in value[0])
            merge = math.isqrt(max(steps * height * width // max(num_tokens, 1), 1))
            if steps * (height // merge) * (width // merge) == num_tokens:
                return steps, height // merge, width // merge
    if side is not None and num_tokens % side**2 == 0:
        return num_tokens // side**2, side, side
    return 1, 1, num_tokens
