"""OpenVINO GenAI's continuous batching with prefixes cached; products, keys and values in the precision asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found]
import openvino_genai as genai  # type: ignore[import-not-found]
import PIL.Image

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


class Streamer(genai.StreamerBase):
    def __init__(self, stamp: Callable[[], None]) -> None:
        super().__init__()
        self.ids: list[int] = []
        self._stamp = stamp

    def write(self, token: int | list[int]) -> genai.StreamingStatus:
        self._stamp()
        self.ids += token if isinstance(token, list) else [token]
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def load(picture: str) -> openvino.Tensor:
    """(1, height, width, 3)"""
    return openvino.Tensor(np.array(PIL.Image.open(picture).convert("RGB"))[None])


class Engine:
    def __init__(self, folder: str, settings: dict[str, Any]) -> None:
        precision = PRECISIONS[settings["dtype"]]
        common = {"INFERENCE_NUM_THREADS": settings["threads"], "INFERENCE_PRECISION_HINT": precision}
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = max(1, round(settings["kv_gb"]))
        scheduler.max_num_seqs = settings["at_once"]
        scheduler.max_num_batched_tokens = 2048
        scheduler.enable_prefix_caching = True
        properties = common if settings["quantize"] != "none" else common | {"KV_CACHE_PRECISION": precision}
        self.pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties, {}, common)

    def _config(self, num_tokens: int) -> genai.GenerationConfig:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = num_tokens, True, False
        return config

    def ask(self, picture: str, question: str, num_tokens: int, stamp: Callable[[], None]) -> list[int]:
        streamer = Streamer(stamp)
        self.pipeline.generate(
            [question], images=[[load(picture)]], generation_config=[self._config(num_tokens)], streamer=streamer
        )
        return streamer.ids

    def ask_all(self, pictures: list[str], question: str, num_tokens: int) -> list[list[int]]:
        handles = [
            self.pipeline.add_request(number, question, [load(picture)], self._config(num_tokens))
            for number, picture in enumerate(pictures)
        ]
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        return [list(handle.read_all()[0].generated_ids) for handle in handles]
