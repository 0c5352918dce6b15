"""What a decoder's configuration says of arithmetic that lies beside its layers, or that differs from layer to layer.

transformers computes these things in the loop over the layers, which is the engine's own here. Settings that change the
result and that are not computed are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig

from mm.models.folder import BadCheckpoint
from mm.models.recurrent import keeps_state

KINDS = frozenset({"full_attention", "sliding_attention"})
"""Kinds of attention layers that the engine has a cache for, beside those that keep a state."""

SOFTCAP = "final_logit_softcapping"

GROWING = frozenset({"longrope", "dynamic"})
"""Rotary embeddings whose frequencies depend on the longest position that was asked for."""


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """What is computed around the layers of a decoder.

    Attributes:
        windows: Per layer, the tokens that one sees, itself included; None where it sees all earlier ones.
        keeps_state: Per layer, whether it keeps a state of each sequence, and no keys and values.
        cache_indices: Per layer, the place of its keys and values in the cache. Several layers may share one.
        kv_shapes: Per layer, its key and value heads and their width.
        rotary_kinds: Per layer, the name of its rotary embedding, where a model has several; else None.
        input_scale: Factor of the first layer's input.
        logit_scale: Factor of the logits.
        logit_softcap: c of c * tanh(logit / c), after the factor. None leaves them as they are.
        max_positions: Positions up to which all of this holds.
    """

    windows: tuple[int | None, ...]
    keeps_state: tuple[bool, ...]
    cache_indices: tuple[int, ...]
    kv_shapes: tuple[tuple[int, int], ...]
    rotary_kinds: tuple[str | None, ...]
    input_scale: float
    logit_scale: float
    logit_softcap: float | None
    max_positions: int

    @classmethod
    def of(cls, folder: Path, text: PretrainedConfig, used: Set[str]) -> Arithmetic:
        """The arithmetic of a text model.

        Args:
            used: Names that the whole model's own pass uses. What a configuration says of logits counts only there:
                many models around a decoder leave out what the decoder's own head would do.

        Raises:
            BadCheckpoint: It has layers of a kind that the engine cannot run.
        """
        config: Any = text
        num_layers: int = config.num_hidden_layers
        kinds = list(getattr(config, "layer_types", None) or [])
        if unknown := sorted(kind for kind in {*kinds} - KINDS if not keeps_state(kind)):
            raise BadCheckpoint(
                str(folder), f"has decoder layers with {', '.join(unknown)}, for which this engine has no cache"
            )
        window: int | None = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True) is False:
            window = None
        if kinds and len(kinds) < num_layers:
            raise BadCheckpoint(str(folder), f"names the kinds of {len(kinds)} layers, but has {num_layers}")
        has_window = [kind == "sliding_attention" for kind in kinds] if kinds else [True] * num_layers
        keeps = tuple(keeps_state(kinds[i]) if kinds else False for i in range(num_layers))
        softcap: float | None = getattr(config, "final_logit_softcapping", None) if SOFTCAP in used else None
        return cls(
            windows=tuple(window if has_window[i] else None for i in range(num_layers)),
            keeps_state=keeps,
            cache_indices=_cache_indices(folder, config, kinds, keeps),
            kv_shapes=_kv_shapes(config, num_layers),
            rotary_kinds=_rotary_kinds(config, kinds, num_layers),
            input_scale=float(getattr(config, "embedding_multiplier", None) or 1.0),
            logit_scale=_logit_scale(config, used),
            logit_softcap=float(softcap) if softcap else None,
            max_positions=_max_positions(config),
        )

    @property
    def is_recurrent(self) -> bool:
        """Whether any layer keeps a state."""
        return any(self.keeps_state)

    @property
    def num_cached_layers(self) -> int:
        """Layers that have keys and values of their own."""
        return len({at for at, keeps in zip(self.cache_indices, self.keeps_state, strict=True) if not keeps})

    @property
    def cache_windows(self) -> tuple[int | None, ...]:
        """Per layer of the cache, the widest window of the layers that read it; empty where none has a window."""
        if self.shortest_window is None:
            return ()
        found: dict[int, int | None] = {}
        for at, window, keeps in zip(self.cache_indices, self.windows, self.keeps_state, strict=True):
            if not keeps:
                before = found.get(at, 0)
                found[at] = None if window is None or before is None else max(window, before)
        return tuple(found[at] for at in sorted(found))

    @property
    def shares_keys(self) -> bool:
        """Whether a layer attends to keys and values of another one."""
        return self.num_cached_layers < self.keeps_state.count(False)

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Heads and width that hold those of every layer."""
        return max(heads for heads, _ in self.kv_shapes), max(width for _, width in self.kv_shapes)

    @property
    def shortest_window(self) -> int | None:
        """The shortest window of all layers; None where every layer sees everything."""
        return min((window for window in self.windows if window is not None), default=None)

    def finish(self, logits: Tensor) -> Tensor:
        """The model's logits, of the head's products."""
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_softcap is not None:
            logits = torch.tanh(logits / self.logit_softcap) * self.logit_softcap
        return logits


def _cache_indices(folder: Path, config: Any, kinds: list[str], keeps: tuple[bool, ...]) -> tuple[int, ...]:
    """Layers that share keys and values have the place of the last layer of their kind that stores its own."""
    modes: list[str | None] = list(getattr(config, "kv_sharing_modes", None) or len(keeps) * (None,))
    if unknown := sorted({str(mode) for mode in modes} - {"None", "store", "reuse"}):
        raise BadCheckpoint(str(folder), f"shares keys and values in a way that is not known: {', '.join(unknown)}")
    found: list[int] = []
    stored: dict[str, int] = {}
    count = 0
    for i, keeps_own_state in enumerate(keeps):
        found.append(stored[kinds[i]] if modes[i] == "reuse" else count)
        if modes[i] == "store":
            stored[kinds[i]] = count
        count += not keeps_own_state and modes[i] != "reuse"
    return tuple(found)


def _kv_shapes(config: Any, num_layers: int) -> tuple[tuple[int, int], ...]:
    layers = [config.per_layer_config[i] for i in range(num_layers)]
    widths = [getattr(one, "head_dim", None) or one.hidden_size // one.num_attention_heads for one in layers]
    return tuple((one.num_key_value_heads, width) for one, width in zip(layers, widths, strict=True))


def _logit_scale(config: Any, used: Set[str]) -> float:
    factor, divisor = (
        float(getattr(config, name, None) or 1.0) if name in used else 1.0 for name in ("logit_scale", "logits_scaling")
    )
    return factor * divisor if "* logits_scaling" in used else factor / divisor


def _rotary_kinds(config: Any, kinds: list[str], num_layers: int) -> tuple[str | None, ...]:
    """Where rotary parameters are given per kind of layer, the kind of each layer."""
    parameters: Mapping[str, object] = getattr(config, "rope_parameters", None) or {}
    if not kinds or not {kind for kind in kinds if not keeps_state(kind)} <= parameters.keys():
        return (None,) * num_layers
    return tuple(kinds[:num_layers])


def _max_positions(config: Any) -> int:
    """Positions up to which the rotary frequencies do not depend on what else was asked for."""
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    most: int = config.max_position_embeddings
    nested = [cast("Mapping[str, Any]", part) for part in parameters.values() if isinstance(part, dict)]
    for one in [parameters, *nested]:
        if one.get("rope_type") in GROWING:
            original = one.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            most = min(most, int(original or most))
    return most
