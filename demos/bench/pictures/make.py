"""Odd but valid picture files: every format, depth, palette and orientation that four tools can write.

Pillow is needed. ImageMagick (`convert`), ffmpeg and libvips (pyvips) add their files where they are installed. A
file's name tells the tool and what is odd about it.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from demos.bench.pictures.tools import by_tools
from mm.media.orientation import TAG

SIZES = ((61, 43), (8, 9), (130, 17))


def source(width: int, height: int) -> np.ndarray:
    """(H, W, 4) uint8: a gradient, blocks, noise, and every level of alpha."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(1).integers(0, 40, (height, width))
    red, green = x * 215 // max(width - 1, 1) + noise, y * 255 // max(height - 1, 1)
    blue = (x // 4 + y // 4) % 2 * 200 + 20
    return np.dstack([red, green, blue, (x * 7 + y * 5) % 256]).astype(np.uint8)


def make(folder: Path) -> list[Path]:
    """Write all files that the installed tools can write, and return their paths."""
    sources = folder / "sources"
    sources.mkdir(parents=True, exist_ok=True)
    for width, height in SIZES:
        pixels, name = source(width, height), f"{width}x{height}"
        PIL.Image.fromarray(pixels).save(sources / f"rgba-{name}.png")
        PIL.Image.fromarray(pixels[..., :3]).save(sources / f"rgb-{name}.png")
    by_python(folder)
    by_tools(folder, sources)
    return sorted(path for path in folder.iterdir() if path.is_file() and path.stat().st_size)


def by_python(folder: Path) -> None:
    """Write what needs Pillow only."""
    _pillow(folder)
    _by_hand(folder)


def _picture(mode: str = "RGBA", size: tuple[int, int] = SIZES[0]) -> PIL.Image.Image:
    picture = PIL.Image.fromarray(source(*size))
    return (
        picture.convert("L").convert("I").point(lambda v: v * 257).convert("I;16")
        if mode == "I;16"
        else picture.convert(mode)
    )


def _save(folder: Path, name: str, picture: PIL.Image.Image, **options: Any) -> None:
    picture.save(folder / f"pillow-{name}", **options)


def _pillow(folder: Path) -> None:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        _save(folder, f"{mode.replace(';', '')}.png", _picture(mode))
    for bits in (1, 2, 4, 8):
        palette = _picture("RGB").quantize(1 << bits)
        _save(folder, f"palette{bits}.png", palette, bits=bits)
        _save(folder, f"palette{bits}-index.png", palette, bits=bits, transparency=1)
        _save(folder, f"palette{bits}-alpha.png", palette, bits=bits, transparency=bytes(range(0, 256, 256 >> bits)))
        _save(folder, f"palette{bits}.gif", palette)
        _save(folder, f"palette{bits}-index.gif", palette, transparency=0)
        _save(folder, f"palette{bits}.bmp", palette)
    for subsampling, progressive, quality in itertools.product((0, 1, 2), (False, True), (15, 95)):
        options: dict[str, Any] = {"subsampling": subsampling, "progressive": progressive, "quality": quality}
        _save(folder, f"{subsampling}-{'p' if progressive else 'b'}-{quality}.jpg", _picture("RGB"), **options)
        _save(
            folder,
            f"restart-{subsampling}-{int(progressive)}-{quality}.jpg",
            _picture("RGB"),
            restart_marker_rows=1,
            **options,
        )
    for mode, progressive in itertools.product(("L", "CMYK"), (False, True)):
        _save(folder, f"{mode}-{int(progressive)}.jpg", _picture(mode), quality=92, progressive=progressive)
    _save(folder, "stored-as-rgb.jpg", _picture("RGB"), keep_rgb=True, quality=92)
    for mode, (lossless, quality) in itertools.product(
        ("RGB", "RGBA"), ((True, 0), (True, 100), (False, 5), (False, 90))
    ):
        for method in (0, 6):
            name = f"{mode}-{'lossless' if lossless else 'lossy'}-{quality}-{method}.webp"
            _save(folder, name, _picture(mode), lossless=lossless, quality=quality, method=method)
    _save(folder, "exact.webp", _picture("RGBA"), lossless=True, exact=True)
    for subsampling, mode, quality in itertools.product(
        ("4:4:4", "4:2:2", "4:2:0", "4:0:0"), ("RGB", "RGBA"), (40, 100)
    ):
        name = f"{subsampling.replace(':', '')}-{mode}-{quality}.avif"
        _save(folder, name, _picture(mode), subsampling=subsampling, quality=quality, speed=10)
    _save(folder, "limited-range.avif", _picture("RGB"), range="limited", quality=90, speed=10)
    _save(folder, "premultiplied.avif", _picture("RGBA"), alpha_premultiplied=True, quality=90, speed=10)
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        _save(folder, f"{mode}.bmp", _picture(mode))
    _animations(folder)
    _orientations(folder)


def _animations(folder: Path) -> None:
    frames = [_picture("RGBA"), _picture("RGBA").transpose(PIL.Image.Transpose.ROTATE_180)]
    for extension in ("gif", "webp", "png", "avif"):
        _save(folder, f"animated.{extension}", frames[0], save_all=True, append_images=frames[1:], duration=90)
    for disposal in (1, 2, 3):
        _save(folder, f"disposal{disposal}.gif", frames[0], save_all=True, append_images=frames[1:], disposal=disposal)


def _orientations(folder: Path) -> None:
    saved = {"png": {}, "jpg": {"quality": 95}, "webp": {"lossless": True}, "avif": {"quality": 95, "speed": 10}}
    for orientation, (extension, options) in itertools.product(range(1, 9), saved.items()):
        exif = PIL.Image.Exif()
        exif[TAG] = orientation
        _save(folder, f"orientation{orientation}.{extension}", _picture("RGB"), exif=exif, **options)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _by_hand(folder: Path) -> None:
    """What the tools do not write: transparent colours at every depth, and bitmaps of every header and mask."""
    for depth, colour, size in itertools.product((1, 2, 4, 8, 16), (0, 2), SIZES):
        if colour == 0 or depth >= 8:
            (folder / f"hand-key{depth}-{colour}-{size[0]}.png").write_bytes(_keyed_png(depth, colour, size))
    for name, data in _bitmaps():
        (folder / f"hand-{name}.bmp").write_bytes(data)


def _keyed_png(depth: int, colour: int, size: tuple[int, int]) -> bytes:
    pixels = source(*size)[..., : 3 if colour else 1].astype(np.uint32)
    samples = pixels * ((1 << depth) - 1) // 255 if depth < 16 else pixels * 257 ^ 1
    key = samples[3, 3]
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    else:
        bits = np.unpackbits(samples.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = [np.packbits(row.reshape(-1)).tobytes() for row in bits]
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    parts = (
        chunk(b"IHDR", header),
        chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)),
        chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))),
        chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _bitmaps() -> Iterator[tuple[str, bytes]]:
    width, height = 12, 9
    rgba = source(width, height)
    bgra = rgba[..., [2, 1, 0, 3]]
    opaque = bgra.copy()
    opaque[..., 3] = 255
    empty = bgra.copy()
    empty[..., 3] = 0
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    for name, pixels in {"alpha": bgra, "opaque": opaque, "alpha-all-zero": empty}.items():
        for header_size in (56, 108, 124):
            yield f"v{header_size}-{name}", bitmap(pixels.tobytes(), width, height, 32, 3, header_size, masks)
            yield f"v{header_size}-{name}-top-down", bitmap(pixels.tobytes(), width, -height, 32, 3, header_size, masks)
        yield f"rgb32-{name}", bitmap(pixels.tobytes(), width, height, 32, 0, 40)
    red, green, blue = (rgba[..., i].astype(np.uint16) for i in range(3))
    five_six_five = _rows(red >> 3 << 11 | green >> 2 << 5 | blue >> 3)
    yield "565", bitmap(five_six_five, width, height, 16, 3, 40, (0xF800, 0x7E0, 0x1F))
    yield "555", bitmap(_rows(red >> 3 << 10 | green >> 3 << 5 | blue >> 3), width, height, 16, 0, 40)
    yield from _indexed_bitmaps(rgba[..., 0])


def _indexed_bitmaps(index: np.ndarray) -> Iterator[tuple[str, bytes]]:
    height, width = index.shape
    levels = np.arange(256)
    colours = np.stack([levels * 3 % 256, levels, 255 - levels, levels * 0], axis=-1).astype(np.uint8).tobytes()
    grey, black_white = b"".join(bytes([level] * 3 + [0]) for level in range(16)), b"\0\0\0\0\xff\xff\xff\0"
    for name, bits, palette in (
        ("256 colours", 8, colours),
        ("40 colours", 8, colours[:160]),
        ("two greys in 8 bits", 8, black_white),
        ("16 greys in 8 bits", 8, grey),
        ("16 colours", 4, colours[:64]),
        ("two greys in 4 bits", 4, black_white),
        ("two colours", 1, colours[:8]),
        ("white first", 1, black_white[4:] + black_white[:4]),
    ):
        few = (index.astype(np.int64) % (len(palette) // 4)).astype(np.uint8)
        planes = np.unpackbits(few[..., None], axis=-1)[..., 8 - bits :]
        rows = _rows(np.packbits(planes.reshape(height, -1), axis=1))
        data = bitmap(rows, width, height, bits, 0, 40, palette=palette, num_colours=len(palette) // 4)
        yield name.replace(" ", "-"), data


def _rows(samples: np.ndarray) -> bytes:
    """Rows filled up to 4 bytes."""
    rows = [row.tobytes() for row in samples]
    return b"".join(row + bytes(-len(row) % 4) for row in rows)


def bitmap(
    pixels: bytes,
    width: int,
    height: int,
    bits: int,
    compression: int,
    header_size: int,
    masks: Sequence[int] = (),
    palette: bytes = b"",
    num_colours: int = 0,
) -> bytes:
    """A BMP file. A negative height stores the rows from the top."""
    info = struct.pack(
        "<IiiHHIIiiII", header_size, width, height, 1, bits, compression, len(pixels), 2835, 2835, num_colours, 0
    )
    info += struct.pack(f"<{len(masks)}I", *masks)
    info += bytes(max(header_size - len(info), 0))
    if header_size >= 108:
        info = info[:56] + b"BGRs" + info[60:]
    start = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + info + palette + pixels
