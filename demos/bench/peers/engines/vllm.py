"""vLLM's CPU build, with its engine in this process and without compilation, as short runs on a CPU use it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image

MAX_TOKENS = 2048
"""Prompt and answer of one request, at most."""


class Engine:
    def __init__(self, folder: str, settings: dict[str, Any]) -> None:
        if settings["quantize"] != "none":
            raise ValueError(f"has no {settings['quantize']} weights made from a folder of floats on a CPU")
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": str(max(1, round(settings["kv_gb"]))), "HF_HUB_OFFLINE": "1"}
        from vllm import LLM

        self.llm = LLM(
            folder,
            dtype=settings["dtype"],
            max_model_len=MAX_TOKENS,
            max_num_seqs=settings["at_once"],
            enforce_eager=True,
            seed=0,
        )
        self.template = (Path(folder) / "chat_template.jinja").read_text(encoding="utf-8")
        self.count = 0

    def _submit(self, picture: str, question: str, num_tokens: int) -> str:
        from vllm import SamplingParams

        content = [{"type": "image"}, {"type": "text", "text": question}]
        ids = self.llm.get_tokenizer().apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        self.count += 1
        name = str(self.count)
        prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": PIL.Image.open(picture).convert("RGB")}}
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        self.llm.llm_engine.add_request(name, prompt, sampling)
        return name

    def _run(self, stamp: Callable[[], None]) -> dict[str, list[int]]:
        """The tokens of every request; `stamp` is called after each step that gave one."""
        found: dict[str, list[int]] = {}
        while self.llm.llm_engine.has_unfinished_requests():
            if outputs := self.llm.llm_engine.step():
                stamp()
            for output in outputs:
                found[output.request_id] = list(output.outputs[0].token_ids)
        return found

    def ask(self, picture: str, question: str, num_tokens: int, stamp: Callable[[], None]) -> list[int]:
        name = self._submit(picture, question, num_tokens)
        return self._run(stamp)[name]

    def ask_all(self, pictures: list[str], question: str, num_tokens: int) -> list[list[int]]:
        names = [self._submit(picture, question, num_tokens) for picture in pictures]
        answers = self._run(lambda: None)
        return [answers[name] for name in names]
