"""Looks at a server that are taken again where the machine was disturbed: CPU time was taken from it meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

MOST_STOLEN: Final = 0.05
"""Share of the CPU time that may be taken from this machine during a look; beyond it, it is done again."""
LOOKS: Final = 5
"""At most so many looks are taken to have one that was not disturbed; the last one counts all the same."""

_Found = TypeVar("_Found")


def busy_s() -> tuple[float, float]:
    """CPU time that the whole machine has spent on anything, and that was taken from it."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / ticks, steal / ticks


class Stolen:
    """How much of the machine's CPU time is taken from it from now on."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._before = busy_s()[1]

    def share(self) -> float:
        """Of all CPU time until now."""
        passed = time.monotonic() - self._since
        return (busy_s()[1] - self._before) / passed / (os.cpu_count() or 1)


class Quiet:
    """Takes looks, and counts in ``again`` those that were taken again."""

    def __init__(self) -> None:
        self.again = 0

    def look(self, look: Callable[[], tuple[_Found, float]]) -> _Found:
        """What ``look`` finds; it also says what share of the CPU time was stolen meanwhile."""
        for _ in range(LOOKS - 1):
            found, stolen = look()
            if stolen <= MOST_STOLEN:
                return found
            self.again += 1
        return look()[0]
