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

_BEGIN: Final = """
local requests = {}
local function read()
  local headers = {%s}
  local bodies = io.open("%s", "rb")
  for size in io.lines("%s") do
    requests[#requests + 1] = wrk.format("POST", nil, headers, bodies:read(tonumber(size)))
  end
  bodies:close()
end
"""
"""The beginning of both scripts for wrk."""
_LOAD: Final = """
local turn = 0
function init(arguments)
  read()
end
function request()
  turn = turn % #requests + 1
  return requests[turn]
end
function done(summary, latency, all)
  local errors = summary.errors
  io.write(string.format("measured requests=%d us=%d p50_us=%d p99_us=%d status=%d lost=%d\\n",
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), errors.status,
    errors.connect + errors.read + errors.write + errors.timeout))
end
"""
_REPLAY: Final = """
local ffi = require("ffi")
ffi.cdef[[
  typedef struct { long seconds; long nanoseconds; } moment;
  int clock_gettime(int clock, moment *now);
  int getpid();
  int kill(int process, int signal);
]]
local order, turn, asked, began, mark, ours = {}, 0, false, 0, 0, nil
local moment = ffi.new("moment")
whole_us, marked_us = 0, 0
local function us()
  ffi.C.clock_gettime(1, moment)
  return tonumber(moment.seconds) * 1e6 + tonumber(moment.nanoseconds) / 1e3
end
function setup(thread)
  ours = thread
end
function init(arguments)
  read()
  for number in io.lines(arguments[1]) do
    order[#order + 1] = requests[tonumber(number) + 1]
  end
  mark = tonumber(arguments[2])
end
function request()
  if not asked then
    -- wrk looks at one before it begins.
    asked = true
    return order[1]
  end
  turn = turn + 1
  if turn == 1 then
    began = us()
  elseif turn == mark + 1 then
    marked_us = us() - began
  elseif turn == #order + 1 then
    whole_us = us() - began
    -- Its main thread sleeps for as long as it was told to, unless it is interrupted.
    wrk.thread:stop()
    ffi.C.kill(ffi.C.getpid(), 2)
  end
  return order[(turn - 1) % #order + 1]
end
function done(summary, latency, all)
  local errors = summary.errors
  io.write(string.format("replayed requests=%d us=%d whole_us=%d marked_us=%d failed=%d\\n",
    summary.requests, summary.duration, ours:get("whole_us"), ours:get("marked_us"),
    errors.status + errors.connect + errors.read + errors.write + errors.timeout))
end
"""
_REPLAYED: Final = re.compile(r"replayed requests=(\d+) us=(\d+) whole_us=(\d+) marked_us=(\d+) failed=(\d+)")
_RESULT: Final = re.compile(
    r"measured requests=(\d+) us=(\d+) p50_us=(\d+) p99_us=(\d+) status=(\d+) lost=(\d+)"
)


class Counted(Struct, frozen=True):
    """Replies of any kind, and the ``seconds`` in which they came."""

    requests: int
    seconds: float

    @property
    def requests_per_s(self) -> float:
        """Replies per second."""
        return self.requests / self.seconds


class Speed(Counted, frozen=True):
    """What one measurement saw in its window."""

    p50_ms: float
    p99_ms: float
    replies: int
    """All that the server has answered, those outside the window too."""
    failed: int = 0
    """Replies that are not a 200, and requests without a reply."""


class Replay(Counted, frozen=True):
    """What came of requests in a given order, each once, or as many as there was time for."""

    whole: bool
    """Whether all have been sent."""
    marked_s: float = 0.0
    """Until the request was sent that was to be marked; 0 where it was not."""


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

    def replay(
        self,
        port: int,
        path: str,
        bodies: Sequence[bytes],
        order: Sequence[int],
        connections: int,
        seconds: float,
        mark: int = 0,
    ) -> Replay:
        """Send the bodies of these numbers as JSON, each once, for ``seconds`` at most.

        The time is noted at which request number ``mark`` is sent, where it is not 0. Raises RuntimeError if any reply
        is not a 200, or none came back.
        """


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
        url = f"http://127.0.0.1:{port}{path}"
        with tempfile.TemporaryDirectory() as name:
            script = _written(Path(name), bodies, headers, _LOAD)
            requests, us, p50, p99, status, lost = _run(script, url, connections, seconds, _RESULT)
        if not requests:
            raise RuntimeError(f"{path}: no replies, {lost} requests lost")
        return Speed(requests, us / 1e6, p50 / 1e3, p99 / 1e3, requests, status + lost)

    def put(self, port: int, path: str, bodies: Sequence[bytes], connections: int, seconds: float) -> Speed:
        """As `Client.put`."""
        speed = self.measure(port, path, bodies, connections, seconds)
        if speed.failed:
            raise RuntimeError(f"{path}: {speed.requests} replies, {speed.failed} failed")
        return speed

    def replay(
        self,
        port: int,
        path: str,
        bodies: Sequence[bytes],
        order: Sequence[int],
        connections: int,
        seconds: float,
        mark: int = 0,
    ) -> Replay:
        """As `Client.replay`."""
        url = f"http://127.0.0.1:{port}{path}"
        with tempfile.TemporaryDirectory() as name:
            script, numbers = _written(Path(name), bodies, JSON, _REPLAY), Path(name, "order")
            numbers.write_text("".join(f"{number}\n" for number in order))
            requests, us, whole_us, marked_us, failed = _run(
                script, url, connections, seconds, _REPLAYED, (str(numbers), str(mark))
            )
        if failed or not requests:
            raise RuntimeError(f"{path}: {requests} replies, {failed} failed")
        return Replay(requests, (whole_us or us) / 1e6, whole_us > 0, marked_us / 1e6)


def _written(folder: Path, bodies: Sequence[bytes], headers: Headers, rest: str) -> Path:
    """A script for wrk that knows these bodies; all its files are in ``folder``."""
    content, sizes, script = folder / "bodies", folder / "sizes", folder / "load.lua"
    content.write_bytes(b"".join(bodies))
    sizes.write_text("".join(f"{len(body)}\n" for body in bodies))
    shown = ", ".join(f'["{name}"] = "{value}"' for name, value in headers.items())
    script.write_text(_BEGIN % (shown, content, sizes) + rest)
    return script


def _run(
    script: Path,
    url: str,
    connections: int,
    seconds: float,
    result: re.Pattern[str],
    arguments: Sequence[str] = (),
) -> tuple[int, ...]:
    """The figures that the script writes in the end. Raises RuntimeError where it does not."""
    # wrk knows whole seconds only.
    words = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "10s"]
    done = subprocess.run(
        [*words, "-s", str(script), url, "--", *arguments],
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
    )
    found = result.search(done.stdout)
    if not found:
        raise RuntimeError(f"wrk ended with {done.returncode}: {done.stderr or done.stdout}")
    return tuple(map(int, found.groups()))


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

    def replay(
        self,
        port: int,
        path: str,
        bodies: Sequence[bytes],
        order: Sequence[int],
        connections: int,
        seconds: float,
        mark: int = 0,
    ) -> Replay:
        """As `Client.replay`."""
        found = put(
            Load(
                port,
                path,
                tuple(bodies),
                tuple(order),
                connections,
                seconds,
                once=True,
                mark=mark,
                warm_up_s=0.0,
            )
        )
        if found.wrong or found.failed or found.unknown or not found.requests:
            raise RuntimeError(f"{path}: {found.failed + found.unknown} failures; first: {found.complaint}")
        return Replay(found.requests, found.seconds, found.whole, found.marked_s)

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
