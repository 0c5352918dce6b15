"""The question as the decoder embeds it, for query-aware reducers.

The embeddings of the question's tokens are read from the checkpoint's file one by one, so an encoder process holds no
language weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from mm.models.checkpoint import read_rows
from mm.models.pretrained import from_folder
from mm.models.prompt_tokenizer import PromptTokenizer, control_tokens

EMBEDDING_KEY = re.compile(r"(?:^|\.)embed_tokens\.weight$")


class TextEmbeddings:
    """Embeds texts with the checkpoint's tokenizer and matrix of token embeddings.

    Args:
        folder: A checkpoint with its tokenizer.
        max_tokens: Positions of the decoder. Longer texts are refused.
        device: Where the embeddings are put.
    """

    def __init__(self, folder: Path, max_tokens: int, device: torch.device) -> None:
        self.folder, self.max_tokens, self.device = folder, max_tokens, device
        tokenizer: Any = from_folder(AutoTokenizer, folder)
        self.tokenizer = PromptTokenizer(tokenizer, control_tokens(tokenizer))

    def __call__(self, text: str) -> Tensor:
        """(T, D) float32, one row per token of the text. T is 0 for an empty text. No token is a control token.

        Raises:
            ContextTooLong: The text has more tokens than the decoder has positions.
            BadCheckpoint: The checkpoint has no matrix of token embeddings.
        """
        ids = self.tokenizer.text_ids(text, self.max_tokens)
        return read_rows(self.folder, lambda key: EMBEDDING_KEY.search(key) is not None, ids).to(self.device)
