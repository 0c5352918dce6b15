"""Decoders with other weights in their layers, for requests whose reducer was trained together with the decoder.

All of them share the KV cache, the embedding and the head. A step computes the requests of each decoder apart.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from mm.engine.attention.base import AttentionBackend
from mm.engine.model_runner import ModelRunner
from mm.engine.scheduler import SchedulerOutput
from mm.models.language import LanguageModel
from mm.plugins.calls import PluginCalls
from mm.plugins.weights import ReducerWeights


class AdaptedDecoders:
    """The decoders of one engine, by the fingerprint of the reducer's weights. The model's own has the name "".

    Args:
        language: The model's own decoder.
        runner: Runs it.
        attention: Over the cache in which all sequences are.
        calls: Calls the reducers.
    """

    def __init__(
        self, language: LanguageModel, runner: ModelRunner, attention: AttentionBackend, calls: PluginCalls
    ) -> None:
        self._language, self._attention, self._calls = language, attention, calls
        self._runners = {"": runner}
        self._lock = threading.Lock()

    def add(self, weights: ReducerWeights) -> str:
        """Read a decoder if it is a new one, which takes as long as reading the model. Returns its name.

        Raises:
            BadWeights: Its tensors are damaged or do not fit the model.
        """
        with self._lock:
            if weights.fingerprint not in self._runners:
                language = self._language.with_layers(weights)
                self._runners[weights.fingerprint] = ModelRunner(language, self._attention, calls=self._calls)
        return weights.fingerprint

    def parts(self, scheduled: SchedulerOutput) -> Iterator[tuple[ModelRunner, SchedulerOutput]]:
        """The parts of a step, each with what runs it: one for each decoder that has something to do."""
        names = sorted({seq.request.decoder for seq in scheduled.seqs})
        for name in names:
            if len(names) == 1:
                yield self._runners[name], scheduled
            else:
                decode = [seq for seq in scheduled.decode if seq.request.decoder == name]
                chunks = [item for item in scheduled.chunks if item.seq.request.decoder == name]
                yield self._runners[name], SchedulerOutput(decode=decode, chunks=chunks)
