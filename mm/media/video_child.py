"""The process that decodes one clip and ends: `python -m mm.media.video_child`.

It imports its decoder, sends "ready" and reads one request. Then it limits its own memory, CPU time, wall time, files
and sockets for good, and only then looks at the clip. It must not import torch: a spare child has to start fast and
stay small.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from mm.media.video_decoder import decode, prepare
from mm.media.video_messages import DecodeRequest, Done, Message, Plan, Refused
from mm.processes.child import lower_limit, private_stdout
from mm.processes.wire import OUT_OF_MEMORY_STATUS, WireClosed, read_exactly, read_header, write_message

Decode = Callable[[BinaryIO, DecodeRequest], Iterator[Message]]
PIECE_BYTES = 1 << 20


def main(prepare: Callable[[], object] = prepare, decode: Decode = decode) -> None:
    """Serve one request on stdin and stdout. End without clean-up, since the clip may have damaged the process."""
    pipe_in, pipe_out = sys.stdin.buffer, private_stdout()
    try:
        prepare()
        write_message(pipe_out, {"type": "ready"})
        header = read_header(pipe_in)  # fails when the parent is gone
        clip = receive_clip(pipe_in, header["num_bytes"])
        confine(header["limits"])
        send_frames(decode, clip, DecodeRequest(**header["request"]), pipe_out)
    except (WireClosed, BrokenPipeError):
        os._exit(1)
    except MemoryError:
        os._exit(OUT_OF_MEMORY_STATUS)
    os._exit(0)


def receive_clip(pipe_in: BinaryIO, num_bytes: int) -> BinaryIO:
    """The encoded clip as an open file in memory. It is not mapped, so the process does not grow with it.

    Raises:
        WireClosed: The parent is gone.
    """
    clip = os.fdopen(os.memfd_create("clip"), "w+b")
    while num_bytes > 0:
        piece = read_exactly(pipe_in, min(num_bytes, PIECE_BYTES))
        clip.write(piece)
        num_bytes -= len(piece)
    clip.flush()
    return clip


def send_frames(decode: Decode, clip: BinaryIO, request: DecodeRequest, pipe_out: BinaryIO) -> None:
    """Send the plan, the frames and `done`, or the reason why not. No text of a library leaves this process."""
    try:
        for message in decode(clip, request):
            with _clock_stopped():
                write_message(pipe_out, *_encoded(message))
    except (BrokenPipeError, WireClosed):
        raise
    except Refused as refused:
        write_message(pipe_out, {"type": "refused", **vars(refused)})
    except MemoryError:
        write_message(pipe_out, {"type": "refused", "reason": "decode_limit", "limit": None})
    except Exception:
        # PyAV alone raises InvalidDataError, IndexError, UnicodeDecodeError, AttributeError and EOFError on damaged
        # clips.
        reason = "undecodable" if _has_memory() else "decode_limit"
        write_message(pipe_out, {"type": "refused", "reason": reason, "limit": None})


def _has_memory() -> bool:
    """Whether memory is left. A library that has none may raise any error."""
    try:
        bytearray(32 << 20)
    except MemoryError:
        return False
    return True


def confine(limits: dict[str, Any]) -> None:
    """Limit this process for good; hard limits cannot be raised again.

    No new file descriptor can be opened. So the decoder can open neither a file nor a socket, whatever the clip is.
    """
    cpu_s, memory_bytes = int(limits["cpu_s"]), int(limits["memory_bytes"])
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    lower_limit(resource.RLIMIT_CORE, 0, 0)
    lower_limit(resource.RLIMIT_FSIZE, 0, 0)
    lower_limit(resource.RLIMIT_CPU, cpu_s, cpu_s + 1)
    lower_limit(resource.RLIMIT_AS, memory_bytes, memory_bytes)
    lower_limit(resource.RLIMIT_NOFILE, highest, highest)
    # The parent kills this process at the same time. This is for the case that the parent is gone.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, float(limits["wall_s"]))


@contextmanager
def _clock_stopped() -> Generator[None]:
    """Stop the wall clock while the parent reads. It may take its time between two chunks."""
    left_s, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    yield
    signal.setitimer(signal.ITIMER_REAL, left_s)


def _encoded(message: Message) -> tuple[dict[str, Any], bytes | memoryview]:
    if isinstance(message, Plan):
        return {"type": "plan", **message._asdict()}, b""
    if isinstance(message, Done):
        return {"type": "done", **message._asdict()}, b""
    height, width, _ = message.pixels.shape
    body = message.pixels.data.cast("B")
    return {"type": "frame", "time_s": message.time_s, "width": width, "height": height}, body


if __name__ == "__main__":
    main()
