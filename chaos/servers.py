"""A running server seen from outside: its processes, their memory, and waiting for what should happen to it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from bench.processes import with_descendants
from parbake.app.supervisor import Status, VersionStatus
from parbake.errors import ParbakeError
from parbake.testing import Server
from parbake.transports import client

PATIENCE_S: Final = 60.0
"""Longest that a scenario waits for something that should take a moment."""


def status(server: Server) -> Status:
    """What it serves, by which processes."""
    return client.status(port=server.port)


def version(server: Server, name: str) -> VersionStatus:
    """What it serves under a name."""
    return next(version for version in status(server).versions if version.name == name)


def wait_for(condition: Callable[[], object], patience_s: float = PATIENCE_S) -> float:
    """Wait until something is so; gives the seconds that took, or infinity where it never came."""
    began = time.monotonic()
    while time.monotonic() - began < patience_s:
        try:
            if condition():
                return time.monotonic() - began
        except ParbakeError:
            # The admin API may be away while processes are.
            pass
        time.sleep(0.01)
    return float("inf")


def is_there(pid: int) -> bool:
    """Whether a process runs (one that has ended and was not asked for its status does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def memory_mb(pids: Iterable[int]) -> float:
    """Memory of processes together in MB (powers of ten): what is theirs alone, without files that they map."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
    return total * 1024 / 1e6


def server_memory_mb(server: Server) -> float:
    """Memory of all processes of a server."""
    return memory_mb(with_descendants(server.process.pid))


def sockets(pid: int) -> int:
    """How many sockets a process has open."""
    folder = Path(f"/proc/{pid}/fd")
    count = 0
    for item in folder.iterdir():
        try:
            count += os.readlink(item).startswith("socket:")
        except OSError:
            continue
    return count
