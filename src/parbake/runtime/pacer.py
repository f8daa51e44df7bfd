"""The process that looks at the pace of a CPU for `parbake.runtime.pace`.

``python -m parbake.runtime.pacer CPU PATH PARENT``. It imports next to nothing: there is one for each CPU, and each
takes memory.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

EVERY_S: Final = 0.02
"""Each look interrupts a thread of a model, and all its others wait for that one (``python -m bench.pace``)."""

LOOK: Final = struct.Struct("=dd")
"""When it was (seconds, as `time.monotonic` has it), and the CPU seconds that the work took."""


class _Work:
    """What a request takes of a CPU, in small: Python, JSON, and bytes through a socket."""

    _TEXT: Final = json.dumps(
        {"inputs": [{"name": "x", "shape": [1, 10], "data": [i / 7 for i in range(10)]}]}
    )

    def __init__(self) -> None:
        self._here, self._there = socket.socketpair()

    def do(self) -> None:
        """Once."""
        total = 0
        for i in range(500):
            total += i
        for _ in range(8):
            self._here.send(b"x" * 300)
            self._there.recv(1000)
        for _ in range(3):
            json.loads(self._TEXT)


def main(cpu: int, path: Path, parent: int) -> None:
    """Look on until the process that wants to know is gone."""
    # Ctrl-C is for the process that wants to know.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Where that is not allowed it looks at whichever CPU it is given.
    with suppress(AttributeError, OSError):
        os.sched_setaffinity(0, {cpu})
    work = _Work()
    with path.open("wb", buffering=0) as file:
        while os.getppid() == parent:
            time.sleep(EVERY_S)
            # The first time is for the caches.
            work.do()
            started = time.thread_time()
            work.do()
            file.write(LOOK.pack(time.monotonic(), time.thread_time() - started))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
