"""The page about a run: what it counts, and that it is one file."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serve.jobs.batch.progress import Counts
from serve.jobs.batch.summary import MAX_POINTS, History, columns, lines, summary_page
from tests.serve.jobs.rows_server import BAD, rows_server
from tests.serve.jobs.test_batch import picture, run


class Checked(HTMLParser):
    """Counts tags, and refuses what loads or runs anything."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.num_polylines = self.num_columns = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "img", "iframe")
        assert not {name for name, _ in attrs} & {"src", "href", "onload"}
        self.num_polylines += tag == "polyline"
        self.num_columns += tag == "rect"

    def handle_data(self, data):
        self.texts.append(data)


def test_a_job_leaves_a_page_with_its_counts_and_a_run_without_work_keeps_it(tmp_path):
    data = [picture(0), picture(0), picture(1), BAD + b"<script>"]
    pq.write_table(pa.table({"image": data, "id": ["a", "b", "c", "<b>"]}), tmp_path / "rows.parquet")
    with rows_server() as server:
        assert run(tmp_path / "rows.parquet", tmp_path / "out", server) == 3
        text = (tmp_path / "out" / "summary.html").read_text()
        assert run(tmp_path / "rows.parquet", tmp_path / "out", server) == 3
        assert (tmp_path / "out" / "summary.html").read_text() == text
        assert run("*.none", tmp_path / "other", server) == 1
    page = Checked(text)
    assert "3 of 4 rows answered, 1 failed" in page.texts
    for name, value in (("answered by the model", "2"), ("as equal rows", "1"), ("answered before", "0")):
        assert page.texts[page.texts.index(name) + 1] == value
    assert {"load: media_undecodable", "<b>", "finished"} <= set(page.texts)
    assert (page.num_polylines, page.num_columns) == (1, 1)


def test_sidecars_have_the_page_among_the_job_s_own_files(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    with rows_server() as server:
        assert run(tmp_path / "a.png", tmp_path, server, form="txt") == 0
    assert not (tmp_path / "summary.html").exists()
    assert (tmp_path / ".mm" / "summary.html").exists()


def test_a_long_run_has_few_points_that_end_where_it_ended():
    history = History()
    for i in range(100_000):
        history.note(0.1 * i, i, i % 7)
    assert MAX_POINTS / 4 < len(history.points) <= MAX_POINTS
    assert history.points[0] == (0.0, 0)
    assert history.points[-1][1] > 99_000
    assert all(rows == pytest.approx(10 * seconds) for seconds, rows in history.points)
    assert max(after[0] - before[0] for before, after in pairwise(history.points)) < 200, "of 10,000 seconds"
    assert history.lengths[0] == 14_286


def test_plots_scale_to_what_they_show():
    points = re.search(r'points="([^"]*)"', lines([(0, 0), (5, 10), (10, 10)], "x", "y"))
    assert points is not None
    xs, ys = zip(*((float(x), float(y)) for x, y in (pair.split(",") for pair in points[1].split())), strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1])
    assert ys[0] > ys[1] == ys[2] == 12
    heights = [
        float(height) for height in re.findall(r'<rect [^>]*height="([\d.]*)"', columns({0: 1, 128: 4}, "x", "y"))
    ]
    assert heights[1] == pytest.approx(4 * heights[0], abs=0.2)
    assert lines([(0, 0), (3, 0)], "x", "y") == columns({}, "x", "y") == ""


def test_a_page_without_any_row_can_be_read():
    assert "0 rows answered, 0 failed" in Checked(summary_page(Counts(), [], History(), {}, 0.0, "finished")).texts
