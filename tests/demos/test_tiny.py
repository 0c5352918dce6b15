"""The shipped folder loads offline with `transformers`, its tokenizer takes any text, its answers come from seeing."""

from pathlib import Path

import gradio
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText, AutoProcessor

import mm
from demos.train.data.questions import answer_words
from demos.train.data.things import CHARACTERS
from demos.train.evaluate import answer, scene_items
from mm.models.shipped import CANNOT_TELL

FOLDER = Path(__file__).parents[2] / "mm" / "models" / "weights" / "tiny"
SAMPLES = Path(__file__).parents[2] / "demos" / "samples"
EASY = ("color", "shape", "size", "where", "exist")
PHOTOGRAPHS = ("cheetah1.jpg", "bus.png", "groot.jpeg", "lion.jpg", "tower.jpg")
"""Of the package gradio; the training saw none of them."""
NUM_QUESTIONS, MIN_RIGHT, MAX_RIGHT_BLIND = 24, 19, 13


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.mark.parametrize("name", ["tiny", "tiny_plain"])
def test_folder_is_small(name):
    assert sum(file.stat().st_size for file in (FOLDER.parent / name).iterdir()) < 25e6


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
@example("  two  spaces\tand\nlines 🙂 日本語 \x00")
def test_tokenizer_gives_any_text_back(processor, text):
    tokenizer = processor.tokenizer
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_answer_words_and_characters_are_single_tokens(processor):
    for word in (*answer_words(), *CHARACTERS):
        assert len(processor.tokenizer(word)["input_ids"]) == 1
        assert len(processor.tokenizer(f" {word}")["input_ids"]) == 1
    assert processor.tokenizer.tokenize("K7PX") == list("K7PX")


def test_template_takes_strings_parts_turns_and_system_messages(processor):
    image, text = {"type": "image"}, {"type": "text", "text": "What color is it?"}
    render = processor.apply_chat_template
    first = render([{"role": "user", "content": [image, text]}], add_generation_prompt=True)
    assert first == "<s><|user|><image>What color is it?<|assistant|>"
    last = render([{"role": "user", "content": [text, {"type": "video"}]}], add_generation_prompt=True)
    assert last == "<s><|user|>What color is it?<video><|assistant|>"
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>What color is it?"},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": "Sure?"},
    ]
    expected = "<s><|system|>Be brief.<|user|><image>What color is it?<|assistant|>red</s><|user|>Sure?<|assistant|>"
    assert render(turns, add_generation_prompt=True) == expected


def test_model_answers_from_the_picture(processor):
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()
    items = [item for item in scene_items(40, False, 4) if item.question.kind in EASY][:NUM_QUESTIONS]
    pictures = [item.pixels for item in items]
    assert len(items) == NUM_QUESTIONS

    def num_right(given: list) -> int:
        said = answer(model, processor, items, given)
        return sum(text == item.question.answer for text, item in zip(said, items, strict=True))

    assert num_right(pictures) >= MIN_RIGHT
    assert num_right(pictures[12:] + pictures[:12]) <= MAX_RIGHT_BLIND


def test_model_says_that_it_cannot_tell_what_photographs_show():
    folder = Path(gradio.__file__).parent / "media_assets" / "images"
    with mm.load("tiny", dtype="float32") as model:

        def refusals(paths: list[Path], *asked: str) -> int:
            questions = [{"prompt": text, "images": [path]} for path in paths for text in asked]
            answers = model.generate_batch(questions, max_new_tokens=24, temperature=0)
            return sum(answer.text == CANNOT_TELL for answer in answers)

        foreign = ("What is this?", "Describe the picture.", "How many people are there?", "What color is the circle?")
        assert refusals([folder / name for name in PHOTOGRAPHS], *foreign) >= 18  # of 20
        assert refusals(sorted(SAMPLES.glob("*.png")), "Describe the picture.", "What color is the star?") == 0
