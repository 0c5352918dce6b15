"""Blocks before a sliding window are freed; what a later token attends to stays."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import mm
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.kv_cache.prefix_cache import PrefixCache
from mm.engine.kv_cache.windows import NULL_BLOCK
from mm.models.kv_cache_spec import KVCacheSpec
from tests.helpers.decoders import random_llava_with

SIZE, WINDOWS = 4, (None, 6, 9, None, 1)
SHAPE = KVCacheSpec(
    num_layers=len(WINDOWS),
    num_heads=1,
    head_dim=1,
    dtype=torch.float32,
    device=torch.device("cpu"),
    block_size=SIZE,
    windows=WINDOWS,
)


class Twin:
    """A cache, and the prompts of its sequences: token i of prompt p has the stamp 1000 p + i + 1 in every layer."""

    def __init__(self, num_blocks: int) -> None:
        self.cache = KVCache(SHAPE, num_blocks=num_blocks, max_num_seqs=4)
        self.prefixes = PrefixCache(self.cache)
        self.stamps: dict[int, list[int]] = {}

    def append(self, seq: int, count: int, prompt: int) -> None:
        held = self.stamps[seq]
        self.cache.append_slots(seq, count)
        new = [1000 * prompt + i + 1 for i in range(len(held), len(held) + count)]
        for layer in range(len(WINDOWS)):
            slots = torch.from_numpy(self.cache.slot_mapping(layer, seq, len(held)))
            for pool in (self.cache.keys, self.cache.values):
                pool.flatten(0, 1)[slots] = torch.tensor(new, dtype=torch.float32)[:, None, None]
        held += new

    def admit(self, prompt: int, num_tokens: int) -> int:
        """Begin with what is cached of a prompt."""
        seq, names = self.cache.allocate(), [self.name(prompt, i) for i in range(num_tokens // SIZE)]
        found = self.prefixes.match(names)
        self.cache.share(seq, found)
        self.stamps[seq] = [1000 * prompt + i + 1 for i in range(found.shape[1] * SIZE)]
        return seq

    def name(self, prompt: int, block: int) -> bytes:
        return f"{prompt} {block}".encode()

    def compare(self) -> None:
        """The next token of each sequence sees what it should, in every layer."""
        self.cache.check(self.prefixes.held)
        for seq, stamps in self.stamps.items():
            for layer, window in enumerate(WINDOWS):
                seen = stamps if window is None else stamps[len(stamps) - min(window - 1, len(stamps)) :]
                keys, values = self.cache.read(layer, seq)
                first = len(stamps) - len(seen)
                assert keys[first:].flatten().tolist() == values[first:].flatten().tolist() == seen


def held(cache: KVCache, layer: int, seq: int) -> int:
    return int((cache.blocks(layer, seq) != NULL_BLOCK).sum())


@pytest.mark.parametrize("seed", range(8))
def test_what_a_later_token_attends_to_is_always_there(seed):
    rng = random.Random(seed)
    twin, prompts, longest = Twin(rng.choice([150, 400])), {}, 0
    for _ in range(400):
        seqs = sorted(twin.stamps)
        kind = rng.choice(["admit", "append", "append", "each", "release", "put", "fork", "back", "room", "free"])
        seq = rng.choice(seqs) if seqs else None
        if kind == "admit" and twin.cache.num_free_seqs:
            prompt = rng.randrange(3)
            seq = twin.admit(prompt, rng.randrange(60))
            prompts[seq] = prompt
            longest = max(longest, len(twin.stamps[seq]))
        elif seq is None:
            continue
        elif kind == "append":
            count = rng.randrange(1, 14)
            if twin.prefixes.make_room(twin.cache.num_blocks_for(seq, count)):
                twin.append(seq, count, prompts[seq])
        elif kind == "each":
            if twin.prefixes.make_room(twin.cache.num_blocks_for_each(np.array([seq]))):
                twin.append(seq, 1, prompts[seq])
        elif kind == "release":
            twin.cache.remove_skipped_blocks(np.array(seqs))
            for one in seqs:
                length = len(twin.stamps[one])
                for layer, window in enumerate(WINDOWS):
                    first = 0 if window is None else max(0, length + 1 - window) // SIZE
                    assert held(twin.cache, layer, one) == -(-length // SIZE) - first
        elif kind == "put":
            twin.prefixes.put(seq, [twin.name(prompts[seq], i) for i in range(len(twin.stamps[seq]) // SIZE)])
        elif kind == "fork" and twin.cache.num_free_seqs:
            copy = twin.cache.fork(seq)
            twin.stamps[copy], prompts[copy] = list(twin.stamps[seq]), prompts[seq]
        elif kind == "back":  # a draft of which some is accepted
            count = rng.randrange(1, 5)
            if twin.prefixes.make_room(twin.cache.num_blocks_for(seq, count)):
                twin.append(seq, count, prompts[seq])
                accepted = rng.randrange(count + 1)
                twin.cache.keep_accepted(seq, count, range(accepted))
                del twin.stamps[seq][len(twin.stamps[seq]) - count + accepted :]
        elif kind == "room":
            twin.prefixes.make_room(rng.randrange(twin.cache.num_blocks) if rng.random() < 0.1 else 20)
        elif kind == "free":
            twin.cache.free(seq)
            del twin.stamps[seq]
        twin.compare()
    assert longest >= 2 * SIZE, "no prefix of some length was ever found"
    for seq in sorted(twin.stamps):
        twin.cache.free(seq)
    twin.prefixes.clear()
    assert twin.cache.num_free_blocks == twin.cache.num_blocks
    assert twin.cache.num_used_bytes == 0


def test_cached_blocks_before_the_windows_make_room_and_a_prefix_needs_whole_windows():
    """Sequences that decode hold their prompt's blocks, and of the cached ones only those are in use."""
    twin = Twin(100)
    seq = twin.admit(1, 0)
    twin.append(seq, 40, 1)
    names = [twin.name(1, i) for i in range(10)]
    twin.prefixes.put(seq, names)
    twin.cache.remove_skipped_blocks(np.array([seq]))
    assert twin.prefixes.match(names).shape[1] == 10
    free, gone = twin.cache.num_free_blocks, 8 + 8 + 10  # of windows 6, 9 and 1
    assert not twin.prefixes.make_room(free + gone + 1)
    assert twin.prefixes.make_room(free + gone)
    assert twin.cache.num_free_blocks == free + gone
    found = twin.prefixes.match(names)
    assert found.shape[1] == 10  # the windows' ends are still there
    assert [int((row == NULL_BLOCK).sum()) for row in found] == [0, 8, 8, 0, 10]
    assert not twin.prefixes.match(names[:5]).shape[1]
    twin.compare()
    again = twin.admit(2, 0)
    twin.append(again, 20, 1)  # the same tokens, computed anew
    twin.stamps[again] = [1000 + i + 1 for i in range(20)]
    twin.prefixes.put(again, names[:5])
    assert twin.prefixes.match(names[:5]).shape[1] == 5
    twin.compare()


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("chunk", [32, 4096])
def test_answers_far_beyond_a_window_are_those_of_transformers_in_little_memory(tmp_path, prefix_caching, chunk):
    """With a prefix that was found, two choices, a draft, and so little memory that sequences are preempted."""
    layers = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    settings = {"sliding_window": 32, "use_sliding_window": True, "num_hidden_layers": 4, "layer_types": layers}
    folder = random_llava_with(tmp_path, "qwen2", **settings)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    words = LlavaProcessor.from_pretrained(folder)
    question = "what colour is the circle and what colour is the square beside it? " * 4
    content = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    text = words.apply_chat_template(content, add_generation_prompt=True)
    inputs = words(text=text, return_tensors="pt", add_special_tokens=False)
    length, more = inputs.input_ids.shape[1], 160
    out = model.generate(**inputs, max_new_tokens=more, min_new_tokens=more, do_sample=False)
    expected = out[0, length:].tolist()
    asked = {"max_new_tokens": more, "temperature": 0, "ignore_eos": True}
    options = {
        "max_batch_tokens": chunk,
        "prefix_caching": prefix_caching,
        "kv_cache_gb": 0.0003,
        "drafters": ("copy",),
        "control": False,
    }
    with mm.load(folder, dtype="float32", num_threads=1, **options) as ours:
        engine = ours.native_engine
        cache, used = engine.cache, [0]
        release = cache.remove_skipped_blocks

        def recorded(seq_indices):
            release(seq_indices)
            used.append((cache.num_used_bytes - engine.prefix_cache.num_idle_bytes) // cache.shape.block_bytes)

        cache.remove_skipped_blocks = recorded
        assert list(ours.generate(question, **asked).token_ids[0]) == expected
        blocks, in_window = -(-(length + more) // cache.shape.block_size), -(-32 // cache.shape.block_size) + 1
        assert used[-2] <= blocks + 3 * in_window  # the last but one step of the sequence
        if chunk == 32 and not prefix_caching:
            assert max(used) <= blocks + 3 * (in_window + chunk // cache.shape.block_size)
        for also in ({"n": 2}, {"speculation": "copy"}, {}):
            answer = ours.generate(question, **asked, **also)
            assert all(list(tokens) == expected for tokens in answer.token_ids)
        many = ours.generate_batch([{"prompt": question, **asked}] * 6)
        assert all(list(one.token_ids[0]) == expected for one in many)
        assert engine.stats.num_preemptions
        assert bool(engine.stats.prefix_hits) == prefix_caching
        cache.check(engine.prefix_cache.held)


def test_a_prompt_in_chunks_is_found_by_another_that_begins_as_it_does(tmp_path):
    """Its blocks before the windows are freed only when the prefix cache has them."""
    folder = random_llava_with(tmp_path, "mistral", sliding_window=32)
    shared = "what colour is the circle and what colour is the square beside it? " * 4
    with mm.load(folder, dtype="float32", num_threads=1, max_batch_tokens=32, kv_cache_gb=0.01) as ours:
        ours.generate(shared + "circle " * 80, max_new_tokens=2, temperature=0)
        before = ours.native_engine.stats.prefix_hits
        again = ours.generate(shared + "square? " * 8, max_new_tokens=8, temperature=0)
        found = ours.native_engine.stats.prefix_hits - before
        assert found > 32 + ours.native_engine.cache.shape.block_size
        alone = ours.generate(shared + "square? " * 8, max_new_tokens=8, temperature=0, cache_salt="alone")
        assert again.token_ids == alone.token_ids
