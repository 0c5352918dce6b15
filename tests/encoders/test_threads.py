"""An encoder is shared between threads: what one asks for never shows in what another gets."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from encoders.llava import CLS_ATTENTION, LlavaEncoder
from mm.data.media import Image
from tests.helpers.checkpoints import random_llava


def test_concurrent_calls_give_what_single_calls_give(tmp_path):
    encoder = LlavaEncoder(random_llava(tmp_path / "llava"))
    rng = np.random.default_rng(0)
    images = [Image(pixels=rng.integers(0, 256, (56, 56, 3), dtype=np.uint8), content_hash=str(i)) for i in range(24)]
    needs = [frozenset({CLS_ATTENTION}) if i % 2 else frozenset() for i in range(len(images))]

    def encode(i: int):
        return encoder.encode([images[i]], needs=needs[i])[0]

    alone = [encode(i) for i in range(len(images))]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = list(pool.map(encode, range(len(images))))
            for one, other in zip(alone, together, strict=True):
                assert torch.equal(one.embeddings, other.embeddings)
                assert one.aux_features.keys() == other.aux_features.keys()
                assert all(torch.equal(one.aux_features[name], other.aux_features[name]) for name in one.aux_features)
