"""Worker processes of a bake: started before anything that takes long to import, ended with the bake."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from types import TracebackType


@dataclass(frozen=True, slots=True)
class Helper:
    """One worker process, and our end of the socket pair to it."""

    index: int
    """From 1: the bake itself is 0."""
    process: subprocess.Popen[bytes]
    socket: socket.socket


class Crew:
    """At most ``size`` worker processes. Leaving the context ends those that still run."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.helpers: list[Helper] = []

    def start(self) -> None:
        """Start the processes, which get ready while they wait for their job. Does nothing the second time."""
        if not self.helpers:
            self.helpers = [_start(index) for index in range(1, self.size + 1)]

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for helper in self.helpers:
            # One that has done its work is about to end; what it wrote is complete.
            helper.process.kill()
            helper.socket.close()
        for helper in self.helpers:
            helper.process.wait()


def _start(index: int) -> Helper:
    ours, theirs = socket.socketpair()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "parbake.batch.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            # What a model prints is not the output of the bake: it goes where messages go.
            stdout=2,
            env=environment,
        )
    return Helper(index, process, ours)
