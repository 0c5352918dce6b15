"""Odd but valid files, against pixels that are known beforehand. `demos.bench.pictures.compare` asks other decoders."""

from __future__ import annotations

import io
import struct

import numpy as np
import PIL.Image
import pytest

from demos.bench.pictures import make
from mm.errors import MediaError
from mm.media import decode_image

RNG = np.random.default_rng(8)
WIDTH, HEIGHT = 13, 9


def bitmap(
    rows: list[bytes],
    bits: int,
    *,
    compression: int = 0,
    palette: bytes = b"",
    masks: tuple[int, ...] = (),
    head: int = 40,
) -> bytes:
    """A BMP file from its rows, top row first."""
    padded = [row + bytes(-len(row) % 4) for row in rows[::-1]] if compression in (0, 3) else rows
    pixels, num_colours = b"".join(padded), len(palette) // 4
    info = struct.pack("<IiiHHIIiiII", head, WIDTH, HEIGHT, 1, bits, compression, len(pixels), 0, 0, num_colours, 0)
    info += struct.pack(f"<{len(masks)}I", *masks)
    info += bytes(max(head - len(info), 0))
    start = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + info + palette + pixels


def packed(indices: np.ndarray, bits: int) -> list[bytes]:
    planes = np.unpackbits(indices[..., None].astype(np.uint8), axis=-1)[..., 8 - bits :]
    return [np.packbits(row.reshape(-1)).tobytes() for row in planes]


def run_length(indices: np.ndarray) -> list[bytes]:
    """RLE8, one pixel a run."""
    lines = [b"".join(bytes([1, index]) for index in row) + b"\0\0" for row in indices[::-1]]
    return [*lines, b"\0\1"]


PALETTES = {
    "black and white": lambda n: np.array([[level] * 3 for level in (0, 255)] * (n // 2)),
    "grey levels": lambda n: np.array([[level] * 3 for level in range(n)]),
    "colours": lambda n: RNG.integers(0, 256, (n, 3)),
}


@pytest.mark.parametrize("name", PALETTES)
@pytest.mark.parametrize(
    ("bits", "num_colours", "compression"),
    [
        (1, 2, 0),
        (4, 2, 0),
        (4, 10, 0),
        (4, 16, 0),
        (8, 2, 0),
        (8, 16, 0),
        (8, 256, 0),
        (8, 2, 1),
        (8, 16, 1),
        (8, 256, 1),
    ],
)
def test_bitmaps_with_palettes_of_every_length(budget, name, bits, num_colours, compression):
    """A short grey palette in wide pixels is read by Pillow as pixels of another width."""
    colours = PALETTES[name](num_colours)
    indices = RNG.integers(0, num_colours, (HEIGHT, WIDTH))
    palette = b"".join(bytes([blue, green, red, 0]) for red, green, blue in colours.tolist())
    rows = run_length(indices) if compression else packed(indices, bits)
    file = bitmap(rows, bits, compression=compression, palette=palette)
    assert np.array_equal(decode_image(file, budget).pixels, colours[indices])


MASKS = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)


@pytest.mark.parametrize("head", [56, 108, 124])
def test_bitmaps_with_alpha(budget, head):
    bgra = RNG.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    rgb = bgra[..., 2::-1].astype(float)
    alpha = bgra[..., 3:] / 255
    file = bitmap([row.tobytes() for row in bgra], 32, compression=3, masks=MASKS, head=head)
    assert np.abs(decode_image(file, budget).pixels - (rgb * alpha + 255 * (1 - alpha))).max() <= 1
    bgra[..., 3] = 0  # nobody writes a picture that cannot be seen: its writer left alpha out
    file = bitmap([row.tobytes() for row in bgra], 32, compression=3, masks=MASKS, head=head)
    assert np.array_equal(decode_image(file, budget).pixels, rgb)


def test_bitmaps_of_other_layouts_are_named_as_such(budget):
    rows = [bytes(WIDTH * 2)] * HEIGHT
    for file in (
        bitmap(rows, 16, compression=3, masks=(0xF00, 0xF0, 0xF)),
        bitmap([bytes(WIDTH)] * HEIGHT, 2, palette=bytes(16)),
        bitmap(rows, 0, compression=4),
    ):
        with pytest.raises(MediaError, match="format is not allowed; send BMP of 1, 4, 8, 16"):
            decode_image(file, budget)


def noise(mode: str = "RGB") -> PIL.Image.Image:
    smooth = np.kron(RNG.integers(0, 256, (5, 7, 4)), np.ones((8, 8, 1))).astype(np.uint8)
    return PIL.Image.fromarray(smooth).convert(mode)


def saved(picture: PIL.Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_of_every_layout(budget, mode, subsampling, progressive):
    data = saved(noise(mode), "JPEG", quality=95, subsampling=subsampling, progressive=progressive)
    expected = np.array(noise_of(data).convert("RGB"))
    assert np.array_equal(decode_image(data, budget).pixels, expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_that_lacks_only_its_end_marker_is_complete(budget, mode):
    data = saved(noise(mode), "JPEG", quality=95)
    whole = decode_image(data, budget).pixels
    assert np.array_equal(decode_image(data[:-2], budget).pixels, whole)
    for cut in (3, 4, 10, len(data) // 4):
        with pytest.raises(MediaError, match="truncated"):
            decode_image(data[:-cut], budget)


def noise_of(data: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(data))


def test_what_the_corpus_makes_without_other_tools_is_decoded_at_its_size(budget, tmp_path):
    """The full comparison with other decoders is `python -m demos.bench.pictures.compare`."""
    make.by_python(tmp_path)
    files = [path for path in tmp_path.iterdir() if path.suffix != ".avif"]
    assert len(files) > 150
    for path in files:
        pixels = decode_image(path.read_bytes(), budget).pixels
        with PIL.Image.open(path) as picture:
            is_turned = "orientation" in path.name and int(path.name.partition("orientation")[2][0]) >= 5
            assert pixels.shape[:2] == (picture.size if is_turned else picture.size[::-1]), path.name
        # Where black is the transparent one of two colours, all is white.
        assert pixels.std() > 2 or "key1-" in path.name, f"{path.name} is one colour"


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


def test_heif_and_others_are_named_as_formats_that_are_not_taken(budget):
    others = [saved(noise(), name) for name in ("TIFF", "ICO", "JPEG2000")]
    for data in (HEIC, HEIC.replace(b"heic", b"avif"), *others, b"qoif" + bytes(20)):
        with pytest.raises(MediaError) as caught:
            decode_image(data, budget)
        assert caught.value.reason == "unsupported_format"
