"""A video child with decoders that misbehave, run by the tests in place of the real one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np

from mm.media import video_child
from mm.media.video_messages import DecodeRequest, Done, Frame, Message, Plan

DECODERS: dict[str, Callable[[BinaryIO, DecodeRequest], Iterator[Message]]] = {}


def decoder(act: Callable[[BinaryIO], object]) -> None:
    """Register a decoder that acts, then answers with one grey frame."""

    def decode(clip: BinaryIO, request: DecodeRequest) -> Iterator[Message]:
        act(clip)
        yield Plan(16, 16, 1, 1.0)
        yield Frame(0.0, np.full((16, 16, 3), 127, np.uint8))
        yield Done(0)

    DECODERS[act.__name__] = decode


@decoder
def well(clip: BinaryIO) -> None:
    """Does nothing odd."""


@decoder
def sleep(clip: BinaryIO) -> None:
    time.sleep(60)


@decoder
def spin(clip: BinaryIO) -> None:
    while True:
        pass


@decoder
def hoard(clip: BinaryIO) -> None:
    held = [bytearray(64 << 20) for _ in range(64)]
    held.clear()


@decoder
def crash(clip: BinaryIO) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


@decoder
def open_file(clip: BinaryIO) -> None:
    open("/etc/hostname").close()


@decoder
def open_socket(clip: BinaryIO) -> None:
    socket.socket().close()


@decoder
def fork_and_wait(clip: BinaryIO) -> None:
    if os.fork() == 0:
        time.sleep(60)
    time.sleep(60)


@decoder
def chatter(clip: BinaryIO) -> None:
    os.write(1, b"a library that prints\n" * 100)


def lying(clip: BinaryIO, request: DecodeRequest) -> Iterator[Message]:
    """Plans a small frame and sends a large one."""
    yield Plan(16, 16, 1, 1.0)
    yield Frame(0.0, np.zeros((4096, 4096, 3), np.uint8))


def greedy(clip: BinaryIO, request: DecodeRequest) -> Iterator[Message]:
    """Plans more frames than were asked for."""
    yield Plan(16, 16, 10**9, 1.0)


def large(clip: BinaryIO, request: DecodeRequest) -> Iterator[Message]:
    """120 MB, more than any pipe holds."""
    yield Plan(1000, 1000, 40, 40.0)
    for index in range(40):
        yield Frame(float(index), np.full((1000, 1000, 3), index, np.uint8))
    yield Done(0)


def backwards(clip: BinaryIO, request: DecodeRequest) -> Iterator[Message]:
    """Sends a frame that is shown before the one before it."""
    yield Plan(16, 16, 2, 2.0)
    for time_s in (1.0, 0.5):
        yield Frame(time_s, np.zeros((16, 16, 3), np.uint8))
    yield Done(0)


def endless(clip: BinaryIO, request: DecodeRequest) -> Iterator[Message]:
    """Sends one frame and then nothing more."""
    yield Plan(16, 16, 2, 2.0)
    yield Frame(0.0, np.zeros((16, 16, 3), np.uint8))
    time.sleep(60)


def slow(clip: BinaryIO, request: DecodeRequest) -> Iterator[Message]:
    """Sends 15 frames, with a tenth of a second before each."""
    yield Plan(16, 16, 15, 15.0)
    for index in range(15):
        time.sleep(0.1)
        yield Frame(float(index), np.zeros((16, 16, 3), np.uint8))
    yield Done(0)


def busy(clip: BinaryIO, request: DecodeRequest) -> Iterator[Message]:
    """Takes two CPU seconds."""
    yield Plan(16, 16, 15, 15.0)
    end = time.process_time() + 2
    while time.process_time() < end:
        pass
    for index in range(15):
        yield Frame(float(index), np.zeros((16, 16, 3), np.uint8))
    yield Done(0)


DECODERS.update({act.__name__: act for act in (lying, greedy, large, backwards, endless, slow, busy)})


def prepare() -> None:
    if sys.argv[1] == "absent":
        raise ImportError


if __name__ == "__main__":
    if sys.argv[1] == "orphan":  # a parent that dies while its spare waits
        spare = subprocess.Popen([sys.executable, __file__, "well"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        os.write(1, str(spare.pid).encode())
        os._exit(0)
    video_child.main(prepare, DECODERS.get(sys.argv[1], DECODERS["well"]))
