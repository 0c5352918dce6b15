"""The files of the corpus that ImageMagick, ffmpeg and libvips write, each where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAGICK = next((path for path in ("/usr/bin/convert", shutil.which("magick") or "") if Path(path).is_file()), None)
"""ImageMagick 6 has `convert`, 7 has `magick`."""

FFMPEG = shutil.which("ffmpeg")
VERSIONS = ("BMP", "BMP2", "BMP3", "GIF", "GIF87")
"""Names of ImageMagick for older variants of a format."""

NAME = "61x43"
"""Size of the source of most files."""


def vips() -> Any:
    """The module pyvips, or None."""
    return importlib.import_module("pyvips") if importlib.util.find_spec("pyvips") else None


def by_tools(folder: Path, sources: Path) -> None:
    """Write what the installed tools write.

    Args:
        sources: Folder of `rgb-WxH.png` and `rgba-WxH.png`.
    """
    if MAGICK:
        for name, arguments in _magick_files(sources):
            version = f"{first}:" if (first := name.partition("-")[0]) in VERSIONS else ""
            _run([MAGICK, *arguments, f"{version}{folder / f'magick-{name}'}"])
    if FFMPEG:
        for name, arguments in _ffmpeg_files(sources):
            _run([FFMPEG, "-nostdin", "-v", "error", "-y", *arguments, str(folder / f"ffmpeg-{name}")])
    if vips():
        _vips_files(folder, sources)


def _run(command: Sequence[str]) -> None:
    """A combination that the tool refuses writes no file."""
    subprocess.run(command, capture_output=True, check=False, timeout=60)


Files = list[tuple[str, list[str]]]
"""Names and arguments of the tool."""


def _magick_files(sources: Path) -> Files:
    return [
        *_magick_pngs(sources),
        *_magick_jpegs(sources),
        *_magick_gifs(sources),
        *_magick_bitmaps(sources),
        *_magick_webps(sources),
    ]


def _magick_pngs(sources: Path) -> Files:
    found: Files = []
    kinds = [(0, d) for d in (1, 2, 4, 8, 16)] + [(2, 8), (2, 16)] + [(3, d) for d in (1, 2, 4, 8)]
    kinds += [(4, 8), (4, 16), (6, 8), (6, 16)]
    for (colour, depth), interlace, size in itertools.product(kinds, ("none", "PNG"), (NAME, "8x9", "130x17")):
        source = str(sources / f"{'rgba' if colour >= 4 else 'rgb'}-{size}.png")
        grey = ["-colorspace", "Gray"] if colour in (0, 4) else []
        few = ["+dither", "-colors", str(1 << depth)] if colour == 3 or (colour == 0 and depth < 8) else []
        wide = ["-resize", f"{size}!", "-blur", "0x1"] if depth == 16 else []
        define = ["-define", f"png:color-type={colour}", "-define", f"png:bit-depth={depth}"]
        name = f"type{colour}-{depth}-{interlace}-{size}.png"
        found.append((name, [source, *grey, *few, *wide, "-depth", str(depth), "-interlace", interlace, *define]))
    rgb = str(sources / f"rgb-{NAME}.png")
    for number in range(10):
        found.append((f"filter{number}.png", [rgb, "-define", f"png:compression-filter={number}"]))
    for gamma in ("0.45455", "1.0", "0.2"):
        found.append((f"gamma{gamma}.png", [rgb, "-define", "png:include-chunk=gama", "-set", "gamma", gamma]))
    found.append(("background.png", [str(sources / f"rgba-{NAME}.png"), "-background", "red"]))
    found.append(("key.png", [rgb, "-transparent", "srgb(20,0,220)", "-define", "png:color-type=2"]))
    return found


def _magick_jpegs(sources: Path) -> Files:
    rgb, found = str(sources / f"rgb-{NAME}.png"), Files()
    factors = ("1x1", "2x1", "1x2", "2x2", "4x1", "4x2", "2x2,1x2,1x1")
    for factor, interlace, quality in itertools.product(factors, ("none", "JPEG"), ("5", "85", "100")):
        options = ["-sampling-factor", factor, "-interlace", interlace, "-quality", quality]
        found.append((f"{factor.replace(',', '_')}-{interlace}-{quality}.jpg", [rgb, *options]))
    for space, interlace in itertools.product(("Gray", "CMYK", "YCCK", "RGB"), ("none", "JPEG")):
        found.append((f"{space}-{interlace}.jpg", [rgb, "-colorspace", space, "-interlace", interlace]))
    found.append(("arithmetic.jpg", [rgb, "-define", "jpeg:arithmetic-coding=true"]))
    for size in ("8x9", "130x17"):
        found.append((f"{size}.jpg", [str(sources / f"rgb-{size}.png"), "-quality", "90"]))
    return found


def _magick_gifs(sources: Path) -> Files:
    rgba, rgb, found = str(sources / f"rgba-{NAME}.png"), str(sources / f"rgb-{NAME}.png"), Files()
    for colours, interlace, version in itertools.product(("2", "3", "16", "256"), ("none", "GIF"), ("GIF", "GIF87")):
        source = rgb if version == "GIF87" else rgba
        name = f"{version}-{colours}-{interlace}.gif"
        found.append((name, [source, "-colors", colours, "-interlace", interlace]))
    found.append(("grey.gif", [rgb, "-colorspace", "Gray"]))
    small = ["(", rgb, "-crop", "20x15+9+11", "-repage", "61x43+9+11", ")"]
    for disposal in ("None", "Background", "Previous"):
        head = ["-dispose", disposal, "-delay", "10"]
        found.append((f"part-first-{disposal}.gif", [*head, *small, rgb]))
        found.append((f"part-second-{disposal}.gif", [*head, rgb, *small]))
    found.append(("part-background.gif", ["-background", "red", *small]))
    return found


def _magick_bitmaps(sources: Path) -> Files:
    found: Files = []
    for size, version in itertools.product((NAME, "8x9", "130x17"), ("BMP", "BMP2", "BMP3")):
        rgb, rgba = str(sources / f"rgb-{size}.png"), str(sources / f"rgba-{size}.png")
        prefix = f"{version}-{size}"
        found.append((f"{prefix}-rgb.bmp", [rgb]))
        found.append((f"{prefix}-alpha.bmp", [rgba]))
        found.append((f"{prefix}-two.bmp", [rgb, "-monochrome"]))
        found.append((f"{prefix}-grey.bmp", [rgb, "-colorspace", "Gray"]))
        for colours in ("2", "7", "16", "256"):
            palette = [rgb, "+dither", "-colors", colours, "-type", "Palette"]
            found.append((f"{prefix}-{colours}.bmp", [*palette]))
            found.append((f"{prefix}-{colours}-rle.bmp", [*palette, "-compress", "RLE"]))
        for kind in ("RGB565", "ARGB1555", "ARGB4444"):
            options = ["-define", f"bmp:subtype={kind}"]
            found.append((f"{prefix}-{kind}.bmp", [rgb if kind == "RGB565" else rgba, *options]))
    return found


def _magick_webps(sources: Path) -> Files:
    found: Files = []
    for source, lossless, quality in itertools.product(("rgb", "rgba"), ("true", "false"), ("10", "95")):
        options = ["-define", f"webp:lossless={lossless}", "-quality", quality]
        found.append((f"{source}-{lossless}-{quality}.webp", [str(sources / f"{source}-{NAME}.png"), *options]))
    return found


def _ffmpeg_files(sources: Path) -> Files:
    found: Files = []
    rgb, rgba = (["-i", str(sources / f"{name}-{NAME}.png")] for name in ("rgb", "rgba"))
    png = ("rgb24", "rgba", "rgb48be", "rgba64be", "gray", "gray16be", "ya8", "ya16be", "monob", "pal8")
    for pixels, filtering in itertools.product(png, ("none", "sub", "up", "avg", "paeth", "mixed")):
        found.append((f"{pixels}-{filtering}.png", [*rgba, "-pix_fmt", pixels, "-pred", filtering]))
    for pixels in ("bgra", "bgr24", "rgb565le", "rgb555le", "rgb444le", "rgb8", "monob", "pal8", "gray"):
        found.append((f"{pixels}.bmp", [*rgba, "-pix_fmt", pixels]))
    for pixels, quality in itertools.product(("yuvj420p", "yuvj422p", "yuvj444p"), ("2", "20")):
        found.append((f"{pixels}-{quality}.jpg", [*rgb, "-pix_fmt", pixels, "-q:v", quality]))
    for pixels in ("rgb8", "bgr8", "gray", "pal8"):
        found.append((f"{pixels}.gif", [*rgba, "-pix_fmt", pixels]))
    for pixels, lossless in itertools.product(("bgra", "yuv420p", "yuva420p"), ("0", "1")):
        found.append((f"{pixels}-{lossless}.webp", [*rgba, "-pix_fmt", pixels, "-lossless", lossless]))
    found.append(("animated.png", [*rgba, *rgba, "-filter_complex", "concat=n=2", "-f", "apng"]))
    return found


def _vips_files(folder: Path, sources: Path) -> None:
    """PNG, JPEG, WebP, GIF and AVIF with the options that the others lack."""
    rgb, rgba = (vips().Image.new_from_file(str(sources / f"{name}-{NAME}.png")) for name in ("rgb", "rgba"))
    grey = rgb.colourspace("b-w")
    for bits, interlace in itertools.product((1, 2, 4, 8), (False, True)):
        grey.pngsave(str(folder / f"vips-grey{bits}-{int(interlace)}.png"), bitdepth=bits, interlace=interlace)
        for name, picture in (("rgb", rgb), ("rgba", rgba)):
            path = folder / f"vips-palette{bits}-{name}-{int(interlace)}.png"
            picture.pngsave(str(path), bitdepth=bits, palette=True, interlace=interlace)
    for name, picture in (("rgb", rgb), ("rgba", rgba), ("grey", grey)):
        wide = (picture * 257).cast("ushort").copy(interpretation="grey16" if name == "grey" else "rgb16")
        for interlace in (False, True):
            wide.pngsave(str(folder / f"vips-{name}16-{int(interlace)}.png"), interlace=interlace)
        for profile in ("srgb", "p3"):
            picture.pngsave(str(folder / f"vips-{name}-{profile}.png"), profile=profile)
            picture.jpegsave(str(folder / f"vips-{name}-{profile}.jpg"), profile=profile, background=255)
        for mode, interlace in itertools.product(("on", "off"), (False, True)):
            path = folder / f"vips-{name}-subsample-{mode}-{int(interlace)}.jpg"
            picture.jpegsave(str(path), subsample_mode=mode, interlace=interlace, optimize_coding=True, background=255)
        for options in ({"lossless": True}, {"near_lossless": True}, {"Q": 50}, {"Q": 50, "smart_subsample": True}):
            path = folder / f"vips-{name}-{'-'.join(options)}.webp"
            picture.webpsave(str(path), **options)
        for dither, interlace in itertools.product((0.0, 1.0), (False, True)):
            picture.gifsave(
                str(folder / f"vips-{name}-{dither}-{int(interlace)}.gif"), dither=dither, interlace=interlace
            )
        for bits, mode, lossless in itertools.product((8, 10, 12), ("on", "off"), (False, True)):
            path = folder / f"vips-{name}-{bits}-{mode}-{int(lossless)}.avif"
            picture.heifsave(
                str(path), compression="av1", bitdepth=bits, subsample_mode=mode, lossless=lossless, effort=0
            )
    for orientation in range(1, 9):
        turned = rgb.copy()
        turned.set_type(vips().GValue.gint_type, "orientation", orientation)
        for extension in ("png", "jpg", "webp"):
            turned.write_to_file(str(folder / f"vips-orientation{orientation}.{extension}"))
