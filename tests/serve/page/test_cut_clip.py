"""The time line under a clip: one piece per cube, over the whole length."""

from __future__ import annotations

from types import SimpleNamespace

from serve.page.pictures import kept_pictures
from serve.page.reply import _kept_map


def test_a_clip_that_was_cut_has_a_time_line_with_its_pieces():
    times = [(0, 3, 0.0, 0.5), (3, 5, 0.5, 2.0)]
    names = ("first_frame", "num_frames", "start_s", "end_s")
    cubes = [dict(zip(names, values, strict=True)) for values in times]
    item = _kept_map({"kind": "video", "grid": [8, 8, 8], "kept": [0, 1], "cubes": cubes})
    shown = SimpleNamespace(urls=["u"] * 8, timestamps_s=[i / 4 for i in range(8)], aspect_ratio=1.0)
    page = kept_pictures([shown], [item])
    assert 'left:0.000%;width:25.000%" title="cube 1: 3 frames, 0.0 s to 0.5 s"' in page
    assert 'left:25.000%;width:75.000%" title="cube 2: 5 frames, 0.5 s to 2.0 s"' in page
    assert "0.8 s · cube 2<" in page
    assert page.count("<div") == page.count("</div>")
