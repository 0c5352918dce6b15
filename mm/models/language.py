"""A language model taken apart: embedding, decoder layers, norm and head of any transformers text model.

The engine drives the layers one by one, so that tokens can leave between two of them. What it asks of a text model is
the signature that all of transformers' decoder layers share, not a class.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from mm.models.attention import ATTENTION, Attention, AttentionMetadata, Rotary
from mm.models.checkpoint import BadCheckpoint, load_module, read_tensors
from mm.models.kv_cache_spec import KVCacheSpec
from mm.models.layers import FusedLayer, build_layer
from mm.models.linear import PackedProduct

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

    Attributes:
        num_layer_weights: Of all decoder layers.

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
        self.head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.layers = [build_layer(layer, i, self.head_dim) for i, layer in enumerate(self.model.layers)]
        self._product = PackedProduct(self.head_weight)
        self.num_layer_weights = sum(p.numel() for p in self.model.layers.parameters())
        self._table: Rotary | None = None

    def _head(self, head: Tensor | None, config: PretrainedConfig, folder: Path) -> Tensor:
        embedding = self.model.get_input_embeddings().weight
        if head is not None:
            return head.to(self.device, self.dtype)
        if getattr(config, "tie_word_embeddings", False) or getattr(self.config, "tie_word_embeddings", False):
            return embedding
        raise BadCheckpoint(str(folder), "lacks lm_head.weight and does not tie it to the embedding")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def vocab_size(self) -> int:
        return self.head_weight.shape[0]

    @property
    def kv_cache_spec(self) -> KVCacheSpec:
        """What a row of this model takes in the cache."""
        return KVCacheSpec(
            num_layers=self.num_layers,
            num_heads=self.config.num_key_value_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    @torch.inference_mode()
    def embed(self, token_ids: Tensor) -> Tensor:
        """(L,) ids to (L, D) embeddings."""
        return self.model.get_input_embeddings()(token_ids.to(self.device))

    def rotary(self, positions: Tensor) -> Rotary:
        """cos and sin (R, w) float32 of positions (P, R), which need not be contiguous; P = 1, or 3 for M-RoPE."""
        if positions.shape[0] > 1:
            return self._rotary(positions.unsqueeze(1))
        most = int(positions.max()) + 1
        if self._table is None or self._table[0].shape[0] < most:
            size = max(1024, 1 << (most - 1).bit_length())
            rows = 3 if self._multi_axis else 1
            self._table = self._rotary(torch.arange(size, device=self.device).expand(rows, 1, size))
        cos, sin = self._table
        return cos[positions[0]], sin[positions[0]]

    @property
    def _multi_axis(self) -> bool:
        return "mrope_section" in (getattr(self.config, "rope_parameters", None) or {})

    def _rotary(self, positions: Tensor) -> Rotary:
        """Of positions (P, 1, R)."""
        like = torch.empty(1, dtype=torch.float32, device=self.device)
        rows = positions if positions.shape[0] > 1 else positions[0]
        cos, sin = self.model.rotary_emb(like, position_ids=rows)
        return cos[0].contiguous(), sin[0].contiguous()

    def layer(
        self, index: int, hidden: Tensor, batch: AttentionMetadata, rotary: Rotary, attention: Attention
    ) -> Tensor:
        """One decoder layer over packed rows (R, D); their keys and values go to the cache behind `attention`."""
        return self.layers[index](hidden, batch, rotary, attention)

    def compile(self) -> None:
        """Put what layers do before and after attention through torch.compile, where we know the layer."""
        for layer in self.layers:
            layer.compile()

    def pack(self) -> None:
        """Lay weights out as this machine multiplies them fastest. Behind it transformers' layers have none."""
        for layer in self.layers:
            layer.pack()
        self._product.pack()
        if all(isinstance(layer, FusedLayer) for layer in self.layers):
            self.model.layers = nn.ModuleList()  # else every weight would be held twice

    def queries(self, index: int, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Rotated queries (R, H, d) of a layer's input."""
        return self.layers[index].queries(hidden, rotary)

    def keys(self, index: int, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Rotated keys (R, H_kv, d) of a layer's input; nothing is stored."""
        return self.layers[index].keys(hidden, rotary)

    def norm(self, hidden: Tensor) -> Tensor:
        """(R, D) of the last layer's output (R, D): what the head makes logits of."""
        return self.model.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, vocab) of the last layer's output (R, D)."""
        return self._product(self.model.norm(hidden))
