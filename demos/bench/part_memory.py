"""Peak memory of a process that holds only a model's encoder, or only its decoder, beside the bytes of its tensors.

    python -m demos.bench.part_memory [--shape small] [--json FILE]

The checkpoint has the shape of Qwen3-VL-2B and random bfloat16 weights. Each part is loaded in a process of its own.
The constant is what such a process takes with a checkpoint whose layers are a few numbers wide: Python, the libraries,
the tokenizer, the KV cache. The physical limit is the sum of the part's tensors.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.helpers.families import write

SHARD_BYTES = 512 << 20
GOAL = 1.05
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES = {
    "small": ({**SMALL, "vocab_size": 1024}, {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}),
    "qwen3-vl-2b": (
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "vocab_size": 151936,
        },
        {"hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2048},
    ),
}
LOAD = """
import sys
from mm.build import build_decoder, build_encode_parts
from mm.config import ModelConfig
config = ModelConfig(
    model=sys.argv[1], dtype="bfloat16", num_threads=1, kv_cache_gb=0.1, skip_self_test=True, compile=False
)
part = build_encode_parts(config) if sys.argv[2] == "encoder" else build_decoder(config)
status = open("/proc/self/status").read()
print(*(next(line.split()[1] for line in status.splitlines() if line.startswith(key)) for key in ("VmHWM", "RssAnon")))
"""


def write_shape(name: str, folder: Path) -> dict[str, int]:
    """Write the checkpoint; returns the bytes of each part's tensors."""
    write("qwen3_vl", folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    config, (text, vision) = AutoConfig.from_pretrained(folder, trust_remote_code=False), SHAPES[name]
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    for part, changed in ((config.text_config, text), (config.vision_config, vision)):
        for key, value in changed.items():
            setattr(part, key, value)
    head_dim = config.text_config.hidden_size // config.text_config.num_attention_heads
    config.text_config.head_dim, config.text_config.num_hidden_layers = head_dim, 28
    config.text_config.rope_parameters["mrope_section"] = [head_dim // 2 - 2 * (head_dim // 6), *[head_dim // 6] * 2]
    config.vision_config.depth, config.vision_config.deepstack_visual_indexes = 24, [5, 11, 17]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    sizes, shard, index = {"encoder": 0, "decoder": 0}, {}, {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight":
            continue
        shard[key] = torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(std=0.02)
        sizes["decoder" if ".language_model." in key else "encoder"] += shard[key].nbytes
        if sum(one.nbytes for one in shard.values()) > SHARD_BYTES:
            index |= save_shard(shard, folder, len(index))
            shard = {}
    index |= save_shard(shard, folder, len(index))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sizes


def save_shard(shard: dict[str, torch.Tensor], folder: Path, number: int) -> dict[str, str]:
    name = f"model-{number:05}.safetensors"
    save_file(shard, folder / name, {"format": "pt"})
    return dict.fromkeys(shard, name)


def measured(folder: Path, part: str) -> tuple[int, int]:
    """(peak resident bytes, anonymous bytes at the end) of a process that loads the part."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), part], check=True, capture_output=True, text=True, timeout=1200
    )
    peak, now = (1024 * int(one) for one in done.stdout.split()[-2:])
    return peak, now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES], default="qwen3-vl-2b")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        small = Path(scratch, "small")
        write_shape("small", small)
        constant = {part: measured(small, part)[0] for part in ("encoder", "decoder")}
        folder = Path(scratch, "model")
        sizes = write_shape(args.shape, folder)
        for part, num_bytes in sizes.items():
            peak, now = measured(folder, part)
            ratio = (peak - constant[part]) / num_bytes
            found[part] = {"tensors": num_bytes, "constant": constant[part], "peak": peak, "ratio": round(ratio, 3)}
            print(
                f"{part}: tensors {num_bytes / 1e6:,.0f} MB, constant {constant[part] / 1e6:,.0f} MB, peak "
                f"{peak / 1e6:,.0f} MB, afterwards {now / 1e6:,.0f} MB anonymous; "
                f"(peak - constant) / tensors {ratio:.3f} (goal at most {GOAL})"
            )
    if args.json:
        args.json.write_text(json.dumps({"shape": args.shape, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
