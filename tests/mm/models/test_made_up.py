"""An architecture that nobody has heard of, and that keeps the interface of transformers, is served as it is."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
)

import mm
from tests.helpers.decoders import randomize
from tests.helpers.families import FAMILIES, ids, llava_next, template, tokenizer


class MadeUpConfig(LlavaNextConfig):
    model_type = "made_up"


class MadeUpModel(LlavaNextModel):
    config_class = MadeUpConfig

    def get_image_features(self, pixel_values, image_sizes, **options):
        """Features in the opposite order."""
        output = super().get_image_features(pixel_values, image_sizes, **options)
        output.pooler_output = [rows.flip(0) for rows in output.pooler_output]
        return output


class MadeUp(LlavaNextForConditionalGeneration):
    config_class = MadeUpConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = MadeUpModel(config)
        self.post_init()


@pytest.fixture
def folder(tmp_path):
    AutoConfig.register("made_up", MadeUpConfig, exist_ok=True)
    AutoModelForImageTextToText.register(MadeUpConfig, MadeUp, exist_ok=True)
    family = FAMILIES["llava_next"]
    words = tokenizer(family)
    known = llava_next(words)
    config = MadeUpConfig(
        vision_config=known.vision_config,
        text_config=known.text_config,
        image_grid_pinpoints=known.image_grid_pinpoints,
        **ids(words, image_token_id="<image>"),
    )
    model = MadeUp(config)
    randomize(model)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.do_sample = False
    model.save_pretrained(tmp_path)
    family.processor(words, template(family.image, family.video)).save_pretrained(tmp_path)
    return tmp_path


def test_is_served(folder):
    picture = np.random.default_rng(3).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    model = MadeUp.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [[PIL.Image.fromarray(picture)]]
    inputs = processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
    expected = model.generate(**inputs, max_new_tokens=8)[0, inputs.input_ids.shape[1] :].tolist()
    with mm.load(folder, dtype="float32", num_threads=1) as ours:
        given = ours.generate("What is it?", images=[picture], max_new_tokens=8, temperature=0)
    assert list(given.token_ids[0]) == expected
