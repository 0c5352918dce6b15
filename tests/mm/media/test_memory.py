"""Memory of decoded pixels: one limit for a request and for all of a process, waiting in turn, and all given back."""

from __future__ import annotations

import gc
import io
import threading
import time

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest

from mm.config import MediaLimits
from mm.data.media import FrameSampling
from mm.errors import CapacityError, MediaError
from mm.media import DecodeMemory, MediaBudget, decode_image, decode_video


def encoded(file_format: str, mode: str = "RGB", side: int = 256, **options: object) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (side, side), "red").convert(mode).save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("file_format", "mode"),
    [("PNG", "1"), ("PNG", "P"), ("PNG", "RGBA"), ("JPEG", "RGB"), ("WEBP", "RGB"), ("GIF", "P"), ("BMP", "RGB")],
)
def test_a_decoded_picture_holds_its_pixels_and_nothing_more(file_format, mode):
    memory = DecodeMemory(1 << 30)
    budget = MediaBudget(MediaLimits(), memory)
    for count in (1, 2):
        pixels = decode_image(encoded(file_format, mode), budget).pixels
        assert memory.num_bytes == count * pixels.nbytes
    budget.give_back()
    assert memory.num_bytes == 0


def test_a_decoded_clip_holds_its_frames(make_clip):
    memory = DecodeMemory(1 << 30)
    budget = MediaBudget(MediaLimits(), memory)
    clip = decode_video(make_clip(), FrameSampling(num_frames=3), budget)
    assert memory.num_bytes == clip.frames.nbytes
    with pytest.raises(MediaError) as caught:
        decode_video(make_clip(), FrameSampling(num_frames=3), MediaBudget(MediaLimits(max_decoded_bytes=1000), memory))
    assert caught.value.reason == "too_much_memory"
    assert memory.num_bytes == clip.frames.nbytes


def test_what_cannot_be_decoded_holds_nothing():
    memory = DecodeMemory(1 << 30)
    budget = MediaBudget(MediaLimits(), memory)
    for data in (encoded("PNG")[:-40], encoded("JPEG")[:-400], b"nonsense"):
        with pytest.raises(MediaError):
            decode_image(data, budget)
        assert memory.num_bytes == 0


def test_a_request_that_is_dropped_gives_back():
    memory = DecodeMemory(1 << 30)
    budget = MediaBudget(MediaLimits(), memory)
    decode_image(encoded("PNG"), budget)
    assert memory.num_bytes > 0
    del budget
    gc.collect()
    assert memory.num_bytes == 0


def test_a_request_cannot_hold_more_than_the_limit():
    limit = 256 * 256 * 8
    memory = DecodeMemory(limit)
    budget = MediaBudget(MediaLimits(max_decoded_bytes=limit), memory)
    decode_image(encoded("PNG"), budget)
    with pytest.raises(MediaError, match=f"^to decode the image takes more memory than the limit of {limit} bytes"):
        decode_image(encoded("PNG"), budget)
    assert memory.num_bytes == 256 * 256 * 3


def test_the_size_in_the_header_counts_before_anything_is_decoded(monkeypatch):
    files = [encoded(file_format) for file_format in ("PNG", "JPEG", "BMP", "GIF", "WEBP")]
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    budget = MediaBudget(MediaLimits(max_decoded_bytes=1000))
    for data in files:
        with pytest.raises(MediaError) as caught:
            decode_image(data, budget)
        assert caught.value.reason == "too_much_memory"


def run_together(count: int, work) -> list[Exception | None]:
    errors: list[Exception | None] = [None] * count

    def run(i: int) -> None:
        try:
            work(i)
        except Exception as error:
            errors[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return errors


def test_requests_wait_for_each_other_and_never_exceed_the_limit():
    memory, seen = DecodeMemory(10), list[int]()

    def work(i: int) -> None:
        for step in range(20):
            num_bytes = 1 + (i * 7 + step * 3) % 10
            memory.take(num_bytes)
            seen.append(memory.num_bytes)
            time.sleep(0.0005)
            memory.give_back(num_bytes)

    assert run_together(8, work) == [None] * 8
    assert max(seen) <= 10
    assert memory.num_bytes == 0


def test_a_large_request_is_not_overtaken_forever():
    memory = DecodeMemory(10)
    memory.take(1)
    order: list[str] = []

    def ask(name: str, num_bytes: int) -> None:
        memory.take(num_bytes)
        order.append(name)
        memory.give_back(num_bytes)

    large = threading.Thread(target=ask, args=("large", 10))
    large.start()
    while not memory.num_waiting:
        time.sleep(0.001)
    small = threading.Thread(target=ask, args=("small", 1))
    small.start()
    while memory.num_waiting < 2:
        time.sleep(0.001)
    assert order == []
    memory.give_back(1)
    large.join(10)
    small.join(10)
    assert order == ["large", "small"]


def test_waiting_ends_with_an_error_that_says_to_try_again():
    memory = DecodeMemory(10, wait_s=0.01)
    memory.take(10)
    with pytest.raises(CapacityError, match="in use by other requests"):
        memory.take(1)
    memory.give_back(10)
    memory.take(10)


def test_requests_that_hold_memory_and_wait_for_more_do_not_block_each_other():
    """Without a rule for it, both would wait for what the other holds."""
    memory = DecodeMemory(10)
    held = threading.Barrier(2)

    def work(_: int) -> None:
        memory.take(5)
        try:
            held.wait(10)
            memory.take(3, held_bytes=5)
            memory.give_back(3)
        finally:
            memory.give_back(5)

    errors = run_together(2, work)
    assert sorted(map(type, errors), key=str) == sorted([CapacityError, type(None)], key=str)
    assert memory.num_bytes == 0


def test_pictures_of_one_pixel_value_are_decoded_in_bounded_memory():
    """Python's allocator is not seen by tracemalloc for Pillow's part; NumPy's is, and it is the larger one."""
    import tracemalloc

    data = encoded("PNG", "1", side=4000)
    decode_image(encoded("PNG"), MediaBudget(MediaLimits()))
    tracemalloc.start()
    pixels = decode_image(data, MediaBudget(MediaLimits())).pixels
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < pixels.nbytes + (16 << 20)
    assert np.array_equal(pixels[0, 0], pixels[-1, -1])
