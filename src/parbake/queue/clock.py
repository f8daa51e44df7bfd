"""The time that jobs go by: it passes as real time does, whatever is done to the clock on the wall."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Clock:
    """``ticks`` are seconds since some moment that is the same for all processes until ``boot`` is another one."""

    boot: str
    ticks: Callable[[], float]
    wall: Callable[[], float] = time.time


def machine_clock() -> Clock:
    """The clock of this machine since its start, suspended times included; where there is none, the wall's."""
    try:
        boot = _BOOT_ID.read_text(encoding="ascii").strip()
        since_start = time.CLOCK_BOOTTIME
    except (OSError, AttributeError):
        return Clock("", time.time)
    return Clock(boot, lambda: time.clock_gettime(since_start))
