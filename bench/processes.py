"""Servers under measurement: start them, wait for them, count their CPU time, end them."""

from __future__ import annotations

import os
import random
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_ROOT: Final = Path(__file__).parents[1]
_START_S: Final = 60.0


def free_port() -> int:
    """A TCP port on loopback that nobody listens on, below those that the system gives to whoever asks for any."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@contextmanager
def peer(script: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run ``script ARGUMENTS PORT`` until the block ends; gives process and port once it accepts connections."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments, str(port)],
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _wait(process, port)
        yield process, port
    finally:
        process.terminate()
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _wait(process: subprocess.Popen[str], port: int) -> None:
    limit = time.monotonic() + _START_S
    while time.monotonic() < limit:
        if process.poll() is not None:
            words = process.stderr.read() if process.stderr else ""
            raise RuntimeError(f"{_command(process)} ended with {process.returncode}: {words[-2000:]}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(f"{_command(process)} does not accept connections after {_START_S:g} s")


def _command(process: subprocess.Popen[str]) -> str:
    return shlex.join(map(str, process.args)) if isinstance(process.args, list) else str(process.args)


def with_descendants(pid: int) -> tuple[int, ...]:
    """A process and all that it has started, directly or not."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := _stat(int(folder.name))):
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, ())
    return tuple(found)


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of processes together, as the kernel counts it (in steps of 10 ms mostly)."""
    total = 0
    for pid in pids:
        if fields := _stat(pid):
            total += int(fields[11]) + int(fields[12])
    return total / _TICKS_PER_S


def proportional_bytes(pids: Sequence[int]) -> int:
    """Memory of processes together; a page that n processes share counts as an nth for each (PSS)."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on, or nothing where the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    # The name before may hold spaces and brackets.
    return text.rpartition(")")[2].split()
