"""The settings of a caption job, and which of them decide the text of its captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm.config import ModelConfig
from mm.data.media import Kind
from mm.errors import MmError

DEFAULT_PROMPTS: Mapping[Kind, str] = {"image": "Describe the image.", "video": "Describe the video."}


class JobError(MmError):
    """A caption job cannot start or go on."""

    code = "job_error"


@dataclass(frozen=True, kw_only=True)
class CaptionJob:
    """One run of `mm caption`.

    Attributes:
        inputs: Files, folders (looked through recursively) and glob patterns.
        out: Folder of the results; made when missing.
        prompt: Asked about every item; None asks for a description of the image or of the video.
        model: The model, its reducer, its frame sampling and its limits.
        max_tokens: Longest caption. Decoding is greedy, so a caption depends on nothing but the item and the settings.
        patterns: File names to take from folders, such as "*.png"; empty takes every image and clip.
        limit: Only this many of the items found, the first ones, finished ones included; running again adds none.
        retry_failed: Try items again that failed in an earlier run.
        restart: Discard the folder's earlier results.
        quiet: No progress and no summary; errors and failed items are still reported.
        as_json: One JSON line with the counts on stdout at the end.
        num_prefetch: Items that are loaded and encoded ahead of those being answered.
        num_together: Items that are answered at a time; a kill costs no more than these.
    """

    inputs: tuple[str, ...]
    out: Path
    prompt: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    max_tokens: int = 128
    patterns: tuple[str, ...] = ()
    limit: int | None = None
    retry_failed: bool = False
    restart: bool = False
    quiet: bool = False
    as_json: bool = False
    num_prefetch: int = 2
    num_together: int = 16

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_tokens", self.max_tokens, 1),
            ("limit", self.limit, 1),
            ("num_prefetch", self.num_prefetch, 0),
            ("num_together", self.num_together, 1),
        ):
            if value is not None and value < least:
                raise JobError(f"{name} was {value}; give at least {least}")
        if self.prompt is not None and not self.prompt.strip():
            raise JobError("the prompt is empty; give a question, or none to ask for a description")

    def prompt_for(self, kind: Kind) -> str:
        return DEFAULT_PROMPTS[kind] if self.prompt is None else self.prompt


def settings_of(job: CaptionJob) -> dict[str, Any]:
    """What decides the text of a caption, JSON-ready. Captions of one output folder share all of it.

    The device is not part: a job may move to another machine. Neither are the inputs, which may grow.

    Raises:
        PluginError: The reducer does not exist or has bad options.
    """
    from mm.models.locate import find
    from mm.plugins.spec import bind, configured_reducer

    model = job.model
    return {
        "model": str(Path(model.model).resolve()) if Path(model.model).is_dir() else model.model,
        "dtype": model.dtype,
        "reducer": bind(configured_reducer(model), find(model.model)).canonical,
        "image prompt": job.prompt_for("image"),
        "video prompt": job.prompt_for("video"),
        "max_tokens": job.max_tokens,
        "frames": model.num_frames if model.fps is None else f"{model.fps:g} per second",
    }


def check_same(earlier: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Refuse to mix captions that were made differently.

    Raises:
        JobError: Names every setting that differs and what can be done.
    """
    names = [name for name in {**earlier, **now} if earlier.get(name) != now.get(name)]
    if names:
        changes = "; ".join(f"{name} was {earlier.get(name)!r} and is now {now.get(name)!r}" for name in names)
        raise JobError(
            f"{out} holds results made with other settings: {changes}. Give another --out to keep both, "
            "use the earlier settings to go on, or --restart to discard the earlier results"
        )
