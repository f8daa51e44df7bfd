"""How many CPUs this process may really use: the container's quota, not the host's core count."""

from __future__ import annotations

import math
import os
from pathlib import Path


def quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Whole CPUs available, at least 1: the least of affinity and the cgroup (v1 or v2) limit."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [limit for limit in (_v2(root, membership), _v1(root)) if limit is not None]
    return max(1, min([count, *(math.floor(limit) for limit in limits)]))


def _v2(root: Path, membership: Path) -> float | None:
    """The tightest ``cpu.max`` from this process's cgroup up to the root."""
    path = root
    for line in _text(membership).splitlines():
        if line.startswith("0::"):
            path = root / line[3:].lstrip("/")
    found: list[float] = []
    while True:
        words = _text(path / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            found.append(float(words[0]) / float(words[1]))
        if path in (root, path.parent):
            return min(found) if found else None
        path = path.parent


def _v1(root: Path) -> float | None:
    quota_us = _text(root / "cpu" / "cpu.cfs_quota_us").strip()
    period_us = _text(root / "cpu" / "cpu.cfs_period_us").strip()
    if quota_us and period_us and int(quota_us) > 0:
        return int(quota_us) / int(period_us)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
