"""The runner process: loads one bundle, proves it on its goldens, then answers batches until it is told to end.

Started by `parbake.runtime.confine`, with one end of a socket pair. It imports what every
model needs, waits for an `Assignment` on that socket, and reports `Loaded` or `Refused`. So a runner can
be started ahead of time, as a spare that takes over within milliseconds. It ends when the other end
closes: no runner outlives its supervisor.
"""

from __future__ import annotations

import ctypes
import selectors
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from parbake.contract.bundle import StoredBundle, read_bundle
from parbake.contract.environment import capture, differences
from parbake.contract.model import Environment
from parbake.contract.ort import onnxruntime
from parbake.contract.tensors import Tensors
from parbake.errors import BundleAltered, EnvironmentDiffers, ModelFailed, ParbakeError, RowRejected
from parbake.runtime import wire
from parbake.runtime.session import Session, check_goldens

_READ_BYTES = 1 << 20
_SEND_TIMEOUT_S = 10.0

AWAKE: Final = b"\n"
"""Said by a process that stands by when it has its libraries, and again whenever it is asked with the same."""


ROOM: Final = b'{"type":"room"'
"""How the first message begins where the process is to be a room of many models (`parbake.runtime.room`)."""


class Assignment(Struct, frozen=True):
    """What a runner is to run, and where it listens."""

    bundle: str
    socket: str
    threads: int = 1
    allow_pickle: bool = False
    allow_mismatch: bool = False
    digest: str = ""
    """Of the bundle; another one may have been put under the same path since the server read it."""
    verify: bool = False
    """Whether to hold every file against the digest, and not its size alone."""
    prove: bool = True
    """Whether to refuse a bundle whose goldens this machine answers otherwise."""


class Loaded(Struct, frozen=True, tag="loaded"):
    """The runner listens; ``row_us`` is the median time of one golden row in microseconds."""

    goldens: int
    seconds: float
    row_us: float
    kept: tuple[str, ...] = ()
    """What the process could not give up before it ran the bundle."""


class Refused(Struct, frozen=True, tag="refused"):
    """The bundle cannot be run; the process ends."""

    code: str
    message: str
    hint: str


Report = Loaded | Refused


def check_digest(bundle: StoredBundle, digest: str) -> None:
    """Raise `BundleAltered` unless this is the bundle of that digest."""
    if bundle.digest != digest:
        raise BundleAltered(
            f"{bundle.path} now holds bundle {bundle.digest[:19]}..., served is {digest[:19]}...",
            hint="parbake reload puts the new one in service",
        )


def check_environment(packed: Environment, allow_mismatch: bool) -> None:
    """Hold the libraries that a bundle's own code needs against those here. Raises `EnvironmentDiffers`."""
    if not packed.required or allow_mismatch:
        return
    found = [d for d in differences(packed, capture()) if d.required]
    if found:
        words = ", ".join(f"{d.name} {d.packed} (here {d.here})" for d in found)
        raise EnvironmentDiffers(
            f"the bundle's code was packed with {words}",
            hint="install these versions, pack again, or --allow-mismatch to serve it all the same",
        )


def time_one_row(session: Session, goldens: Tensors, calls: int = 15) -> float:
    """Median microseconds of one row, measured on a golden."""
    row = {name: value[:1] for name, value in goldens.items()}
    times: list[float] = []
    for _ in range(calls):
        started = time.perf_counter()
        session.run(row)
        times.append(time.perf_counter() - started)
        # A runner that starts again after a crash is waited for.
        if sum(times) > 0.05:
            break
    return sorted(times)[len(times) // 2] * 1e6


def main(descriptor: int, kept: tuple[str, ...] = ()) -> int:
    """Run until the control socket closes or SIGTERM. Gives the exit status. ``kept`` goes into the report."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=descriptor)
    # The slow imports of a spare happen before anybody waits for it.
    import numpy  # noqa: F401

    onnxruntime()
    control.sendall(AWAKE)
    while (line := _read_line(control)) == AWAKE:
        control.sendall(AWAKE)
    if not line:
        return 0
    if line.startswith(ROOM):
        # Not above: a room is made of what is here.
        from parbake.runtime import room

        return room.serve(control, line, kept)
    assignment = msgspec.json.decode(line, type=Assignment)
    started = time.perf_counter()
    try:
        # The supervisor has verified the digest; mostly only sizes are checked again here.
        bundle = read_bundle(assignment.bundle, verify=assignment.verify)
        check_digest(bundle, assignment.digest or bundle.digest)
        check_environment(bundle.environment, assignment.allow_mismatch)
        session = Session(bundle, threads=assignment.threads, allow_pickle=assignment.allow_pickle)
        rows = check_goldens(session, bundle) if assignment.prove else bundle.goldens().rows
        row_us = time_one_row(session, bundle.goldens().inputs) if rows else 0.0
    except ParbakeError as error:
        control.sendall(msgspec.json.encode(Refused(error.code, error.message, error.hint)) + b"\n")
        return 1
    listener = listen(Path(assignment.socket))
    loaded = Loaded(rows, time.perf_counter() - started, row_us, kept)
    control.sendall(msgspec.json.encode(loaded) + b"\n")
    _serve(session, listener, control, row_us / 1e6)
    return 0


class Connection:
    """Bytes of one front that do not make a whole frame yet."""

    __slots__ = ("buffer", "need", "socket")

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.buffer = bytearray()
        self.need = 8


def _serve(session: Session, listener: socket.socket, control: socket.socket, row_s: float) -> None:
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ, None)
    selector.register(control, selectors.EVENT_READ, None)
    while True:
        for key, _ in selector.select():
            if key.fileobj is control:
                # The supervisor says nothing more after the assignment: readable means closed.
                return
            if key.fileobj is listener:
                connected, _ = listener.accept()
                connected.settimeout(_SEND_TIMEOUT_S)
                selector.register(connected, selectors.EVENT_READ, Connection(connected))
                continue
            connection: Connection = key.data
            try:
                for frame in receive(connection):
                    answer(session, connection.socket, frame, row_s)
            except (OSError, EOFError, ValueError):
                selector.unregister(connection.socket)
                connection.socket.close()


def receive(connection: Connection) -> Sequence[bytes]:
    """The next whole frames: none, a batch, or a batch behind a probe. One read per call, so that fronts take turns."""
    buffer = connection.buffer
    chunk = connection.socket.recv(max(_READ_BYTES, connection.need - len(buffer)))
    if not chunk:
        raise EOFError
    if not buffer:
        # The usual case: one read is one frame.
        length = wire.frame_length(chunk)
        if length == len(chunk):
            return (chunk,)
    buffer += chunk
    frames: list[bytes] = []
    while (length := wire.frame_length(buffer)) is not None and len(buffer) >= length:
        frames.append(bytes(memoryview(buffer)[:length]))
        del buffer[:length]
    connection.need = length or 8
    return frames


def answer(session: Session, connected: socket.socket, frame: bytes, row_s: float) -> None:
    """Run the batch of a frame, and send what came of it. ``row_s`` is the time of a golden row, 0 if there is none.

    Raises OSError where the front is gone, ValueError for a torn frame.
    """
    request_id, rows, raws, shapes = wire.read_request(frame)
    if not rows:
        # A probe: that it is answered is the answer, and how long a row takes is good to know before the first batch.
        connected.sendall(b"".join(wire.reply_frame(request_id, wire.OK, row_s, (), ())))
        return
    started = time.perf_counter()
    status, out_raws, out_shapes = wire.OK, [b""], [()]
    try:
        out_raws, out_shapes = session.run_raw(raws, rows, shapes)  # type: ignore[assignment]  # list of shapes
    except RowRejected as error:
        status, out_raws = wire.REJECTED, [_words(error.message)]
    except ModelFailed as error:
        status, out_raws = wire.FAILED, [_words(error.message)]
    except (Exception, SystemExit) as error:
        status, out_raws = wire.FAILED, [_words(f"{type(error).__name__}: {error}")]
    seconds = time.perf_counter() - started
    connected.sendall(b"".join(wire.reply_frame(request_id, status, seconds, out_raws, out_shapes)))


def _words(message: str) -> bytes:
    # A model's words may hold what UTF-8 cannot.
    return message[:2000].encode(errors="replace")


def listen(path: Path) -> socket.socket:
    """A Unix-domain socket there that accepts connections from the moment it can be seen."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Bound under another name first: a front never meets a socket that does not accept yet.
    staging = path.with_suffix(".new")
    staging.unlink(missing_ok=True)
    listener.bind(str(staging))
    staging.chmod(0o600)
    listener.listen(128)
    staging.rename(path)
    return listener


def _read_line(control: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        chunk = control.recv(65536)
        if not chunk:
            return b""
        data += chunk
    return data


def _die_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent dies; elsewhere the closed control socket does it."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
