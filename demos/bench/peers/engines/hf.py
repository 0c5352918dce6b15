"""Hugging Face transformers: the processor and `generate`; many questions are one static batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import PIL.Image
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


class Stamps:
    """A stopping criterion that never stops."""

    def __init__(self, stamp: Callable[[], None]) -> None:
        self._stamp = stamp

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self._stamp()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Engine:
    def __init__(self, folder: str, settings: dict[str, Any]) -> None:
        if settings["quantize"] != "none":
            raise ValueError(f"has no {settings['quantize']} weights for a CPU of its own")
        torch.set_num_threads(settings["threads"])
        dtype = getattr(torch, settings["dtype"])
        self.model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        ).eval()
        self.model.generation_config.eos_token_id = None
        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    def ask(self, picture: str, question: str, num_tokens: int, stamp: Callable[[], None]) -> list[int]:
        return self._generate([picture], question, num_tokens, [Stamps(stamp)])[0]

    def ask_all(self, pictures: list[str], question: str, num_tokens: int) -> list[list[int]]:
        return self._generate(pictures, question, num_tokens, [])

    def _generate(self, pictures: list[str], question: str, num_tokens: int, criteria: list[Stamps]) -> list[list[int]]:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        images = [PIL.Image.open(path).convert("RGB") for path in pictures]
        inputs = self.processor(
            images=images, text=[prompt] * len(images), return_tensors="pt", add_special_tokens=False
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        with torch.inference_mode():
            out = self.model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, stopping_criteria=criteria)
        return out[:, inputs["input_ids"].shape[1] :].tolist()
