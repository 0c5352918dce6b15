"""What training sees in a packed row is what `transformers` computes for the single prompt of the real template."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from demos.train.data.questions import SHORT_KINDS, SceneAsker
from demos.train.data.scenes import draw_scene, sample_scene
from demos.train.model import IMAGE_TOKENS, build_config, build_model, normalise
from demos.train.packing import Packer, collate
from demos.train.train_lm import run_decoder, splice
from demos.train.train_vit import run_tower

FOLDER = Path(__file__).parents[2] / "mm" / "models" / "weights" / "tiny"


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


@torch.no_grad()
@pytest.mark.parametrize("plain", [True, False])
def test_packed_row_equals_single_prompts(processor, plain):
    model = build_model(build_config()).eval()
    scene, rng = sample_scene(1), np.random.default_rng(0)
    asker = SceneAsker(scene, rng)
    asked = [q for kind in (*SHORT_KINDS, "caption") if (q := asker.ask(kind))]
    packer = Packer(processor.tokenizer)
    row = packer.pack(asked, IMAGE_TOKENS, np.arange(IMAGE_TOKENS), np.random.default_rng(3), plain)
    packed = collate([row], np.arange(IMAGE_TOKENS)[None], IMAGE_TOKENS, [0])
    pixels = draw_scene(scene)
    visual = model.model.multi_modal_projector(run_tower(model.model.vision_tower, normalise(pixels[None]))[:, 1:])
    embeds = splice(model, packed, [visual[0]], dtype=torch.float32)
    logits, *_ = run_decoder(model, embeds, packed, clip=False)
    for index in sorted(set(packed.target_question.tolist())):
        question = asked[index]
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
        turn.append({"role": "assistant", "content": question.answer})
        prompt = processor.apply_chat_template(turn)
        inputs = processor(images=pixels, text=prompt, return_tensors="pt")
        mine = packed.target_question == index
        count = int(mine.sum())
        assert inputs["input_ids"][0, -count:].tolist() == packed.target_token[mine].tolist()
        whole = model(**inputs).logits[0, -count - 1 : -1]
        if plain:
            torch.testing.assert_close(logits[mine], whole, atol=1e-4, rtol=1e-4)


def test_a_row_about_which_nothing_can_be_asked_is_the_picture_alone(processor):
    packer, shapes = Packer(processor.tokenizer), set()
    for seed in range(40):
        row = packer.pack([], 4, np.arange(4), np.random.default_rng(seed), plain=False)
        shapes.add(len(row.ids) > 6)  # with a system message, and without
        assert not row.targets
        assert row.positions == list(range(len(row.ids)))
    assert shapes == {True, False}
