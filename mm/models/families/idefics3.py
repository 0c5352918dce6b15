"""Idefics3 and SmolVLM: a picture is split into crops, each with a tag of its own. Positions are one-dimensional.

A large picture is encoded as rows and columns of square crops, and once as a whole. In the prompt, each of these is a
tag such as `<row_1_col_2>` and then its tokens. The tags are kept when tokens are dropped. Only pictures are supported,
not the clips of SmolVLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mm.data.media import Kind
from mm.data.tokens import VisualTokens
from mm.models.family import CheckpointFamily, Placed, among_text
from mm.models.folder import REPLACE, BadCheckpoint, read_json, read_text
from mm.models.pretrained import from_folder

AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"


class _Config(Protocol):
    image_token_id: int


class Idefics3(CheckpointFamily):
    """The decoder side of an Idefics3 or SmolVLM checkpoint."""

    model_types: ClassVar[frozenset[str]] = frozenset({"idefics3", "smolvlm"})

    def load_tokenizer(self, folder: Path) -> tuple[PreTrainedTokenizerBase, str | None]:
        """As in the base class, without a processor: SmolVLM's needs num2words, a package that only its clips use."""
        return cast(PreTrainedTokenizerBase, from_folder(AutoTokenizer, folder)), chat_template(folder)

    def placeholders(self) -> Mapping[int, Kind]:
        return {self._image_token_id: "image"}

    @property
    def _image_token_id(self) -> int:
        return cast(_Config, self.config).image_token_id

    def place(self, tokens: VisualTokens) -> Placed:
        _, height, width = tokens.grid
        image_token = cast(str, self.tokenizer.convert_ids_to_tokens(self._image_token_id))
        text = item_text(tokens.crops, image_token * height * width)
        # Control tokens separate an item from the text around it, so it can be tokenised alone.
        ids = self.item_ids(text)
        return among_text(ids, self._image_token_id, tokens)


def item_text(crops: tuple[int, int] | None, cells: str) -> str:
    """The text of a picture in the prompt, as `replace_image_token` of transformers' processors writes it.

    Args:
        crops: Rows and columns of crops. None where the picture is only encoded as a whole.
        cells: The placeholder, repeated once per token of a crop.
    """
    rows, columns = crops or (0, 0)
    lines = [
        "".join(f"{AROUND}<row_{row}_col_{column}>{cells}" for column in range(1, columns + 1)) + "\n"
        for row in range(1, rows + 1)
    ]
    return "".join(lines) + ("\n" if lines else "") + f"{AROUND}{WHOLE}{cells}{AROUND}"


def chat_template(folder: Path) -> str | None:
    """The chat template of a checkpoint that has a file for it, else None."""
    plain, legacy = "chat_template.jinja", "chat_template.json"
    if (folder / plain).exists():
        return read_text(folder, plain)
    if not (folder / legacy).exists():
        return None
    template = read_json(folder, legacy).get("chat_template")
    if not isinstance(template, str):
        raise BadCheckpoint(str(folder), f"{legacy}: chat_template is no text; {REPLACE}")
    return template
