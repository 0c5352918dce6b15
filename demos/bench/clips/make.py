"""Odd but valid clips: every codec, container, edit list and orientation that ffmpeg can write, and some it cannot.

`cases()` lists them. Each is made by ffmpeg's command line (Debian's `ffmpeg` package) in a second or less.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from demos.bench.clips import boxes
from demos.bench.clips.boxes import EMPTY

SOURCE = "testsrc2=size={size}:rate={rate}:duration={seconds}"


@dataclass(frozen=True)
class Case:
    """One clip.

    Attributes:
        name: Name of the file, with its ending.
        make: Writes the file.
        refused: The reason why the product refuses it, or empty.
        times_from: What its times are compared with: "ffprobe"; "ffmpeg", which unlike ffprobe undoes jumps; or
            "rate", where both only guess: frame k is shown at k / 10.
        tolerance: Largest difference of a pixel, 0 to 255.
    """

    name: str
    make: Callable[[Path], None]
    refused: str = ""
    times_from: str = "ffprobe"
    tolerance: int = 3


def ffmpeg(*arguments: object) -> None:
    command = ["ffmpeg", "-nostdin", "-v", "error", "-y", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-800:]}")


def source(size: str = "96x64", rate: float = 10, seconds: float = 1.5, look: str = "") -> list[str]:
    """Input arguments for moving test pictures."""
    return ["-f", "lavfi", "-i", SOURCE.format(size=size, rate=rate, seconds=seconds) + (f",{look}" if look else "")]


def tone(seconds: float) -> list[str]:
    return ["-f", "lavfi", "-i", f"sine=frequency=440:duration={seconds}"]


def plain(name: str, *arguments: object, refused: str = "", times_from: str = "ffprobe", **look: object) -> Case:
    """A clip of test pictures with the given output arguments."""

    def make(path: Path) -> None:
        ffmpeg(*source(**look), *arguments, path)  # type: ignore[arg-type]

    return Case(name, make, refused, times_from)


def edited(name: str, change: Callable[[bytes], bytes], *arguments: object, **facts: object) -> Case:
    """A clip whose bytes are changed after ffmpeg wrote them."""

    def make(path: Path) -> None:
        ffmpeg(*source(), *arguments, path)
        path.write_bytes(change(path.read_bytes()))

    return Case(name, make, **facts)  # type: ignore[arg-type]


def cases() -> list[Case]:
    return [
        *codecs(),
        *pixel_formats(),
        *shapes(),
        *rates(),
        *edits(),
        *layouts(),
        *headers(),
        *streams(),
        *transport(),
        *sizes(),
        *animations(),
        *open_gops(),
        *refused(),
    ]


X264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-preset", "fast")
X265 = ("-c:v", "libx265", "-pix_fmt", "yuv420p", "-preset", "fast", "-x265-params", "log-level=none")
VP8, VP9 = ("-c:v", "libvpx", "-b:v", "200k"), ("-c:v", "libvpx-vp9", "-b:v", "200k", "-pix_fmt", "yuv420p")
AV1 = ("-c:v", "libaom-av1", "-cpu-used", "8", "-b:v", "200k", "-pix_fmt", "yuv420p")


def codecs() -> list[Case]:
    """Each codec in the containers that commonly hold it."""
    found = [
        plain(f"h264.{ending}", *X264, "-g", 5, "-bf", bf)
        for ending, bf in (
            ("mp4", 2),
            ("mov", 0),
            ("mkv", 3),
            ("m4v", 2),
            ("3gp", 0),
            ("flv", 2),
            ("ts", 2),
            ("f4v", 2),
        )
    ]
    found += [plain(f"hevc.{ending}", *X265, "-g", 5) for ending in ("mp4", "mov", "mkv", "ts")]
    found += [plain(f"av1.{ending}", *AV1, "-g", 5) for ending in ("mp4", "mkv", "webm")]
    found += [plain("svtav1.mp4", "-c:v", "libsvtav1", "-g", 5, "-pix_fmt", "yuv420p", size="128x96")]
    found += [plain(f"vp9.{ending}", *VP9, "-g", 5) for ending in ("mp4", "mkv", "webm")]
    found += [plain(f"vp8.{ending}", *VP8, "-g", 5) for ending in ("webm", "mkv")]
    hidden = ("-auto-alt-ref", 1, "-lag-in-frames", 12, "-arnr-maxframes", 5)
    found += [plain("vp8-hidden.webm", *VP8, *hidden, seconds=4), plain("vp9-hidden.webm", *VP9, *hidden, seconds=4)]
    found += [plain(f"mpeg4.{ending}", "-c:v", "mpeg4", "-g", 5) for ending in ("mp4", "mkv", "mov", "avi", "ts")]
    found += [plain("mpeg4-b.mp4", "-c:v", "mpeg4", "-bf", 2), plain("xvid.mkv", "-c:v", "libxvid")]
    found += [
        plain("mpeg4-b.avi", "-c:v", "mpeg4", "-bf", 2, "-g", 8, times_from="rate"),
        plain("h264-b.avi", *X264, "-bf", 2, "-g", 8, times_from="rate"),
        plain("xvid.avi", "-c:v", "libxvid"),
    ]
    found += [plain(f"mjpeg.{ending}", "-c:v", "mjpeg", "-q:v", 3) for ending in ("mp4", "mov", "mkv", "avi")]
    found += [plain(f"mpeg2.{ending}", "-c:v", "mpeg2video", "-r", 25, "-bf", 2, rate=25) for ending in MPEG_ENDINGS]
    found += [plain("mpeg1.mpg", "-c:v", "mpeg1video", "-r", 25, rate=25)]
    found += [plain(f"prores{k}.mov", "-c:v", "prores_ks", "-profile:v", k) for k in range(6)]
    found += [plain("dnxhr.mov", "-c:v", "dnxhd", "-profile:v", "dnxhr_sq", "-pix_fmt", "yuv422p", size="320x180")]
    found += [plain("cfhd.mov", "-c:v", "cfhd", "-pix_fmt", "yuv422p10", size="128x96")]
    found += [plain(f"ffv1-{k}.mkv", "-c:v", "ffv1", "-level", k) for k in (1, 3)]
    lossless = ("huffyuv", "ffvhuff", "utvideo", "ffv1", "rawvideo", "png")
    found += [plain(f"{codec}.avi", "-c:v", codec) for codec in lossless]
    found += [plain(f"{codec}.mkv", "-c:v", codec) for codec in ("huffyuv", "utvideo", "rawvideo", "png", "prores")]
    found += [plain(f"{codec}.mov", "-c:v", codec) for codec in ("qtrle", "png", "jpeg2000")]
    found += [plain("rawvideo.mov", "-c:v", "rawvideo", "-pix_fmt", "uyvy422")]
    found += [plain("theora.ogv", "-c:v", "libtheora", "-g", 5), plain("theora.mkv", "-c:v", "libtheora")]
    found += [plain("flv1.flv", "-c:v", "flv"), plain("wmv1.wmv", "-c:v", "wmv1"), plain("wmv2.wmv", "-c:v", "wmv2")]
    found += [plain("msmpeg4v2.avi", "-c:v", "msmpeg4v2"), plain("msmpeg4v3.avi", "-c:v", "msmpeg4")]
    found += [plain("h263.3gp", "-c:v", "h263", size="176x144"), plain("dv.avi", "-c:v", "dvvideo", **DV)]
    return found


MPEG_ENDINGS = ("mpg", "vob", "ts", "mkv", "mp4", "m2ts")
DV = {"size": "720x576", "rate": 25, "seconds": 0.4}


def pixel_formats() -> list[Case]:
    """Depths, chroma, ranges, matrices and alpha."""
    x264 = ("yuvj420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le", "gray", "nv12")
    found = [plain(f"h264-{name}.mp4", "-c:v", "libx264", "-pix_fmt", name) for name in x264]
    found += [plain("h264-rgb.mkv", "-c:v", "libx264rgb", "-pix_fmt", "rgb24")]
    x265 = ("yuv422p", "yuv444p", "yuv420p10le", "yuv420p12le", "yuv422p12le", "gbrp", "gray")
    found += [plain(f"hevc-{name}.mp4", *X265, "-pix_fmt", name) for name in x265]
    vp9 = ("yuv422p", "yuv440p", "yuv444p", "yuv420p10le", "yuv444p12le", "gbrp")
    found += [plain(f"vp9-{name}.webm", "-c:v", "libvpx-vp9", "-b:v", "300k", "-pix_fmt", name) for name in vp9]
    found += [plain(f"av1-{name}.mp4", *AV1, "-pix_fmt", name) for name in ("yuv444p", "yuv420p10le", "gray")]
    ffv1 = ("yuv420p16le", "gray16le", "gbrp10le", "rgb48le", "bgr0", "yuv411p", "yuv410p", "yuv440p")
    found += [plain(f"ffv1-{name}.mkv", "-c:v", "ffv1", "-pix_fmt", name) for name in ffv1]
    clear = "format=rgba,geq=r='r(X,Y)':g='g(X,Y)':b='b(X,Y)':a='mod(X*4+T*100,256)'"
    for name, codec, pix_fmt in (
        ("prores-alpha.mov", ("prores_ks", "-profile:v", 4), "yuva444p10le"),
        ("qtrle-alpha.mov", ("qtrle",), "argb"),
        ("png-alpha.mov", ("png",), "rgba"),
        ("ffv1-alpha.mkv", ("ffv1",), "bgra"),
        ("ffv1-yuva.mkv", ("ffv1",), "yuva420p"),
        ("utvideo-alpha.avi", ("utvideo",), "gbrap"),
        ("vp8-alpha.webm", ("libvpx", "-auto-alt-ref", 0), "yuva420p"),
        ("vp9-alpha.webm", ("libvpx-vp9", "-auto-alt-ref", 0), "yuva420p"),
    ):
        found.append(plain(name, "-c:v", *codec, "-pix_fmt", pix_fmt, look=clear))
    for matrix in ("bt709", "smpte170m", "bt2020nc", "smpte240m", "fcc", "bt470bg"):
        for span in ("tv", "pc"):
            colour = ("-colorspace", matrix, "-color_range", span)
            found.append(plain(f"colour-{matrix}-{span}.mp4", *X264, *colour))
    for transfer in ("smpte2084", "arib-std-b67"):
        hdr = ("-color_trc", transfer, "-color_primaries", "bt2020", "-colorspace", "bt2020nc")
        found.append(plain(f"hdr-{transfer}.mp4", *X265, "-pix_fmt", "yuv420p10le", *hdr))
    return found


def shapes() -> list[Case]:
    """Odd sizes, pixels that are not square, interlaced fields, and orientations."""
    found = [
        plain("odd-size.mkv", "-c:v", "libx264", "-pix_fmt", "yuv444p", size="97x65"),
        plain("odd-vp9.webm", *VP9, size="95x63"),
        plain("odd-mjpeg.avi", "-c:v", "mjpeg", size="101x67"),
        plain("cropped-h264.mp4", *X264, size="90x50"),
        plain("cropped-hevc.mp4", *X265, size="90x50"),
        plain("tiny.mp4", *X264, size="16x16"),
        plain("wide.mp4", *X264, size="512x16"),
        plain("large.mp4", *X264, size="1920x1080", seconds=0.5),
    ]
    for name, ratio in (("mp4", "4/3"), ("mkv", "16/11"), ("mov", "1/2"), ("webm", "2/1")):
        codec = VP9 if name == "webm" else X264
        found.append(plain(f"anamorphic.{name}", *codec, look=f"setsar={ratio}"))
    found += [
        plain("interlaced-h264.mp4", *X264, "-flags", "+ildct+ilme", "-x264-params", "tff=1"),
        plain("interlaced-h264.ts", *X264, "-flags", "+ildct+ilme", "-x264-params", "bff=1"),
        plain("interlaced-mpeg2.ts", "-c:v", "mpeg2video", "-r", 25, "-flags", "+ildct+ilme", rate=25),
        plain("interlaced-prores.mov", "-c:v", "prores_ks", "-flags", "+ildct"),
    ]
    turns = {"0": (1, 0, 0, 1), "90": (0, 1, -1, 0), "180": (-1, 0, 0, -1), "270": (0, -1, 1, 0)}
    flips = {"mirrored": (-1, 0, 0, 1), "upside": (1, 0, 0, -1), "transposed": (0, 1, 1, 0), "anti": (0, -1, -1, 0)}
    for name, matrix in {**turns, **flips}.items():
        found.append(edited(f"turned-{name}.mp4", lambda data, m=matrix: boxes.with_matrix(data, *m), *X264, "-g", 5))
    found.append(edited("turned-90.mov", lambda data: boxes.with_matrix(data, 0, 1, -1, 0), "-c:v", "mjpeg"))
    return found


def rates() -> list[Case]:
    """Frame rates, variable ones, and clips of one or two frames."""
    found = [plain(f"rate-{rate}.mp4".replace("/", "_"), *X264, rate=rate) for rate in ("24000/1001", "60", "120")]
    found += [plain(f"slow-{k}.mp4", *X264, rate=rate, seconds=s) for k, rate, s in ((1, 1, 8), (2, 0.1, 80))]
    uneven = "setpts='(N+0.4*N*N+5*gt(N\\,7))/10/TB'"
    for ending, codec in (("mkv", X264), ("mp4", X264), ("mov", X265), ("webm", VP9), ("ts", X264), ("flv", X264)):
        found.append(plain(f"vfr.{ending}", *codec, "-fps_mode", "vfr", "-enc_time_base", "1/1000", look=uneven))
    found.append(plain("vfr-b.mp4", *X264, "-bf", 3, "-fps_mode", "vfr", "-enc_time_base", "1/1000", look=uneven))
    one = ("-frames:v", 1)
    for ending, codec in (("mp4", X264), ("webm", VP8), ("mkv", X265), ("ts", X264), ("gif", ()), ("mov", X264)):
        found.append(plain(f"one.{ending}", *codec, *one))
    found.append(plain("one.avi", "-c:v", "mjpeg", *one))
    found.append(plain("two.mp4", *X264, "-frames:v", 2))
    return found


def edits() -> list[Case]:
    """Edit lists, by ffmpeg's own cuts and by hand. A media time has the unit 1/10240 s at 10 frames per second."""

    def cut(
        name: str, start: float, *arguments: object, seconds: float = 3, sound: float = 0, after: tuple = ()
    ) -> Case:
        def make(path: Path) -> None:
            whole = path.with_name("whole-" + path.name)
            inputs = [*source(seconds=seconds), *(tone(sound) if sound else [])]
            ffmpeg(*inputs, *X264, *arguments, whole)
            ffmpeg("-ss", start, "-i", whole, "-c", "copy", *after, path)
            whole.unlink()

        return Case(name, make)

    found = [cut(f"cut-{start}.mp4", start, "-g", 12) for start in (0.3, 0.75, 1.2, 2.4)]
    found += [cut(f"cut-b-{start}.mp4", start, "-g", 12, "-bf", 3) for start in (0.3, 0.75, 1.9)]
    found += [cut("cut.mov", 0.8, "-g", 12), cut("cut-long.mp4", 4.8, "-g", 1000, seconds=6)]
    found += [cut("cut-sound.mp4", 0.8, "-g", 12, sound=3), cut("cut-end.mp4", 0.5, "-g", 12, after=("-t", 1.05))]
    found += [cut("cut-fragmented.mp4", 0.7, "-g", 12, after=("-movflags", "frag_keyframe+empty_moov"))]

    def by_hand(name: str, *entries: tuple[int, int], arguments: tuple = ("-g", 5, "-bf", 0)) -> Case:
        return edited(f"edit-{name}.mp4", lambda data: boxes.with_edits(data, list(entries)), *X264, *arguments)

    found += [
        by_hand("whole", (1500, 0)),
        by_hand("late", (1000, 5 * 1024)),
        by_hand("mid-gop", (800, 7 * 1024)),
        by_hand("mid-frame", (800, 7 * 1024 + 500)),
        by_hand("early-end", (730, 0)),
        by_hand("empty", (500, EMPTY), (1500, 0)),
        by_hand("empty-late", (700, EMPTY), (1000, 5 * 1024)),
        by_hand("two", (500, 0), (500, 10 * 1024)),
        by_hand("three", (300, 2 * 1024), (300, 7 * 1024), (300, 11 * 1024)),
        by_hand("repeat", (500, 0), (500, 0)),
        by_hand("back", (500, 10 * 1024), (500, 0)),
        by_hand("b-frames", (800, 7 * 1024), arguments=("-g", 10, "-bf", 2)),
    ]
    found.append(plain("no-edits-b.mp4", *X264, "-bf", 3, "-use_editlist", 0))
    found.append(plain("negative-cts.mp4", *X264, "-bf", 3, "-movflags", "negative_cts_offsets"))
    found.append(plain("late-start.mp4", *X264, "-output_ts_offset", 2.5))
    return found


def layouts() -> list[Case]:
    """Where the parts of a file are: fragments, indexes at either end or nowhere."""
    found = [
        plain("moov-first.mp4", *X264, "-movflags", "faststart"),
        plain("moov-last.mov", *X264),
        plain("fragments.mp4", *X264, "-g", 5, "-movflags", "frag_keyframe+empty_moov"),
        plain("fragment-each.mp4", *X264, "-bf", 2, "-movflags", "frag_every_frame+empty_moov+default_base_moof"),
        plain("cmaf.mp4", *X264, "-g", 5, "-movflags", "cmaf+frag_keyframe"),
        plain("dash.mp4", *X265, "-g", 5, "-movflags", "dash+frag_keyframe+empty_moov+global_sidx"),
        plain("hybrid.mp4", *X264, "-g", 5, "-movflags", "frag_keyframe"),
        plain("late-fragments.mp4", *X264, "-movflags", "frag_keyframe+empty_moov", "-output_ts_offset", 7200),
        plain("live.webm", *VP8, "-f", "webm", "-live", 1),
        plain("clusters.mkv", *X264, "-cluster_time_limit", 200),
        plain("front-index.mkv", *X264, "-reserve_index_space", 4096),
    ]

    def piped(name: str, file_format: str, *codec: object) -> Case:
        def make(path: Path) -> None:
            command = ["ffmpeg", "-nostdin", "-v", "error", *source(), *map(str, codec), "-f", file_format, "pipe:1"]
            path.write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)

        return Case(name, make)

    found += [
        piped("piped.mkv", "matroska", *X264),
        piped("piped.webm", "webm", *VP9),
        piped("piped.ts", "mpegts", *X264),
    ]
    found += [piped("piped.avi", "avi", "-c:v", "mpeg4"), piped("piped.flv", "flv", "-c:v", "flv")]
    return found


def headers() -> list[Case]:
    """Headers that say the wrong duration, or a wrong number of frames, or nothing."""
    found = [
        edited(f"says-{factor}.mp4", lambda data, f=factor: boxes.with_durations(data, f), *X264)
        for factor in (0, 0.5, 10)
    ]
    found += [
        edited(f"says-{seconds}.mkv", lambda data, s=seconds: boxes.matroska_duration(data, s), *X264)
        for seconds in (0, 0.2, 5000)
    ]
    found.append(edited("says-99.webm", lambda data: boxes.matroska_duration(data, 99), *VP9))

    def avi_frames(data: bytes) -> bytes:
        at, stream = data.index(b"avih") + 8 + 16, data.index(b"strh") + 8 + 32
        data = data[:at] + (999).to_bytes(4, "little") + data[at + 4 :]
        return data[:stream] + (7).to_bytes(4, "little") + data[stream + 4 :]

    found.append(edited("says-999.avi", avi_frames, "-c:v", "mpeg4", "-g", 5))
    stss = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stss")
    found.append(edited("all-marked-key.mp4", lambda data: boxes.without(data, stss), *X264, "-g", 8, "-bf", 0))
    found.append(edited("all-marked-key-b.mp4", lambda data: boxes.without(data, stss), *X265, "-g", 8))
    found.append(edited("all-marked-mpeg4.mp4", lambda data: boxes.without(data, stss), "-c:v", "mpeg4", "-g", 8))
    return found


def streams() -> list[Case]:
    """Covers, several video streams, and sound that is longer or starts earlier."""

    def with_cover(path: Path) -> None:
        cover = path.with_name("cover.png")
        ffmpeg("-f", "lavfi", "-i", "color=red:size=300x300:duration=0.1:rate=10", "-frames:v", 1, cover)
        maps = ("-map", 1, "-map", 0, "-c:v:0", "copy", "-disposition:v:0", "attached_pic")
        ffmpeg(*source(), "-i", cover, *maps, "-c:v:1", "libx264", "-pix_fmt:v:1", "yuv420p", path)
        cover.unlink()

    def attached(path: Path) -> None:
        cover = path.with_name("cover.jpg")
        ffmpeg("-f", "lavfi", "-i", "color=red:size=300x300:duration=0.1:rate=10", "-frames:v", 1, cover)
        ffmpeg(*source(), *X264, "-attach", cover, "-metadata:s:t", "mimetype=image/jpeg", path)
        cover.unlink()

    def several(path: Path) -> None:
        small = ["-f", "lavfi", "-i", "testsrc=size=64x48:rate=5:duration=1"]
        ffmpeg(*small, *source(), "-map", 0, "-map", 1, "-c:v", "libx264", "-pix_fmt", "yuv420p", path)

    def sounding(*arguments: object, seconds: float = 4) -> Callable[[Path], None]:
        return lambda path: ffmpeg(*source(), *tone(seconds), *arguments, path)

    def late_video(path: Path) -> None:
        ffmpeg("-itsoffset", 0.6, *source(), *tone(2), *X264, path)

    def one_cover(path: Path) -> None:
        with_cover(path)
        ffmpeg(*tone(1), "-i", path, "-map", 0, "-map", "1:v:1", "-c:v", "copy", "-f", "mp4", path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    found = [Case(f"cover.{e}", with_cover) for e in ("mp4", "mov")] + [Case("attached.mkv", attached)]
    found += [Case(f"several.{ending}", several) for ending in ("mp4", "mkv", "ts", "avi")]
    found += [Case(f"long-sound.{e}", sounding(*codec)) for e, codec in (("mp4", X264), ("mkv", X264), ("webm", VP8))]
    found += [Case(f"long-sound.{e}", sounding(*codec)) for e, codec in (("ts", X264), ("avi", ("-c:v", "mpeg4")))]
    found += [Case("short-sound.mp4", sounding(*X264, seconds=0.3)), Case("late-video.mp4", late_video)]
    found += [Case("late-video.mkv", late_video)]
    found += [Case("sound-only.mp4", lambda path: ffmpeg(*tone(1), path), "no_video")]
    found += [Case("sound-only.webm", lambda path: ffmpeg(*tone(1), path), "no_video")]
    return [*found, Case("sound-and-cover.mp4", one_cover, "no_video")]


def transport() -> list[Case]:
    """MPEG-TS whose times start anywhere, wrap round, or jump, and which starts in the middle of a picture group."""
    wrap_s = 2**33 / 90000

    def joined(path: Path, *starts: float, sizes: tuple[str, ...] = ("96x64", "96x64")) -> None:
        parts = []
        for k, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            part = path.with_name(f"part{k}.ts")
            ffmpeg(*source(size=size, look=f"hue=h={90 * k}"), *X264, "-g", 5, "-output_ts_offset", start, part)
            parts.append(part.read_bytes())
            part.unlink()
        path.write_bytes(b"".join(parts))

    def late_entry(path: Path) -> None:
        ffmpeg(*source(), *X264, "-g", 6, "-bf", 2, "-f", "mpegts", path)
        data = path.read_bytes()
        path.write_bytes(data[len(data) // 188 // 3 * 188 :])

    return [
        plain("far.ts", *X264, "-output_ts_offset", 80000),
        plain("far.mpg", "-c:v", "mpeg2video", "-r", 25, "-output_ts_offset", 900, rate=25),
        plain("wrap.ts", *X264, "-bf", 2, "-output_ts_offset", wrap_s - 2.0, seconds=3),
        Case("jump-ahead.ts", lambda path: joined(path, 0, 5000), times_from="ffmpeg"),
        Case("jump-back.ts", lambda path: joined(path, 5000, 3), times_from="ffmpeg"),
        Case("repeated.ts", lambda path: joined(path, 0, 0), times_from="ffmpeg"),
        Case("late-entry.ts", late_entry),
        Case("size-change.ts", lambda path: joined(path, 0, 1.7, sizes=("96x64", "64x96"))),
    ]


def sizes() -> list[Case]:
    """The size of the pictures changes within the clip."""

    def joined(ending: str, *codec: object, first: str = "96x64", second: str = "128x96") -> Callable[[Path], None]:
        def make(path: Path) -> None:
            names = []
            for k, size in enumerate((first, second)):
                names.append(path.with_name(f"part{k}.{ending}"))
                ffmpeg(*source(size=size), *codec, "-g", 5, names[-1])
            listing = path.with_name("parts.txt")
            listing.write_text("".join(f"file '{name}'\n" for name in names))
            ffmpeg("-f", "concat", "-safe", 0, "-i", listing, "-c", "copy", path)
            for name in (*names, listing):
                name.unlink()

        return make

    return [
        Case("sizes-vp8.webm", joined("webm", *VP8)),
        Case("sizes-vp9.webm", joined("webm", *VP9)),
        Case("sizes-vp9-smaller.mkv", joined("webm", *VP9, first="160x120", second="64x48")),
        Case("sizes-av1.mkv", joined("mkv", *AV1)),
        Case("sizes-h264.mkv", joined("ts", *X264)),
        Case("sizes-h264.ts", joined("ts", *X264)),
        Case("sizes-hevc.ts", joined("ts", *X265)),
        Case("sizes-h264.mp4", joined("ts", *X264, "-bsf:v", "dump_extra")),
        Case("sizes-mjpeg.mkv", joined("mkv", "-c:v", "mjpeg")),
    ]


def animations() -> list[Case]:
    """Animated pictures as clips. ffmpeg cannot decode animated WebP; Pillow's own test compares those."""
    transparent = "format=rgba,colorchannelmixer=aa=0.5,geq=r='r(X,Y)':g='g(X,Y)':b='b(X,Y)':a='255*gt(X,40)'"
    uneven = ("-fps_mode", "vfr", "-enc_time_base", "1/100")
    return [
        plain("plain.gif"),
        plain("uneven.gif", *uneven, look="setpts='(N+0.3*N*N)/10/TB'"),
        plain("transparent.gif", look=transparent + ",split[a][b];[a]palettegen[p];[b][p]paletteuse"),
        plain("plain.png", "-f", "apng"),
        plain("alpha.png", "-f", "apng", "-pix_fmt", "rgba", look=transparent),
        plain("grey.png", "-f", "apng", "-pix_fmt", "gray"),
        plain("sixteen.png", "-f", "apng", "-pix_fmt", "rgb48be"),
    ]


def open_gops() -> list[Case]:
    """Groups of pictures that need the one before, and clips that were cut at such a place."""
    opened = (*X264, "-bf", 3, "-x264-params", "open-gop=1:keyint=6:min-keyint=6:b-pyramid=normal", "-preset", "slow")
    hevc = (*X265[:-1], "log-level=none:open-gop=1:keyint=6:min-keyint=6:bframes=3")
    refresh = (*X264, "-x264-params", "intra-refresh=1:keyint=8", "-bf", 0)
    return [
        *(plain(f"open-h264.{ending}", *opened, seconds=3) for ending in ("mp4", "mkv", "ts")),
        *(plain(f"open-hevc.{ending}", *hevc, seconds=3) for ending in ("mp4", "mkv", "ts")),
        plain("refresh.ts", *refresh, seconds=3),
        plain("refresh.mkv", *refresh, seconds=3),
        plain("open-mpeg2.mpg", "-c:v", "mpeg2video", "-r", 25, "-bf", 2, "-g", 6, rate=25),
    ]


def refused() -> list[Case]:
    """What is refused although ffmpeg can read it."""
    return [
        plain("snow.mkv", "-c:v", "snow", "-strict", "experimental", refused="unsupported_format"),
        plain("magicyuv.avi", "-c:v", "magicyuv", refused="unsupported_format"),
        plain("v210.mov", "-c:v", "v210", refused="unsupported_format"),
        plain("cinepak.avi", "-c:v", "cinepak", refused="unsupported_format", seconds=0.2),
        plain("svq1.mov", "-c:v", "svq1", refused="unsupported_format"),
        plain("raw.y4m", "-pix_fmt", "yuv420p", refused="unsupported_format"),
        plain("vp9.ivf", *VP9, refused="unsupported_format"),
        plain("mpeg2.mxf", "-c:v", "mpeg2video", "-r", 25, rate=25, refused="unsupported_format"),
        plain("h264.nut", *X264, refused="unsupported_format"),
        plain("raw.m2v", "-c:v", "mpeg2video", "-r", 25, rate=25, refused="unsupported_format"),
    ]
