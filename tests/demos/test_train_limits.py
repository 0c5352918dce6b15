"""What the training of limits draws and asks about pictures from elsewhere, and a run that goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from demos.train import train_limits
from demos.train.data.questions import Question
from demos.train.frozen import FrozenFeatures, load_base
from demos.train.limits_data import FOREIGN, FOREIGN_HELD, OtherPictures, refused
from demos.train.reducer_training import run
from mm.models.shipped import CANNOT_TELL
from mm.plugins.weights import checkpoint_fingerprint

FOLDER = Path(__file__).parents[2] / "mm" / "models" / "weights" / "tiny"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part in ("trained", "held_out"):
        for source, count in (("few", 1), ("many", 4)):
            (folder / part / source).mkdir(parents=True)
            for i in range(count):
                noise = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
                noise.resize((120, 90)).save(folder / part / source / f"{i}.png")
    return folder


def test_views_are_new_each_time_and_the_same_for_a_seed(pictures):
    others = OtherPictures(pictures / "trained")
    one, again, other = (others.draw(np.random.default_rng(seed), 4) for seed in (5, 5, 6))
    assert one.shape == (4, 224, 224, 3)
    assert one.dtype == np.uint8
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_a_small_source_is_not_drowned_by_a_large_one(pictures):
    others = OtherPictures(pictures / "trained")
    share = {path.parent.name: weight for path, weight in zip(others.files, others.weights, strict=True)}
    assert share["few"] == pytest.approx(2 * share["many"])


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="other_pictures"):
        OtherPictures(tmp_path)


def test_every_question_about_another_picture_has_the_one_answer():
    asked = [Question("color", f"What color is {i}?", "red", focus=(1,)) for i in range(9)]
    found = refused(asked, np.random.default_rng(1), clip=False, unseen=True)
    assert {question.answer for question in found} == {CANNOT_TELL}
    assert all(question.focus == () for question in found)
    assert sum(question.text in FOREIGN_HELD for question in found) == 3
    assert not set(FOREIGN) & set(FOREIGN_HELD)


@pytest.fixture
def ready(tmp_path):
    features = FrozenFeatures.of_seeds(load_base(FOLDER, "cpu"), 4, 2, 100_000)
    for kind in ("scenes", "clips"):
        (tmp_path / f"{kind}.bin").write_bytes(getattr(features, kind).view(torch.uint16).numpy().tobytes())
    info = {**features.info, "tokens": 256, "width": 256, "base": checkpoint_fingerprint(FOLDER)}
    (tmp_path / "features.json").write_text(json.dumps(info))
    return tmp_path


def test_two_steps_and_on(ready, pictures):
    def start(*more):
        options = ["--base", str(FOLDER), "--run", str(ready), "--pictures", str(pictures), "--steps", "3"]
        options += ["--scenes", "8", "--clips", "0", *more]
        run(train_limits.LimitsTraining, train_limits.arguments().parse_args(options))

    start("--stop-at", "2")
    start("--resume")
    facts = json.loads((ready / "limits" / "limits.json").read_text())
    assert (facts["steps"], facts["pictures"]) == (3, 5)
    before, after = (load_file(folder / "model.safetensors") for folder in (FOLDER, ready / "limits" / "checkpoint"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("language_model" in name and ".layers." in name for name in changed)
    steps = [json.loads(line) for line in (ready / "limits" / "training.jsonl").read_text().splitlines()]
    assert set(steps[-1]["held_out"]["others"]) == {"few", "many"}
