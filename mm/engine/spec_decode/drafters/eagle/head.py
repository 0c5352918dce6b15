"""The network of a trained drafter: one decoder layer over pairs of (feature, next token), as in EAGLE.

Papers    EAGLE, arXiv:2401.15077; EAGLE-3, arXiv:2503.01840; SpecFLASH, arXiv:2505.12728 (several tokens per step).
Inputs    Input t pairs the target's state f_t with the token x_{t+1}, has the position of x_{t+1} less one, and
          estimates f_{t+1}: through the target's head, the distribution of x_{t+2}. See `vision_adapters` for visual
          tokens.
Equation  u = W [norm(e); f] + b;  h = u + Attn(norm(u));  out = h + MLP(norm(h));  logits = W_head out.
          With feature layers, f is W_fuse [f_a; f_b; f_c] where the target computed it and `out` where the drafter
          reads its own output, normed before W; and logits = W_head norm(out).
Differs   EAGLE has no norm before the attention (SpecVLM adds it) and none on e. EAGLE-3's code widens q, k and v
          where the paper fuses first, as here.

This file holds the arithmetic and the files of a drafter. Sessions, caches and trees are in the modules beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from mm.engine.spec_decode.drafters.eagle.vision_adapters import build_vision_adapter
from mm.errors import shown
from mm.models.folder import REPLACE, BadCheckpoint, read_json, reading

COUNTS = ("width", "vocab_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "num_ahead")
MAX_COUNT = 1 << 24
CONFIG, WEIGHTS = "config.json", "model.safetensors"
FIELD_NAMES = {"vision_adapter": "seeing", "vision_adapter_options": "seeing_options", "feature_layers": "taps"}
"""Field of `DraftConfig` to its key in config.json, where they differ."""
STORED_PREFIXES = {"vision_adapter.global_projection.": "seeing.told.", "vision_adapter.": "seeing."}
"""Beginning of a parameter's name to that of its key in the weights, where they differ. The first that fits holds."""


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """The config.json of a drafter; `FIELD_NAMES` maps fields to keys in the file.

    Attributes:
        width: Width of the target's hidden states.
        vocab_size: Vocabulary size of the target.
        vision_adapter, vision_adapter_options: Name and options of the vision adapter.
        feature_layers: Layers of the target whose inputs are fused. Without any, the last hidden state is read.
        num_ahead: Tokens that one step drafts.
        draft_vocab_size: Size of the drafter's own head; None uses the target's.
        target: Fingerprint of the target it was trained for.
        trained: A record of the training, for people.
    """

    width: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    vision_adapter: str = "none"
    vision_adapter_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    feature_layers: tuple[int, ...] = ()
    num_ahead: int = 1
    draft_vocab_size: int | None = None
    target: str = ""
    trained: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def feature_width(self) -> int:
        """Width of the states that the drafter reads per token."""
        return self.width * max(1, len(self.feature_layers))


class Norm(nn.Module):
    """RMS norm in its input's dtype, also where the weight has another."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.rms_norm(states, self.weight.shape, self.weight.to(states.dtype), self.epsilon)


class DraftHead(nn.Module):
    """The network. It reads the target's embedding table and head, which are not saved with it.

    Args:
        embedding: (vocab, D), the target's.
        head: (vocab, D), the target's.
    """

    def __init__(self, config: DraftConfig, embedding: Tensor, head: Tensor) -> None:
        super().__init__()
        self.config = config
        width, heads = config.width, config.num_heads * config.head_dim
        self.embedding_norm = Norm(width, config.norm_eps)
        self.fuse = nn.Linear(config.feature_width, width, bias=False) if config.feature_layers else None
        self.feature_norm = Norm(width, config.norm_eps) if config.feature_layers else None
        self.fc = nn.Linear(2 * width, width)
        self.input_norm = Norm(width, config.norm_eps)
        self.qkv = nn.Linear(width, heads + 2 * config.num_kv_heads * config.head_dim, bias=False)
        self.out = nn.Linear(heads, width, bias=False)
        self.mlp_norm = Norm(width, config.norm_eps)
        self.gate_up = nn.Linear(width, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, width, bias=False)
        self.out_norm = Norm(width, config.norm_eps) if config.feature_layers else None
        more = config.num_ahead - 1
        self.ahead_in = nn.Linear(width, width) if more else None
        self.ahead_out = nn.Linear(width, more * width, bias=False) if more else None
        self.vision_adapter = build_vision_adapter(config.vision_adapter, width, **config.vision_adapter_options)
        self.own_head: nn.Parameter | None = None
        self.vocab_ids: Tensor | None
        self.register_buffer("vocab_ids", None)
        if config.draft_vocab_size is not None:
            self.own_head = nn.Parameter(head[: config.draft_vocab_size].detach().clone().float())
            self.vocab_ids = torch.arange(config.draft_vocab_size)
        self._shared = (embedding, head)
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Begin near the identity on features, so that the first estimates are the target's own states."""
        width = self.config.width
        nn.init.normal_(self.fc.weight[:, :width], std=width**-0.5)
        self.fc.weight[:, width:].copy_(torch.eye(width))
        nn.init.zeros_(self.fc.bias)
        nn.init.normal_(self.qkv.weight, std=width**-0.5)
        nn.init.normal_(self.gate_up.weight, std=width**-0.5)
        for layer in (self.out, self.down):
            nn.init.normal_(layer.weight, std=0.1 * layer.in_features**-0.5)
        if self.ahead_in is not None and self.ahead_out is not None:
            nn.init.normal_(self.ahead_in.weight, std=width**-0.5)
            nn.init.zeros_(self.ahead_in.bias)
            nn.init.normal_(self.ahead_out.weight, std=width**-0.5)
        if self.fuse is not None:
            nn.init.normal_(self.fuse.weight, std=self.config.feature_width**-0.5)

    def take_vocabulary(self, token_ids: Tensor) -> None:
        """Draft only these tokens: their rows of the target's head begin the own one.

        Args:
            token_ids: (draft_vocab_size,) int64.
        """
        assert self.own_head is not None
        assert self.vocab_ids is not None
        self.vocab_ids.copy_(token_ids.sort().values)
        with torch.no_grad():
            self.own_head.copy_(self._shared[1][self.vocab_ids])

    # ── arithmetic ────────────────────────────────────────────────────────────────────────────────────────────────────

    def features(self, states: Tensor) -> Tensor:
        """(..., feature_width) states of the target to (..., D) features."""
        return states if self.fuse is None else self.fuse(states)

    def inputs(self, features: Tensor, token_ids: Tensor) -> Tensor:
        """(..., D) inputs of the layer for text, from features (..., D) and the tokens after them (...)."""
        tokens = self.embedding_norm(nn.functional.embedding(token_ids, self._shared[0]).to(features.dtype))
        features = features if self.feature_norm is None else self.feature_norm(features)
        return self.fc(torch.cat([tokens, features], dim=-1))

    def project(self, inputs: Tensor) -> Tensor:
        """(..., D) to queries, keys and values (..., H + 2 * H_kv, d), not rotated."""
        return self.qkv(self.input_norm(inputs)).unflatten(-1, (-1, self.config.head_dim))

    def finish(self, inputs: Tensor, attended: Tensor) -> Tensor:
        """(..., D) output of the layer, from its inputs and the output of attention (..., H * d)."""
        hidden = inputs + self.out(attended)
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(nn.functional.silu(gate) * up)

    def next_states(self, output: Tensor) -> Tensor:
        """(..., num_ahead, D) estimates of the next states, from the layer's output (..., D)."""
        if self.ahead_in is None or self.ahead_out is None:
            return output.unsqueeze(-2)
        later = self.ahead_out(nn.functional.silu(self.ahead_in(output)))
        return torch.cat([output.unsqueeze(-2), later.unflatten(-1, (-1, self.config.width))], dim=-2)

    def logits(self, states: Tensor) -> Tensor:
        """(..., vocab or draft_vocab_size) of estimated states (..., D)."""
        states = states if self.out_norm is None else self.out_norm(states)
        return nn.functional.linear(states, self._shared[1] if self.own_head is None else self.own_head)

    def token_ids(self, indices: Tensor) -> Tensor:
        """Ids in the target's vocabulary of indices into `logits`."""
        return indices if self.vocab_ids is None else self.vocab_ids[indices]

    # ── folder ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def save(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write config.json and model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in self.state_dict().items()}
        save_file({_stored_name(name): t.contiguous() for name, t in state.items()}, folder / WEIGHTS)
        (folder / WEIGHTS).chmod(0o644)  # safetensors writes for its owner alone
        fields = {FIELD_NAMES.get(name, name): value for name, value in dataclasses.asdict(self.config).items()}
        (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


def read_draft_config(folder: Path) -> DraftConfig:
    """The configuration of a drafter's folder.

    Raises:
        BadCheckpoint: The folder holds no such configuration.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise BadCheckpoint(str(folder), f"has no {CONFIG}; give a folder that demos.train.train_drafter wrote")
    field_of = {FIELD_NAMES.get(f.name, f.name): f.name for f in dataclasses.fields(DraftConfig)}
    given = read_json(folder, CONFIG)
    if unknown := sorted(given.keys() - field_of.keys()):
        raise BadCheckpoint(str(folder), f"has the unknown setting {unknown[0]!r} in {CONFIG}: is it a drafter's?")
    with reading(folder, CONFIG):
        fields: dict[str, Any] = {field_of[key]: value for key, value in given.items()}
        fields["feature_layers"] = tuple(fields.get("feature_layers", ()))
        config = DraftConfig(**fields)
    _check_config(folder, config)
    return config


def _check_config(folder: Path, config: DraftConfig) -> None:
    """Refuse settings of another type than those of `DraftConfig`, and sizes that no drafter has.

    Raises:
        BadCheckpoint: Names the setting.
    """
    counts = (*COUNTS, *(() if config.draft_vocab_size is None else ("draft_vocab_size",)))
    wanted: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
        (counts, "a whole number above 0", lambda value: type(value) is int and 0 < value <= MAX_COUNT),
        (("norm_eps", "rope_theta"), "a number above 0", lambda value: type(value) in (int, float) and value > 0),
        (("vision_adapter", "target"), "a text", lambda value: isinstance(value, str)),
        (("vision_adapter_options", "trained"), "an object", lambda value: isinstance(value, dict)),
        (("feature_layers",), "a list of layers", lambda value: all(type(layer) is int for layer in value)),
    )
    wrong = [
        (name, value, what)
        for names, what, is_right in wanted
        for name in names
        if not is_right(value := getattr(config, name))
    ]
    if wrong:
        name, value, what = wrong[0]
        key = FIELD_NAMES.get(name, name)
        raise BadCheckpoint(str(folder), f"{CONFIG}: {key} is {shown(value)}, not {what}; {REPLACE}")


def load_draft_head(folder: Path, embedding: Tensor, head: Tensor) -> DraftHead:
    """A trained head in the target's dtype and on its device.

    Args:
        embedding, head: (vocab, D), the target's.

    Raises:
        BadCheckpoint: The folder holds no drafter, or a drafter of another target.
    """
    config = read_draft_config(folder)
    if config.target != fingerprint(head):
        raise BadCheckpoint(
            str(folder),
            "was trained for another target: vocabulary or head differ; train one with demos.train.train_drafter",
        )
    with reading(folder, WEIGHTS):
        tensors = load_file(folder / WEIGHTS)
    with reading(folder, CONFIG):
        network = _of_size(folder, config, tensors, embedding, head)
    names = {_stored_name(name): name for name in network.state_dict()}
    wrong = names.keys() ^ tensors.keys()
    if wrong:
        raise BadCheckpoint(str(folder), f"lacks {sorted(wrong)[0]} or has it in excess in {WEIGHTS}")
    with reading(folder, WEIGHTS):
        network.load_state_dict({names[key]: tensor for key, tensor in tensors.items()})
    return network.to(head.device, head.dtype).eval()


def _of_size(
    folder: Path, config: DraftConfig, tensors: Mapping[str, Tensor], embedding: Tensor, head: Tensor
) -> DraftHead:
    """The network of a configuration, which is not larger than its weights: a damaged size would ask for any memory."""
    with torch.device("meta"):
        needed = sum(math.prod(tensor.shape) for tensor in DraftHead(config, embedding, head).parameters())
    there = sum(math.prod(tensor.shape) for tensor in tensors.values())
    if needed > 2 * there:
        raise BadCheckpoint(
            str(folder), f"{CONFIG} describes {needed} parameters, but {WEIGHTS} has {there}; {REPLACE}"
        )
    return DraftHead(config, embedding, head)


def _stored_name(name: str) -> str:
    """The key of a parameter in the file of weights."""
    for prefix, stored in STORED_PREFIXES.items():
        if name.startswith(prefix):
            return stored + name.removeprefix(prefix)
    return name


def fingerprint(head: Tensor) -> str:
    """A hash of the target's head that does not depend on the precision in which it was loaded."""
    rows = head[:: max(1, head.shape[0] // 64)].detach().to("cpu", torch.bfloat16)
    digest = hashlib.blake2b(digest_size=8)
    digest.update(str(tuple(head.shape)).encode())
    digest.update(rows.contiguous().view(torch.uint16).numpy().tobytes())
    return digest.hexdigest()


def default_feature_layers(num_layers: int) -> tuple[int, ...]:
    """Layers whose inputs EAGLE-3 fuses: 2, L / 2 and L - 3, or evenly spread ones where a target has too few."""
    wanted = (2, num_layers // 2, num_layers - 3)
    if wanted[0] < wanted[1] < wanted[2]:
        return wanted
    spread = {round(1 + i * (num_layers - 2) / 2) for i in range(3)}
    return tuple(sorted(spread))


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (..., head_dim) float32 of positions (...), in the halves form."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions.unsqueeze(-1).float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def size_in_bytes(network: nn.Module) -> int:
    return sum(math.prod(p.shape) * 2 for p in network.parameters())
