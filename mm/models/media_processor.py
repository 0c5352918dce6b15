"""A checkpoint's own processor, item by item: pixels to what the tower takes, and to the text that stands for an item.

transformers' processors replace each mark of a rendered chat template, such as `<image>`, by a text with one
placeholder for each visual token, and with whatever else the model wants between them: tags of crops, ends of rows,
times of frames. That text is asked of the processor for each item, so nothing of it has to be known here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin
from transformers.video_utils import VideoMetadata

from mm.data.media import Image, Kind, Pixels, Video
from mm.models.folder import BadCheckpoint, reading, reason_of
from mm.models.pretrained import from_folder
from mm.models.prompt_tokenizer import PIECE_CHARS
from mm.models.renderer import RENDERER
from mm.models.user_text import closed_under_case, high_characters

NOT_OF_ITEMS = frozenset({"input_ids", "attention_mask", "text_replacement_offsets", "token_type_ids"})
"""Outputs of a processor that are of the text around an item."""


@dataclass(frozen=True, kw_only=True)
class ProcessedItem:
    """One item as the tower's input.

    Attributes:
        inputs: What the processor makes of it, by the names of transformers.
        text: What stands for it in the prompt, with a placeholder for each visual token.
    """

    kind: Kind
    inputs: Mapping[str, Any]
    text: str

    @property
    def layout(self) -> dict[str, Tensor]:
        """All inputs but pixels: what positions follow from, such as `image_grid_thw`."""
        tensors = {name: torch.as_tensor(value) for name, value in self.inputs.items() if name.endswith(LAYOUT)}
        return {name: tensor for name, tensor in tensors.items() if tensor.dim()}


LAYOUT = ("grid_thw", "grid_ts", "_sizes", "num_images")
"""Ends of the names of inputs that describe the shape of an item."""

SAMPLE: Pixels = (np.arange(2 * 64 * 96 * 3) % 251).astype(np.uint8).reshape(2, 64, 96, 3)
"""Two small frames to try a processor with."""


class MediaProcessor:
    """Prepares items and expands prompts as a checkpoint's processor does. It holds no weights.

    Args:
        folder: The checkpoint.

    Attributes:
        template: The processor's chat template.
        refused: Kind of media to why the processor cannot be used for it.

    Raises:
        BadCheckpoint: It has no processor, or one that does not say what text stands for an item.
    """

    def __init__(self, folder: Path) -> None:
        found = from_folder(AutoProcessor, folder)
        if not isinstance(found, ProcessorMixin) or not isinstance(getattr(found, "image_token", None), str):
            raise BadCheckpoint(
                str(folder),
                f"has {type(found).__name__} as its processor, which does not say what text stands for a picture",
            )
        self._processor: Any = found
        self.folder = folder
        self.tokenizer: PreTrainedTokenizerBase = self._processor.tokenizer
        self.template: str | None = getattr(found, "chat_template", None)
        self.refused: dict[Kind, str] = {}
        self._marks: dict[Kind, str] = {}
        self._by_prompt = True

    @functools.cached_property
    def samples(self) -> dict[Kind, ProcessedItem]:
        """A small item of each kind that processor and chat template take."""
        image = Image(pixels=SAMPLE[0], content_hash="")
        clip = Video(frames=SAMPLE, timestamps_s=(0.0, 0.5), duration_s=1.0, content_hash="")
        found: dict[Kind, ProcessedItem] = {}
        items: list[Image | Video] = [image, clip]
        for item in items:
            try:
                self._marks[item.kind] = self._mark(item.kind)
                found[item.kind] = self._sampled(item)
            except Exception as error:
                self._marks.pop(item.kind, None)
                self.refused[item.kind] = reason_of(error)
        return found

    def _sampled(self, item: Image | Video) -> ProcessedItem:
        """The item, with pictures given prompt by prompt, or else in one list for all prompts."""
        try:
            return self.process(item)
        except ValueError:
            if item.kind != "image":
                raise
            self._by_prompt = False
            return self.process(item)

    def _mark(self, kind: Kind) -> str:
        """What the chat template writes for an item: the processor's token, or another one that it has for the kind."""
        token: str | None = getattr(self._processor, f"{kind}_token", None)
        if token is None:
            raise ValueError(f"its processor has no {kind}_token")
        named = cast("dict[str, object]", vars(self._processor))
        others = [value for name, value in named.items() if kind in name and name.endswith("_token")]
        rendered = self._rendered(kind, [token, *(other for other in others if isinstance(other, str))])
        if token in rendered:
            return token
        for other in others:
            if isinstance(other, str) and other in rendered and self._replaces(kind, other):
                return other
        raise ValueError(f"its chat template does not write {token!r} for a {kind}")

    def _replaces(self, kind: Kind, mark: str) -> bool:
        """Whether the processor puts the text of an item in place of a mark."""
        texts: dict[Kind, list[str]] = {"image": [], "video": [], kind: ["?"]}
        expanded, _ = self._processor.get_text_with_replacements([mark], texts["image"], texts["video"])
        return expanded == ["?"]

    def _rendered(self, kind: Kind, marks: Sequence[str]) -> str:
        """What the chat template makes of a question with an item."""
        content = [{"type": kind}, {"type": "text", "text": "?"}]
        source = self.tokenizer.get_chat_template(self.template)  # pyright: ignore[reportUnknownMemberType]
        special: dict[str, Any] = self.tokenizer.special_tokens_map
        return RENDERER.render(
            source,
            [{"role": "user", "content": content}],
            {"tools": None, "documents": None, "add_generation_prompt": True, **special},
            alphabet=closed_under_case(set("".join(marks))),
            taken=high_characters([source, *marks]),
            max_chars=PIECE_CHARS,
        )

    @property
    def marks(self) -> Mapping[str, Kind]:
        """What a rendered template holds for an item, by kind. Kinds that are not taken have marks too."""
        kinds: tuple[Kind, ...] = ("image", "video")
        found: dict[Kind, str | None] = {kind: getattr(self._processor, f"{kind}_token", None) for kind in kinds}
        return {mark: kind for kind, mark in (found | self._marks).items() if mark}

    def of_kind(self, kind: Kind) -> object:
        """The processor of pictures or of clips."""
        return getattr(self._processor, f"{kind}_processor", None)

    def process(
        self, item: Image | Video, *, in_company: bool = False, settings: Mapping[str, Any] | None = None
    ) -> ProcessedItem:
        """The item as the tower takes it. A clip's frames are taken as they are.

        Args:
            in_company: Whether the prompt has other pictures; see `reads_company`.
            settings: Of the processor of that kind, in place of its own.
        """
        mark = self._marks[item.kind]
        own: dict[str, Any] = {f"{item.kind}s_kwargs": dict(settings)} if settings else {}
        if isinstance(item, Video):
            sampling = {"do_sample_frames": False, "video_metadata": [_metadata(item)]}
            own = {"videos_kwargs": {**settings, **sampling}} if settings else sampling
            return self._processed(item.kind, mark, videos=[item.frames], **own)
        picture = PIL.Image.fromarray(item.pixels)
        if not (in_company and self.reads_company):
            return self._processed("image", mark, images=self._listed([picture]), **own)
        pair = self._processed("image", 2 * mark, images=self._listed([picture, picture]), **own)
        firsts = {
            name: value[:1] if isinstance(value, Tensor) and len(value) == 2 else value
            for name, value in pair.inputs.items()
        }
        return replace(pair, inputs=firsts)

    @functools.cached_property
    def reads_company(self) -> bool:
        """Whether the processor cuts a picture in another way when the prompt has more than one."""
        sample = self.samples.get("image")
        mark = self._marks.get("image")
        if sample is None or mark is None:
            return False
        picture = PIL.Image.fromarray(SAMPLE[0])
        pair = self._processed("image", 2 * mark, images=self._listed([picture, picture]))
        return pair.text != sample.text

    def _listed(self, pictures: list[PIL.Image.Image]) -> list[Any]:
        """The pictures of one prompt, as this processor wants them."""
        return [pictures] if self._by_prompt else pictures

    @functools.cached_property
    def _numbered(self) -> Mapping[Kind, str]:
        """What stands before the number of an item, for kinds whose items are numbered from 0 in their texts."""
        picture = PIL.Image.fromarray(SAMPLE[0])
        clip = Video(frames=SAMPLE, timestamps_s=(0.0, 0.5), duration_s=1.0, content_hash="")
        options: dict[Kind, dict[str, Any]] = {
            "image": {"images": self._listed([picture, picture])},
            "video": {"videos": [SAMPLE, SAMPLE], "do_sample_frames": False, "video_metadata": [_metadata(clip)] * 2},
        }
        found: dict[Kind, str] = {}
        for kind, sample in self.samples.items():
            _, (first, second) = self._replaced(2 * self._marks[kind], **options[kind])
            at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))
            if first == sample.text and first[at : at + 1] == "0" and second == f"{first[:at]}1{first[at + 1 :]}":
                found[kind] = first[:at]
        return found

    def _replaced(self, marks: str, **options: Any) -> tuple[dict[str, Any], list[str]]:
        """What the processor makes of the items of one prompt, and what it puts in place of their marks."""
        found = self._processor(text=[marks], return_tensors="pt", return_text_replacement_offsets=True, **options)
        if "text_replacement_offsets" not in found:
            raise ValueError(f"{type(self._processor).__name__} does not say what text stands for an item")
        (offsets,) = found["text_replacement_offsets"]
        inputs = {name: value for name, value in found.items() if name not in NOT_OF_ITEMS}
        return inputs, [one["replacement"] for one in offsets]

    def _processed(self, kind: Kind, marks: str, **options: Any) -> ProcessedItem:
        """What the processor makes of the items of one prompt, with the text of the first one."""
        inputs, texts = self._replaced(marks, **options)
        return ProcessedItem(kind=kind, inputs=inputs, text=texts[0])

    def expand(self, rendered: str, texts: Iterable[tuple[Kind, str]]) -> tuple[str, list[Kind]]:
        """A rendered template with the items' texts in place of its marks, and the kinds that it had marks for.

        Args:
            texts: Kind and text of each item, in order.
        """
        by_kind: dict[Kind, list[str]] = {"image": [], "video": []}
        for kind, text in texts:
            before = self._numbered.get(kind)
            if before is not None and text.startswith(f"{before}0"):
                text = f"{before}{len(by_kind[kind])}{text[len(before) + 1 :]}"
            by_kind[kind].append(text)
        marks = self.marks
        counts = {kind: rendered.count(mark) for mark, kind in marks.items()}
        if any(counts.get(kind, 0) != len(found) for kind, found in by_kind.items()):
            kinds = [kind for kind, count in counts.items() for _ in range(count)]
            return rendered, cast("list[Kind]", kinds)
        if by_kind["image"] and _changes_layout(self._processor):
            pictures = self._listed([PIL.Image.fromarray(SAMPLE[0])] * len(by_kind["image"]))
            options = self._processor._merge_kwargs(tokenizer_init_kwargs={})
            rendered = self._processor.prepare_inputs_layout(images=pictures, text=[rendered], **options)[1][0]
        expanded, offsets = self._processor.get_text_with_replacements([rendered], by_kind["image"], by_kind["video"])
        placed: list[dict[str, Any]] = offsets[0] if offsets else []
        return expanded[0], [one["type"] for one in placed]

    def token_types(self, ids: Sequence[int]) -> Tensor:
        """(L,) int64: 0 for text, 1 for pictures, 2 for clips, as the processor says."""
        return torch.tensor(self._processor.create_mm_token_type_ids([list(ids)])[0])

    def prefix_types(self, ids: Sequence[int]) -> Tensor:
        """(L,) int64: `token_type_ids` of a prompt, which some models make masks of."""
        if getattr(self._processor, "return_mm_token_type_ids", False):
            return self.token_types(ids)
        return torch.zeros(len(ids), dtype=torch.int64)

    def settings(self) -> dict[str, Any]:
        """The processor's settings, as JSON."""
        with reading(self.folder, "processor_config.json"):
            return cast("dict[str, Any]", self._processor.to_dict())


def _changes_layout(processor: object) -> bool:
    """Whether a processor writes more into a prompt than what stands for its items."""
    name = "prepare_inputs_layout"
    return getattr(type(processor), name, None) is not getattr(ProcessorMixin, name, None)


def _metadata(clip: Video) -> VideoMetadata:
    """What a processor makes times of frames of: frame `i` is shown at `frames_indices[i] / fps` seconds."""
    return VideoMetadata(
        total_num_frames=cast(int, clip.duration_s or 1.0),
        fps=1.0,
        duration=clip.duration_s,
        frames_indices=cast("list[int]", list(clip.timestamps_s)),
        height=clip.frames.shape[1],
        width=clip.frames.shape[2],
    )
