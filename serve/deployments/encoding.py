"""What a request needs of the encoders: its media encoded, by one of them or shared out, whatever is lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ray.serve.handle import DeploymentHandle

from mm.config import MediaLimits
from mm.data.request import Request
from serve.deployments.affinity import media_load
from serve.deployments.calls import result_of, retried, to_first
from serve.deployments.messages import INLINE_BYTES, TransferredMedia
from serve.deployments.sharing import Pace, Part, parts_of, with_items
from serve.deployments.tier import Tier
from serve.runtime import Unavailable


class Encoding:
    """Encodes the media of requests.

    Args:
        encoder: Handle of the deployment.
        tier: Its replicas.
        is_whole: Whether the replica that encodes also generates. Then it holds the media, and nothing is shared out.
        limits: Of a request.
    """

    def __init__(
        self, encoder: DeploymentHandle, tier: Tier, *, is_whole: bool, limits: MediaLimits | None = None
    ) -> None:
        self._encoder, self._tier, self._is_whole, self._limits = encoder, tier, is_whole, limits
        # Object references are only counted, and so kept alive, on calls that go through Ray itself.
        self._encode_by_reference = encoder.options(_by_reference=True).encode
        self._item_bytes: dict[str, int] = {}
        self._pace = Pace()

    async def encode(self, request: Request, keys: Sequence[str], *, is_new: bool) -> TransferredMedia:
        """The request's media. A part whose encoder is lost is encoded at another one.

        Args:
            keys: Hash of each item.
            is_new: Whether no replica has worked on the request.
        """
        parts = [] if self._is_whole else parts_of(request, keys, self._tier.balancer, self._pace, self._limits)
        if len(parts) < 2:
            return replace(await self._encode(request, keys, is_new=is_new), keys=tuple(keys))
        self._tier.balancer.stats.num_shared += 1
        asked = [
            asyncio.ensure_future(
                self._encode(with_items(request, part.items), [keys[i] for i in part.items], part, is_new=is_new)
            )
            for part in parts
        ]
        try:
            found = await asyncio.gather(*asked)
        finally:  # after an error nobody needs the other parts
            for one in asked:
                one.cancel()
        return replace(joined(found, [part.items for part in parts]), keys=tuple(keys))

    async def _encode(
        self, request: Request, keys: Sequence[str], part: Part | None = None, *, is_new: bool
    ) -> TransferredMedia:
        """The media of a whole request, or of a part for one encoder."""
        load, balancer = media_load(request), self._tier.balancer

        async def attempt(loss: Unavailable | None) -> TransferredMedia:
            if part is not None and loss is None:
                order, here = balancer.beginning_with(part.replica, keys[0]), part.load
            else:
                order = balancer.encoders(keys[0], load) if keys else []
                here = balancer.load_at(order[0], keys[0], load) if order else load
            call = result_of(to_first(self._method_for(request), order), request)
            with balancer.given(order, here) as ticket:
                on_routed = None if ticket is None else partial(balancer.move, ticket)
                media = await self._tier.stage.through(call, is_new=is_new and loss is None, on_routed=on_routed)
                if ticket is None:
                    return media
                for key in keys:
                    balancer.learn(ticket.replica, key)
                return replace(media, replica=ticket.replica)

        media = await retried(attempt)
        self._learn(request, media, load)
        return media

    def _learn(self, request: Request, media: TransferredMedia, load: float) -> None:
        if not media.num_items:
            return
        size = media.num_bytes // media.num_items
        for kind in {item.kind for item in request.media}:
            self._item_bytes[kind] = max(size, self._item_bytes.get(kind, 0))
        if not media.num_cache_hits:
            self._pace.learn(load, media.seconds)

    def _method_for(self, request: Request) -> Any:
        """The call that suits the size of the encoded media, which is estimated from earlier requests."""
        if self._is_whole:
            return self._encoder.encode_held
        media = sum(self._item_bytes.get(item.kind, INLINE_BYTES) for item in request.media)
        files = sum(len(getattr(item, "source", b"")) for item in request.media)
        return self._encoder.encode_inline if max(media, files) < INLINE_BYTES else self._encode_by_reference


def joined(found: Sequence[TransferredMedia], places: Sequence[Sequence[int]]) -> TransferredMedia:
    """The media of a request from its parts.

    Args:
        places: Of each part's items among the request's.
    """
    inside = [(media, place) for media, place in zip(found, places, strict=True) if media.reference is None]
    outside = [(media, place) for media, place in zip(found, places, strict=True) if media.reference is not None]
    sizes = Counter[Any]()
    for media in found:
        sizes.update(media.media_bytes)
    return TransferredMedia(
        reducer=found[0].reducer,
        num_items=sum(media.num_items for media in found),
        num_cache_hits=sum(media.num_cache_hits for media in found),
        media_bytes=dict(sizes),
        num_bytes=sum(media.num_bytes for media in found),
        seconds=sum(media.seconds for media in found),
        inline=[item for media, _ in inside for item in media.inline or []],
        reference=tuple(one for media, _ in outside for one in media.reference or ()) or None,
        order=tuple(i for _, place in (*inside, *outside) for i in place),
    )
