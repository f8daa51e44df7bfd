"""What was measured on and with: processor, cores, Python, versions of the libraries that matter, date.

And whether it was left alone: a virtual machine does not always get the CPU time that it wants.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Final, TypeVar

from msgspec import Struct

from parbake.runtime.cpu import quota

LIBRARIES: Final = (
    "parbake", "onnxruntime", "numpy", "pyarrow", "uvloop", "httptools", "msgspec", "lmdb",
    "fastapi", "uvicorn", "pydantic",
)  # fmt: skip

MOST_STOLEN: Final = 0.05
"""Share of the CPU time that may be taken from this machine during a look; beyond it, it is done again."""
LOOKS: Final = 5
"""At most so many looks are taken to have one that was not disturbed."""

Found = TypeVar("Found")


class Machine(Struct, frozen=True):
    """Where figures come from."""

    cpu: str
    cores: int
    """CPUs that this process may use."""
    memory_gib: float
    system: str
    python: str
    libraries: dict[str, str]
    date: str


def this_machine() -> Machine:
    """This one, now."""
    return Machine(
        cpu=_field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine(),
        cores=quota(),
        memory_gib=round(int((_field(Path("/proc/meminfo"), "MemTotal") or "0").split()[0]) / 2**20, 1),
        system=f"{platform.system()} {platform.machine()}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        libraries={name: version for name in LIBRARIES if (version := _version(name))},
        date=datetime.now(UTC).date().isoformat(),
    )


def busy_s() -> tuple[float, float]:
    """CPU time that the whole machine has spent on anything, and that was taken from it."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / ticks, steal / ticks


def undisturbed(look: Callable[[], Found]) -> tuple[Found, int]:
    """What ``look`` found while the machine got its CPU time, and how many looks before were disturbed.

    After `LOOKS` of them the last one counts all the same.
    """
    again = 0
    while True:
        started, (_, before) = time.monotonic(), busy_s()
        found = look()
        stolen = (busy_s()[1] - before) / (time.monotonic() - started) / (os.cpu_count() or 1)
        if stolen <= MOST_STOLEN or again == LOOKS - 1:
            return found, again
        again += 1


def _field(path: Path, name: str) -> str:
    """The value of the first ``name : value`` line of a file in /proc, or "" where there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
