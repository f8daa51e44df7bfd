"""How quick the machine is from moment to moment, so that what is measured at different times can be compared.

A virtual machine may be half as quick for seconds because of others on the same hardware, and nothing in it tells. So
while something else is measured a small process on each CPU does the same little work fifty times a second, and
notes the CPU time that it took. What that costs is in docs/decisions/0013.
"""

from __future__ import annotations

import os
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

from parbake.runtime import cpu
from parbake.runtime.pacer import EVERY_S, LOOK

_MOST_CPUS: Final = 4
"""More CPUs are not looked at: these stand for all."""
_START_S: Final = 20.0
_FEWEST_LOOKS: Final = 5
_ENOUGH_LOOKS: Final = 2 * _FEWEST_LOOKS
"""From which on there is a pace."""
_AROUND: Final = 5
"""Looks before and after one that it is compared with."""
_FAR_OFF: Final = 1 / 3
_BEFORE_S: Final = 1.0
"""Looks so long before what is asked for are read too: they tell which ones are sound."""

Looks = npt.NDArray[np.float64]
"""Of one CPU: when, and the CPU seconds that the work took."""


class Pace:
    """Looks at the machine from ``with`` on until the block ends; a pace is pieces of work per CPU second."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._paths: list[Path] = []
        self.seen = False
        """Whether the pace can be seen at all; if not it is always 1."""

    def __enter__(self) -> Pace:
        self._folder = tempfile.TemporaryDirectory(prefix="parbake-pace-")
        try:
            cpus: Sequence[int] = range(os.cpu_count() or 1)
            if hasattr(os, "sched_getaffinity"):
                cpus = sorted(os.sched_getaffinity(0))
            for number in cpus[: min(_MOST_CPUS, cpu.quota())]:
                path = Path(self._folder.name) / str(number)
                # -P: nothing is imported from the folder that the user happens to be in.
                command = [sys.executable, "-P", "-m", "parbake.runtime.pacer"]
                command += [str(number), str(path), str(os.getpid())]
                self._processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                    )
                )
                self._paths.append(path)
            self.seen = self._starts()
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
        """The mean pace of each of some spans of time; of short ones that of about 100 ms around them."""
        if not self.seen:
            return np.ones(len(spans))
        since = min(start for start, _ in spans) - _BEFORE_S
        found: npt.NDArray[np.float64] = np.mean(
            [_paces(looks, spans) for looks in self._looks(since)], axis=0
        )
        return found

    def parts(self, start: float, end: float, seconds: float) -> npt.NDArray[np.float64]:
        """The pace of one part after another, each of so many seconds."""
        count = max(round((end - start) / seconds), 1)
        return self.of([(start + i * seconds, start + (i + 1) * seconds) for i in range(count)])

    @property
    def whole(self) -> bool:
        """Whether it was seen from beginning to end, or never."""
        return not self.seen or all(process.poll() is None for process in self._processes)

    def _looks(self, since: float = 0.0) -> list[Looks]:
        """Of each CPU the looks from then on, or at least the last few."""
        found = []
        for path in self._paths:
            content = path.read_bytes() if path.exists() else b""
            looks = np.frombuffer(content[: len(content) // LOOK.size * LOOK.size], np.float64).reshape(-1, 2)
            first = min(int(np.searchsorted(looks[:, 0], since)), max(len(looks) - 2 * _ENOUGH_LOOKS, 0))
            sound = _sound(looks[first:])
            # Of a clock with coarse steps most looks are worth nothing.
            found.append(sound if len(sound) >= _ENOUGH_LOOKS else _sound(looks))
        return found

    def _starts(self) -> bool:
        limit = time.monotonic() + _START_S
        while time.monotonic() < limit and all(one.poll() is None for one in self._processes):
            if min(map(len, self._looks())) >= _ENOUGH_LOOKS:
                return True
            time.sleep(EVERY_S)
        return False

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes.clear()
        self._folder.cleanup()


def _sound(looks: Looks) -> Looks:
    """The looks without those that took next to no time, compared with those around them.

    What is taken from a virtual machine is taken off CPU times by guess, and at times too much of it.
    """
    looks = looks[looks[:, 1] > 0]
    if len(looks) < _ENOUGH_LOOKS:
        return looks
    took = np.pad(looks[:, 1], _AROUND, mode="edge")
    usual = np.median(np.lib.stride_tricks.sliding_window_view(took, 2 * _AROUND + 1), axis=1)
    return looks[looks[:, 1] > _FAR_OFF * usual]


def _paces(looks: Looks, spans: Sequence[tuple[float, float]]) -> npt.NDArray[np.float64]:
    """The mean pace of one CPU in some spans of time, or of the looks next to them where there are few."""
    sums = np.concatenate([[0.0], np.cumsum(1 / looks[:, 1])])
    starts, ends = np.array(spans).T
    first, last = np.searchsorted(looks[:, 0], starts), np.searchsorted(looks[:, 0], ends)
    lacking = np.maximum(_FEWEST_LOOKS - (last - first) + 1, 0) // 2
    last = np.clip(last + lacking, _FEWEST_LOOKS, len(looks))
    first = np.clip(first - lacking, 0, last - _FEWEST_LOOKS)
    paces: npt.NDArray[np.float64] = (sums[last] - sums[first]) / (last - first)
    return paces
