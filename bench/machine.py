"""What was measured on and with: processor, cores, Python, versions of the libraries that matter, date."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Final

from msgspec import Struct

from parbake.runtime.cpu import quota

LIBRARIES: Final = (
    "parbake", "onnxruntime", "numpy", "pyarrow", "uvloop", "httptools", "msgspec", "lmdb",
    "fastapi", "uvicorn", "pydantic",
)  # fmt: skip


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
