"""The question as the decoder embeds it, for reducers that ask which tokens bear on it.

Reads the rows of the question's tokens out of the checkpoint's file, so that an encoder process holds no language
weights for it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from mm.models.checkpoint import read_rows

EMBEDDING_KEY = re.compile(r"(?:^|\.)embed_tokens\.weight$")


class TextEmbeddings:
    """Text to rows of the checkpoint's embedding matrix.

    Args:
        folder: A checkpoint with its tokenizer.
        device: Where the rows go.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def __call__(self, text: str) -> Tensor:
        """(T, D) float32; no rows for no text.

        Raises:
            BadCheckpoint: The checkpoint has no matrix of token embeddings.
        """
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return read_rows(self.folder, lambda key: EMBEDDING_KEY.search(key) is not None, ids).to(self.device)
