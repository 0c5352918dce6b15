"""The space that CLIP has for pictures and texts, for reducers that compare a picture's tokens with the question.

A LLaVA checkpoint has the vision half of a CLIP and neither its text half nor its projections. Put that CLIP into the
checkpoint's folder as `clip`, with its tokenizer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModelWithProjection

from encoders.helpers.loading import by_first_group, load_part
from mm.models.checkpoint import BadCheckpoint
from mm.models.pretrained import from_folder, model_config
from mm.models.prompt_tokenizer import PromptTokenizer, control_tokens

CLIP_FOLDER = "clip"
TEXT_KEY = re.compile(r"(text_(?:model|projection)\..*?)(?<!\.position_ids)$")
VISION_KEY = re.compile(r"(?:vision_model\.)?(post_layernorm\.\w+|visual_projection\.weight)$")


class ClipSpace:
    """CLIP's projection of tower features, and its text tower.

    Args:
        folder: A CLIP checkpoint of transformers: config.json, safetensors, tokenizer.
        width: Channels of the tower whose features are projected.
        max_tokens: Longer texts are refused.
        device: Where both compute, in float32.

    Raises:
        BadCheckpoint: The folder has no CLIP, or one of another width.
    """

    def __init__(self, folder: Path, width: int, max_tokens: int, device: torch.device) -> None:
        config: Any = model_config(folder)
        if config.model_type != "clip":
            raise BadCheckpoint(str(folder), f"is of model_type {config.model_type!r}, and has to be 'clip'")
        if config.vision_config.hidden_size != width:
            what = f"has a tower {config.vision_config.hidden_size} wide, and the model's is {width} wide: another CLIP"
            raise BadCheckpoint(str(folder), what)
        self.device, self.max_tokens = device, max_tokens
        tokenizer: Any = from_folder(AutoTokenizer, folder)
        self._tokenizer = PromptTokenizer(tokenizer, control_tokens(tokenizer))
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise BadCheckpoint(str(folder), "has a tokenizer without the tokens that begin and end a text")
        self._ends: tuple[int, int] = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        config.text_config.projection_dim = config.projection_dim  # which is the one that `CLIPModel` reads
        self._context: int = config.text_config.max_position_embeddings
        self._text: Any = load_part(
            folder,
            lambda: CLIPTextModelWithProjection(config.text_config),
            lambda _: by_first_group(TEXT_KEY),
            device,
            torch.float32,
        )
        self._vision: Any = load_part(
            folder, lambda: _Projection(config), lambda _: by_first_group(VISION_KEY), device, torch.float32
        )

    @torch.inference_mode()
    def project(self, features: Tensor) -> Tensor:
        """(..., N, width), as the tower leaves them, to (..., P, N) float32."""
        return self._vision(features.float()).mT

    @torch.inference_mode()
    def embed(self, text: str) -> Tensor:
        """(S, P) float32, one row per piece of the text that CLIP's context holds; none of an empty text.

        Pieces but the last have no end token, as in the code of CDPruner's authors.

        Raises:
            ContextTooLong: The text has more tokens than the decoder has positions.
        """
        ids = self._tokenizer.text_ids(text, self.max_tokens)
        if not ids:
            return torch.zeros(0, self._text.config.projection_dim, device=self.device)
        whole = torch.tensor([self._ends[0], *ids, self._ends[1]])
        num_pieces = -(-len(whole) // self._context)
        padded = whole.new_zeros(num_pieces * self._context)
        padded[: len(whole)] = whole
        mask = torch.zeros_like(padded)
        mask[: len(whole)] = 1
        pieces, masks = (one.view(num_pieces, -1).to(self.device) for one in (padded, mask))
        return self._text(input_ids=pieces, attention_mask=masks).text_embeds.float()


class _Projection(nn.Module):
    """Of the vision half, what follows the tower."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        vision = config.vision_config
        self.post_layernorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.visual_projection(self.post_layernorm(features))
