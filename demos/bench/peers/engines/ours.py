"""This engine, as `mm.load` gives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mm
from mm.errors import MmError

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


class Engine:
    def __init__(self, folder: str, settings: dict[str, Any]) -> None:
        self.model = mm.load(
            folder,
            dtype=settings["dtype"],
            quantize=settings["quantize"],
            num_threads=settings["threads"],
            max_num_seqs=settings["at_once"],
            kv_cache_gb=settings["kv_gb"],
        )

    def ask(self, picture: str, question: str, num_tokens: int, stamp: Callable[[], None]) -> list[int]:
        ids: list[int] = []
        for event in self.model.stream(question, images=[picture], max_new_tokens=num_tokens, **GREEDY):
            if new := getattr(event, "token_ids", ()):
                stamp()
                ids += new
        return ids

    def ask_all(self, pictures: list[str], question: str, num_tokens: int) -> list[list[int]]:
        prompts = [{"prompt": question, "images": [picture]} for picture in pictures]
        answers = self.model.generate_batch(prompts, max_new_tokens=num_tokens, **GREEDY)
        if failed := [answer for answer in answers if isinstance(answer, MmError)]:
            raise failed[0]
        return [list(answer.token_ids[0]) for answer in answers if not isinstance(answer, MmError)]
