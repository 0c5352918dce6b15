"""Compare what the product decodes of odd pictures with libvips', ffmpeg's and ImageMagick's pixels.

python -m demos.bench.pictures.compare            # all files; see `make` for the tools
python -m demos.bench.pictures.compare bmp key    # those whose name contains a word
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image

import mm
from demos.bench.pictures.make import make
from demos.bench.pictures.tools import FFMPEG, MAGICK, vips
from mm.errors import MediaError

PADDED = "the fourth byte of a 32-bit BMP without an alpha mask is padding, as for browsers; others take it for alpha"
EXPLAINED = {
    "ffmpeg-bgra.bmp": PADDED,
    "hand-rgb32-alpha.bmp": PADDED,
    "pillow-RGBA.bmp": PADDED,
}
"""Files of which no other decoder makes the same, and why."""

TOLERANCES = {".jpg": 2}
"""Levels by which two right decoders may differ, where it is more than rounding (1): transforms and chroma."""

WIDE_ALPHA = 3
"""The same for 16-bit colours with alpha: two values that are cut to 8 bits are multiplied."""


TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    picture = PIL.Image.fromarray(np.rint(pixels).astype(np.uint8))
    return np.asarray(picture.transpose(TURNS[orientation]) if orientation in TURNS else picture).astype(np.float64)


def on_white(rgba: np.ndarray) -> np.ndarray:
    """(H, W, 3) float of (H, W, 4) in 0..255."""
    alpha = rgba[..., 3:] / 255.0
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def by_vips(path: Path) -> np.ndarray | None:
    """(H, W, 3) float, turned by libvips. None if it cannot read the file."""
    pyvips = vips()
    try:
        picture = pyvips.Image.new_from_file(str(path)).autorot()
        samples = picture.numpy().astype(np.float64)
    except (AttributeError, pyvips.Error):
        return None
    samples = samples[..., None] if samples.ndim == 2 else samples
    if picture.format == "ushort":
        deepest = {"grey16": 65535, "rgb16": 65535}.get(picture.interpretation, 65535)
        samples = samples * 255 / deepest
    if picture.interpretation == "cmyk":
        return (255 - samples[..., :3]) * (255 - samples[..., 3:4]) / 255
    if samples.shape[-1] in (1, 2):
        samples = np.concatenate([samples[..., :1]] * 3 + [samples[..., 1:]], axis=-1)
    return on_white(samples) if samples.shape[-1] == 4 else samples


def _by_command(command: list[str], path: Path) -> np.ndarray | None:
    with PIL.Image.open(path) as picture:
        width, height = picture.size
    raw = subprocess.run(command, capture_output=True, check=False, timeout=60).stdout
    if len(raw) != width * height * 4:
        return None
    return on_white(np.frombuffer(raw, np.uint8).reshape(height, width, 4).astype(np.float64))


def by_ffmpeg(path: Path) -> np.ndarray | None:
    """As `by_vips`, not turned."""
    if FFMPEG is None:
        return None
    command = [FFMPEG, "-nostdin", "-v", "error", "-i", str(path), "-frames:v", "1"]
    return _by_command([*command, "-f", "rawvideo", "-pix_fmt", "rgba", "-"], path)


def by_magick(path: Path) -> np.ndarray | None:
    """As `by_vips`, not turned."""
    if MAGICK is None:
        return None
    return _by_command([MAGICK, f"{path}[0]", "-depth", "8", "-colorspace", "sRGB", "rgba:-"], path)


DECODERS: dict[str, Callable[[Path], np.ndarray | None]] = {
    "libvips": by_vips,
    "ffmpeg": by_ffmpeg,
    "ImageMagick": by_magick,
}


def tolerance(path: Path) -> int:
    is_wide = any(mark in path.name for mark in ("type4-16", "type6-16", "rgba64", "ya16", "rgba16"))
    return WIDE_ALPHA if is_wide else TOLERANCES.get(path.suffix, 1)


def check(path: Path) -> tuple[str, str]:
    """The verdict, and what is behind it: the first decoder that agrees, or all differences."""
    try:
        ours = mm.read_media(path).frames[0].astype(np.float64)
    except MediaError as error:
        return "refused", error.reason
    differences: list[str] = []
    for name, decode in DECODERS.items():
        theirs = decode(path)
        if theirs is None:
            continue
        if "orientation" in path.name and name != "libvips":
            theirs = upright(theirs, int(path.name.partition("orientation")[2][0]))
        if theirs.shape != ours.shape:
            differences.append(f"{name}: {theirs.shape} and not {ours.shape}")
            continue
        largest = float(np.abs(theirs - ours).max())
        if largest <= tolerance(path):
            return "equal", name
        differences.append(f"{name}: {largest:.0f} levels, {np.abs(theirs - ours).mean():.1f} in the mean")
    if path.name in EXPLAINED:
        return "explained", EXPLAINED[path.name]
    return "different" if differences else "not compared", "; ".join(differences)


def main(words: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        paths = [path for path in make(Path(folder)) if not words or any(word in path.name for word in words)]
        counts: Counter[tuple[str, str, str]] = Counter()
        for path in paths:
            verdict, detail = check(path)
            counts[path.suffix, verdict, detail if verdict == "equal" else ""] += 1
            if verdict != "equal":
                sys.stdout.write(f"{verdict}: {path.name}: {detail}\n")
    sys.stdout.write(f"\n{len(paths)} files\n")
    for (suffix, verdict, decoder), count in sorted(counts.items()):
        sys.stdout.write(f"{suffix:6} {verdict:12} {decoder:12} {count}\n")
    return int(any(verdict == "different" for _, verdict, _ in counts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
