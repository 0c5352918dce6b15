"""Serve multimodal models and cut what visual tokens cost.

`mm.load("tiny")` is the way in from Python. Importing this package imports neither torch nor ray.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm.api import Model, load
    from mm.media.read import read_media

__all__ = ["Model", "__version__", "load", "read_media"]
__version__ = "0.1.0"

_HOMES = {"Model": "mm.api", "load": "mm.api", "read_media": "mm.media.read"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        try:
            return getattr(importlib.import_module(_HOMES[name]), name)
        except ModuleNotFoundError as error:
            raise ImportError(f"mm.{name} needs {error.name}: pip install 'mm-serving[models]'") from error
    raise AttributeError(f"module 'mm' has no attribute {name!r}")
