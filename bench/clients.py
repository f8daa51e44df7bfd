"""What puts load on a server: wrk where it is installed, else our own generator, and one of them throughout a run."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from msgspec import Struct

from bench.load import JSON, Load, Measured, put

Headers: TypeAlias = Mapping[str, str]

_SCRIPT: Final = """
local requests, turn = {}, 0
function init(arguments)
  local headers = {%s}
  local bodies = io.open("%s", "rb")
  for size in io.lines("%s") do
    requests[#requests + 1] = wrk.format("POST", nil, headers, bodies:read(tonumber(size)))
  end
  bodies:close()
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
    """Replies of any kind."""
    seconds: float
    p50_ms: float
    p99_ms: float
    replies: int
    """All that the server has answered, those outside the window too."""
    failed: int = 0
    """Replies that are not a 200, and requests without a reply."""

    @property
    def requests_per_s(self) -> float:
        """Replies per second."""
        return self.requests / self.seconds


class Client(Protocol):
    """A closed-loop load generator in a process of its own."""

    @property
    def name(self) -> str:
        """As the report has it."""

    def measure(
        self,
        port: int,
        path: str,
        bodies: Sequence[bytes],
        connections: int,
        seconds: float,
        headers: Headers = JSON,
    ) -> Speed:
        """Send the bodies in turn for ``seconds``. Raises RuntimeError where nothing came back."""

    def put(self, port: int, path: str, bodies: Sequence[bytes], connections: int, seconds: float) -> Speed:
        """The same with JSON. Raises RuntimeError if any reply is not a 200."""


class Wrk:
    """Will Glozer's wrk, with one thread: it is much quicker than what it measures here."""

    def __init__(self) -> None:
        words = subprocess.run(["wrk", "-v"], capture_output=True, text=True, check=False).stdout
        found = re.search(r"wrk (?:debian/)?(\d+\.\d+\.\d+)", words)
        self.name = f"wrk {found[1]}" if found else "wrk"

    def measure(
        self,
        port: int,
        path: str,
        bodies: Sequence[bytes],
        connections: int,
        seconds: float,
        headers: Headers = JSON,
    ) -> Speed:
        """As `Client.measure`."""
        with tempfile.TemporaryDirectory() as folder:
            content, sizes, script = Path(folder, "bodies"), Path(folder, "sizes"), Path(folder, "load.lua")
            content.write_bytes(b"".join(bodies))
            sizes.write_text("".join(f"{len(body)}\n" for body in bodies))
            shown = ", ".join(f'["{name}"] = "{value}"' for name, value in headers.items())
            script.write_text(_SCRIPT % (shown, content, sizes))
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
        if not requests:
            raise RuntimeError(f"{path}: no replies, {lost} requests lost")
        return Speed(requests, us / 1e6, p50 / 1e3, p99 / 1e3, requests, status + lost)

    def put(self, port: int, path: str, bodies: Sequence[bytes], connections: int, seconds: float) -> Speed:
        """As `Client.put`."""
        speed = self.measure(port, path, bodies, connections, seconds)
        if speed.failed:
            raise RuntimeError(f"{path}: {speed.requests} replies, {speed.failed} failed")
        return speed


class Own:
    """`bench.load`, where wrk is not installed. It takes about as much CPU as what it measures."""

    name = "bench/load.py"

    def __init__(self, warm_up_s: float = 0.1) -> None:
        self._warm_up_s = warm_up_s

    def measure(
        self,
        port: int,
        path: str,
        bodies: Sequence[bytes],
        connections: int,
        seconds: float,
        headers: Headers = JSON,
    ) -> Speed:
        """As `Client.measure`."""
        found = self._measured(port, path, bodies, connections, seconds, headers)
        return Speed(
            found.requests,
            found.seconds,
            found.p50_ms,
            found.p99_ms,
            found.right,
            found.wrong + found.failed + found.unknown,
        )

    def put(self, port: int, path: str, bodies: Sequence[bytes], connections: int, seconds: float) -> Speed:
        """As `Client.put`."""
        found = self._measured(port, path, bodies, connections, seconds, JSON)
        if found.wrong or found.failed or found.unknown:
            raise RuntimeError(f"{path}: {found.failed + found.unknown} failures; first: {found.complaint}")
        return Speed(found.requests, found.seconds, found.p50_ms, found.p99_ms, found.right)

    def _measured(
        self,
        port: int,
        path: str,
        bodies: Sequence[bytes],
        connections: int,
        seconds: float,
        headers: Headers,
    ) -> Measured:
        order = tuple(range(len(bodies)))
        load = Load(
            port,
            path,
            tuple(bodies),
            order,
            connections,
            seconds,
            warm_up_s=self._warm_up_s,
            headers=dict(headers),
        )
        found = put(load)
        if not found.requests:
            raise RuntimeError(f"{path}: no replies; {found.complaint}")
        return found


def client(wanted: str = "auto") -> Client:
    """``wrk``, ``own``, or (``auto``) wrk where it is installed."""
    if wanted == "wrk" or (wanted == "auto" and shutil.which("wrk")):
        return Wrk()
    return Own()
