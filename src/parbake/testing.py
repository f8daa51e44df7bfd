"""For tests of your own: a real server on free ports, and a prediction table in memory.

.. code-block:: python

    from urllib.request import urlopen

    from parbake.testing import serving

    with serving("eta.bundle", mode="dynamic") as server:
        assert urlopen(f"{server.url}/v2/health/ready").status == 200

docs/how-to/python.md has one that runs.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from parbake.errors import ServerNotFound
from parbake.tables.memory import MemoryTable

__all__ = ["MemoryTable", "Server", "serving"]

_HTTP = re.compile(r"serving .* on (?P<url>https?://\S+)")
_GRPC = re.compile(r"gRPC on (?P<address>\S+)")


@dataclass(slots=True)
class Server:
    """A running ``parbake serve``, made by `serving`.

    ``url`` is that of HTTP without a slash at the end, ``grpc`` is host:port, or "" where gRPC is off, ``process``
    is the supervisor, and ``seconds`` the time from the start until every model answered.
    """

    process: subprocess.Popen[str]
    url: str
    grpc: str
    seconds: float
    _log: IO[str] = field(repr=False)

    @property
    def port(self) -> int:
        """The HTTP port."""
        return int(self.url.rpartition(":")[2])

    def log(self) -> str:
        """What the server has written to stderr so far."""
        self._log.flush()
        self._log.seek(0)
        return self._log.read()

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 30.0) -> int:
        """Send a signal and wait for the end; gives the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout_s)


@contextmanager
def serving(
    *bundles: str | Path,
    arguments: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    timeout_s: float = 60.0,
    grpc: bool = False,
    **options: object,
) -> Iterator[Server]:
    """Run ``parbake serve`` in a process of its own until the block ends; every model answers when it begins.

    The ports are free ones; ``grpc=True`` opens one for gRPC too. ``options`` are the command's: ``mode="hybrid"``
    is ``--mode hybrid``, ``allow_pickle=True`` is ``--allow-pickle``; ``arguments`` are words put behind them.
    ``environment`` adds variables. A server that is not ready after ``timeout_s`` seconds is killed. Raises
    `ServerNotFound` with what the server wrote if it does not start.
    """
    command = [sys.executable, "-m", "parbake", "serve", *map(str, bundles), "--port", "0"]
    if grpc:
        command += ["--grpc-port", "0"]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        command += [flag] if value is True else [flag, str(value)]
    command += arguments
    with tempfile.TemporaryFile("w+") as log:
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        watchdog = threading.Timer(timeout_s, process.kill)
        watchdog.start()
        try:
            url = address = ""
            while not url or (grpc and not address):
                line = process.stdout.readline() if process.stdout is not None else ""
                if not line:
                    process.wait()
                    log.flush()
                    log.seek(0)
                    raise ServerNotFound(f"the server did not start: {log.read()[-4000:]}")
                if found := _HTTP.search(line):
                    url = found["url"]
                if found := _GRPC.search(line):
                    address = found["address"]
            watchdog.cancel()
            yield Server(process, url, address, time.monotonic() - started, log)
        finally:
            watchdog.cancel()
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            if process.stdout is not None:
                process.stdout.close()
