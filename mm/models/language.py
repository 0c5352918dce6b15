"""A language model in parts: embedding, decoder layers, norm and head of any transformers text model.

The engine runs the layers one by one, so that visual tokens can be dropped between two of them. It relies on the call
signature that all decoder layers of transformers share, and on no model class.
"""

from __future__ import annotations

import copy
import functools
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from mm.models.arithmetic import Arithmetic
from mm.models.attention import Attention, AttentionMetadata, Rotary
from mm.models.checkpoint import BadCheckpoint, load_module
from mm.models.decoder_source import DecoderSource, TextModel
from mm.models.folder import reading
from mm.models.kv_cache_spec import KVCacheSpec
from mm.models.layer_inputs import LayerInputs
from mm.models.layers import FusedLayer, Layer, build_layer
from mm.models.linear import PackedLinear
from mm.models.probe import final_norm, names_in_pass
from mm.models.quantized import Int8Linear, Int8Rows
from mm.models.recurrent import RecurrentLayer
from mm.models.row_ops import RowOp, build_norm, has_kernels
from mm.plugins.weights import ReducerWeights


class TextConfig(Protocol):
    """The fields of a text model's configuration that we read."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    eos_token_id: int | list[int] | None


class _Decoder(Protocol):
    """The parts of a transformers text model that we call."""

    layers: nn.ModuleList
    rotary_emb: nn.Module

    def get_input_embeddings(self) -> nn.Embedding: ...

    def eval(self) -> object: ...


class LanguageModel:
    """The decoder's weights, and the operations that the engine composes.

    Args:
        folder: Checkpoint. Only the language tensors are read.
        config: The whole model's configuration.
        device, dtype: Where and in what the weights live.
        source: Reads and builds the decoder. When not given, it is found by the names that its tensors have.

    Attributes:
        arithmetic: What is computed beside the layers.
        num_layer_weights: Number of weights of all decoder layers.

    Raises:
        BadCheckpoint: Weights are missing, or the architecture has layers that this engine cannot run.
    """

    def __init__(
        self,
        folder: Path,
        config: PretrainedConfig,
        device: str,
        dtype: torch.dtype,
        source: DecoderSource | None = None,
    ) -> None:
        text = config.get_text_config()  # pyright: ignore[reportUnknownMemberType]
        self.arithmetic = self._arithmetic(folder, config)
        self._source = source or TextModel(folder, text)
        tensors, head = self._source.decoder_tensors()
        module = self._source.build_decoder()
        load_module(module, tensors, dtype=dtype, device=device, folder=folder)
        self.model = cast(_Decoder, module)
        self.model.eval()
        self.config = cast(TextConfig, text)
        self.device, self.dtype = torch.device(device), dtype
        self._head_weight: Tensor | Int8Rows = self._head(head, config, folder)
        self.head_dim = self.arithmetic.kv_shape[1]
        self._layer_inputs = LayerInputs.of(module, config)
        self.layers = self._built(self.model.layers)
        self._logits: PackedLinear | Int8Linear = PackedLinear(self._head_weight)
        self._norm, self._embedding = self._final_norm(), self.model.get_input_embeddings()
        self.num_layer_weights = sum(p.numel() for p in self.model.layers.parameters())
        self._table: Rotary | None = None
        with reading(folder, "config.json"):  # wrong sections of M-RoPE would only be found by the first request
            self._rotary(torch.zeros(3 if self._multi_axis else 1, 1, 1, dtype=torch.int64, device=device))
        self._folder, self._prepared = folder, ""

    def _arithmetic(self, folder: Path, config: PretrainedConfig) -> Arithmetic:
        text = config.get_text_config()  # pyright: ignore[reportUnknownMemberType]
        return Arithmetic.of(folder, text, names_in_pass(config))

    def _built(self, layers: nn.ModuleList) -> list[Layer]:
        facts = self.arithmetic
        return [
            RecurrentLayer(layer, i) if facts.keeps_state[i] else build_layer(layer, i, facts)
            for i, layer in enumerate(layers)
        ]

    def _final_norm(self) -> RowOp:
        """Decoders whose layers are all fused end with the norm that is in these layers."""
        norm = final_norm(cast(nn.Module, self.model))
        assert norm is not None
        if not all(isinstance(layer, FusedLayer) for layer in self.layers):
            return norm
        weight, epsilon = cast(Tensor, norm.weight).detach(), cast(float, norm.variance_epsilon)
        return build_norm(weight, epsilon, on_cpu_kernels=has_kernels(weight))

    def with_layers(self, weights: ReducerWeights) -> LanguageModel:
        """The same model with the layers that were trained with a reducer. Tensors that were not changed are its own.

        Raises:
            BadWeights: Tensors are damaged, of another shape, or of no layer of this model.
        """
        changed = weights.decoder_tensors()
        found, _ = self._source.decoder_tensors()
        tensors = {name: tensor for name, tensor in found.items() if name.startswith(LAYERS)}
        if extra := sorted(changed.keys() - tensors.keys()):
            raise weights.bad(f"change tensors of the decoder that are in no layer of this model, such as {extra[0]}")
        if wrong := sorted(name for name, tensor in changed.items() if tensor.shape != tensors[name].shape):
            raise weights.bad(f"have tensors of other shapes than this model's decoder, such as {wrong[0]}")
        tensors |= changed
        module = self._source.build_decoder()
        layers = cast(_Decoder, module).layers
        own = {name.removeprefix(LAYERS): tensor for name, tensor in tensors.items()}
        load_module(layers, own, dtype=self.dtype, device=str(self.device), folder=self._folder)
        adapted = copy.copy(self)
        adapted.layers = self._built(layers.eval())
        for layer in adapted.layers:
            if self._prepared:
                getattr(layer, self._prepared)()
        return adapted

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
        return self._logits.num_outputs

    @property
    def head_weight(self) -> Tensor:
        """(vocab, D). Where the weights have 8 bits, it is made of them at each call."""
        return self._head_weight.dequantized() if isinstance(self._head_weight, Int8Rows) else self._head_weight

    @property
    def kv_cache_spec(self) -> KVCacheSpec:
        """What a token of this model takes in the KV cache."""
        return KVCacheSpec(
            num_layers=self.arithmetic.num_cached_layers,
            has_states=self.arithmetic.is_recurrent,
            windows=self.arithmetic.cache_windows,
            num_heads=self.arithmetic.kv_shape[0],
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    @torch.inference_mode()
    def embed(self, token_ids: Tensor) -> Tensor:
        """(T,) ids to (T, D) embeddings: the first layer's input."""
        return self.as_input(self._embedding(token_ids.to(self.device)))

    def as_input(self, embeddings: Tensor) -> Tensor:
        """The first layer's input of embeddings (T, D), also of visual tokens."""
        scale = self.arithmetic.input_scale
        return embeddings if scale == 1.0 else embeddings * scale

    @property
    def reads_ids(self) -> bool:
        """Whether layers need to know the ids of their tokens."""
        return self._layer_inputs is not None

    @property
    def can_be_recorded(self) -> bool:
        """Whether a decoding step can be recorded on a GPU and replayed."""
        return self.device.type == "cuda" and not self.arithmetic.is_recurrent and not self.reads_ids

    def layer_inputs(self, token_ids: Tensor, embeddings: Tensor) -> Tensor | None:
        """(T, layers, d): what each layer gets beside hidden states. None where layers do not read ids.

        Args:
            token_ids: (T,) Visual tokens have the id of their placeholder.
            embeddings: (T, D), the first layer's input.
        """
        return None if self._layer_inputs is None else self._layer_inputs(token_ids.to(self.device), embeddings)

    def rotary(self, positions: Tensor) -> Rotary:
        """cos and sin (T, w) float32 of positions (P, T), which may have gaps. P = 1, or 3 for M-RoPE."""
        if positions.shape[0] > 1:
            return self._rotary(positions.unsqueeze(1))
        most = int(positions.max()) + 1
        if self._table is None or self._table[0].shape[0] < most:
            size = max(most, min(max(1024, 1 << (most - 1).bit_length()), self.arithmetic.max_positions))
            axes = 3 if self._multi_axis else 1
            self._table = self._rotary(torch.arange(size, device=self.device).expand(axes, 1, size))
        cos, sin = self._table
        return cos[positions[0]], sin[positions[0]]

    @property
    def _multi_axis(self) -> bool:
        return "mrope_section" in (getattr(self.config, "rope_parameters", None) or {})

    def _rotary(self, positions: Tensor) -> Rotary:
        """cos and sin of positions (P, 1, T)."""
        like = torch.empty(1, dtype=torch.float32, device=self.device)
        ids = positions if positions.shape[0] > 1 else positions[0]
        found: list[Rotary] = []
        for kind in self._rotary_kinds:
            options = {} if kind is None else {"layer_type": kind}
            cos, sin = cast(Rotary, self.model.rotary_emb(like, position_ids=ids, **options))
            found.append((cos[0].contiguous(), sin[0].contiguous()))
        self._rotary_widths = [cos.shape[-1] for cos, _ in found]
        if len(found) == 1:
            return found[0]
        return torch.cat([cos for cos, _ in found], dim=-1), torch.cat([sin for _, sin in found], dim=-1)

    @functools.cached_property
    def _rotary_kinds(self) -> list[str | None]:
        """The different rotary embeddings of the layers. Their cos and sin are columns beside each other."""
        return list(dict.fromkeys(self.arithmetic.rotary_kinds))

    def _of_layer(self, index: int, rotary: Rotary) -> Rotary:
        """The columns of cos and sin that a layer rotates by."""
        kinds = self._rotary_kinds
        if len(kinds) == 1:
            return rotary
        which = kinds.index(self.arithmetic.rotary_kinds[index])
        at, width = sum(self._rotary_widths[:which]), self._rotary_widths[which]
        return rotary[0][:, at : at + width].contiguous(), rotary[1][:, at : at + width].contiguous()

    def running(
        self, start: int, stop: int, hidden: Tensor, metadata: AttentionMetadata, rotary: Rotary
    ) -> AbstractContextManager[None]:
        """The context in which the layers start..stop run one after the other; see `mm.models.tensor_parallel`."""
        return nullcontext()

    def layer(
        self, index: int, hidden: Tensor, metadata: AttentionMetadata, rotary: Rotary, attention: Attention
    ) -> Tensor:
        """One decoder layer over packed tokens (T, D). `attention` writes their keys and values to the cache."""
        return self.layers[index](hidden, metadata, self._of_layer(index, rotary), attention)

    def compile(self) -> None:
        """Put what layers do before and after attention through torch.compile, for the layers that we know."""
        self._prepared = "compile"
        for layer in self.layers:
            layer.compile()

    def prepack(self) -> None:
        """Repack weights into oneDNN's blocked format and free the originals, those of transformers' layers too."""
        self._prepared = "prepack"
        self._logits.prepack()  # first, while little else is held: it is the largest
        for layer in self.layers:
            layer.prepack()
        if all(isinstance(layer, FusedLayer) for layer in self.layers):
            self.model.layers = nn.ModuleList()  # else every weight would be held twice

    def quantize(self) -> None:
        """Keep the linear layers, the head and the embedding in 8 bits, and free the originals."""
        self._prepared = "quantize"
        embedding = self.model.get_input_embeddings()
        head, is_plain = Int8Rows(self.head_weight), type(embedding) is nn.Embedding
        is_shared = is_plain and embedding.weight is self._head_weight
        if is_plain:
            self._embedding = head if is_shared else Int8Rows(embedding.weight)
            embedding.weight = nn.Parameter(embedding.weight.new_empty((0, head.values.shape[1])), requires_grad=False)
        self._head_weight, self._logits = head, Int8Linear(head, is_shared=is_shared)
        for layer in self.layers:
            layer.quantize()
        if all(isinstance(layer, FusedLayer) for layer in self.layers):
            self.model.layers = nn.ModuleList()

    def queries(self, index: int, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Rotated queries (T, H, d) of a layer's input."""
        return self.layers[index].queries(hidden, self._of_layer(index, rotary))

    def keys(self, index: int, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Rotated keys (T, H_kv, d) of a layer's input. Nothing is written to the cache."""
        return self.layers[index].keys(hidden, self._of_layer(index, rotary))

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm (T, D) of the last layer's output (T, D): the head's input."""
        return self._norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, vocab) of the last layer's output (T, D)."""
        return self.arithmetic.finish(self._logits(self._norm(hidden)))


LAYERS = "layers."
