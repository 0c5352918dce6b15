"""llama.cpp's server inside this process, with its own prompt cache and a slot for each request that is there."""

from __future__ import annotations

import base64
import json
import os
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xllamacpp  # type: ignore[import-not-found]

from demos.bench.peers.names import DECODER, PICTURE, PROMPT, QUESTION, TOWER

CONTEXT = 2048
"""Tokens of a prompt and its answer, at most."""


class Engine:
    def __init__(self, folder: str, settings: dict[str, Any]) -> None:
        params = xllamacpp.CommonParams()
        params.model.path, params.mmproj.path = str(Path(folder) / DECODER), str(Path(folder) / TOWER)
        params.n_parallel = settings["at_once"]
        params.n_ctx = CONTEXT * settings["at_once"]
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.warmup, params.fit_params = False, False
        self.marker = "<__media__>"
        os.environ["LLAMA_MEDIA_MARKER"] = self.marker
        self.prompt = (Path(folder) / PROMPT).read_text(encoding="utf-8")
        self.server = xllamacpp.Server(params)

    def _ask(self, picture: str, question: str, num_tokens: int, stamp: Callable[[], None]) -> list[int]:
        """By its own interface, since the one for Python takes no pictures with a prompt of ours."""
        text = self.prompt.replace(QUESTION, question).replace(PICTURE, self.marker)
        data = base64.b64encode(Path(picture).read_bytes()).decode()
        body = {
            "prompt": {"prompt_string": text, "multimodal_data": [data]},
            "n_predict": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_tokens": True,
            "cache_prompt": True,
        }
        request = urllib.request.Request(
            f"{self.server.listening_address}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        ids: list[int] = []
        with urllib.request.urlopen(request) as answer:
            for line in answer:
                if line.startswith(b"data: {") and (new := json.loads(line[6:]).get("tokens")):
                    stamp()
                    ids += new
        return ids

    def ask(self, picture: str, question: str, num_tokens: int, stamp: Callable[[], None]) -> list[int]:
        return self._ask(picture, question, num_tokens, stamp)

    def ask_all(self, pictures: list[str], question: str, num_tokens: int) -> list[list[int]]:
        with ThreadPoolExecutor(len(pictures)) as pool:
            return list(pool.map(lambda path: self._ask(path, question, num_tokens, lambda: None), pictures))
