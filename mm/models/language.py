"""A language model taken apart: embedding, decoder layers, norm and head of any transformers text model.

The engine drives the layers one by one, so that tokens can leave between two of them; the layers stay transformers'
own. What it asks of a text model is the signature that all of transformers' decoder layers share, not a class.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from mm.engine.attention import ATTENTION
from mm.engine.kv_cache import KVCache
from mm.models.checkpoint import BadCheckpoint, load_module, read_tensors

HEAD_KEYS = ("lm_head.weight", "language_model.lm_head.weight")
TEXT_KEY = re.compile(
    r"^(?:language_model\.model\.|model\.language_model\.|language_model\.|model\.text_model\."
    r"|model\.(?=embed_tokens\.|layers\.|norm\.))(.+)$"
)
"""Where checkpoints keep the text model; the last form is Qwen's, whose tower lies beside `model.` and not in it."""


def _text_key(key: str) -> str | None:
    if key in HEAD_KEYS:
        return "lm_head.weight"
    match = TEXT_KEY.match(key)
    return match[1] if match else None


class LanguageModel:
    """The decoder's weights and the few operations that the engine composes.

    Args:
        folder: Checkpoint; only the language tensors are read.
        config: The whole model's configuration.
        device, dtype: Where and in what the weights live.

    Raises:
        BadCheckpoint: Weights are missing or the architecture has layers that we do not drive.
    """

    def __init__(self, folder: Path, config: PretrainedConfig, device: str, dtype: torch.dtype) -> None:
        text = config.get_text_config()
        if any(kind != "full_attention" for kind in getattr(text, "layer_types", None) or ()):
            raise BadCheckpoint(
                str(folder), "has decoder layers without full attention, which this engine cannot drive"
            )
        tensors = read_tensors(folder, _text_key)
        head = tensors.pop("lm_head.weight", None)
        with torch.device("meta"):
            model = AutoModel.from_config(text, attn_implementation=ATTENTION)
        load_module(model, tensors, dtype=dtype, device=device, folder=folder)
        # Rotary frequencies are no weights: a module made on the meta device has none until it is made again.
        model.rotary_emb = type(model.rotary_emb)(config=text).to(device)
        self.model = model.eval()
        self.config = text
        self.device, self.dtype = torch.device(device), dtype
        self.head_weight = self._head(head, config, folder)

    def _head(self, head: Tensor | None, config: PretrainedConfig, folder: Path) -> Tensor:
        embedding = self.model.get_input_embeddings().weight
        if head is not None:
            return head.to(self.device, self.dtype)
        if getattr(config, "tie_word_embeddings", False) or getattr(self.config, "tie_word_embeddings", False):
            return embedding
        raise BadCheckpoint(str(folder), "lacks lm_head.weight and does not tie it to the embedding")

    @property
    def num_layers(self) -> int:
        return len(self.model.layers)

    @property
    def vocab_size(self) -> int:
        return self.head_weight.shape[0]

    @torch.inference_mode()
    def embed(self, token_ids: Tensor) -> Tensor:
        """(L,) ids to (L, D) embeddings."""
        return self.model.get_input_embeddings()(token_ids.to(self.device))

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for one sequence of at most `capacity` rows."""
        heads = self.config.num_key_value_heads
        width = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        return KVCache(
            num_layers=self.num_layers,
            num_heads=heads,
            head_dim=width,
            capacity=capacity,
            device=self.device,
            dtype=self.dtype,
        )

    @torch.inference_mode()
    def forward(self, embeddings: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """Run all layers over new rows and return the logits that follow the last one.

        Args:
            embeddings: (L, D) rows; their keys and values are appended to `cache`.
            positions: (P, L) rotary positions, which need not be contiguous; P = 1, or 3 for M-RoPE.

        Returns:
            Logits (vocab,).
        """
        hidden = embeddings.unsqueeze(0)
        rows = positions if positions.shape[0] == 1 else positions.unsqueeze(1)
        cos_sin = self.model.rotary_emb(hidden, position_ids=rows)
        for layer in self.model.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=cos_sin, mm_cache=cache)
        last = self.model.norm(hidden[:, -1:])
        return nn.functional.linear(last, self.head_weight)[0, 0]
