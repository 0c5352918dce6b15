"""Prefill and decode apart, with handles that only count: what is asked of whom, and what a lost replica costs."""

from __future__ import annotations

import asyncio
import time
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from mm.config import ModelConfig
from mm.data.outputs import Summary, Timings, Usage
from mm.data.request import Emitted
from mm.data.tokens import EncodedMedia
from mm.engine.kv_transfer.messages import HandOff, KVPiece, SequenceHandOff
from mm.engine.spec_decode.hidden_state_cache import CapturedStates
from mm.errors import CapacityError, InvalidOption
from mm.models.recurrent import LayerState
from serve.config import ServeConfig, check_split
from serve.runtime import KVLost, MediaLost, Unavailable
from tests.serve.test_ray_runtime import LIMITS, Answer, Method, deltas, deployment, request, texts

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

with warnings.catch_warnings():  # Ray's own, while it is imported
    warnings.simplefilter("ignore")
    from ray.exceptions import ActorDiedError

    from serve.deployments import application, calls, decoding, transport
    from serve.deployments.handing import Gate
    from serve.deployments.messages import INLINE_BYTES, Carried, HandedKV, Prefilled, TransferredMedia
    from serve.deployments.placement import Node, demands
    from serve.deployments.ray_runtime import RayRuntime
    from serve.deployments.whole import HeldMedia
    from tests.serve.test_application import deployments

MEDIA = TransferredMedia(inline=[], reducer="none", num_items=1)
PIECE, STATE = (Carried(transport="inline", num_bytes=size, inline=size) for size in (100, 10))
SUMMARY = Summary(usage=Usage(num_prompt_tokens=7, num_completion_tokens=3), timings=Timings())


def begins(*token_ids: int) -> list[Prefilled]:
    """What a prefill replica says that hands over."""
    return [Prefilled(pieces=[PIECE]), Prefilled(events=deltas(*token_ids)), Prefilled(pieces=[PIECE], state=STATE)]


def goes_on(*token_ids: int) -> list[Any]:
    return [*([one] for one in deltas(*token_ids, finish_reason="length")), [SUMMARY]]


@pytest.fixture
async def make(monkeypatch):
    monkeypatch.setattr(calls, "PAUSE_S", 0.0)
    monkeypatch.setattr(decoding, "RESUME_S", 0.0)

    def made(begin: Method, go_on: Method, **options: Any) -> RayRuntime:
        encode = options.pop("encode", Method(Answer([MEDIA])))
        encoder = deployment(encode=encode, encode_inline=encode)
        decoder = deployment(text_limits=Method(Answer([LIMITS])), go_on=go_on)
        runtime = RayRuntime(encoder, decoder, "none", deployment(begin=begin), **options)
        for tier in runtime._tiers:
            tier.stage._set_present(True)
        return runtime

    return made


async def streamed(runtime: RayRuntime) -> list[str]:
    batches = [batch async for batch in runtime.stream(request(has_picture=True), MEDIA)]
    return texts([[event for event in batch if event is not SUMMARY] for batch in batches])


async def test_a_decoder_goes_on_behind_the_first_token_and_the_prefill_replica_is_released(make) -> None:
    prefill, go_on = Answer(begins(1)), Method(Answer(goes_on(2, 3)))
    runtime = make(Method(prefill), go_on)
    assert await streamed(runtime) == ["1", "2", "3"]
    ((asked, media, handed, is_streamed),) = go_on.calls
    assert (asked.emitted, asked.media, is_streamed) == ((Emitted(token_ids=(1,)),), (), True)
    assert handed == HandedKV(pieces=(PIECE, PIECE), state=STATE)
    assert media is MEDIA
    assert prefill.is_cancelled
    assert {name: stats.num_bytes for name, stats in runtime._transfers.stats.items()} == {
        "inline": 210,
        "object_store": 0,
    }


async def test_an_answer_that_ends_with_its_first_token_needs_no_decoder(make) -> None:
    whole = [Prefilled(events=[*deltas(1, finish_reason="length"), SUMMARY])]
    go_on = Method(Answer([]))
    runtime = make(Method(Answer(whole)), go_on)
    assert await runtime.complete(request(), MEDIA) == whole[0].events
    assert not go_on.calls


async def test_a_prefill_replica_that_is_lost_before_the_first_token_is_replaced(make) -> None:
    begin = Method(Answer(begins(1)[:1], ActorDiedError()), Answer(begins(1)))
    assert await streamed(make(begin, Method(Answer(goes_on(2))))) == ["1", "2"]
    assert [asked.emitted for asked, _ in begin.calls] == [(), ()]


async def test_one_that_is_lost_behind_the_first_token_is_replaced_by_one_that_computes_it_too(make) -> None:
    begin = Method(Answer(begins(1)[:2], ActorDiedError()), Answer(begins(2)))
    assert await streamed(make(begin, Method(Answer(goes_on(3))))) == ["1", "2", "3"]
    assert [asked.emitted for asked, _ in begin.calls] == [(), (Emitted(token_ids=(1,)),)]


async def test_what_is_gone_with_its_prefill_replica_is_computed_again(make) -> None:
    begin = Method(Answer(begins(1)), Answer(begins(2)))
    go_on = Method(Answer([], KVLost("gone")), Answer(goes_on(3)))
    assert await streamed(make(begin, go_on)) == ["1", "2", "3"]
    assert len(go_on.calls) == 2


async def test_a_decoder_that_is_lost_before_it_begins_leaves_the_hand_over_to_another(make) -> None:
    begin, go_on = Method(Answer(begins(1))), Method(Answer([], ActorDiedError()), Answer(goes_on(2)))
    assert await streamed(make(begin, go_on)) == ["1", "2"]
    assert (len(begin.calls), len(go_on.calls)) == (1, 2)


async def test_a_decoder_that_is_lost_later_costs_another_prefill(make) -> None:
    begin = Method(Answer(begins(1)), Answer(begins(3)))
    go_on = Method(Answer([deltas(2)], ActorDiedError()), Answer(goes_on(4)))
    assert await streamed(make(begin, go_on)) == ["1", "2", "3", "4"]
    assert begin.calls[1][0].emitted == (Emitted(token_ids=(1, 2)),)


async def test_full_decoders_keep_what_was_handed_over_waiting(make) -> None:
    prefill = Answer(begins(1))
    go_on = Method(*[Answer([], CapacityError("busy"))] * 7, Answer(goes_on(2)))
    assert await streamed(make(Method(prefill), go_on)) == ["1", "2"]
    assert len(go_on.calls) == 8


async def test_a_full_prefill_replica_refuses_a_new_request(make) -> None:
    with pytest.raises(CapacityError, match="busy"):
        await streamed(make(Method(Answer([], CapacityError("busy"))), Method(Answer([]))))


async def test_replicas_that_are_all_lost_end_the_request(make) -> None:
    with pytest.raises(Unavailable):
        await streamed(make(Method(Answer([], ActorDiedError())), Method(Answer([]))))


async def test_media_lost_with_their_encoder_are_encoded_again(make) -> None:
    begin = Method(Answer([], MediaLost("gone")), Answer(begins(1)))
    encode = Method(Answer([replace(MEDIA, num_bytes=5)]))
    runtime = make(begin, Method(Answer(goes_on(2))), encode=encode)
    assert await streamed(runtime) == ["1", "2"]
    assert begin.calls[1][1].num_bytes == 5


async def test_a_whole_answer_has_every_event(make) -> None:
    go_on = Method(Answer([deltas(2), [*deltas(3, finish_reason="length"), SUMMARY]]))
    runtime = make(Method(Answer(begins(1))), go_on)
    assert [getattr(event, "text", None) for event in await runtime.complete(request(), MEDIA)] == ["1", "2", "3", None]
    assert go_on.calls[0][3] is False


async def test_encoders_wait_while_the_prefill_stage_is_full(make) -> None:
    gate = Gate(1)
    runtime = make(Method(Answer(begins(1))), Method(Answer(goes_on(2))), gate=gate)
    with gate.passing():
        encoding = asyncio.ensure_future(runtime.encode(request(has_picture=True)))
        await asyncio.sleep(0.02)
        assert not encoding.done()
    assert (await encoding).num_items == 1
    assert not gate.is_full


def test_what_travels_arrives_as_it_was() -> None:
    state = LayerState(torch.rand(1, 2, 3), None)
    sequence = SequenceHandOff(
        sequence=0,
        choices=(0, 1),
        num_computed_tokens=5,
        lengths=(5, 3),
        states={1: state},
        snapshots={b"hash": {1: LayerState(torch.rand(1, 2, 3), torch.rand(1, 4))}},
        captured=(CapturedStates(torch.arange(5), {"last_hidden": torch.rand(5, 8, dtype=torch.bfloat16)}),),
        last_logits=torch.rand(9),
    )
    handed = HandOff(
        fingerprint=b"print",
        emitted=(Emitted(token_ids=(1,)),) * 2,
        seed=3,
        sequences=(sequence,),
        origins=torch.arange(3),
        num_cached_tokens=0,
        kv_bytes=64,
        reducer_faults=(),
        queue_s=0.1,
        prefill_s=0.2,
    )
    piece = KVPiece(sequence=0, starts=(0, 0), counts=(5, 3), keys=torch.rand(8, 2, 4), values=torch.rand(8, 2, 4))

    async def moved() -> Any:
        carried = [await transport.sent(one, transport.TRANSPORTS["auto"]) for one in (piece, handed)]
        assert [one.num_bytes for one in carried] == [2 * 8 * 2 * 4 * 4, handed.num_bytes]
        received = HandedKV(pieces=carried[:1], state=carried[1])
        assert not received.has_references
        return await transport.received(received, EncodedMedia(reducer="none"))

    found = asyncio.run(moved())
    assert torch.equal(found.pieces[0].keys, piece.keys)
    assert torch.equal(found.pieces[0].values, piece.values)
    (ours,) = found.state.sequences
    assert torch.equal(ours.states[1].conv, state.conv)
    assert ours.states[1].recurrent is None
    assert torch.equal(ours.captured[0].states["last_hidden"], sequence.captured[0].states["last_hidden"])
    assert torch.equal(ours.last_logits, sequence.last_logits)
    assert torch.equal(ours.snapshots[b"hash"][1].recurrent, sequence.snapshots[b"hash"][1].recurrent)
    assert (found.state.emitted, found.state.fingerprint, ours.lengths) == (handed.emitted, b"print", (5, 3))
    assert handed.num_bytes == 6 * 4 + 10 * 4 + 5 * 8 * 2 + 9 * 4


def test_small_things_travel_inside_the_message(monkeypatch) -> None:
    put = list[Any]()
    monkeypatch.setattr(transport.ray, "put", lambda value: put.append(value) or "reference")
    auto = transport.TRANSPORTS["auto"]
    assert auto.send("arrays", INLINE_BYTES - 1) == Carried(
        transport="inline", num_bytes=INLINE_BYTES - 1, inline="arrays"
    )
    large = auto.send("arrays", INLINE_BYTES)
    assert (large.transport, large.inline, large.reference, put) == ("object_store", None, ("reference",), ["arrays"])


def test_held_media_are_given_once_and_not_for_ever(monkeypatch) -> None:
    held, media = HeldMedia(10.0), EncodedMedia(reducer="none")
    name = held.put(media)
    assert held.take(name) is media
    with pytest.raises(MediaLost):
        held.take(name)
    old = held.put(media)
    later = time.monotonic() + 11
    monkeypatch.setattr("serve.deployments.whole.time.monotonic", lambda: later)
    held.put(media)
    with pytest.raises(MediaLost):
        held.take(old)


SPLITS = {
    "none": ({"Model", "Ingress"}, {"decoder": 1.0}),
    "ep": ({"Encoder", "Decoder", "Ingress"}, {"encoder": 0.25, "decoder": 0.75}),
    "epd": ({"Encoder", "Prefill", "Decoder", "Ingress"}, {"encoder": 0.25, "prefill": 0.375, "decoder": 0.375}),
}


@pytest.mark.parametrize("split", SPLITS)
def test_each_stage_has_its_deployment_and_together_they_fit_one_gpu(split: Any) -> None:
    names, shares = SPLITS[split]
    node = Node(total={"CPU": 8.0, "GPU": 1.0}, free={"CPU": 8.0, "GPU": 1.0})
    config = ServeConfig(split=split, num_decoders=2, decoder_labels=("zone=b",) if split != "none" else ())
    found = deployments(application.build_application(config))
    assert set(found) == names
    assert found["Model" if split == "none" else "Decoder"].num_replicas == 2
    asked = {
        one.stage: one.options["num_gpus"] for one in demands(ServeConfig(split=split), [node]) if one.stage in shares
    }
    config = replace(config, model=replace(config.model, device="cuda"))
    asked = {one.stage: one.options["num_gpus"] for one in demands(config, [node]) if one.stage in shares}
    assert asked == shares
    assert sum(asked.values()) == 1


@pytest.mark.parametrize(
    ("split", "settings"),
    [
        ("none", {"num_encoders": 2}),
        ("none", {"encoder_gpus": 0.5}),
        ("none", {"max_encoders_per_node": 1}),
        ("none", {"num_prefills": 2}),
        ("ep", {"num_prefills": 2}),
        ("ep", {"prefill_labels": ("zone=b",)}),
        ("ep", {"kv_transport": "inline"}),
    ],
)
def test_settings_of_a_stage_without_replicas_are_refused_by_name(split: Any, settings: dict[str, Any]) -> None:
    config = ServeConfig(split=split, **settings)
    with pytest.raises(InvalidOption, match=f"{next(iter(settings))}.*no meaning"):
        check_split(config)
    with pytest.raises(InvalidOption):
        application.build_application(config)
    check_split(replace(config, split="epd"))


@pytest.mark.parametrize("settings", [{"engine": "vllm"}, {"tensor_parallel": 2}])
def test_decoders_whose_keys_and_values_cannot_move_are_refused_at_the_start(settings: dict[str, Any]) -> None:
    config = ServeConfig(model=ModelConfig(**settings), split="epd")
    with pytest.raises(InvalidOption, match=f"{next(iter(settings))}.*cannot move"):
        check_split(config)
    check_split(replace(config, split="ep"))
