"""Encoded pictures, and pictures in memory, to `Image`.

Pillow decodes. This file selects the formats, checks sizes before anything is decoded, and defines how each pixel mode
becomes RGB.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
from PIL import Image as PilImage
from PIL import ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from mm.data.media import Image, Pixels
from mm.errors import InvalidRequest, MediaError, MmError
from mm.media.bmp import drop_empty_alpha, use_palette
from mm.media.hashing import content_hash, pixel_hash
from mm.media.limits import BYTES_PER_PIXEL, MediaBudget
from mm.media.orientation import orientation_in
from mm.media.png import SIGNATURE, read_png, whitener
from mm.media.rgb import to_rgb

ALLOWED_FORMATS = "JPEG, PNG, WebP, GIF or BMP"

ALLOWED_BMP = "BMP of 1, 4, 8, 16 (5-5-5 or 5-6-5), 24 or 32 bits, or another format"

FOREIGN_SIGNATURES = (
    b"II*\0",
    b"MM\0*",
    b"%PDF",
    b"<svg",
    b"<?xml",
    b"8BPS",
    b"\0\0\1\0",
    b"\xff\x0a",
    b"\xff\x4f\xff\x51",
    b"qoif",
    b"DDS ",
    b"gimp",
    b"v/1\x01",
    b"P4\n",
    b"P5\n",
    b"P6\n",
    b"P7\n",
    b"Pf\n",
    b"PF\n",
)
"""Signatures of TIFF, PDF, SVG, PSD, ICO, JPEG XL, JPEG 2000, QOI, DDS, XCF, OpenEXR and PNM.

These formats are refused. Their error differs from that of a damaged file.
"""

NATIVE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
"""Bytes of a pixel in Pillow's memory, for the modes in which it is not 4."""


def decode_image(data: bytes, budget: MediaBudget) -> Image:
    """Decode one picture, upright and on white.

    Raises:
        MediaError: `empty`, `unsupported_format`, `undecodable`, or a limit of the budget.
        CapacityError: Other requests need the memory.
    """
    if not data:
        raise MediaError("empty", "image")
    plugin = _plugin_for(data)
    with _mapped_errors():
        width, height = _header_size(data)
        if width and height:
            budget.check_size("image", width, height)
        pixels = _decode_png(data, budget) if plugin is PngImageFile else _decode(plugin, data, budget)
    return Image(pixels=pixels, content_hash=content_hash("image", data))


def _decode(plugin: type[ImageFile.ImageFile], data: bytes, budget: MediaBudget) -> Pixels:
    with plugin(BytesIO(data)) as picture, _memory_for(picture, budget):
        if isinstance(picture, BmpImageFile):
            use_palette(picture, data)
        try:
            picture.load()
        except OSError:
            if not isinstance(picture, JpegImageFile) or "progressive" in picture.info:
                raise
            return _decode_without_end(data)
        if isinstance(picture, BmpImageFile):
            drop_empty_alpha(picture)
        return to_rgb(picture, _orientation(picture))


def _decode_without_end(data: bytes) -> Pixels:
    """A sequential JPEG that lacks only its end marker, as some cameras and streams leave it.

    The decoder fills what is missing with grey and does not say so. So two continuations are tried: the pixels are all
    there if they do not depend on what follows.

    Raises:
        OSError: Pixels are missing.
    """
    found: list[Pixels] = []
    for rest in (b"", b"\x55" * 4096):
        with JpegImageFile(BytesIO(data + rest + b"\xff\xd9")) as picture:
            found.append(to_rgb(picture, _orientation(picture)))
    if not np.array_equal(found[0], found[1]):
        raise OSError("the file is cut short")
    return found[0]


def _orientation(picture: PilImage.Image) -> int:
    """1 to 8. AVIF has properties of its own for it, which Pillow gives as EXIF, and other texts do not count."""
    return orientation_in({"exif": picture.info.get("exif")} if picture.format == "AVIF" else picture.info)


def _decode_png(data: bytes, budget: MediaBudget) -> Pixels:
    png = read_png(data)
    needs_low_bytes = len(png.transparent) == 3 and png.depth == 16
    with PngImageFile(BytesIO(png.data)) as picture, _memory_for(picture, budget, 2 if needs_low_bytes else 1):
        picture.load()
        if needs_low_bytes:
            return to_rgb(picture, png.orientation, whitener(png, picture))
        if png.transparent:
            picture.info["transparency"] = png.transparent if picture.mode == "RGB" else png.transparent[0]
        return to_rgb(picture, png.orientation)


@contextmanager
def _memory_for(picture: PilImage.Image, budget: MediaBudget, num_loads: int = 1) -> Generator[None]:
    """Draw a picture that is decoded meanwhile. What only decoding needs is given back at the end."""
    width, height = picture.size
    bytes_per_pixel = BYTES_PER_PIXEL + num_loads * _loading_bytes_per_pixel(picture)
    borrowed = budget.take_pixels("image", width, height, bytes_per_pixel=bytes_per_pixel)
    kept = 0
    try:
        yield
        kept = width * height * BYTES_PER_PIXEL
    finally:
        budget.give_back(borrowed - kept)


def _loading_bytes_per_pixel(picture: PilImage.Image) -> int:
    """Pillow's pixels and what the decoder holds meanwhile. The figures of decoders are measured."""
    if isinstance(picture, WebPImageFile):
        return 14
    is_progressive = isinstance(picture, JpegImageFile) and "progressive" in picture.info
    return NATIVE_BYTES.get(picture.mode, 4) + (8 if is_progressive else 1)


def stored_pixels(data: bytes) -> int:
    """Pixels of a picture as its header has them; 0 if it cannot be read. Nothing is decoded."""
    try:
        with _mapped_errors():
            width, height = _header_size(data)
            if not width:
                with _plugin_for(data)(BytesIO(data)) as picture:
                    width, height = picture.size
            return width * height
    except MediaError:
        return 0


def image_from_pil(picture: PilImage.Image, budget: MediaBudget) -> Image:
    """A Pillow picture of any mode with a defined range, turned upright if it has an EXIF orientation.

    Raises:
        InvalidRequest: Mode F, whose range of values is not defined.
        MediaError: `undecodable` (a file opened lazily and damaged), or a limit of the budget.
    """
    if picture.mode == "F":
        raise InvalidRequest("a picture of mode 'F' has no defined range of values; convert it to 'L' or 'RGB' first")
    budget.take_item("image")
    with _mapped_errors():
        if (file := _unread_png(picture)) is not None:
            pixels = _decode_png(file, budget)
            return Image(pixels=pixels, content_hash=pixel_hash("image", pixels))
        with _memory_for(picture, budget):
            picture.load()
            pixels = to_rgb(picture, _orientation(picture))
    return Image(pixels=pixels, content_hash=pixel_hash("image", pixels))


def _unread_png(picture: PilImage.Image) -> bytes | None:
    """The file of a PNG that Pillow has opened and not read yet. What Pillow keeps of it afterwards is not enough."""
    if not isinstance(picture, PngImageFile) or not picture.tile or picture.fp is None or picture.tell():
        return None
    at = picture.fp.tell()
    picture.fp.seek(0)
    data = picture.fp.read()
    picture.fp.seek(at)
    return data


def image_from_array(pixels: Pixels, budget: MediaBudget) -> Image:
    """A picture from a uint8 array (H, W, 3) in RGB or (H, W) in grey. The array is copied.

    Raises:
        InvalidRequest: Another dtype or shape.
        MediaError: A limit of the budget.
    """
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        given = f"{pixels.dtype} {pixels.shape}"
        raise InvalidRequest(f"an image array must be uint8 of shape (H, W, 3) or (H, W), not {given}")
    budget.take_item("image")
    budget.take_pixels("image", pixels.shape[1], pixels.shape[0])
    rgb = np.stack([pixels] * 3, axis=-1) if pixels.ndim == 2 else np.array(pixels, order="C")
    return Image(pixels=rgb, content_hash=pixel_hash("image", rgb))


def _plugin_for(data: bytes) -> type[ImageFile.ImageFile]:
    """Pillow's reader for these bytes.

    `PIL.Image.open` is not used: it would try several readers, and it has a size limit of its own, which warns.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImageFile
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GifImageFile
    if data.startswith(b"BM"):
        return BmpImageFile
    is_foreign = data.lstrip()[:5].startswith(FOREIGN_SIGNATURES) or data[4:8] in (b"ftyp", b"jP  ", b"JXL ")
    raise MediaError(
        "unsupported_format" if is_foreign else "undecodable", allowed=ALLOWED_FORMATS if is_foreign else ""
    )


def _header_size(data: bytes) -> tuple[int, int]:
    """Width and height of PNG, WebP and GIF; (0, 0) for others.

    WebP's and GIF's readers allocate memory as soon as they open a file.
    """
    width = height = 0
    if len(data) < 30:
        return 0, 0  # the header is cut; the readers refuse it
    if data.startswith(SIGNATURE):
        width, height = struct.unpack_from(">II", data, 16)
    elif data[:3] == b"GIF":
        width, height = struct.unpack_from("<HH", data, 6)
    elif data[8:16] == b"WEBPVP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif data[8:16] == b"WEBPVP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    elif data[8:16] == b"WEBPVP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return width, height


@contextmanager
def _mapped_errors() -> Generator[None]:
    """Replace what Pillow raises by a `MediaError` with a fixed text, and drop Pillow's warnings.

    The original error is not chained, since its text may hold paths.
    """
    reason, allowed = None, ""
    try:
        with warnings.catch_warnings():
            # Only for Pillow: two threads may restore each other's filters, and then other warnings are not affected.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    except MmError:
        raise
    except MemoryError:
        reason = "decode_limit"
    except Exception as error:
        # Pillow raises OSError, SyntaxError, struct.error, IndexError, ... for damaged files.
        is_unknown_bmp = str(error).startswith("Unsupported BMP")
        reason, allowed = ("unsupported_format", ALLOWED_BMP) if is_unknown_bmp else ("undecodable", "")
    if reason:
        raise MediaError(reason, "image", allowed=allowed)
