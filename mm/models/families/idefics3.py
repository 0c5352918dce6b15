"""Idefics3 and SmolVLM: a picture as crops and a whole, each behind a tag that says which, one-dimensional positions.

A large picture is seen in rows and columns of square crops, then once as a whole. In the prompt each of these is a tag
such as `<row_1_col_2>`, then its tokens; these texts stay when tokens are dropped. Pictures only: clips of SmolVLM are
not taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoTokenizer

from mm.data.media import Kind
from mm.data.tokens import VisualTokens
from mm.models.family import CheckpointFamily, Placed, among_text

AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"


class Idefics3(CheckpointFamily):
    """Decoder side of an Idefics3 or SmolVLM checkpoint: language model, tokenizer, template, splice among tags.

    Args:
        folder: Checkpoint in Hugging Face format.
        device, dtype: Where and in what the language model lives.
    """

    model_types: ClassVar[frozenset[str]] = frozenset({"idefics3", "smolvlm"})

    def load_tokenizer(self, folder: Path) -> tuple[Any, str | None]:
        """Without the processor: SmolVLM's cannot be made without a package (num2words) that only its clips use."""
        return AutoTokenizer.from_pretrained(folder, local_files_only=True), chat_template(folder)

    def placeholders(self) -> Mapping[int, Kind]:
        return {self.config.image_token_id: "image"}

    def place(self, tokens: VisualTokens) -> Placed:
        _, height, width = tokens.grid
        text = item_text(
            tokens.crops, self.tokenizer.convert_ids_to_tokens(self.config.image_token_id) * height * width
        )
        # Text between control tokens is tokenised apart from what is around them, so an item can be by itself.
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return among_text(ids, self.config.image_token_id, tokens)


def item_text(crops: tuple[int, int] | None, cells: str) -> str:
    """What a picture is in the prompt, as `replace_image_token` of transformers' processors writes it.

    Args:
        crops: Rows and columns of crops; None when there is the whole only.
        cells: The placeholder, once per token of a crop.
    """
    rows, columns = crops or (0, 0)
    lines = [
        "".join(f"{AROUND}<row_{row}_col_{column}>{cells}" for column in range(1, columns + 1)) + "\n"
        for row in range(1, rows + 1)
    ]
    return "".join(lines) + ("\n" if lines else "") + f"{AROUND}{WHOLE}{cells}{AROUND}"


def chat_template(folder: Path) -> str | None:
    """The folder's chat template where a file of its own holds it."""
    if (plain := folder / "chat_template.jinja").is_file():
        return plain.read_text()
    legacy = folder / "chat_template.json"
    return json.loads(legacy.read_text())["chat_template"] if legacy.is_file() else None
