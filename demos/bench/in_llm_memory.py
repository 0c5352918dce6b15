"""How much memory does a method inside the decoder take beyond the prefill itself?

A prompt of 3,000 visual tokens is prefilled by a small decoder with random weights, once without a reducer and then
with each method. Measured are the growth of the process's peak memory, and the largest tensor that any operation
returned. As a control, one full attention map of the same prompt is made at the end: no method makes one.

    python -m demos.bench.in_llm_memory
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from demos.bench.machine import facts
from mm.data.tokens import Prompt
from mm.engine.attention.base import build_attention
from mm.engine.cache_pruning import prune_cache
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.model_input import Chunk
from mm.engine.model_runner import ModelRunner
from mm.engine.prefill_pruning import PruneState
from mm.models.language import LanguageModel
from mm.plugins.capabilities import in_decode, in_prefill
from mm.plugins.spec import build_reducer

NUM_VISUAL, NUM_BEFORE, NUM_BEHIND = 3000, 30, 200
REDUCERS = (
    "fastv:keep_ratio=0.25",
    "pyramiddrop",
    "mustdrop:key_ratio=0,global_share=0.00033,peak=0.01",
)
MiB = 1 << 20


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation returned, in bytes."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.num_bytes = max(self.num_bytes, tensor.numel() * tensor.element_size())
        return out


def peak_bytes() -> int:
    """Peak memory of this program alone. `getrusage` would begin with the peak of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def build_language(folder: Path) -> LanguageModel:
    """Eight layers of 256, eight heads that share four keys."""
    text = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=320,
        max_position_embeddings=4096,
        initializer_range=0.1,
    )
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision}, text_config=text, image_token_id=3
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return LanguageModel(folder, config, "cpu", torch.float32)


def build_prompt(width: int) -> Prompt:
    num_rows = NUM_BEFORE + NUM_VISUAL + NUM_BEHIND
    is_visual = torch.zeros(num_rows, dtype=torch.bool)
    is_visual[NUM_BEFORE : NUM_BEFORE + NUM_VISUAL] = True
    return Prompt(
        token_ids=torch.zeros(num_rows, dtype=torch.int64),
        embeddings=torch.randn(num_rows, width, generator=torch.Generator().manual_seed(0)),
        positions=torch.arange(num_rows)[None],
        next_position=num_rows,
        is_visual=is_visual,
    )


def prefill(language: LanguageModel, prompt: Prompt, cache: KVCache, spec: str) -> tuple[int, int]:
    """Largest tensor in bytes, and visual tokens left after the last layer at which some were dropped."""
    reducer = build_reducer(spec)
    hooks = {layer: stage for stage in in_prefill(reducer) for layer in stage.layers(language.num_layers)}
    visual = prompt.is_visual.nonzero().squeeze(1)
    state = PruneState(
        reducers=hooks,
        visual=visual,
        origins=torch.arange(NUM_VISUAL),
        items=torch.zeros(NUM_VISUAL, dtype=torch.int64),
        kinds=("image",),
        protected=torch.zeros(NUM_VISUAL, dtype=torch.bool),
    )
    slot = cache.allocate()
    chunk = Chunk(
        seq_index=slot,
        embeddings=prompt.embeddings,
        positions=prompt.positions,
        prune_state=state if hooks else None,
    )
    with Largest() as largest:
        ModelRunner(language, build_attention(cache)).forward([chunk])
        prune_cache(cache, slot, prompt, 0, chunk.prune_state, in_decode(reducer))
    cache.free(slot)
    if state.error is not None:
        raise state.error
    return largest.num_bytes, len(state.visual)


def full_map(language: LanguageModel, prompt: Prompt) -> int:
    """Largest tensor of one layer's attention when the map is made whole."""
    with Largest() as largest, torch.inference_mode():
        rotary = language.rotary(prompt.positions)
        query, key = language.queries(0, prompt.embeddings, rotary), language.keys(0, prompt.embeddings, rotary)
        groups = query.shape[1] // key.shape[1]
        torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(groups, dim=1)).softmax(-1)
    return largest.num_bytes


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        language = build_language(Path(folder))
        prompt = build_prompt(256)
        shape = language.kv_cache_spec
        cache = KVCache(shape, num_blocks=shape.num_layers * shape.num_blocks(prompt.length), max_num_seqs=1)
        prefill(language, prompt, cache, "none")  # what is set up once is charged to no method
        before = peak_bytes()
        for spec in ("none", *REDUCERS, "a full map"):
            whole = spec == "a full map"
            largest, left = (full_map(language, prompt), 0) if whole else prefill(language, prompt, cache, spec)
            grown, before = peak_bytes() - before, peak_bytes()
            rows.append({"method": spec, "largest_tensor_bytes": largest, "peak_grew_bytes": grown, "left": left})
            print(f"{spec:60} largest tensor {largest / MiB:8.1f} MiB   peak +{grown / MiB:8.1f} MiB   left {left}")
    record = {"question": "in_llm_memory", "visual_tokens": NUM_VISUAL, "rows": rows, "machine": facts()}
    sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
