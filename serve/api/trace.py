"""Records when requests came and how large they were, for `mm plan --trace`. Contents are never part of it."""

from __future__ import annotations

import logging
from pathlib import Path

from mm.data.outputs import Usage
from mm.data.request import Request
from mm.errors import InvalidOption
from serve.lines import cut_unfinished_line
from serve.planning.traces import RECORDED

log = logging.getLogger(__name__)
HEADER = ",".join(RECORDED)


class TraceRecorder:
    """Appends a line for each answered request to a CSV file.

    Args:
        num_frames: Frames of a clip for which a request asks no number.

    Raises:
        InvalidOption: The file cannot be written, or it holds something else.
    """

    def __init__(self, path: str, num_frames: int) -> None:
        self._path, self._num_frames, self._has_failed = Path(path), num_frames, False
        try:
            found = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
            if found and not found.startswith(HEADER + "\n"):
                raise InvalidOption("serve", "record_trace", f"was {path!r}, a file that holds something else")
            cut_unfinished_line(self._path)
            self._write("" if found else HEADER + "\n")
            self._path.chmod(0o600)
        except (OSError, UnicodeDecodeError) as error:
            problem = f"was {path!r}, which cannot be written: {error}"
            raise InvalidOption("serve", "record_trace", problem) from None

    def add(self, request: Request, usage: Usage, arrived_at: float) -> None:
        """Write a request's line. A full disk stops the recording and not the server.

        Args:
            arrived_at: Seconds since 1970.
        """
        kept = usage.num_image_tokens_prompt + usage.num_video_tokens_prompt
        row = (
            f"{arrived_at:.6f}",
            usage.num_prompt_tokens,
            self._num_pictures(request),
            usage.num_visual_tokens_in,
            kept,
            max(1, usage.num_completion_tokens),
        )
        try:
            self._write(",".join(map(str, row)) + "\n")
        except OSError as error:
            if not self._has_failed:
                log.error("record_trace=%s", error)
            self._has_failed = True

    def _write(self, text: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)

    def _num_pictures(self, request: Request) -> int:
        asked = request.vision.frames
        frames = asked.num_frames if asked is not None and asked.num_frames else self._num_frames
        return sum(frames if item.kind == "video" else 1 for item in request.media)
