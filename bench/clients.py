"""What puts load on a server: wrk where it is installed, else our own generator, and one of them throughout a run."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from msgspec import Struct

from bench.load import Load, put

_SCRIPT: Final = """
local bodies, requests, turn = {}, {}, 0
for line in io.lines("%s") do bodies[#bodies + 1] = line end
function init(arguments)
  local headers = {["content-type"] = "application/json"}
  for i, body in ipairs(bodies) do requests[i] = wrk.format("POST", nil, headers, body) end
end
function request()
  turn = turn %% #requests + 1
  return requests[turn]
end
function done(summary, latency, all)
  local errors = summary.errors
  io.write(string.format("measured requests=%%d us=%%d p50_us=%%d p99_us=%%d status=%%d lost=%%d\\n",
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), errors.status,
    errors.connect + errors.read + errors.write + errors.timeout))
end
"""
_RESULT: Final = re.compile(
    r"measured requests=(\d+) us=(\d+) p50_us=(\d+) p99_us=(\d+) status=(\d+) lost=(\d+)"
)


class Speed(Struct, frozen=True):
    """What one measurement saw in its window of ``seconds``."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    replies: int
    """All that the server has answered, those outside the window too."""

    @property
    def requests_per_s(self) -> float:
        """Replies per second."""
        return self.requests / self.seconds


class Client(Protocol):
    """A closed-loop load generator in a process of its own."""

    @property
    def name(self) -> str:
        """As the report has it."""

    def put(self, port: int, path: str, bodies: Sequence[bytes], connections: int, seconds: float) -> Speed:
        """Send the bodies in turn for ``seconds``. Raises RuntimeError if any reply is not a 200."""


class Wrk:
    """Will Glozer's wrk, with one thread: it is much quicker than what it measures here."""

    def __init__(self) -> None:
        words = subprocess.run(["wrk", "-v"], capture_output=True, text=True, check=False).stdout
        found = re.search(r"wrk (?:debian/)?(\d+\.\d+\.\d+)", words)
        self.name = f"wrk {found[1]}" if found else "wrk"

    def put(self, port: int, path: str, bodies: Sequence[bytes], connections: int, seconds: float) -> Speed:
        """As `Client.put`."""
        with tempfile.TemporaryDirectory() as folder:
            lines, script = Path(folder, "bodies"), Path(folder, "load.lua")
            lines.write_bytes(b"\n".join(bodies) + b"\n")
            script.write_text(_SCRIPT % lines)
            # wrk knows whole seconds only.
            length = f"-d{max(1, round(seconds))}s"
            url = f"http://127.0.0.1:{port}{path}"
            done = subprocess.run(
                ["wrk", "-t1", f"-c{connections}", length, "--timeout", "10s", "-s", str(script), url],
                capture_output=True,
                text=True,
                timeout=seconds + 60,
                check=False,
            )
        found = _RESULT.search(done.stdout)
        if not found:
            raise RuntimeError(f"wrk ended with {done.returncode}: {done.stderr or done.stdout}")
        requests, us, p50, p99, status, lost = map(int, found.groups())
        if status or lost or not requests:
            raise RuntimeError(f"{path}: {requests} replies, {status} of them not 200, {lost} requests lost")
        return Speed(requests, us / 1e6, p50 / 1e3, p99 / 1e3, requests)


class Own:
    """`bench.load`, where wrk is not installed. It takes about as much CPU as what it measures."""

    name = "bench/load.py"

    def put(self, port: int, path: str, bodies: Sequence[bytes], connections: int, seconds: float) -> Speed:
        """As `Client.put`."""
        order = tuple(range(len(bodies)))
        measured = put(Load(port, path, tuple(bodies), order, connections, seconds, warm_up_s=0.1))
        if measured.wrong or measured.failed or measured.unknown or not measured.requests:
            raise RuntimeError(
                f"{path}: {measured.failed + measured.unknown} failures; first: {measured.complaint}"
            )
        return Speed(measured.requests, measured.seconds, measured.p50_ms, measured.p99_ms, measured.right)


def client(wanted: str = "auto") -> Client:
    """``wrk``, ``own``, or (``auto``) wrk where it is installed."""
    if wanted == "wrk" or (wanted == "auto" and shutil.which("wrk")):
        return Wrk()
    return Own()
