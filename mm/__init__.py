"""Serve multimodal models and cut what visual tokens cost.

`mm.load("tiny")` is the way in from Python. Importing this package imports neither torch nor ray.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm import errors
    from mm.api import Answer, Model, load
    from mm.data.request import Request
    from mm.data.sampling_params import SamplingParams
    from mm.media.read import read_media

__all__ = ["Answer", "Model", "Request", "SamplingParams", "__version__", "errors", "load", "read_media"]
__version__ = "0.1.0"

_HOMES = {
    "Answer": "mm.api",
    "Model": "mm.api",
    "Request": "mm.data.request",
    "SamplingParams": "mm.data.sampling_params",
    "load": "mm.api",
    "read_media": "mm.media.read",
}
"""Public names to the modules that define them. They are imported on first use."""


def __getattr__(name: str) -> Any:
    import importlib

    if name == "errors":
        return importlib.import_module("mm.errors")
    if name in _HOMES:
        try:
            return getattr(importlib.import_module(_HOMES[name]), name)
        except ModuleNotFoundError as error:
            raise ImportError(f"mm.{name} needs {error.name}: pip install 'mm-serving[models]'") from error
    raise AttributeError(f"module 'mm' has no attribute {name!r}")
