"""An engine that plays events from a generator, one request after the other: what `EngineLoop` needs of one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from mm.data.outputs import Event
from mm.data.request import Request
from mm.data.tokens import Encoded, EncodedMedia
from mm.engine.interface import NATIVE
from mm.engine.sequence import OutputSink
from mm.engine.spec_decode.metrics import SpecDecodeStats
from mm.engine.stats import INTER_TOKEN_S, STEP_TOKENS, EngineStats, Histogram
from mm.plugins.calls import PluginCalls


def stats_of(**figures: Any) -> EngineStats:
    """An engine's figures: 0 where nothing is given."""
    figures = dict.fromkeys(EngineStats.__dataclass_fields__, 0) | {"engine_id": "scripted"} | figures
    for name, bounds in (("step_tokens", STEP_TOKENS), ("inter_token_s", INTER_TOKEN_S)):
        figures[name] = figures[name] or Histogram(bounds)
    figures["spec_decode"] = figures["spec_decode"] or SpecDecodeStats()
    return EngineStats(**figures)


Play = Callable[[Request, Sequence[Encoded], str], Generator[Event]]


@dataclass(eq=False)
class Scene:
    """One request under way."""

    events: Generator[Event]
    sink: OutputSink
    begun: bool = False
    aborted: threading.Event = field(default_factory=threading.Event)


class ScriptedEngine:
    """Plays `play(request, encoded, reducer)` for each request, an event per step."""

    capabilities, problems, prefills_ahead = NATIVE, (), False

    def __init__(self, play: Play) -> None:
        self._play, self.calls = play, PluginCalls()
        self.inputs = SimpleNamespace(check_length=lambda params: None)
        self._scenes: deque[Scene] = deque()
        self.wake = threading.Event()

    @property
    def has_work(self) -> bool:
        return bool(self._scenes)

    @property
    def stats(self) -> EngineStats:
        running = sum(scene.begun for scene in list(self._scenes))
        return stats_of(num_running=running, num_waiting=len(self._scenes) - running)

    def submit(self, params: Request, media: EncodedMedia, sink: OutputSink) -> Scene:
        scene = Scene(self._play(params, media.items, media.reducer), sink)
        self._scenes.append(scene)
        self.wake.set()
        return scene

    def abort(self, scene: Scene, *, wait: bool = False) -> None:
        scene.aborted.set()
        self.wake.set()

    def step(self) -> bool:
        for scene in [scene for scene in self._scenes if scene.aborted.is_set()]:
            self._end(scene, None)
        if not self._scenes:
            return False
        scene = self._scenes[0]
        scene.begun = True
        try:
            scene.sink.put(next(scene.events))
        except StopIteration:
            self._end(scene, None)
        except Exception as error:
            self._end(scene, error)
        return True

    def drain(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _end(self, scene: Scene, error: Exception | None) -> None:
        self._scenes.remove(scene)
        scene.events.close()
        scene.sink.end(error)
