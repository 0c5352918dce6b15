"""One question about one picture or clip, answered with several reducers.

Nothing is cached between them. A first answer, which is not shown, warms the model up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mm.api import Model, build_request, collect
from mm.config import ModelConfig
from mm.data.media import Kind
from mm.data.outputs import KeptMap

STAGES = ("load", "encode", "reduce", "prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One run of `mm compare`.

    Attributes:
        path: A picture or clip.
        reducers: Compared in this order, after "none".
        out: Folder for pictures and numbers; None writes nothing.
        as_json: Print the numbers as JSON instead of the table.
    """

    path: Path
    prompt: str
    reducers: tuple[str, ...]
    model: ModelConfig = field(default_factory=ModelConfig)
    max_tokens: int = 128
    out: Path | None = None
    as_json: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """The result with one reducer.

    Attributes:
        prompt_tokens: Visual tokens that entered the decoder.
        kept_tokens: Visual tokens that are left after the last layer.
        kv_bytes: Size of the KV cache blocks that the request held at its first token, text included.
        stages_s: Seconds of each stage.
        overlay: The picture with the kept tokens, if there is one.
    """

    reducer: str
    answer: str
    tokens_in: int
    prompt_tokens: int
    kept_tokens: int
    kv_bytes: int
    stages_s: dict[str, float]
    overlay: str | None = None


def compare(model: Model, job: Comparison, kind: Kind, reducers: Sequence[str]) -> Iterator[tuple[Row, KeptMap | None]]:
    """The result with each reducer, and the tokens that it kept."""
    for turn, spec in enumerate([reducers[0], *reducers]):
        media: dict[str, Any] = {"images": [job.path]} if kind == "image" else {"videos": [job.path]}
        options = {"reducer": spec, "temperature": 0.0, "max_new_tokens": job.max_tokens}
        request = build_request(job.prompt, **media, **options)
        answer = collect(model.run(request))
        if not turn:
            continue  # the first answer includes what is done once per process
        usage, timings = answer.usage, asdict(answer.timings)
        yield (
            Row(
                reducer=spec,
                answer=answer.text.strip(),
                tokens_in=usage.num_visual_tokens_in,
                prompt_tokens=usage.num_image_tokens_prompt + usage.num_video_tokens_prompt,
                kept_tokens=usage.num_visual_tokens_kept,
                kv_bytes=answer.kv_bytes,
                stages_s={stage: round(timings[f"{stage}_s"], 6) for stage in STAGES},
            ),
            answer.kept[0] if answer.kept else None,
        )
