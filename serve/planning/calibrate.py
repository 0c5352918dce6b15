"""`mm bench calibrate`: measures the service curves of a model on this machine, in this process.

`patches` are counted in visual tokens before reduction: the tower's work grows with them, and recordings have them too.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import PIL.Image

import mm
from mm.api import build_request
from mm.config import ModelConfig
from mm.encode.pipeline import encode
from mm.engine.engine import LLMEngine
from mm.engine.loop import Submitted
from mm.settings import settings_of
from serve.api.routes import create_app
from serve.config import ServeConfig
from serve.planning.curves import SCHEMA, PlanError, parse_curves
from serve.stages import build_local_runtime

FILLER = ("a", "the", "is", "1", ".", "x")
"""Words of which one may be one token."""
ALONE = {"temperature": 0.0, "ignore_eos": True, "speculation": "none"}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """One run of `mm bench calibrate`.

    Attributes:
        sides_px: Of square pictures, one of each size.
        repeats: Of each measurement; the median counts.
        hand_off: Whether moving data between replicas is measured too, which starts a Ray.
    """

    out: Path
    model: ModelConfig = field(default_factory=ModelConfig)
    sides_px: tuple[int, ...] = (224,)
    repeats: int = 5
    hand_off: bool = True


def run_calibration(job: Calibration) -> None:
    """Measure, and write the file.

    Raises:
        PlanError: The model's tokenizer or context does not allow it.
    """
    if not job.out.absolute().parent.is_dir():
        raise PlanError(f"{job.out} cannot be written: its folder is not there")
    data = calibrate(job, lambda what: sys.stderr.write(f"mm: measuring {what}\n"))
    parse_curves(data, str(job.out))
    job.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"written to {job.out}; plan with: mm plan --gpus 8 --curves {job.out} --rate 1\n")


def calibrate(job: Calibration, say: Callable[[str], object] = lambda _: None) -> dict[str, Any]:
    """The curves as plain data; see `serve.planning.curves`."""
    config = replace(job.model, cache_bytes=0, prefix_caching=False)
    uses_processor = config.device == "cpu" and config.num_threads == 1
    bench = _Bench(mm.Model(config), job, time.process_time if uses_processor else time.perf_counter)
    try:
        say("encode")
        found = bench.encode()
        say("prefill")
        found["prefill"] = bench.prefill()
        say("decode")
        found["decode"] = bench.decode()
        found["step_s"] = bench.shared_step_s(found)
        sizes = bench.sizes()
    finally:
        bench.model.close()
    say("the front end")
    front = asyncio.run(_front_end(config, bench, job, found))
    if job.hand_off:
        found["hand_off"] = _hand_off(job.repeats, say)
    about = {
        "model": job.model.model,
        "settings": _settings(job.model),
        "device": config.device,
        "threads": config.num_threads,
        "clock": "processor time" if uses_processor else "wall time",
        "processor": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("mm-serving", "torch")},
    }
    return {"schema": SCHEMA, **found, **sizes, "front_end": front, "about": about}


def _hand_off(repeats: int, say: Callable[[str], object]) -> dict[str, Any]:
    from serve.deployments.environment import LOOPBACK, prepare_environment

    prepare_environment(LOOPBACK)
    from serve.planning.hand_off import measure_hand_off

    return measure_hand_off(repeats, say)


def _settings(model: ModelConfig) -> dict[str, Any]:
    """What is not the default, by public name: `mm plan` writes it into the settings of a server."""
    values = {one.name: (one.value_in(model), one.default) for one in settings_of(ModelConfig) if one.name != "model"}
    return {name: value for name, (value, default) in values.items() if value != default}


class _Bench:
    def __init__(self, model: mm.Model, job: Calibration, clock: Callable[[], float]) -> None:
        self.engine = cast(LLMEngine, model.engine)  # the native one, which is stepped here
        self.model, self.clock, self._repeats, self._sides = model, clock, job.repeats, job.sides_px
        self._seed = 0
        self._filler, self._fixed = self._find_filler()

    def picture(self, side: int) -> bytes:
        """A new picture of noise as PNG."""
        self._seed += 1
        coarse = np.random.default_rng(self._seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        PIL.Image.fromarray(coarse).resize((side, side)).save(buffer, "PNG")
        return buffer.getvalue()

    def timed(self, run: Callable[[], object]) -> float:
        start = self.clock()
        run()
        return self.clock() - start

    # ── encoder ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def encode(self) -> dict[str, Any]:
        """Curve of the encoder's half of a request: decode, tower, reduce."""
        limits = self.model.config.limits
        batches = [num for num in (1, 2, 4, 8) if num <= limits.max_images]
        rows: dict[int, list[float]] = {}
        tokens: dict[int, int] = {}
        for side in sorted(self._sides):
            patches, kept = self._tokens_of(side)
            if patches not in rows:
                rows[patches] = [self._encode_s(side, num) for num in batches]
                tokens[patches] = kept
        axis = sorted(rows)
        last = axis[-1]
        return {
            "encode": {"patches": axis, "batch": batches, "seconds": [rows[patches] for patches in axis]},
            "picture": {"patches": last, "tokens": tokens[last]},
        }

    def _tokens_of(self, side: int) -> tuple[int, int]:
        encoded = encode(self._asked("?", [side]), self.model.encode_parts).items[0]
        return math.prod(encoded.tokens.grid), encoded.tokens.num_tokens

    def _asked(self, text: str, sides: Sequence[int], num_tokens: int = 1) -> Any:
        images = [self.picture(side) for side in sides]
        return build_request(text, images=images, max_new_tokens=num_tokens, **ALONE)

    def _encode_s(self, side: int, num: int) -> float:
        requests = [self._asked("?", [side] * num) for _ in range(self._repeats + 1)]
        times = [self.timed(lambda one=one: encode(one, self.model.encode_parts)) for one in requests]
        return statistics.median(times[1:])

    # ── decoder ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, num_prompt_tokens: int, num_tokens: int) -> Submitted:
        """A request whose prompt has so many tokens."""
        text = " ".join([self._filler] * max(1, num_prompt_tokens - self._fixed))
        request = self._asked(text, [], num_tokens)
        return self.model.loop.submit(request, encode(request, self.model.encode_parts))

    def _find_filler(self) -> tuple[str, int]:
        """A word of which each copy is one token, and the tokens that a prompt has beside them."""
        for word in FILLER:
            lengths = list[int]()
            for num in (20, 30, 50):
                submitted = self.model.loop.submit(
                    *((request := self._asked(" ".join([word] * num), [])), encode(request, self.model.encode_parts))
                )
                lengths.append(submitted.request.prompt.length)
                self._drain()
            if lengths[1] - lengths[0] == 10 and lengths[2] - lengths[0] == 30:
                return word, lengths[0] - 20
        raise PlanError("this model's tokenizer has no word of one token among those that calibration tries")

    def steps(self) -> list[tuple[int, float]]:
        """Compute all that is submitted: tokens and seconds of each step."""
        engine, found = self.engine, list[tuple[int, float]]()
        while engine.has_work:
            before = engine.stats.num_scheduled_tokens
            seconds = self.timed(engine.step)
            found.append((engine.stats.num_scheduled_tokens - before, seconds))
        return found

    def _drain(self) -> None:
        self.steps()

    @property
    def budget(self) -> int:
        return self.engine.config.max_num_batched_tokens

    @property
    def context(self) -> int:
        return self.engine.family.max_context_tokens

    def prefill(self) -> dict[str, Any]:
        """Curve over the tokens of a chunk and the tokens before it, which are whole chunks."""
        room = self.context - 8
        cached = [num * self.budget for num in (0, 1, 3) if num * self.budget + 32 < room]
        most = min(self.budget, room - cached[-1])
        tokens = sorted({num for num in (self._fixed + 1, 32, 128, 256, most) if self._fixed < num <= most})
        rows = [[self._prefill_s(num, before) for before in cached] for num in tokens]
        return {"tokens": tokens, "cached": cached, "seconds": rows}

    def _prefill_s(self, tokens: int, cached: int) -> float:
        times = list[float]()
        for _ in range(self._repeats + 1):
            self.submit(cached + tokens, 1)
            num, seconds = self.steps()[-1]
            assert num == tokens, f"a chunk of {num} tokens, where {tokens} were to be measured"
            times.append(seconds)
        return statistics.median(times[1:])

    def decode(self) -> dict[str, Any]:
        """Curve of a step over sequences and their mean context."""
        most = self.engine.config.max_num_seqs
        batches = sorted({num for num in (1, 4, 16, most) if num <= most})
        contexts = sorted({max(self._fixed + 1, 32), min(1024, self.context // 2)})
        rows = [[self._decode_s(num, context) for context in contexts] for num in batches]
        return {"batch": batches, "context": contexts, "seconds": rows}

    def _decode_s(self, batch: int, context: int) -> float:
        num_steps = self._repeats + 3
        chunks = -(-context * batch // self.budget) + 1
        for _ in range(batch):
            self.submit(context, num_steps + chunks)
        times = [seconds for num, seconds in self.steps() if num == batch]
        return statistics.median(times[-num_steps:-1] or times)

    def shared_step_s(self, found: dict[str, Any]) -> float:
        """What a step that decodes and prefills saves over two steps; never more than the smaller of the two."""
        curves = parse_curves({"schema": SCHEMA, **found}, "the measurement")
        assert curves.prefill is not None
        assert curves.decode is not None
        batch, tokens = min(4, self.engine.config.max_num_seqs), 64 + self._fixed
        apart = curves.decode(batch, 48), curves.prefill(tokens, 0)
        savings = list[float]()
        for _ in range(self._repeats):
            for _ in range(batch):
                self.submit(self._fixed + 16, 32)
            for _ in range(6):
                self.engine.step()
            self.submit(tokens, 1)
            together = next(seconds for num, seconds in self.steps() if num > batch)
            savings.append(sum(apart) - together)
        return min(max(0.0, statistics.median(savings)), *apart)

    def sizes(self) -> dict[str, Any]:
        """Bytes of a token, and the bounds of the engine."""
        engine = self.engine
        spec = engine.cache.shape
        one = encode(self._asked("?", self._sides[:1]), self.model.encode_parts).items[0].tokens
        token_bytes = spec.num_layers * spec.token_bytes
        return {
            "visual_token_bytes": one.embeddings.shape[1] * one.embeddings.element_size(),
            "kv_token_bytes": token_bytes,
            "lanes": 1,
            "engine": {
                "max_num_seqs": engine.config.max_num_seqs,
                "max_batch_tokens": self.budget,
                "kv_tokens": engine.stats.kv_total_bytes // token_bytes,
            },
        }


async def _front_end(config: ModelConfig, bench: _Bench, job: Calibration, found: dict[str, Any]) -> dict[str, Any]:
    """What a request takes beside encode and prefill: HTTP, JSON, chat template, threads, the answer."""
    curves = parse_curves({"schema": SCHEMA, **found}, "the measurement")
    served = ServeConfig(model=config)
    runtime = build_local_runtime(served)
    rest: dict[int, float] = {}
    try:
        transport = httpx.ASGITransport(create_app(runtime, served))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            for pictures in (0, 1, 4):
                times = list[float]()
                for _ in range(job.repeats + 2):
                    body = _body(served, [bench.picture(job.sides_px[-1]) for _ in range(pictures)])
                    start = bench.clock()
                    answer = await client.post("/v1/chat/completions", content=body)
                    seconds = bench.clock() - start
                    if answer.status_code != 200:
                        raise PlanError(f"the server refused a request: {answer.text[:200]}")
                    prompt = answer.json()["usage"]["prompt_tokens"]
                    assert curves.prefill is not None
                    seconds -= curves.prefill(prompt, 0)
                    if pictures and curves.encode is not None and curves.picture is not None:
                        seconds -= curves.encode(curves.picture.patches, pictures)
                    times.append(seconds)
                rest[pictures] = statistics.median(times[2:])
    finally:
        runtime.close()
    per_picture = max(0.0, (rest[4] - rest[0]) / 4)
    return {"request_s": max(0.0, rest[0]), "picture_s": per_picture, "workers": 1}


def _body(config: ServeConfig, pictures: Sequence[bytes]) -> bytes:
    urls = ["data:image/png;base64," + base64.b64encode(data).decode() for data in pictures]
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": "What is there?"})
    asked = {"model": config.names[0], "messages": [{"role": "user", "content": content}], "max_tokens": 1}
    return json.dumps(asked | {"temperature": 0, "ignore_eos": True}).encode()
