"""The budget that all media of one request draw from. It counts, and refuses what exceeds a limit."""

from __future__ import annotations

from threading import Lock

from mm.config import MediaLimits
from mm.data.media import Kind
from mm.errors import MediaError
from mm.media.memory import DecodeMemory

BYTES_PER_PIXEL = 3
"""Of decoded pixels: RGB in uint8."""


class MediaBudget:
    """What the media of one request may still use.

    Make one per request. Each item draws once: when it is fetched (item, bytes) and when it is decoded (pixels,
    memory). It may be shared between threads.

    Attributes:
        memory: Lends the memory of decoded pixels to all requests. None counts this request's only.
    """

    def __init__(self, limits: MediaLimits, memory: DecodeMemory | None = None) -> None:
        self.limits, self.memory = limits, memory
        self._num_borrowed_bytes = 0
        self._lock = Lock()
        self._num_items: dict[Kind, int] = {"image": 0, "video": 0}
        self._num_bytes = 0
        self._num_pixels = 0

    def take_item(self, kind: Kind) -> None:
        """Count one image or video.

        Raises:
            MediaError: `too_many_items`.
        """
        limit = self.limits.max_images if kind == "image" else self.limits.max_videos
        with self._lock:
            if self._num_items[kind] >= limit:
                raise MediaError("too_many_items", kind, limit)
            self._num_items[kind] += 1

    def check_bytes(self, kind: Kind, num_bytes: int) -> None:
        """Refuse an encoded size without drawing it, for sizes that are declared or still growing.

        Raises:
            MediaError: `too_many_bytes`.
        """
        item_limit = self.limits.max_image_bytes if kind == "image" else self.limits.max_video_bytes
        if num_bytes > item_limit:
            raise MediaError("too_many_bytes", kind, item_limit)
        if self._num_bytes + num_bytes > self.limits.max_request_bytes:
            raise MediaError("too_many_bytes", kind, self.limits.max_request_bytes)

    def take_bytes(self, kind: Kind, num_bytes: int) -> None:
        """Draw the encoded size of one whole item.

        Raises:
            MediaError: `empty` or `too_many_bytes`.
        """
        if num_bytes == 0:
            raise MediaError("empty", kind)
        with self._lock:
            self.check_bytes(kind, num_bytes)
            self._num_bytes += num_bytes

    def check_size(self, kind: Kind, width: int, height: int) -> None:
        """Refuse a picture or frame size without drawing it.

        Raises:
            MediaError: `too_small`, `too_many_pixels` or `bad_aspect`.
        """
        short, long = sorted((width, height))
        if short < self.limits.min_side_px:
            raise MediaError("too_small", kind, self.limits.min_side_px)
        if short * long > self.limits.max_pixels:
            raise MediaError("too_many_pixels", kind, self.limits.max_pixels)
        if long > short * self.limits.max_aspect:
            raise MediaError("bad_aspect", kind, self.limits.max_aspect)

    def take_pixels(
        self, kind: Kind, width: int, height: int, num_frames: int = 1, bytes_per_pixel: int = BYTES_PER_PIXEL
    ) -> int:
        """Draw the decoded pixels of one item. Call it with the sizes of the header, before decoding.

        Args:
            bytes_per_pixel: Memory that decoding takes at most, the decoded pixels included.

        Returns:
            Bytes that are borrowed now, until `give_back`.

        Raises:
            MediaError: `too_small`, `too_many_pixels`, `bad_aspect` or `too_much_memory`.
            CapacityError: Other requests need the memory.
        """
        self.check_size(kind, width, height)
        num_pixels = width * height * num_frames
        with self._lock:
            if self._num_pixels + num_pixels > self.limits.max_total_pixels:
                raise MediaError("too_many_pixels", kind, self.limits.max_total_pixels)
            self._num_pixels += num_pixels
        return self._borrow(kind, num_pixels * bytes_per_pixel)

    def _borrow(self, kind: Kind, num_bytes: int) -> int:
        with self._lock:
            held_bytes = self._num_borrowed_bytes
            if held_bytes + num_bytes > self.limits.max_decoded_bytes:
                raise MediaError("too_much_memory", kind, self.limits.max_decoded_bytes)
        if self.memory is not None:
            self.memory.take(num_bytes, held_bytes)
        with self._lock:
            self._num_borrowed_bytes += num_bytes
        return num_bytes

    def give_back(self, num_bytes: int | None = None) -> None:
        """Give borrowed memory back: that many bytes, or all."""
        with self._lock:
            num_bytes = self._num_borrowed_bytes if num_bytes is None else num_bytes
            self._num_borrowed_bytes -= num_bytes
        if num_bytes and self.memory is not None:
            self.memory.give_back(num_bytes)

    def __del__(self) -> None:
        """A request that is dropped anywhere holds no memory."""
        self.give_back()

    def take_frames(self, num_frames: int) -> None:
        """Refuse a number of sampled frames of one clip.

        Raises:
            MediaError: `too_many_frames`.
        """
        if num_frames > self.limits.max_sampled_frames:
            raise MediaError("too_many_frames", "video", self.limits.max_sampled_frames)

    def take_duration(self, duration_s: float) -> None:
        """Refuse the length of a clip.

        Raises:
            MediaError: `too_long`.
        """
        if not duration_s <= self.limits.max_duration_s:  # in this form NaN is refused too
            raise MediaError("too_long", "video", self.limits.max_duration_s)
