"""The generator: a seed is one picture for ever, and answers agree with what was drawn."""

import hashlib

import numpy as np
import pytest

from demos.train.data.clips import draw_clip, sample_clip
from demos.train.data.questions import CLIP_KINDS, SCENE_KINDS, WORDINGS, ClipAsker, SceneAsker, word
from demos.train.data.scenes import COLORS, HELD_OUT, SIDE_PX, draw_scene, patch_labels, sample_crowd, sample_scene


@pytest.mark.parametrize("seed", [0, 7, HELD_OUT + 3])
def test_seed_gives_the_same_picture_and_questions_again(seed):
    def everything() -> tuple:
        scene, clip = sample_scene(seed), sample_clip(seed)
        askers = (SceneAsker(scene, np.random.default_rng(1)), SceneAsker(scene, np.random.default_rng(2)))
        asked = [asker.ask(kind) for asker in askers for kind in SCENE_KINDS]
        pixels = hashlib.sha256(draw_scene(scene).tobytes() + draw_clip(clip).tobytes()).hexdigest()
        return scene, clip, asked, pixels

    assert everything() == everything()


def test_other_seeds_give_other_pictures():
    digests = {hashlib.sha256(draw_scene(sample_scene(seed)).tobytes()).hexdigest() for seed in range(20)}
    assert len(digests) == 20


def test_labels_of_a_color_sit_on_pixels_of_that_color():
    names, near, total = list(COLORS), 0, 0
    for seed in range(12):
        scene = sample_crowd(seed)
        blocks = draw_scene(scene).reshape(16, 14, 16, 14, 3).swapaxes(1, 2).reshape(256, 196, 3).astype(float)
        labels = patch_labels(scene.things, scene.texts)
        for patch in np.flatnonzero(labels["shape"]):
            distance = np.linalg.norm(blocks[patch] - COLORS[names[labels["color"][patch] - 1]], axis=1)
            near, total = near + (np.sort(distance)[20] < 45), total + 1
    assert total > 200
    assert near / total > 0.97


def test_yes_and_no_are_balanced():
    answers = {"exist": [], "relation": []}
    for seed in range(400):
        asker = SceneAsker(sample_scene(seed), np.random.default_rng(seed))
        for kind, given in answers.items():
            if question := asker.ask(kind):
                given.append(question.answer == "yes")
    for kind, given in answers.items():
        assert 0.42 < np.mean(given) < 0.58, kind


def test_answers_follow_from_the_scene():
    for seed in range(50):
        scene = sample_scene(seed)
        asker = SceneAsker(scene, np.random.default_rng(seed))
        assert len(asker.ask("list").answer.split(", ")) == len(scene.things)
        for text in scene.texts:
            assert f'"{text.string}"' in asker.ask("caption").answer
        exist = asker.ask("exist")
        assert (exist.answer == "yes") == any(thing.name in exist.text for thing in scene.things)


def test_spans_cover_answers_that_enumerate():
    for seed in range(30):
        scene = SceneAsker(sample_scene(seed), np.random.default_rng(seed))
        clip = ClipAsker(sample_clip(seed), np.random.default_rng(seed))
        asked = [scene.ask(kind) for kind in SCENE_KINDS] + [clip.ask(kind) for kind in CLIP_KINDS]
        for question in asked:
            if question and question.spans:
                edges = [0, *(span.stop for span in question.spans)]
                assert [span.start for span in question.spans] == edges[:-1]
                assert edges[-1] == len(question.answer)


def test_unseen_wordings_are_never_drawn_for_training():
    rng = np.random.default_rng(0)
    for kind, wordings in WORDINGS.items():
        assert wordings[-1] not in {word(rng, kind, unseen=False) for _ in range(60)}
        assert word(rng, kind, unseen=True) == wordings[-1]


def test_a_clip_changes_only_where_something_happens():
    clip = sample_clip(4)
    frames = draw_clip(clip)
    assert frames.shape == (clip.num_frames, SIDE_PX, SIDE_PX, 3)
    assert (frames[0] != frames[-1]).any()
    assert (frames[0] != frames[-1]).any(-1).mean() < 0.3
