"""Pictures: what each mode means in RGB, pixel for pixel, and every refusal with its reason."""

from __future__ import annotations

import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp

from mm.data.media import FrameSampling
from mm.errors import MEDIA_REASONS, InvalidRequest, MediaError
from mm.media import content_hash, decode_image, image_from_array, image_from_pil
from mm.media.hashing import framed_hash, pixel_hash

RNG = np.random.default_rng(7)
COLOURS = RNG.integers(0, 256, (16, 24, 3), dtype=np.uint8)
GREYS = RNG.integers(0, 256, (16, 24), dtype=np.uint8)


def encode(picture: PIL.Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def of(pixels: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray(pixels)


def reason(data: bytes, budget) -> str:
    with pytest.raises(MediaError) as caught:
        decode_image(data, budget)
    assert caught.value.kind == "image"
    assert str(caught.value).startswith(
        MEDIA_REASONS[caught.value.reason].format(kind="image", limit="", allowed="")[:12]
    )
    assert caught.value.__cause__ is None
    return caught.value.reason


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("options", [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})], ids=lambda o: o[0])
def test_lossless_formats_are_exact(budget, options):
    pixels = decode_image(encode(of(COLOURS), options[0], **options[1]), budget).pixels
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, COLOURS)


def test_jpeg_is_what_pillow_decodes(budget):
    data = encode(of(COLOURS), "JPEG", quality=90)
    assert np.array_equal(decode_image(data, budget).pixels, np.array(PIL.Image.open(BytesIO(data)).convert("RGB")))


def test_grey_and_one_bit(budget):
    assert np.array_equal(decode_image(encode(of(GREYS)), budget).pixels, np.stack([GREYS] * 3, -1))
    bits = of(GREYS).point(lambda value: 255 * (value > 99), "1")
    assert np.array_equal(decode_image(encode(bits), budget).pixels[..., 0], 255 * (GREYS > 99))


def test_sixteen_bit_grey_is_scaled(budget):
    wide = RNG.integers(0, 65536, (16, 24), dtype=np.uint16)
    wide[0, :4] = 0, 65535, 128, 129
    expected = np.round(wide / 257).astype(np.uint8)
    for data in (encode(of(wide)), sixteen_bit(wide)):
        assert np.array_equal(decode_image(data, budget).pixels, np.stack([expected] * 3, -1))
    assert np.array_equal(image_from_pil(of(wide.astype(np.int32)), budget).pixels[..., 0], expected)


def sixteen_bit(wide: np.ndarray) -> bytes:
    """Built by hand, so that the reference does not come from the library under test."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    return png(wide.shape[1], wide.shape[0], 16, 0, rows)


@pytest.mark.parametrize("colour", [2, 4, 6], ids=["rgb16", "la16", "rgba16"])
def test_sixteen_bit_colours(budget, colour):
    channels = {2: 3, 4: 2, 6: 4}[colour]
    wide = RNG.integers(0, 65536, (16, 24, channels), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    values = wide / 65535
    alpha = values[..., -1:] if colour != 2 else np.ones_like(values[..., :1])
    expected = 255 * (values[..., : 1 if colour == 4 else 3] * alpha + 1 - alpha)
    pixels = decode_image(png(24, 16, 16, colour, rows), budget).pixels
    assert (
        np.abs(pixels - expected).max() <= 2.5
    )  # Pillow keeps the high byte of each channel, here of two that are multiplied


def test_alpha_is_composited_on_white(budget):
    alpha = RNG.integers(0, 256, (16, 24), dtype=np.uint8)
    rgba = np.dstack([COLOURS, alpha])
    for file_format, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        weight = alpha[..., None] / 255
        expected = COLOURS * weight + 255 * (1 - weight)
        pixels = decode_image(encode(of(rgba), file_format, **options), budget).pixels
        assert np.abs(pixels - expected).max() <= 1


def test_grey_with_alpha(budget):
    alpha = np.where(GREYS > 99, 255, 0).astype(np.uint8)
    expected = np.where(GREYS > 99, GREYS, 255)
    pixels = decode_image(encode(of(np.dstack([GREYS, alpha]))), budget).pixels
    assert np.array_equal(pixels, np.stack([expected] * 3, -1))


def test_palette_with_and_without_transparency(budget):
    indices = RNG.integers(0, 4, (16, 24), dtype=np.uint8)
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], np.uint8)
    picture = PIL.Image.frombytes("P", (24, 16), indices.tobytes())
    picture.putpalette(colours.tobytes())
    assert np.array_equal(decode_image(encode(picture), budget).pixels, colours[indices])
    shown = colours.copy()
    shown[1] = 255
    for data in (encode(picture, transparency=1), encode(picture, "GIF", transparency=1)):
        assert np.array_equal(decode_image(data, budget).pixels, shown[indices])
    half = encode(picture, transparency=bytes([255, 0, 128, 255]))
    expected = np.array([[255, 0, 0], [255, 255, 255], [127, 127, 255], [9, 9, 9]])
    assert np.abs(decode_image(half, budget).pixels - expected[indices]).max() <= 1


def test_a_transparent_colour_without_alpha(budget):
    picture = COLOURS.copy()
    picture[4:8] = (1, 2, 3)
    expected = picture.copy()
    expected[4:8] = 255
    assert np.array_equal(decode_image(encode(of(picture), transparency=(1, 2, 3)), budget).pixels, expected)


def test_cmyk(budget):
    cmyk = PIL.Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixels = decode_image(encode(cmyk, "JPEG", quality=100), budget).pixels
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 3


def test_gif_gives_its_first_frame(budget):
    frames = [PIL.Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode_image(data, budget).pixels == (255, 0, 0)).all()


TURNS = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_orientation(budget, orientation, order):
    entry = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, 1) + entry + bytes(4)
    for data in (encode(of(COLOURS), exif=tiff), encode(of(COLOURS), "WEBP", lossless=True, exif=b"Exif\0\0" + tiff)):
        assert np.array_equal(decode_image(data, budget).pixels, TURNS[orientation](COLOURS))
    jpeg = decode_image(encode(of(COLOURS), "JPEG", exif=b"Exif\0\0" + tiff), budget).pixels
    assert np.array_equal(jpeg, TURNS[orientation](decode_image(encode(of(COLOURS), "JPEG"), budget).pixels))


@pytest.mark.parametrize("exif", [b"", b"II", b"II*\0" + b"\xff" * 20, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"\0" * 40])
def test_damaged_exif_is_ignored_without_a_warning(budget, exif):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = decode_image(encode(of(COLOURS), exif=exif or b"x"), budget).pixels
        decode_image(encode(of(COLOURS), "JPEG", exif=exif), budget)
    assert np.array_equal(pixels, COLOURS)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_truncated_pictures_are_refused(budget, file_format, keep):
    data = encode(of(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), file_format)
    assert reason(data[: int(len(data) * keep)], budget) == "undecodable"


def test_what_is_no_picture_is_refused(budget):
    assert reason(b"", budget) == "empty"
    for data in (b"x", b"garbage" * 9, b"BM", b"GIF89a", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF____WEBPVP8X"):
        assert reason(data, budget) == "undecodable"


@pytest.mark.parametrize(
    "data", [encode(of(COLOURS), "TIFF"), encode(of(COLOURS), "ICO"), b" <svg/>", b"%PDF-1.7", b"\0\0\0\x18ftypheic"]
)
def test_formats_off_the_list_are_named_as_such(budget, data):
    with pytest.raises(MediaError, match="send JPEG, PNG, WebP, GIF or BMP"):
        decode_image(data, budget)


def test_limits_come_from_the_header(make_budget):
    data = encode(PIL.Image.new("RGB", (300, 10)))
    assert reason(data, make_budget(max_pixels=2999)) == "too_many_pixels"
    assert reason(data, make_budget(max_total_pixels=2999)) == "too_many_pixels"
    assert reason(data, make_budget(min_side_px=11)) == "too_small"
    assert reason(data, make_budget(max_aspect=29.9)) == "bad_aspect"
    exact = make_budget(max_pixels=3000, max_total_pixels=3000, min_side_px=10, max_aspect=30.0)
    assert decode_image(data, exact).pixels.shape == (10, 300, 3)
    assert reason(data, exact) == "too_many_pixels"  # the request's pixels are used up


def bombs() -> list[tuple[str, bytes]]:
    one_bit = (b"\0" + bytes(1125)) * 9000
    huge_gif = b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0"
    part = b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x4c\x01\0;"
    vp8x = b"RIFF\xff\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\x3f\0" * 2 + bytes(300)
    sof = b"\xff\xd8\xff\xc0\0\x11\x08" + struct.pack(">HH", 65500, 65500) + b"\x03\x01\x22\0\x02\x11\x01\x03\x11\x01"
    bmp = b"BM" + bytes(8) + struct.pack("<IIiiHHI", 54, 40, 60000, 60000, 1, 24, 0) + bytes(20)
    return [
        ("png1bit", png(9000, 9000, 1, 0, one_bit)),
        ("pnghuge", png(2**31 - 1, 2**31 - 1, 8, 6, b"")),
        ("gif", huge_gif + part),
        ("gifpart", b"GIF89a\x10\0\x10\0\0\0\0" + part),
        ("webp", vp8x),
        ("jpeg", sof + b"\xff\xd9"),
        ("bmp", bmp),
    ]


@pytest.mark.parametrize(("name", "data"), bombs(), ids=[name for name, _ in bombs()])
def test_bombs_are_refused_from_their_header(budget, name, data):
    import time
    import tracemalloc

    tracemalloc.start()
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = reason(data, budget)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == ("undecodable" if name in ("gifpart", "jpeg") else "too_many_pixels")
    assert time.monotonic() - began < 1
    assert peak_bytes < 30 << 20


def test_a_one_bit_picture_within_limits_is_decoded(budget):
    assert decode_image(png(4000, 4000, 1, 0, (b"\0" + bytes(500)) * 4000), budget).pixels.shape == (4000, 4000, 3)


def test_pictures_in_memory(budget, make_budget):
    array = image_from_array(COLOURS, budget)
    assert np.array_equal(array.pixels, COLOURS)
    assert not np.shares_memory(array.pixels, COLOURS)
    assert array.content_hash == image_from_pil(of(COLOURS), budget).content_hash
    assert np.array_equal(image_from_array(GREYS, budget).pixels, np.stack([GREYS] * 3, -1))
    assert np.array_equal(image_from_pil(of(COLOURS).convert("LAB"), budget).pixels.shape, (16, 24, 3))
    for wrong in (COLOURS.astype(np.float32), COLOURS[..., :2], COLOURS.transpose(2, 0, 1), GREYS[0]):
        with pytest.raises(InvalidRequest, match="uint8"):
            image_from_array(wrong, budget)
    with pytest.raises(InvalidRequest, match="'F'"):
        image_from_pil(of(GREYS).convert("F"), budget)
    one = make_budget(max_images=1)
    image_from_array(COLOURS, one)
    with pytest.raises(MediaError, match=r"limit of 1$"):
        image_from_pil(of(COLOURS), one)


PIXELS = stnp.arrays(np.uint8, stnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=st.integers(0, 1))


@given(PIXELS, PIXELS, st.sampled_from(["image", "video"]), st.sampled_from(["image", "video"]))
def test_different_pixels_never_share_a_name(a, b, kind_a, kind_b):
    same = kind_a == kind_b and a.shape == b.shape and np.array_equal(a, b)
    assert (pixel_hash(kind_a, a) == pixel_hash(kind_b, b)) == same


PARTS = st.lists(
    st.none() | st.binary(max_size=4) | st.text("ab1\0", max_size=4) | st.integers(0, 9) | st.floats(0, 2), max_size=4
)


@given(PARTS, PARTS)
def test_different_parts_never_share_a_name(a, b):
    same = [(type(part), part) for part in a] == [(type(part), part) for part in b]
    assert (framed_hash(*a) == framed_hash(*b)) == same


def test_known_collisions_differ(budget):
    flat = np.arange(30 * 150 * 3, dtype=np.uint32).astype(np.uint8)
    wide, tall = flat.reshape(30, 150, 3), flat.reshape(150, 30, 3)
    assert image_from_array(wide, budget).content_hash != image_from_array(tall, budget).content_hash
    grey, colour = np.full((9, 9), 5, np.uint8), np.full((9, 3, 3), 5, np.uint8)
    assert pixel_hash("image", grey) != pixel_hash("image", colour)
    palettes = []
    for first in (10, 20):
        picture = PIL.Image.new("P", (9, 9), 0)
        picture.putpalette([first] * 3)
        palettes += [image_from_pil(picture, budget).content_hash, decode_image(encode(picture), budget).content_hash]
    assert len(set(palettes)) == 4


def test_the_name_is_known_before_decoding(budget):
    data = encode(of(COLOURS))
    assert decode_image(data, budget).content_hash == content_hash("image", data)
    names = {
        content_hash("video", data, FrameSampling()),
        content_hash("video", data, FrameSampling(num_frames=9)),
        content_hash("video", data, FrameSampling(fps=1.0)),
        content_hash("image", data),
        content_hash("image", data + b"\0"),
    }
    assert len(names) == 5
