"""How much memory this process may use, and how much another one does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def limit(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes: the least of the machine's memory and the cgroup (v1 or v2) limits."""
    found = [os.sysconf("SC_PHYS_PAGES") * _PAGE]
    path = root
    for line in _text(membership).splitlines():
        if line.startswith("0::"):
            path = root / line[3:].lstrip("/")
    while True:
        found.append(_number(path / "memory.max"))
        if path in (root, path.parent):
            break
        path = path.parent
    found.append(_number(root / "memory" / "memory.limit_in_bytes"))
    return min(size for size in found if size)


def resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 where that cannot be told, or it has ended."""
    words = _text(Path(f"/proc/{pid}/statm")).split()
    return int(words[1]) * _PAGE if len(words) > 1 else 0


def peak(pid: int) -> int:
    """Bytes of memory that a process held at most; 0 where that cannot be told, or it has ended."""
    for line in _text(Path(f"/proc/{pid}/status")).splitlines():
        words = line.split()
        if words[:1] == ["VmHWM:"]:
            return int(words[1]) * 1024
    return 0


def _number(path: Path) -> int:
    text = _text(path).strip()
    return int(text) if text.isdigit() else 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
