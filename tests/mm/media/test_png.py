"""PNG files beyond what Pillow does with them: a transparent colour, damage that no browser minds, orientation."""

from __future__ import annotations

import io
import itertools
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from mm.errors import MediaError
from mm.media import decode_image, image_from_pil

RNG = np.random.default_rng(5)
WIDTH, HEIGHT = 19, 11
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
SAMPLES = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}


def chunk(name: bytes, body: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(name + body) if crc is None else crc
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)


def png(samples: np.ndarray, depth: int, colour: int, *before: bytes, after: bytes = b"") -> bytes:
    """Built by hand, so that the reference does not come from a library under test."""
    rows = [row.reshape(-1) for row in samples]
    if depth == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        bits = [np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - depth :].reshape(-1) for row in rows]
        packed = [np.packbits(row).tobytes() for row in bits]
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in packed))
    parts = chunk(b"IHDR", header), *before, chunk(b"IDAT", pixels), after, chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def random_samples(depth: int, colour: int) -> np.ndarray:
    """Few values per channel, so that each colour occurs and neighbours of the transparent one do too."""
    values = RNG.integers(0, 1 << depth, 3)
    near = np.concatenate([values, values ^ 1, values ^ (1 << depth >> 1)])
    return RNG.choice(near, (HEIGHT, WIDTH, SAMPLES[colour]))


def to_8_bits(samples: np.ndarray, depth: int) -> np.ndarray:
    wide = np.rint(samples * 255 / ((1 << depth) - 1))
    return np.broadcast_to(wide, (HEIGHT, WIDTH, 3))


DEPTHS = [(depth, GREY) for depth in (1, 2, 4, 8, 16)] + [(8, RGB), (16, RGB)]


@pytest.mark.parametrize(("depth", "colour"), DEPTHS)
@pytest.mark.parametrize("high_bits", [0, 0xFFFF], ids=["clean", "high bits set"])
def test_the_transparent_colour_is_white_and_no_other(budget, depth, colour, high_bits):
    for _ in range(5):
        samples = random_samples(depth, colour)
        key = samples[3, 4]
        stored = [int(value) | (high_bits & ~((1 << depth) - 1)) for value in key]  # only the low bits count
        file = png(samples, depth, colour, chunk(b"tRNS", struct.pack(f">{len(stored)}H", *stored)))
        is_key = (samples == key).all(axis=-1)
        expected = np.where(is_key[..., None], 255, to_8_bits(samples, depth))
        pixels = decode_image(file, budget).pixels.astype(int)
        assert np.abs(pixels - expected).max() <= (depth == 16)  # Pillow cuts 16-bit colours, others are rounded
        assert (pixels[is_key] == 255).all()
        opened = image_from_pil(PIL.Image.open(io.BytesIO(file)), budget)
        assert np.array_equal(opened.pixels, pixels)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palettes_with_alpha(budget, depth):
    colours = RNG.integers(0, 256, (1 << depth, 3))
    alpha = RNG.integers(0, 256, (1 << depth) - 1)  # the last colour has no entry, so it is opaque
    indices = RNG.integers(0, 1 << depth, (HEIGHT, WIDTH, 1))
    palette = chunk(b"PLTE", colours.astype(np.uint8).tobytes())
    file = png(indices, depth, PALETTE, palette, chunk(b"tRNS", alpha.astype(np.uint8).tobytes()))
    weight = np.append(alpha, 255)[:, None] / 255
    expected = (colours * weight + 255 * (1 - weight))[indices[..., 0]]
    assert np.abs(decode_image(file, budget).pixels - expected).max() <= 1


PLAIN = random_samples(8, RGB)
KEY = chunk(b"tRNS", struct.pack(">3H", *PLAIN[0, 0]))
NOT_NEEDED = [
    chunk(b"tEXt", b"a\0b", 1),
    chunk(b"gAMA", struct.pack(">I", 45455), 1),
    chunk(b"pHYs", struct.pack(">IIB", 2835, 2835, 1), 1),
    chunk(b"pHYs", b"short"),
    chunk(b"cHRM", b"short"),
    chunk(b"iCCP", b"name\0\0" + zlib.compress(b"no profile"), 7),
    chunk(b"iCCP", b"name\0\0no deflate"),
    chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(9 << 20))),
    chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(9 << 20))),
    chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(9 << 20))),
    chunk(b"zTXt", b"Raw profile type exif\0\0no deflate"),
    chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 8\nno digits"),
    chunk(b"eXIf", b"nonsense"),
    chunk(b"acTL", struct.pack(">II", 0, 0)),
    chunk(b"acTL", b"short"),
    chunk(b"fcTL", b"short"),
    chunk(b"tIME", b""),
    chunk(b"abCd", b"unknown"),
    KEY[:-1] + bytes([KEY[-1] ^ 1]),
    chunk(b"tRNS", b"odd"),
    chunk(b"tRNS", bytes(2)),
]


@pytest.mark.parametrize("index", range(len(NOT_NEEDED)))
def test_damage_in_a_chunk_that_is_not_needed_changes_nothing(budget, index):
    for file in (png(PLAIN, 8, RGB, NOT_NEEDED[index]), png(PLAIN, 8, RGB, after=NOT_NEEDED[index])):
        assert np.array_equal(decode_image(file, budget).pixels, PLAIN)


def test_damage_in_a_chunk_that_is_needed_is_refused(budget):
    palette = chunk(b"PLTE", bytes(range(12)))
    indices = RNG.integers(0, 4, (HEIGHT, WIDTH, 1))
    for name, file in {
        b"PLTE": png(indices, 8, PALETTE, palette),
        b"IHDR": png(PLAIN, 8, RGB),
        b"IDAT": png(PLAIN, 8, RGB),
    }.items():
        at = file.index(name)
        length = int.from_bytes(file[at - 4 : at], "big")
        crc = at + 4 + length
        damaged = file[:crc] + bytes([file[crc] ^ 1]) + file[crc + 1 :]
        with pytest.raises(MediaError, match="damaged"):
            decode_image(damaged, budget)
    assert np.array_equal(decode_image(png(PLAIN, 8, RGB)[:-12], budget).pixels, PLAIN), "no IEND: all pixels are there"


def exif(orientation: int, order: str = ">", kind: int = 3, count: int = 1) -> bytes:
    value = struct.pack(order + {1: "B3x", 3: "Hxx", 4: "I", 9: "i"}[kind], orientation)
    entry = struct.pack(f"{order}HHI", 0x0112, kind, count) + value
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, 1) + entry + bytes(4)


def xmp(form: str, orientation: int) -> bytes:
    body = form.format(orientation)
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description {body}</rdf:Description></x:xmpmeta>'.encode()


def raw_profile(name: str, data: bytes) -> bytes:
    digits = data.hex()
    lines = "\n".join(digits[at : at + 72] for at in range(0, len(digits), 72))
    return f"Raw profile type {name}\0\n{name}\n{len(data):8}\n{lines}\n".encode()


def places(orientation: int) -> dict[str, bytes]:
    """Chunks that state an orientation, by a name for each."""
    attribute, element = 'tiff:Orientation="{}">', "><tiff:Orientation>{}</tiff:Orientation>"
    found = {
        f"eXIf {order} {kind}": chunk(b"eXIf", exif(orientation, order, kind))
        for order, kind in itertools.product("<>", (1, 3, 4, 9))
    }
    itxt = b"XML:com.adobe.xmp\0\0\0\0\0"
    raw = raw_profile("exif", b"Exif\0\0" + exif(orientation))
    keyword, _, text = raw.partition(b"\0")
    return found | {
        "raw exif": chunk(b"tEXt", raw),
        "raw exif without its prefix": chunk(b"tEXt", raw_profile("exif", exif(orientation))),
        "raw exif, compressed": chunk(b"zTXt", keyword + b"\0\0" + zlib.compress(text)),
        "raw APP1": chunk(b"tEXt", raw_profile("APP1", b"Exif\0\0" + exif(orientation))),
        "raw xmp": chunk(b"tEXt", raw_profile("xmp", xmp(attribute, orientation))),
        "XMP attribute": chunk(b"iTXt", itxt + xmp(attribute, orientation)),
        "XMP element": chunk(b"iTXt", itxt + xmp(element, orientation)),
        "XMP, single quotes": chunk(b"iTXt", itxt + xmp("tiff:Orientation = '{}'>", orientation)),
        "XMP, compressed": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp(attribute, orientation))),
        "EXIF before XMP": chunk(b"eXIf", exif(orientation)) + chunk(b"iTXt", itxt + xmp(attribute, 3)),
    }


@pytest.mark.parametrize("place", places(1))
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_wherever_it_is_said(budget, place, orientation):
    reference = PIL.Image.fromarray(PLAIN.astype(np.uint8))
    reference.getexif()[0x0112] = orientation
    turned = np.array(PIL.ImageOps.exif_transpose(reference))
    said = places(orientation)[place]
    for file in (png(PLAIN, 8, RGB, said), png(PLAIN, 8, RGB, after=said)):
        assert np.array_equal(decode_image(file, budget).pixels, turned)


@pytest.mark.parametrize("said", [chunk(b"eXIf", exif(9)), chunk(b"eXIf", exif(0)), chunk(b"eXIf", exif(6), 1)])
def test_an_orientation_that_is_none_turns_nothing(budget, said):
    assert np.array_equal(decode_image(png(PLAIN, 8, RGB, said), budget).pixels, PLAIN)
