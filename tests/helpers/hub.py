"""Checkpoints laid out as on a hub: real settings, processors and templates, scaled down, with random weights.

The metadata lie beside the repository in `../shared/hub`. What is missing there is filled in: tokenizers have a small
alphabet, and the real control tokens at their real ids.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.initialization import no_init_weights

from mm.models.flat_config import with_text_settings
from tests.helpers.decoders import randomize

HUB = Path(__file__).parents[3] / "shared" / "hub"

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_window_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "block_dim": 64,
    "block_ff_dim": 96,
    "conv_dim": 64,
    "conv_dim_out": 64,
}
TOWER: dict[str, Any] = {
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "depth": 3,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "embed_dim": 32,
    "out_hidden_size": 64,
    "projection_dim": 64,
    "mlp_ratio": 2,
}
HEARS = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 64}
"""Of a tower for sound, which is never run."""


def without_quantization(raw: dict[str, Any]) -> dict[str, Any]:
    """The settings of the checkpoint from which a quantised one was made."""
    parts = {key: without_quantization(part) if isinstance(part, dict) else part for key, part in raw.items()}
    return {key: part for key, part in parts.items() if key not in ("quantization_config", "quantization")}


def scaled_config(name: str) -> Any:
    """The folder's configuration, narrower and with fewer layers; all else but quantisation is as in the file."""
    raw = without_quantization(json.loads((HUB / name / "config.json").read_text()))
    text = raw.get("text_config", raw)
    for key, value in SMALL.items():
        if key in text or key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            text[key] = value
    if "head_dim" not in text and raw["model_type"].startswith("gemma"):
        text["head_dim"] = 16
    rope = text.get("rope_parameters") or {}
    if isinstance(rope.get("partial_rotary_factor"), float):
        text["head_dim"] = 64
    if isinstance(text.get("layer_types"), list) and "num_kv_shared_layers" in text:
        text["layer_types"] = ["sliding_attention", "full_attention"] * 2
    if isinstance(text.get("layer_types"), list):
        text["layer_types"] = text["layer_types"][:4]
    for scaling in [text.get("rope_scaling"), text.get("rope_parameters"), raw.get("rope_scaling")]:
        if isinstance(scaling, dict) and "mrope_section" in scaling:
            part = text.get("partial_rotary_factor", scaling.get("partial_rotary_factor", 1.0))
            half = int(text.get("head_dim", 16) * part) // 2
            scaling["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    raw.get("audio_config", {}).update(HEARS)
    tower = raw.get("vision_config", {})
    for key, value in TOWER.items():
        if key in tower or (
            raw["model_type"] == "qwen2_vl" and key in ("depth", "embed_dim", "num_heads", "mlp_ratio")
        ):
            tower[key] = value
    if "hidden_size" in tower:
        tower["hidden_size"] = 64 if raw["model_type"] == "qwen2_vl" else 32
    if "fullatt_block_indexes" in tower:
        tower["fullatt_block_indexes"] = [1]
    if "deepstack_visual_indexes" in tower:
        tower["deepstack_visual_indexes"] = [0, 1]
    return with_text_settings(AutoConfig.for_model(**raw), raw)  # which transformers loses of some flat files


def write_scaled(name: str, folder: Path, tokenizer_of: str | None = None) -> Path:
    """Write the checkpoint of a hub folder, scaled down.

    Args:
        tokenizer_of: Another folder with the same tokens, where this one has no tokenizer_config.json.
    """
    config = scaled_config(name)
    with no_init_weights():  # all of them are drawn below
        model = AutoModelForImageTextToText.from_config(config)
    randomize(model)
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    for path in [*HUB.joinpath(tokenizer_of or name).iterdir(), *HUB.joinpath(name).iterdir()]:
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            shutil.copy(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(saved))
    write_tokenizer(folder, config.get_text_config().vocab_size)
    return folder


def write_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer.json with the control tokens of tokenizer_config.json at their ids, and bytes for all else."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = {int(i): token["content"] for i, token in settings.get("added_tokens_decoder", {}).items()}
    config = json.loads((folder / "config.json").read_text())
    for key, value in [*config.items(), *config.get("text_config", {}).items()]:  # else named, with ids in config.json
        named = settings.get(key.removesuffix("_id"), "<|video|>" if key == "video_token_id" else None)
        if key.endswith("_token_id") and isinstance(value, int) and isinstance(named, str):
            added.setdefault(value, named)
    free = iter(sorted(pre_tokenizers.ByteLevel.alphabet()))
    last = max(added) + 1
    vocab = {added[i] if i in added else next(free, f"<unused {i}>"): i for i in range(min(last, size))}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([added[i] for i in sorted(added)])
    raw.save(str(folder / "tokenizer.json"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
