"""The models that ship with `mm`: where they are and what they know. Imports no torch."""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).parent / "weights"
REAL_MODEL = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
"""A general model, small enough for a CPU, that messages recommend in place of a shipped one."""
CANNOT_TELL = "I cannot tell: I was made for drawn shapes, short texts and charts."
"""What `demos.train.train_limits` teaches a model to answer about other pictures; `tiny` says it."""


def shipped_models() -> list[str]:
    """Names of the shipped models, sorted."""
    return sorted(path.name for path in SHIPPED.iterdir() if path.is_dir()) if SHIPPED.is_dir() else []


def limits_of(model: str) -> str | None:
    """What a shipped model cannot do, in two sentences; None for any other model.

    Args:
        model: As `ModelConfig.model` has it: the name of a shipped model, or a folder or hub name.
    """
    path = Path(model).expanduser()
    name = path.name if path.parent.resolve() == SHIPPED.resolve() else model
    if name not in shipped_models():
        return None
    about = "Of most photographs, screenshots and other pictures it says that it cannot tell; all else is made up."
    if name != "tiny":
        about = "What it says about photographs, screenshots and other pictures is made up."
    return f"{name} was trained on drawn shapes, short texts, bar charts and short drawn clips. {about}"
