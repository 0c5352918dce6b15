"""The encoder's threads: a download must not hold up requests that have their media with them."""

from __future__ import annotations

import asyncio
import threading

from mm.api import build_request
from mm.data.request import Request
from mm.data.tokens import EncodedMedia
from serve.stages import EncoderStage


async def test_a_slow_download_occupies_no_worker() -> None:
    arrived, finish = threading.Event(), threading.Event()

    def load(request: Request) -> Request:
        if request.media[0].source == "http://slow.example/a.png":
            arrived.set()
            assert finish.wait(20)
        return request

    stage = EncoderStage(load, lambda request, tell: EncodedMedia(reducer=request.request_id), ("image",), workers=1)
    slow = build_request("What?", images=["http://slow.example/a.png"])
    quick = build_request("What?", images=[b"file"])
    waiting = asyncio.ensure_future(stage.encode(slow))
    try:
        assert await asyncio.to_thread(arrived.wait, 20)
        media = await asyncio.wait_for(stage.encode(quick), 20)
        assert media.reducer == quick.request_id
        assert not waiting.done()
        finish.set()
        assert (await asyncio.wait_for(waiting, 20)).reducer == slow.request_id
    finally:
        finish.set()
        stage.close()
