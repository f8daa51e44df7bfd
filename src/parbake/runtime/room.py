"""The room process: many models of one isolation group, loaded and put away while it runs.

A runner that was given a `RoomAssignment` in place of an `Assignment`. Each model listens on a socket of its own, as
in a runner, so that fronts see no difference; what the supervisor wants comes over the control socket. Batches run in
a few threads, one at a time for each model: a slow model does not hold up its neighbours.

A model that is put away first answers what was read, then says goodbye (`wire.BYE`): what a front gets no answer to
after that was not read, and may be sent again. What each model is at work on stands in a file of marks
that outlives the process (`parbake.runtime.marks`): if it ends, only those can have been to blame.
"""

from __future__ import annotations

import ctypes
import gc
import os
import queue
import selectors
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np
from msgspec import Struct

from parbake.contract.bundle import StoredBundle, read_bundle
from parbake.contract.ort import onnxruntime
from parbake.errors import ModelFailed, NotReady, ParbakeError
from parbake.runtime import wire
from parbake.runtime.marks import LOADING, NOTHING, Marks
from parbake.runtime.runner import (
    Assignment,
    Connection,
    answer,
    check_digest,
    check_environment,
    listen,
    receive,
    time_one_row,
)
from parbake.runtime.session import Session, check_goldens

MOST_MODELS: Final = 1 << 16
"""Marks in the file of marks."""
_SEND_TIMEOUT_S: Final = 10.0
_INLINE_S: Final = 0.0005
"""A batch that takes less is run where it is read: the way to another thread and back costs more."""
_SMALL_BYTES: Final = 1 << 22
_TRIM_S: Final = 1.0
"""Freed memory goes back to the system when nothing was loaded for this long, or after the following."""
_TRIM_LATEST_S: Final = 5.0
_MMAP_BYTES: Final = 1 << 20
"""Blocks of this size are mapped one by one, and given back the moment they are freed."""


_IDENTITY: Final = (
    b'\x08\x08\x12\x00:9\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x10\n\x01x\x12\x0b\n\t\x08\x01\x12\x05'
    b"\n\x03\x12\x01Nb\x10\n\x01y\x12\x0b\n\t\x08\x01\x12\x05\n\x03\x12\x01NB\x04\n\x00\x10\r"
)
"""The ONNX graph that gives back its input."""


class RoomAssignment(Struct, frozen=True, tag="room"):
    """What a process is told that is to be a room."""

    marks: str
    """File of the marks."""
    threads: int = 4
    careful_s: float = 0.0
    """Time in which batches run one at a time: the last process ended, and the next time shall say over which."""


class LoadModel(Struct, frozen=True, tag="load"):
    """To a room: load this model, prove it, listen. ``slot`` is the place of its mark."""

    number: int
    slot: int
    assignment: Assignment


class UnloadModel(Struct, frozen=True, tag="unload"):
    """To a room: put the model away that listens there."""

    number: int
    socket: str


class GetUses(Struct, frozen=True, tag="uses"):
    """To a room: what was asked since the last reply."""

    number: int


class RoomReady(Struct, frozen=True, tag="ready"):
    """From a room: it is there; ``kept`` is what it could not give up."""

    kept: tuple[str, ...] = ()


class ModelLoaded(Struct, frozen=True, tag="loaded"):
    """Reply to `LoadModel`: the model listens. ``uses``, here and below, counts batches since the last reply."""

    number: int
    bytes: int
    """Memory that it took, and at least the size of its files."""
    seconds: float
    row_us: float
    uses: dict[str, int] = {}


class ModelRefused(Struct, frozen=True, tag="refused"):
    """Reply to `LoadModel`: this model cannot be run; the room goes on."""

    number: int
    code: str
    message: str
    hint: str


class Done(Struct, frozen=True, tag="done"):
    """Reply to `UnloadModel` and `GetUses`."""

    number: int
    uses: dict[str, int] = {}


ToRoom = LoadModel | UnloadModel | GetUses
FromRoom = RoomReady | ModelLoaded | ModelRefused | Done


class _Model:
    """A model that is loaded, or on its way out."""

    __slots__ = (
        "busy",
        "connections",
        "leaving",
        "listener",
        "path",
        "pending",
        "row_s",
        "session",
        "slot",
        "uses",
    )

    def __init__(self, path: str, slot: int, session: Session, listener: socket.socket, row_s: float) -> None:
        self.path = path
        self.slot = slot
        self.session: Session | None = session
        self.listener = listener
        self.row_s = row_s
        self.connections: set[_Front] = set()
        self.pending: deque[_Batch] = deque()
        self.busy = False
        """Whether a batch runs, or a thread has been asked to run one. This and ``pending`` under the room's lock."""
        self.leaving: int | None = None
        """Number of the call that wants it gone."""
        self.uses = 0


class _Front(Connection):
    """A connection of a front to one of the models."""

    __slots__ = ("model",)

    def __init__(self, connected: socket.socket, model: _Model) -> None:
        super().__init__(connected)
        self.model = model


class _Batch(NamedTuple):
    """What a front has sent to one of the models."""

    front: _Front
    request_id: int
    frame: bytes


def serve(control: socket.socket, line: bytes, kept: tuple[str, ...]) -> int:
    """Be a room until the control socket closes. Gives the exit status."""
    assignment = msgspec.json.decode(line, type=RoomAssignment)
    tune_memory()
    _warm_up()
    gc.collect()
    gc.freeze()
    # Batches make no cycles that last, and to look for them in many models takes longer than a batch.
    gc.set_threshold(50_000, 20, 50)
    control.sendall(msgspec.json.encode(RoomReady(kept)) + b"\n")
    _Room(control, assignment).run()
    return 0


def _warm_up() -> None:
    """Have onnxruntime take what it takes once, some megabytes, before a model is measured."""
    ort = onnxruntime()

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(_IDENTITY, options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.zeros(1, np.float32)})


class _Room:
    def __init__(self, control: socket.socket, assignment: RoomAssignment) -> None:
        self._control = control
        self._heard = bytearray()
        self._decoder = msgspec.json.Decoder(ToRoom)
        self._encoder = msgspec.json.Encoder()
        self._marks = Marks(Path(assignment.marks), MOST_MODELS)
        self._models: dict[str, _Model] = {}
        self._selector = selectors.DefaultSelector()
        self._crew = ThreadPoolExecutor(assignment.threads, "parbake-batch")
        self._lock = threading.Lock()
        self._cyclic = False
        """Whether something was put away that only the garbage collector can free."""
        self._first = True
        """Whether nothing has been loaded yet."""
        self._alone = threading.Lock()
        self._careful_until = time.monotonic() + assignment.careful_s if assignment.careful_s else 0.0
        self._posts: deque[Callable[[], None]] = deque()
        """What other threads want done where the sockets are."""
        self._bell, self._rings = socket.socketpair()
        self._loads: queue.SimpleQueue[LoadModel | None] = queue.SimpleQueue()
        """None: something was freed."""

    def run(self) -> None:
        """Answer until the supervisor hangs up."""
        threading.Thread(target=self._load_all, name="parbake-load", daemon=True).start()
        self._rings.setblocking(False)
        for waited in (self._control, self._rings):
            self._selector.register(waited, selectors.EVENT_READ, None)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._control:
                    if not self._hear():
                        return
                elif key.fileobj is self._rings:
                    with suppress(BlockingIOError):
                        self._rings.recv(4096)
                    while self._posts:
                        self._posts.popleft()()
                elif isinstance(key.data, _Model):
                    self._accept(key.data)
                else:
                    self._read(key.data)

    # Fronts ----------------------------------------------------------------------------------------

    def _accept(self, model: _Model) -> None:
        try:
            connected, _ = model.listener.accept()
        except OSError:
            # It was put away in this very turn, or who asked has gone.
            return
        connected.settimeout(_SEND_TIMEOUT_S)
        front = _Front(connected, model)
        model.connections.add(front)
        self._selector.register(connected, selectors.EVENT_READ, front)

    def _read(self, front: _Front) -> None:
        model = front.model
        try:
            for frame in receive(front):
                request_id, rows = wire.request_head(frame)
                if model.leaving is not None or model.session is None:
                    # Not read, as far as the front is concerned.
                    continue
                if not rows:
                    answer(model.session, front.socket, frame, model.row_s)
                else:
                    self._take(model, _Batch(front, request_id, frame), rows)
        except (OSError, EOFError, ValueError):
            self._hang_up(front)

    def _hang_up(self, front: _Front) -> None:
        if front in front.model.connections:
            front.model.connections.remove(front)
        with suppress(KeyError, ValueError):
            self._selector.unregister(front.socket)
        front.socket.close()

    def _take(self, model: _Model, batch: _Batch, rows: int) -> None:
        model.uses += 1
        with self._lock:
            if model.busy:
                model.pending.append(batch)
                return
            model.busy = True
            quick = rows * model.row_s < _INLINE_S and not self._careful_until and model.row_s
            if not quick:
                model.pending.append(batch)
        if not quick:
            self._crew.submit(self._work, model)
            return
        # Nobody else adds while this thread is here, and it is this thread that reads: nothing can be pending after.
        self._run(model, batch)
        with self._lock:
            model.busy = False

    def _work(self, model: _Model) -> None:
        """Run one batch of a model, in a thread of the crew; then it is the others' turn."""
        with self._lock:
            batch = model.pending.popleft()
        if self._careful_until:
            if time.monotonic() > self._careful_until:
                self._careful_until = 0.0
            with self._alone:
                self._run(model, batch)
        else:
            self._run(model, batch)
        with self._lock:
            again = bool(model.pending)
            model.busy = again
        if again:
            self._crew.submit(self._work, model)
        elif model.leaving is not None:
            self._post(lambda: self._put_away(model))

    def _run(self, model: _Model, batch: _Batch) -> None:
        session = model.session
        if session is None:
            return
        self._marks.put(model.slot, batch.request_id)
        try:
            answer(session, batch.front.socket, batch.frame, model.row_s)
        except (OSError, ValueError):
            # The thread that reads finds it closed.
            with suppress(OSError):
                batch.front.socket.shutdown(socket.SHUT_RDWR)
        finally:
            self._marks.put(model.slot, NOTHING)

    # The supervisor --------------------------------------------------------------------------------

    def _hear(self) -> bool:
        """Read what the supervisor says; whether it is still there."""
        chunk = self._control.recv(1 << 16)
        if not chunk:
            return False
        self._heard += chunk
        *lines, rest = self._heard.split(b"\n")
        self._heard = bytearray(rest)
        for line in lines:
            message = self._decoder.decode(line)
            if isinstance(message, LoadModel):
                self._loads.put(message)
            elif isinstance(message, UnloadModel):
                self._unload(message)
            else:
                self._say(Done(message.number, self._uses()))
        return True

    def _say(self, message: FromRoom) -> None:
        self._control.sendall(self._encoder.encode(message) + b"\n")

    def _uses(self) -> dict[str, int]:
        found = {model.path: model.uses for model in self._models.values() if model.uses}
        for path in found:
            self._models[path].uses = 0
        return found

    def _post(self, work: Callable[[], None]) -> None:
        self._posts.append(work)
        self._bell.send(b"!")

    def _loaded(self, message: LoadModel, model: _Model, size: int, seconds: float) -> None:
        self._models[model.path] = model
        self._selector.register(model.listener, selectors.EVENT_READ, model)
        row_us = round(model.row_s * 1e6, 1)
        self._say(ModelLoaded(message.number, size, round(seconds, 6), row_us, self._uses()))

    def _unload(self, message: UnloadModel) -> None:
        model = self._models.get(message.socket)
        if model is None or model.leaving is not None:
            self._say(Done(message.number))
            return
        model.leaving = message.number
        self._selector.unregister(model.listener)
        model.listener.close()
        Path(model.path).unlink(missing_ok=True)
        with self._lock:
            busy = model.busy
        if not busy:
            self._put_away(model)

    def _put_away(self, model: _Model) -> None:
        """Everything that was read has been answered."""
        if model.session is None or model.leaving is None:
            return
        bye = b"".join(wire.reply_frame(wire.BYE, wire.OK, 0.0, (), ()))
        for front in list(model.connections):
            # It hangs up when it has read this: if we did, it might not get to read it.
            try:
                front.socket.sendall(bye)
            except OSError:
                self._hang_up(front)
        uses = self._uses()
        del self._models[model.path]
        # A graph goes with its last reference; code of its own may hold itself.
        self._cyclic = self._cyclic or model.session.contract.own_code
        model.session = None
        self._say(Done(model.leaving, uses))
        self._loads.put(None)

    # Loading, in a thread of its own ----------------------------------------------------------------

    def _load_all(self) -> None:
        trim_at = 0.0
        while True:
            try:
                message = self._loads.get(timeout=_TRIM_S if trim_at else None)
            except queue.Empty:
                message = None
                trim_at = time.monotonic()
            if message is None:
                trim_at = trim_at or time.monotonic() + _TRIM_LATEST_S
            else:
                self._load(message)
            if trim_at and time.monotonic() >= trim_at:
                trim_at = 0.0
                collect, self._cyclic = self._cyclic, False
                give_memory_back(collect=collect)

    def _load(self, message: LoadModel) -> None:
        wanted = message.assignment
        started = time.perf_counter()
        before = Memory.now()
        try:
            self._marks.reserve(message.slot)
        except OSError as error:
            full = NotReady(
                f"no model can be loaded, as nothing can be written: {error}",
                hint="free space where the temporary files are",
            )
            self._refuse(message, full)
            return
        self._marks.put(message.slot, LOADING)
        try:
            # The supervisor has verified the digest; mostly only sizes are checked again here.
            bundle = read_bundle(wanted.bundle, verify=wanted.verify)
            check_digest(bundle, wanted.digest or bundle.digest)
            check_environment(bundle.environment, wanted.allow_mismatch)
            if self._first and not bundle.contract.own_code and file_bytes(bundle) < _SMALL_BYTES:
                # What the libraries take once is not this model's.
                _open(bundle, wanted)
                before = Memory.now()
            self._first = False
            session, row_us = _open(bundle, wanted)
        except ParbakeError as error:
            self._refuse(message, error)
            return
        except (Exception, SystemExit) as error:
            # Code of its own may raise anything; the neighbours have no part in it.
            words = f"{wanted.bundle} cannot be loaded: {type(error).__name__}: {error}"
            self._refuse(message, ModelFailed(words))
            return
        finally:
            self._marks.put(message.slot, NOTHING)
        size = max(Memory.now().since(before), file_bytes(bundle))
        listener = listen(Path(wanted.socket))
        model = _Model(wanted.socket, message.slot, session, listener, row_us / 1e6)
        seconds = time.perf_counter() - started
        self._post(lambda: self._loaded(message, model, size, seconds))

    def _refuse(self, message: LoadModel, error: ParbakeError) -> None:
        refused = ModelRefused(message.number, error.code, error.message, error.hint)
        self._post(lambda: self._say(refused))


def _open(bundle: StoredBundle, wanted: Assignment) -> tuple[Session, float]:
    """A bundle's session, proven, and the time of a row in microseconds. Raises `ParbakeError`."""
    session = Session(bundle, threads=wanted.threads, allow_pickle=wanted.allow_pickle)
    rows = check_goldens(session, bundle) if wanted.prove else bundle.goldens().rows
    return session, time_one_row(session, bundle.goldens().inputs, calls=5) if rows else 0.0


def file_bytes(bundle: StoredBundle) -> int:
    """Size of a bundle's files together."""
    return sum(item.bytes for item in bundle.manifest.files)


# Memory --------------------------------------------------------------------------------------------


class _MallInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc, see mallinfo(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
        )
    )  # fmt: skip


class Memory(NamedTuple):
    """Bytes of this process; 0 where this platform cannot tell."""

    resident: int = 0
    small_blocks: int = 0
    """Allocated and not freed, but for blocks that are mapped one by one."""

    @classmethod
    def now(cls) -> Memory:
        """As it is."""
        if sys.platform != "linux":
            return cls()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        libc = ctypes.CDLL(None)
        if not hasattr(libc, "mallinfo2"):
            return cls(resident)
        libc.mallinfo2.restype = _MallInfo
        return cls(resident, int(libc.mallinfo2().uordblks))

    def since(self, before: Memory) -> int:
        """What has been added.

        Small blocks may lie where others were freed, where the process does not grow; large ones are mapped anew,
        and grow it by what is written to of them.
        """
        return max(self.resident - before.resident, self.small_blocks - before.small_blocks)


def tune_memory() -> None:
    """Have freed memory be free for all threads, and large blocks go back to the system at once."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        m_arena_max, m_mmap_threshold = -8, -3
        # musl has no such function, and no such need.
        if hasattr(libc, "mallopt"):
            libc.mallopt(m_arena_max, 1)
            libc.mallopt(m_mmap_threshold, _MMAP_BYTES)


def give_memory_back(*, collect: bool) -> None:
    """Hand freed memory back to the operating system; ``collect`` garbage first, which halts everybody for a while."""
    if collect:
        gc.collect()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
