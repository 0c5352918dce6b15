"""The generator: a seed is one picture for ever, and answers agree with what was drawn."""

import hashlib
import re

import numpy as np
import pytest

from demos.train.data.clips import draw_clip, sample_clip
from demos.train.data.labels import patch_at, patch_labels, sample_crowd
from demos.train.data.questions import (
    CLIP_KINDS,
    EVENT_KINDS,
    FRAME_TOKENS,
    PICTURE_TOKENS,
    SCENE_KINDS,
    WORDINGS,
    ClipAsker,
    SceneAsker,
    SeveralAsker,
    content,
    draw_wording,
    templates,
)
from demos.train.data.scenes import HELD_OUT, draw_scene, sample_scene
from demos.train.data.things import CHARACTERS, SIDE_PX


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


def test_every_sort_of_scene_occurs():
    scenes = [sample_scene(seed) for seed in range(200)]
    assert sum(scene.chart is not None for scene in scenes) > 10
    assert sum(scene.display is not None for scene in scenes) > 10
    assert sum(scene.plain for scene in scenes) > 30
    assert {len(scene.things) for scene in scenes} == set(range(7))
    assert {len(scene.texts) for scene in scenes} == set(range(4))


def test_things_are_drawn_in_their_color_where_they_are_said_to_be():
    near, total = 0, 0
    for seed in range(40):
        scene = sample_scene(seed)
        pixels = draw_scene(scene).astype(float)
        for thing in scene.things:
            if thing.shape == "ring":  # its middle is the ground
                continue
            around = pixels[round(thing.y) - 3 : round(thing.y) + 4, round(thing.x) - 3 : round(thing.x) + 4]
            near += np.linalg.norm(around - thing.rgb, axis=-1).mean() < 40
            total += 1
    assert total > 60
    assert near / total > 0.97


def test_patch_labels_name_the_characters_and_bars_of_the_scene():
    for seed in range(60):
        scene = sample_crowd(seed) if seed % 2 else sample_scene(seed)
        labels = patch_labels(scene)
        for text in scene.texts:
            for index, (character, center) in enumerate(zip(text.string, text.centers, strict=True)):
                patch = patch_at(*center)
                found = {labels[name][patch] - 1 for name in ("char1", "char2")}
                assert CHARACTERS.index(character) in found
                if labels["char2"][patch] == 0:
                    assert labels["index"][patch] == 1 + index
        if scene.chart:
            assert set(labels["extreme"]) >= {0, 1, 3}


def test_zero_and_one_stand_only_in_numbers():
    for seed in range(300):
        for text in sample_scene(seed).all_texts:
            assert text.string.isdigit() or not set("01") & set(text.string)


def test_yes_and_no_are_balanced():
    answers = {"exist": [], "relation": []}
    for seed in range(500):
        asker = SceneAsker(sample_scene(seed), np.random.default_rng(seed))
        for kind, given in answers.items():
            if question := asker.ask(kind):
                given.append(question.answer == "yes")
    for kind, given in answers.items():
        assert 0.42 < np.mean(given) < 0.58, kind


def test_answers_follow_from_the_scene():
    for seed in range(80):
        scene = sample_scene(seed)
        asker = SceneAsker(scene, np.random.default_rng(seed))
        if scene.things:
            assert len(asker.ask("list").answer.split(", ")) == len(scene.things)
            exist = asker.ask("exist")
            assert (exist.answer == "yes") == any(thing.name in exist.text for thing in scene.things)
        for text in scene.texts:
            assert f'"{text.string}"' in asker.ask("caption").answer
        if scene.display:
            assert asker.ask("number").answer == scene.display.string
        if scene.texts:
            assert asker.ask("read").answer in {text.string for text in scene.texts}


def test_chart_answers_follow_from_the_bars():
    kinds = set()
    for seed in range(300):
        scene = sample_scene(seed)
        if not scene.chart:
            continue
        bars = {bar.color: bar.value for bar in scene.chart.bars}
        question = SceneAsker(scene, np.random.default_rng(seed)).ask("chart")
        if re.search("highest|tallest|largest|longest|top of", question.text):
            assert bars[question.answer] == max(bars.values())
            kinds.add("highest")
        elif re.search("lowest|shortest|smallest", question.text):
            assert bars[question.answer] == min(bars.values())
            kinds.add("lowest")
        elif re.search("number of bars|count of bars|ount the bars|ow many bars", question.text):
            assert question.answer == str(len(bars))
            kinds.add("bars")
        elif color := next((c for c in bars if f"{c} bar" in question.text), None):
            assert question.answer == str(bars[color])
            kinds.add("value")
    assert kinds == {"highest", "lowest", "bars", "value"}


def test_content_ignores_the_style_of_a_description_and_nothing_else():
    scene = sample_scene(0)
    asker = SceneAsker(scene, np.random.default_rng(0))
    said = {asker.describe(style).answer for style in range(4)}
    assert len(said) == 4
    assert len({content(asker.describe(style).answer) for style in (0, 1, 3)}) == 1
    assert content("A small red star is at the top left.") == content("There is a small red star at the top left.")
    assert content("A small red star.") != content("A large red star.")
    assert content("red star, blue ring") != content("blue ring, red star")
    assert content('The text "AB" is at the top left.') != content('The text "AC" is at the top left.')


def test_spans_cover_answers_that_enumerate():
    for seed in range(40):
        scene = SceneAsker(sample_scene(seed), np.random.default_rng(seed))
        clip = ClipAsker(sample_clip(seed), np.random.default_rng(seed))
        asked = [scene.ask(kind) for kind in SCENE_KINDS] + [clip.ask(kind) for kind in CLIP_KINDS]
        for question in asked:
            if question and question.spans:
                edges = [0, *(span.stop for span in question.spans)]
                assert [span.start for span in question.spans] == edges[:-1]
                assert edges[-1] == len(question.answer)


def test_kept_out_wordings_never_occur_in_training():
    for kind, wording in WORDINGS.items():
        assert not set(wording.held) & set(templates(kind)), kind
        assert len(wording.held) >= 2
        assert len(templates(kind)) >= 15, kind


def test_kept_out_wordings_are_asked_when_wanted():
    def plain(text: str) -> str:
        return text.lower().replace("colour", "color").replace("what's ", "what is ").rstrip("?.")

    rng = np.random.default_rng(0)
    for kind in ("color", "where", "read"):
        known = {plain(template.format("star")) for template in templates(kind)}
        unseen = [plain(draw_wording(rng, kind, "star", unseen=True)) for _ in range(100)]
        seen = [plain(draw_wording(rng, kind, "star")) for _ in range(100)]
        assert np.mean([text in known for text in seen]) > 0.4
        assert not [text for text in unseen if text in known]
        assert len(set(seen)) > 40


def test_questions_on_several_pictures_point_into_the_right_one():
    for seed in range(40):
        scenes = [sample_scene(2 * seed), sample_scene(2 * seed + 1)]
        question = SeveralAsker(scenes, np.random.default_rng(seed)).ask("which")
        if question:
            picture = ("first", "second").index(question.answer)
            assert {p // PICTURE_TOKENS for p in question.focus} == {picture}
            shown = [any(thing.name in question.text for thing in scene.things) for scene in scenes]
            assert shown == [i == picture for i in range(2)]


def test_a_clip_changes_only_where_and_when_something_happens():
    for seed in range(12):
        clip = sample_clip(seed)
        frames = draw_clip(clip)
        assert frames.shape == (clip.num_frames, SIDE_PX, SIDE_PX, 3)
        changing = {f for e in clip.events for f in range(e.before_frame + 1, e.after_frame + 1)}
        for frame in range(1, clip.num_frames):
            assert (frames[frame] != frames[frame - 1]).any() == (frame in changing)
        assert (frames[0] != frames[-1]).any(-1).mean() < 0.5
        distinct = draw_clip(clip, distinct=True)
        assert len(distinct) == len(set(clip.states()))
        for frame, look in enumerate(clip.states()):
            assert (frames[frame] == frames[look]).all()


def test_every_sort_of_event_occurs_and_is_told():
    kinds = set()
    for seed in range(150):
        clip = sample_clip(seed)
        asker = ClipAsker(clip, np.random.default_rng(seed))
        kinds |= {event.kind for event in clip.events}
        happens = asker.ask("happens").answer
        assert len(re.findall(r"\.", happens)) == len(clip.events)
        if len(clip.events) > 1:
            assert happens == f"{asker.ask('first').answer} {asker.ask('last').answer}"
        told = {(token // FRAME_TOKENS, kind) for token, kind, _ in asker.changes()}
        assert told >= {(e.after_frame, EVENT_KINDS.index(e.kind)) for e in clip.events}
    assert kinds == set(EVENT_KINDS)
