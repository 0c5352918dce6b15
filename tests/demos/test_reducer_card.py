"""The cards of the shipped reducers say what their config.json says."""

import json
import shutil
from pathlib import Path

import pytest

from demos.train.reducer_card import write

REDUCERS = Path(__file__).parents[2] / "mm" / "models" / "weights" / "tiny" / "reducers"


@pytest.mark.parametrize("name", ["cubes", "dynamic"])
def test_the_tables_are_those_of_the_figures(tmp_path, name):
    shipped = REDUCERS / name
    for file in ("README.md", "config.json"):
        shutil.copy(shipped / file, tmp_path / file)
    write(tmp_path)
    assert (tmp_path / "README.md").read_text() == (shipped / "README.md").read_text()
    card = json.loads((tmp_path / "config.json").read_text())
    figures = json.dumps(card["trained"]["held_out"]).replace("0.", "0.9")
    (tmp_path / "config.json").write_text(
        json.dumps({**card, "trained": {**card["trained"], "held_out": json.loads(figures)}})
    )
    write(tmp_path)
    assert (tmp_path / "README.md").read_text() != (shipped / "README.md").read_text()


def test_a_card_without_places_and_a_reducer_without_tables_are_refused(tmp_path):
    shutil.copy(REDUCERS / "cubes" / "config.json", tmp_path)
    (tmp_path / "README.md").write_text("# nothing\n")
    with pytest.raises(SystemExit, match="variants"):
        write(tmp_path)
    with pytest.raises(SystemExit, match="router"):
        write(REDUCERS / "router")
