"""Answers from a model in this process, by the engine that also serves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Any

import mm
from mm.config import ModelConfig
from mm.device import resolved
from mm.errors import RequestError
from serve.evaluation.client import EvalRequest, Reply
from serve.evaluation.items import EvaluationError


class LocalBackend:
    """A loaded model.

    Args:
        num_frames: Taken of a clip, evenly spread; all if it has fewer.

    Raises:
        MmError: The model cannot be used.
    """

    def __init__(self, config: ModelConfig, *, num_frames: int, max_tokens: int) -> None:
        self._config, self._num_frames, self._max_tokens = config, num_frames, max_tokens
        self._model = mm.Model(config)

    def metadata(self) -> dict[str, Any]:
        return {
            "model": self._config.model,
            "through": "this process",
            "device": resolved(self._config.device),
            "dtype": self._config.dtype,
            "quantize": self._config.quantize,
            "num_frames": self._num_frames,
            "max_tokens": self._max_tokens,
            "versions": {name: version(name) for name in ("mm-serving", "torch", "transformers")},
        }

    def answers(self, requests: Iterable[EvalRequest], reducer: str | None) -> Iterator[Reply]:
        for ask in requests:
            options: dict[str, Any] = {"images": [ask.media]}
            if ask.kind == "video":
                options = {"videos": [ask.media], "num_frames": self._num_frames}
            try:
                answer = self._model.generate(
                    ask.question,
                    reducer=reducer,
                    temperature=0.0,
                    max_new_tokens=self._max_tokens,
                    return_map=False,
                    **options,
                )
            except RequestError as error:
                raise EvaluationError(f"at item {ask.item_id!r}: {error}") from error
            usage = answer.usage
            yield Reply(
                text=answer.text,
                num_visual_tokens_in=usage.num_visual_tokens_in,
                num_visual_tokens_kept=usage.num_visual_tokens_kept,
            )

    def close(self) -> None:
        """Nothing has to be closed; the model is freed with this object."""
