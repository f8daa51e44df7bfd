"""Who races, in which configuration, and how each is started, frozen, weighed and ended."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from bench.models import Packed
from bench.payloads import TOLERANCE, check
from bench.payloads import Protocol as Spoken
from bench.processes import free_port, proportional_bytes, with_descendants
from bench.venvs import PEERS, environment
from parbake.testing import serving

PATH: Final = "/v2/models/eta/infer"
CHECKED: Final = 32
"""Rows that a server must answer rightly before its speed means anything."""
_START_S: Final = 60.0
_POLL_S: Final = 0.01
_END_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Entrant:
    """A server in one configuration."""

    what: str
    peer: str
    """Its folder in bench/peers; "" is parbake."""
    arguments: tuple[str, ...] = ()
    """The variant of a peer; words behind ``parbake serve BUNDLE``."""
    speaks: tuple[Spoken, ...] = ("json",)
    connections: tuple[int, ...] = (1, 8, 64)
    """The loads for which this is the configuration to take."""
    fast: bool = False
    """Whether it may be the fastest peer: the others are left out of some loads, as there are many."""
    restless: bool = False
    """Whether it takes CPU time while nobody asks, so that it must be frozen when others are measured."""

    @property
    def ours(self) -> bool:
        """Whether this is parbake."""
        return not self.peer

    @property
    def bare(self) -> bool:
        """Whether this answers with a constant."""
        return self.peer.startswith("bare")

    @property
    def tolerance(self) -> float:
        """How far an answer may be from the model's."""
        return math.inf if self.bare else TOLERANCE


BARE: Final = Entrant("bare loop and parser, constant answer", "bare", speaks=("json", "binary"))
BARE_GRPC: Final = Entrant("bare grpc.aio, constant answer", "bare_grpc", speaks=("grpc",))

TABLE_HIT: Final = "parbake, table hit"
INLINE: Final = "parbake, dynamic, inline"
PROCESS: Final = "parbake, dynamic, in a process"
ALL_DYNAMIC: Final = "parbake, everything on, dynamic"
ALL_TABLE: Final = "parbake, everything on, table hit"


def parbake(packed: Packed, folder: Path, *, all_ways: bool) -> list[Entrant]:
    """Parbake in each way of serving that is measured; ``all_ways`` is for the smallest model."""
    dynamic = ("--mode", "dynamic", "--threads", "1")
    table = ("--table", str(packed.table), "--mode", "static")
    inline = Entrant(
        INLINE, "", (*dynamic, "--placement", "inline"), ("json", "binary", "grpc") if all_ways else ("json",)
    )
    process = Entrant(PROCESS, "", (*dynamic, "--placement", "process"))
    if not all_ways:
        return [inline, process]
    log = ("--log-outputs", "--log-inputs", "hashed", "--prediction-log")
    return [
        Entrant(TABLE_HIT, "", table, ("json", "binary", "grpc")),
        inline,
        process,
        Entrant(ALL_DYNAMIC, "", (*inline.arguments, *log, str(folder / "log-of-dynamic"))),
        Entrant(ALL_TABLE, "", (*table, *log, str(folder / "log-of-table"))),
    ]


@dataclass(frozen=True, slots=True)
class Peer:
    """Another server, with the configurations that are best for it."""

    folder: str
    name: str
    distribution: str
    entrants: tuple[Entrant, ...]


def _peer(folder: str, name: str, distribution: str, *entrants: Entrant) -> Peer:
    return Peer(folder, name, distribution, entrants)


ROSTER: Final = (
    _peer(
        "mosec",
        "mosec",
        "mosec",
        Entrant("mosec, row by row", "mosec", ("one",), ("json",), (1, 8), fast=True),
        Entrant("mosec, batches", "mosec", ("batches",), ("json",), (8, 64), fast=True),
        Entrant("mosec, batches, 2 workers", "mosec", ("batches", "2"), ("json",), (64,), fast=True),
        Entrant("mosec, plain bytes, row by row", "mosec", ("bytes",), ("bytes",), (1, 8), fast=True),
        Entrant("mosec, plain bytes, batches", "mosec", ("bytes-batches",), ("bytes",), (8, 64), fast=True),
    ),
    _peer(
        "triton",
        "Triton (nvidia-pytriton)",
        "nvidia-pytriton",
        Entrant("Triton, row by row", "triton", ("one",), ("json", "binary", "grpc"), (1, 8), fast=True),
        Entrant("Triton, batches", "triton", ("batches",), ("json", "binary", "grpc"), (8, 64), fast=True),
    ),
    _peer(
        "fastapi",
        "FastAPI + uvicorn",
        "fastapi",
        Entrant("FastAPI + uvicorn", "fastapi", fast=True),
        Entrant("FastAPI + uvicorn, 2 processes", "fastapi", ("2",), ("json",), (8, 64), fast=True),
    ),
    _peer(
        "mlserver",
        "MLServer",
        "mlserver",
        Entrant("MLServer", "mlserver", ("one",), ("json", "grpc")),
    ),
    _peer("litserve", "LitServe", "litserve", Entrant("LitServe", "litserve", ("one",))),
    _peer("bentoml", "BentoML", "bentoml", Entrant("BentoML", "bentoml")),
    _peer("ray_serve", "Ray Serve", "ray", Entrant("Ray Serve", "ray_serve", restless=True)),
)
_WITH_GRPC_PORT: Final = ("triton", "mlserver")


class Running(Protocol):
    """A server that answers."""

    entrant: Entrant
    port: int
    grpc_port: int
    path: str
    cold_start_s: float
    """From its start to the first right answer; NaN where others were starting beside it."""

    @property
    def pid(self) -> int:
        """The process that all others of it descend from."""

    def wait(self, packed: Packed) -> None:
        """Wait until it answers rightly. Raises RuntimeError."""

    def freeze(self) -> None:
        """Let it do nothing, so that others have the machine, where it is restless."""

    def thaw(self) -> None:
        """Let it go on."""

    def terminate(self) -> None:
        """Ask it to end."""

    def close(self) -> None:
        """See it ended."""


def port_of(server: Running, protocol: Spoken) -> int:
    """Where a server listens for a protocol."""
    return server.grpc_port if protocol == "grpc" else server.port


def pids(server: Running) -> tuple[int, ...]:
    """All processes of a server."""
    return with_descendants(server.pid)


def memory_mib(server: Running) -> float:
    """Its memory: each page shared by n processes counts as an nth in each (PSS)."""
    return proportional_bytes(pids(server)) / 2**20


@dataclass(slots=True)
class Ours:
    """A ``parbake serve``; it does nothing while nobody asks."""

    entrant: Entrant
    _context: AbstractContextManager[object] = field(repr=False)
    port: int
    grpc_port: int
    pid: int
    cold_start_s: float
    _started: float
    path: str = PATH

    @staticmethod
    def start(entrant: Entrant, packed: Packed) -> Ours:
        """Start it; every model answers when this returns. Raises `parbake.errors.ServerNotFound`."""
        started = time.perf_counter()
        grpc = "grpc" in entrant.speaks
        # One front, as there is one process of most peers.
        context = serving(packed.bundle, arguments=entrant.arguments, workers=1, grpc=grpc)
        server = context.__enter__()
        port = int(server.grpc.rpartition(":")[2]) if grpc else 0
        return Ours(entrant, context, server.port, port, server.process.pid, float("nan"), started)

    def wait(self, packed: Packed) -> None:
        """As `Running.wait`."""
        check(packed, self.entrant.speaks[0], self.port, self.path, (0,))
        self.cold_start_s = time.perf_counter() - self._started

    def freeze(self) -> None:
        """Nothing to do."""

    def thaw(self) -> None:
        """Nothing to do."""

    def terminate(self) -> None:
        """As `Running.terminate`."""
        _signal((self.pid,), signal.SIGTERM)

    def close(self) -> None:
        """As `Running.close`."""
        self._context.__exit__(None, None, None)


@dataclass(slots=True)
class Theirs:
    """A peer's server, in a process group of its own."""

    entrant: Entrant
    port: int
    grpc_port: int
    cold_start_s: float
    path: str
    _process: subprocess.Popen[bytes]
    _log: Path
    _started: float
    _seen: tuple[int, ...] = ()
    """Its processes when it was told to end."""

    @staticmethod
    def start(entrant: Entrant, packed: Packed, python: Path, folder: Path) -> Theirs:
        """Start its program, in an empty folder; use `wait` to know that it answers."""
        folder.mkdir(parents=True)
        port, grpc_port = free_port(), free_port()
        command = [str(python), str(PEERS / entrant.peer / "server.py")]
        if entrant.bare:
            command += [str(port)]
            grpc_port = port
        else:
            command += [str(packed.onnx), str(port)]
            command += [str(grpc_port)] if entrant.peer in _WITH_GRPC_PORT else []
            command += entrant.arguments
        log = folder / "output"
        started = time.perf_counter()
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Theirs(entrant, port, grpc_port, float("nan"), PATH, process, log, started)

    @property
    def pid(self) -> int:
        """The process that was started."""
        return self._process.pid

    def wait(self, packed: Packed) -> None:
        """As `Running.wait`; what it does not answer rightly once it answers is not forgiven later."""
        first = self.entrant.speaks[0]
        while True:
            try:
                check(packed, first, port_of(self, first), self.path, (0,), self.entrant.tolerance)
            except (OSError, RuntimeError) as error:
                words = str(error)
            else:
                self.cold_start_s = time.perf_counter() - self._started
                return
            if self._process.poll() is not None:
                raise RuntimeError(f"ended with {self._process.returncode}: {self._last_words()}")
            if time.perf_counter() - self._started > _START_S:
                raise RuntimeError(f"no right answer within {_START_S:g} s: {words}; {self._last_words()}")
            time.sleep(_POLL_S)

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n")
        return next((line.strip()[-300:] for line in reversed(lines) if line.strip()), "it said nothing")

    def freeze(self) -> None:
        """As `Running.freeze`. Only where it must be: Triton's processes do not survive it."""
        if self.entrant.restless:
            _signal(pids(self), signal.SIGSTOP)

    def thaw(self) -> None:
        """As `Running.thaw`."""
        if self.entrant.restless:
            _signal(pids(self), signal.SIGCONT)

    def terminate(self) -> None:
        """As `Running.terminate`."""
        everybody = pids(self)
        self._seen = tuple({*self._seen, *everybody})
        _signal(everybody, signal.SIGCONT)
        self._process.terminate()

    def close(self) -> None:
        """As `Running.close`, and of whatever it has left behind."""
        self.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        _signal(self._seen, signal.SIGKILL)
        self._process.wait()


def start(entrant: Entrant, packed: Packed, python: Path, folder: Path) -> Running:
    """Start a server. Raises RuntimeError or `parbake.errors.ParbakeError`."""
    if entrant.ours:
        return Ours.start(entrant, packed)
    return Theirs.start(entrant, packed, python, folder)


def _signal(everybody: Sequence[int], number: int) -> None:
    for pid in everybody:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


OWN_PYTHON: Final = Path(sys.executable)
"""The bare servers run in our own environment, with the uvloop and httptools that parbake has."""

Say = Callable[[str], None]
