"""Write a Qwen2.5-VL as GGUF: the decoder with its tokenizer, and the tower with its projector.

Run by `demos.bench.peers` with the Python of llama.cpp's environment: FOLDER OUT f32|q8_0. Names of tensors and fields
are those that the gguf package knows; only the decoder's matrices are quantized.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found]
import numpy as np
from safetensors.numpy import load_file

from demos.bench.peers.names import DECODER, TOWER

Tensors = dict[str, np.ndarray]


def write_decoder(config: dict[str, Any], tokenizer: dict[str, Any], tensors: Tensors, path: Path, kind: str) -> None:
    text = config["text_config"]
    writer = gguf.GGUFWriter(str(path), "qwen2vl")
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_sections([*text["rope_parameters"]["mrope_section"], 0])
    add_tokenizer(writer, tokenizer, text)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2VL, text["num_hidden_layers"])
    for name, tensor in tensors.items():
        if ".visual." not in name and not name.startswith("visual."):
            plain = name.replace("model.language_model.", "model.")
            add_tensor(writer, names.get_name(plain, (".weight", ".bias")), tensor, kind)
    finish(writer)


def add_tokenizer(writer: Any, tokenizer: dict[str, Any], text: dict[str, Any]) -> None:
    """A byte-level BPE, filled up to the size of the head."""
    words = {index: word for word, index in tokenizer["model"]["vocab"].items()}
    special = {one["id"]: one["content"] for one in tokenizer["added_tokens"]}
    size = text["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([special.get(i) or words.get(i) or f"[unused{i}]" for i in range(size)])
    writer.add_token_types([3 if i in special else 1 for i in range(size)])  # control, normal
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_token_merges(merges)
    writer.add_eos_token_id(text["eos_token_id"])
    writer.add_add_bos_token(False)


def write_tower(config: dict[str, Any], processor: dict[str, Any], tensors: Tensors, path: Path) -> None:
    vision = config["vision_config"]
    writer = gguf.GGUFWriter(str(path), "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("qwen2.5vl_merger")
    writer.add_vision_use_silu(True)
    writer.add_vision_image_size(560)
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_projection_dim(vision["out_hidden_size"])
    writer.add_vision_block_count(vision["depth"])
    writer.add_vision_head_count(vision["num_heads"])
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_n_wa_pattern(vision["fullatt_block_indexes"][0] + 1)
    writer.add_vision_image_mean(processor["image_mean"])
    writer.add_vision_image_std(processor["image_std"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, vision["depth"])
    for name, tensor in tensors.items():
        if (at := name.find("visual.")) < 0:
            continue
        plain = name[at:]
        if "patch_embed" in plain:  # one convolution for each of the two frames
            for frame, suffix in enumerate(("", ".1")):
                add_tensor(writer, f"v.patch_embd.weight{suffix}", tensor[:, :, frame], "f32")
        elif ".qkv." in plain:
            for part, rows in zip("qkv", np.split(tensor, 3), strict=True):
                add_tensor(writer, names.get_name(plain.replace("qkv", part), (".weight", ".bias")), rows, "f32")
        else:
            add_tensor(writer, names.get_name(plain, (".weight", ".bias")), tensor, "f32")
    finish(writer)


def add_tensor(writer: Any, name: str | None, tensor: np.ndarray, kind: str) -> None:
    if name is None:
        raise ValueError("a tensor has no name in GGUF")
    tensor = np.ascontiguousarray(tensor, dtype=np.float32)
    if kind == "q8_0" and tensor.ndim == 2:
        quantized = gguf.quants.quantize(tensor, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    else:
        writer.add_tensor(name, tensor)


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(folder: Path, out: Path, kind: str) -> None:
    def read(name: str) -> dict[str, Any]:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    out.mkdir(parents=True)
    tensors: Tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    config = read("config.json")
    write_decoder(config, read("tokenizer.json"), tensors, out / DECODER, kind)
    write_tower(config, read("processor_config.json")["image_processor"], tensors, out / TOWER)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
