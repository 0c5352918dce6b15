"""Tokens come out of a message as they went in, in every dtype, and own their memory."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from mm.data.tokens import Encoded, EncodeTimings, Placement, VisualTokens

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


def test_every_field_survives_and_is_counted() -> None:
    rows = 6
    tokens = VisualTokens(
        embeddings=torch.randn(rows, 4),
        positions=torch.arange(rows * 3).reshape(rows, 3),
        sizes=torch.ones(rows),
        grid=(1, 2, 3),
        kind="video",
        seconds_per_step=0.5,
        crops=(1, 2),
        protected=torch.ones(rows, dtype=torch.bool),
        placement=Placement(offsets=torch.arange(rows), advance=9),
        borders=(0,),
        layer_planes=torch.randn(3, rows, 4),
        text="<image>",
        layout={"image_grid_thw": torch.tensor([1, 2, 3])},
    )
    given = dataclasses.asdict(tokens)
    assert all(value is not None for value in given.values()), "a new field needs a value here"
    packed = pickle.loads(pickle.dumps(transport.pack([Encoded(tokens=tokens)]), protocol=5))
    (back,) = transport.unpack(packed)
    found = dataclasses.asdict(back.tokens)
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name
        elif name not in ("placement", "layout"):
            assert found[name] == value, name
    assert torch.equal(back.tokens.placement.offsets, tokens.placement.offsets)
    assert back.tokens.placement.advance == 9
    assert back.tokens.layout["image_grid_thw"].tolist() == [1, 2, 3]
    tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
    assert transport.num_bytes(packed) == sum(t.numel() * t.element_size() for t in tensors)


def test_read_only_memory_is_copied() -> None:
    bits, dtype = transport.pack_tensor(torch.ones(3))
    bits = bits.copy()
    bits.flags.writeable = False
    tensor = transport.unpack_tensor((bits, dtype))
    tensor += 1
    assert bits.view("float32").tolist() == [1, 1, 1]
