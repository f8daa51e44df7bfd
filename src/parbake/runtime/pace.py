"""How quick the machine is from moment to moment, so that what is measured at different times can be compared.

A virtual machine may be half as quick for seconds because of others on the same hardware, and nothing in it tells. So
while something else is measured a small process on each CPU does the same little work a hundred times a second, and
notes the CPU time that it took. It takes between one and two per cent of a CPU.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np
import numpy.typing as npt

_EVERY_S: Final = 0.01
_MOST_CPUS: Final = 4
"""More CPUs are not looked at: these stand for all."""
_START_S: Final = 20.0
_FEWEST_LOOKS: Final = 5
_ENOUGH_LOOKS: Final = 2 * _FEWEST_LOOKS
"""From which on there is a pace."""
_LOOK: Final = struct.Struct("=dd")
"""When it was (seconds, as `time.monotonic` has it), and the CPU seconds that the work took."""


class Pace:
    """Looks at the machine from ``with`` on until the block ends; a pace is pieces of work per CPU second."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Pace:
        self._folder = tempfile.TemporaryDirectory(prefix="parbake-pace-")
        try:
            cpus: Sequence[int] = range(os.cpu_count() or 1)
            if hasattr(os, "sched_getaffinity"):
                cpus = sorted(os.sched_getaffinity(0))
            for cpu in cpus[:_MOST_CPUS]:
                command = [sys.executable, "-m", __name__, str(cpu), str(self._path(cpu))]
                self._processes.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
                )
            self._paths = [self._path(cpu) for cpu in cpus[:_MOST_CPUS]]
            self._wait()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def between(self, start: float, end: float | None = None) -> float:
        """The mean pace between two moments of `time.monotonic`, of all CPUs; until now without an ``end``."""
        return float(self.of([(start, time.monotonic() if end is None else end)])[0])

    def of(self, spans: Sequence[tuple[float, float]]) -> npt.NDArray[np.float64]:
        """The mean pace of each of some spans of time; of short ones that of about 50 ms around them."""
        found: npt.NDArray[np.float64] = np.mean([_paces(looks, spans) for looks in self._looks()], axis=0)
        return found

    def parts(self, start: float, end: float, seconds: float) -> npt.NDArray[np.float64]:
        """The pace of one part after another, each of so many seconds."""
        count = max(round((end - start) / seconds), 1)
        return self.of([(start + i * seconds, start + (i + 1) * seconds) for i in range(count)])

    def _path(self, cpu: int) -> Path:
        return Path(self._folder.name) / str(cpu)

    def _looks(self) -> list[npt.NDArray[np.float64]]:
        found = []
        for path in self._paths:
            content = path.read_bytes() if path.exists() else b""
            whole = content[: len(content) // _LOOK.size * _LOOK.size]
            found.append(np.frombuffer(whole, np.float64).reshape(-1, 2))
        return found

    def _wait(self) -> None:
        limit = time.monotonic() + _START_S
        while min(map(len, self._looks())) < _ENOUGH_LOOKS:
            if time.monotonic() > limit or any(one.poll() is not None for one in self._processes):
                raise OSError("the processes that look at the machine's pace did not start")
            time.sleep(_EVERY_S)

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes.clear()
        self._folder.cleanup()


def _paces(looks: npt.NDArray[np.float64], spans: Sequence[tuple[float, float]]) -> npt.NDArray[np.float64]:
    """The mean pace of one CPU in some spans of time, or of the looks next to them where there are few."""
    took = looks[:, 1]
    # What is taken from a virtual machine is taken off CPU times by guess, and at times too much of it.
    looks = looks[took > np.median(took) / 2]
    sums = np.concatenate([[0.0], np.cumsum(1 / looks[:, 1])])
    starts, ends = np.array(spans).T
    first, last = np.searchsorted(looks[:, 0], starts), np.searchsorted(looks[:, 0], ends)
    lacking = np.maximum(_FEWEST_LOOKS - (last - first) + 1, 0) // 2
    last = np.clip(last + lacking, _FEWEST_LOOKS, len(looks))
    first = np.clip(first - lacking, 0, last - _FEWEST_LOOKS)
    paces: npt.NDArray[np.float64] = (sums[last] - sums[first]) / (last - first)
    return paces


class _Work:
    """What a request takes of a CPU, in small: Python, JSON, and bytes through a socket."""

    _TEXT: Final = json.dumps(
        {"inputs": [{"name": "x", "shape": [1, 10], "data": [i / 7 for i in range(10)]}]}
    )

    def __init__(self) -> None:
        self._here, self._there = socket.socketpair()

    def do(self) -> None:
        total = 0
        for i in range(500):
            total += i
        for _ in range(8):
            self._here.send(b"x" * 300)
            self._there.recv(1000)
        for _ in range(3):
            json.loads(self._TEXT)


def main(cpu: int, path: Path) -> None:
    """Look on until whoever wants to know is gone."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cpu})
    work = _Work()
    parent = os.getppid()
    with path.open("wb", buffering=0) as file:
        while os.getppid() == parent:
            time.sleep(_EVERY_S)
            # The first time is for the caches.
            work.do()
            started = time.thread_time()
            work.do()
            file.write(_LOOK.pack(time.monotonic(), time.thread_time() - started))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
