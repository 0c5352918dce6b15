"""Where the commands that serve write their log."""

from __future__ import annotations

import logging
import sys


def log_to_stderr() -> None:
    """Log from the level INFO on; libraries that log every request only from WARNING on."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpcore", "transformers", "ray", "openai"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
