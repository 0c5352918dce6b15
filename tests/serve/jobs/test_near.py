"""Pictures that look the same share an answer, and no others do."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from serve.jobs.batch.job import BatchJob
from serve.jobs.batch.near import Mark, Marks
from serve.jobs.job import JobError
from tests.serve.jobs.rows_server import rows_server
from tests.serve.jobs.test_batch import records_of, run

pytest.importorskip("imagehash")


@pytest.fixture
def server():
    with rows_server() as running:
        yield running


def drawing(color: str = "red", side: int = 160, left: int = 20) -> Image.Image:
    image = Image.new("RGB", (160, 160), "white")
    ImageDraw.Draw(image).rectangle((left, 30, left + 70, 110), color)
    ImageDraw.Draw(image).ellipse((90, 70, 150, 150), "navy")
    return image.resize((side, side), Image.Resampling.LANCZOS)


def data_of(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def write(path, data: list, **columns) -> None:
    pq.write_table(pa.table({"image": data, **columns}), path)


def test_sizes_and_formats_of_one_picture_share_an_answer_and_other_pictures_do_not(tmp_path, server):
    same = [data_of(drawing()), data_of(drawing(), "JPEG", quality=60), data_of(drawing(side=97)), data_of(drawing())]
    other = [data_of(drawing("green")), data_of(drawing(left=60)), data_of(Image.new("RGB", (64, 64), "red"))]
    other += [data_of(Image.new("RGB", (64, 64), "blue")), b"no picture"]
    write(tmp_path / "rows.parquet", same + other)
    options = {"concurrency": 1, "form": "parquet"}
    assert run(tmp_path / "rows.parquet", tmp_path / "near", server, dedup="near", **options) == 0
    found = {record["id"]: record for record in records_of(tmp_path / "near", "parquet")}
    assert [found[i]["same_as"] for i in range(9)] == [None, 0, 0, 0, *[None] * 5]
    assert len({found[i]["text"] for i in range(4)}) == 1
    assert found[0]["num_bits_apart"] is None
    assert found[3]["num_bits_apart"] == 0
    assert all(found[i]["num_bits_apart"] <= 4 for i in (1, 2))
    assert len({found[i]["content_hash"] for i in range(9)}) == 8, "each has its own hash"
    assert len(server.bodies) == 6
    assert run(tmp_path / "rows.parquet", tmp_path / "exact", server, **options) == 0
    assert len(server.bodies) == 6 + 8
    assert run(tmp_path / "rows.parquet", tmp_path / "none", server, dedup="none", **options) == 0
    assert len(server.bodies) == 6 + 8 + 9


def test_a_job_that_goes_on_knows_what_earlier_runs_saw_and_another_question_is_another(tmp_path, server):
    data = [data_of(drawing()), data_of(drawing(side=97)), data_of(drawing(side=97))]
    write(tmp_path / "rows.parquet", data, prompt=[None, None, "How many?"])
    options = {"concurrency": 1, "dedup": "near"}
    assert run(tmp_path / "rows.parquet", tmp_path / "out", server, limit=1, **options) == 0
    assert run(tmp_path / "rows.parquet", tmp_path / "out", server, **options) == 0
    assert [record["same_as"] for record in records_of(tmp_path / "out")] == [None, 0, None]
    assert len(server.bodies) == 2


def test_another_choice_of_equal_rows_is_another_job_and_unknown_ones_are_refused(tmp_path, server, capsys):
    write(tmp_path / "rows.parquet", [data_of(drawing())])
    assert run(tmp_path / "rows.parquet", tmp_path / "out", server, dedup="near") == 0
    assert run(tmp_path / "rows.parquet", tmp_path / "out", server) == 1
    assert "dedup was 'near'" in capsys.readouterr().err
    with pytest.raises(JobError, match="dedup was 'nearly'; allowed: exact, near, none"):
        BatchJob(inputs=("x",), out=tmp_path, dedup="nearly")


@pytest.mark.parametrize(("bits", "color", "is_near"), [(4, 12, True), (5, 0, False), (0, 13, False)])
def test_the_thresholds_are_those_of_the_docs_and_the_nearest_counts(bits, color, is_near):
    plain = Mark(np.zeros(4, np.uint16), np.full(48, 100, np.uint8))
    other = Mark(np.array([0, (1 << bits) - 1, 0, 0], np.uint16), plain.colors.copy())
    other.colors[7] -= color
    marks = Marks()
    for i in range(200):
        marks.add(Mark(np.full(4, 0x5555, np.uint16), plain.colors), f"far {i}")
    marks.add(Mark.parse(other.text), "other")
    assert marks.nearest(plain) == (("other", bits) if is_near else None)
    marks.add(plain, "plain")
    assert marks.nearest(plain) == ("plain", 0)
