"""The process that decodes one clip and ends: `python -m mm.media.video_child DECODER`.

It imports its decoder, sends "ready" and reads one request. Then it limits its own memory, CPU time, wall time, files
and sockets for good, and only then decodes the clip. It must not import torch: a spare child has to start fast and stay
small.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from typing import Any, BinaryIO

from mm.media.video_decoders import DECODERS, Decode, DecodeRequest, Frame, Plan, Refused
from mm.media.wire import OUT_OF_MEMORY_STATUS, WireClosed, read_exactly, read_header, write_message


def main() -> None:
    """Serve one request on stdin and stdout. End without clean-up, since the clip may have damaged the process."""
    pipe_in, pipe_out = sys.stdin.buffer, _private_stdout()
    try:
        decode = DECODERS[sys.argv[1]]()
        write_message(pipe_out, {"type": "ready"})
        header = read_header(pipe_in)  # fails when the parent is gone
        confine(header["limits"])
        data = read_exactly(pipe_in, header["num_bytes"])
        send_frames(decode, data, DecodeRequest(**header["request"]), pipe_out)
    except (WireClosed, BrokenPipeError):
        os._exit(1)
    except MemoryError:
        os._exit(OUT_OF_MEMORY_STATUS)
    os._exit(0)


def send_frames(decode: Decode, data: bytes, request: DecodeRequest, pipe_out: BinaryIO) -> None:
    """Send the plan, the frames and `done`, or the reason why not. No text of a library leaves this process."""
    try:
        for item in decode(data, request):
            write_message(pipe_out, *_encoded(item))
        write_message(pipe_out, {"type": "done"})
    except (BrokenPipeError, WireClosed):
        raise
    except Refused as refused:
        write_message(pipe_out, {"type": "refused", "reason": refused.reason, "limit": refused.limit})
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
    _lower(resource.RLIMIT_CORE, 0, 0)
    _lower(resource.RLIMIT_FSIZE, 0, 0)
    _lower(resource.RLIMIT_CPU, cpu_s, cpu_s + 1)
    _lower(resource.RLIMIT_AS, memory_bytes, memory_bytes)
    _lower(resource.RLIMIT_NOFILE, highest, highest)
    # The parent kills this process at the same time. This is for the case that the parent is gone.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, float(limits["wall_s"]))


def _lower(limit: int, soft: int, hard: int) -> None:
    """Set a limit, or keep the inherited one if that is lower."""
    inherited = resource.getrlimit(limit)[1]
    if inherited != resource.RLIM_INFINITY:
        soft, hard = min(soft, inherited), min(hard, inherited)
    resource.setrlimit(limit, (soft, hard))


def _encoded(item: Plan | Frame) -> tuple[dict[str, Any], bytes | memoryview]:
    if isinstance(item, Plan):
        return {"type": "plan", **item._asdict()}, b""
    height, width, _ = item.pixels.shape
    body = item.pixels.data.cast("B")
    return {"type": "frame", "time_s": item.time_s, "width": width, "height": height}, body


def _private_stdout() -> BinaryIO:
    """The pipe under another descriptor, so that a library that prints to stdout cannot break the protocol."""
    pipe_out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return pipe_out


if __name__ == "__main__":
    main()
