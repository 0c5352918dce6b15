"""Tokens come out of a message as they went in, in every dtype, and own their memory."""

from __future__ import annotations

import pickle

import pytest
import torch

from mm.data.tokens import Encoded, EncodeTimings, VisualTokens

transport = pytest.importorskip("serve.deployments.transport")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 6])
def test_round_trip(dtype, rows) -> None:
    embeddings = torch.randn(rows, 4).to(dtype)
    tokens = VisualTokens(
        embeddings=embeddings,
        positions=torch.arange(rows * 3).reshape(rows, 3),
        sizes=torch.ones(rows),
        grid=(1, 2, 3),
        kind="image",
        aux_features={"cls_attention": torch.ones(rows)},
    )
    item = Encoded(tokens=tokens, timings=EncodeTimings(encode_s=1.5), cache_hit=True)
    (back,) = transport.unpack(pickle.loads(pickle.dumps(transport.pack([item]), protocol=5)))
    assert back.tokens.embeddings.dtype == dtype
    assert torch.equal(back.tokens.embeddings, embeddings)
    assert torch.equal(back.tokens.positions, tokens.positions)
    assert torch.equal(back.tokens.sizes, tokens.sizes)
    assert (back.tokens.grid, back.tokens.kind, back.timings, back.cache_hit) == (
        (1, 2, 3),
        "image",
        item.timings,
        True,
    )
    assert not back.tokens.aux_features


def test_read_only_memory_is_copied() -> None:
    bits, dtype = transport.pack_tensor(torch.ones(3))
    bits = bits.copy()
    bits.flags.writeable = False
    tensor = transport.unpack_tensor((bits, dtype))
    tensor += 1
    assert bits.view("float32").tolist() == [1, 1, 1]
