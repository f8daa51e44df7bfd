"""Models that are loaded on demand: in which room each belongs, and the loading and putting away under the budget."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from parbake.app.plan import PlanEntry
from parbake.app.residency import Residency
from parbake.contract.bundle import StoredBundle
from parbake.errors import NotReady, ParbakeError, RunnerDown
from parbake.logs import log
from parbake.runtime import marks
from parbake.runtime.pool import RunnerPool
from parbake.runtime.room import MOST_MODELS, file_bytes
from parbake.runtime.rooms import Room
from parbake.runtime.runner import Assignment

if TYPE_CHECKING:
    from parbake.app.metrics import RoomsState

ModelState = Literal["asleep", "loading", "loaded", "leaving"]

LOAD_BOUNDS_S: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Upper bounds of the histogram of loading times."""
_OVERHEAD_BYTES: Final = 128 * 1024
"""Taken for what a model takes beyond its files, until it was measured."""
_USES_S: Final = 1.0
_REST_S: Final = 30.0
"""Time after which a process without a model ends, if there are others."""
_REVIVE_S: Final = 1.0
_TRIES: Final = 6
"""How often a model is loaded again whose room ended meanwhile, for whatever reason."""
_ENOUGH: Final = 4
"""So often a room may end over loading the same model while nothing else was at work there."""
_BARRED_S: Final = 60.0
"""Time in which it is not loaded after that."""


@dataclass(slots=True, eq=False)
class RoomModel:
    """A model that is loaded on demand: where it listens when it is, and what became of it so far."""

    entry: PlanEntry
    """With its socket."""
    room: Room
    file_bytes: int
    state: ModelState = "asleep"
    bytes: int = 0
    """Memory that it takes, or took when it was loaded last."""
    loads: int = 0
    evictions: int = 0
    uses: int = 0
    last_used: float = 0.0
    """Unix time of the last batch, to the second; 0 for never."""
    row_us: float = 0.0
    crashes: int = 0
    """How often in a row its room ended over loading it."""
    crashed: float = 0.0
    """When that was last, on the monotonic clock."""
    loading: asyncio.Task[None] | None = field(default=None, repr=False)
    left: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    @property
    def socket(self) -> str:
        """Where it listens, and what it goes by."""
        return self.entry.sockets[0]

    @property
    def assignment(self) -> Assignment:
        """What its room is told."""
        entry = self.entry
        return Assignment(
            entry.bundle,
            self.socket,
            entry.threads,
            entry.allow_pickle,
            entry.allow_mismatch,
            entry.digest,
            entry.verify,
            entry.prove,
        )


class Rooms:
    """All models of one server that are loaded on demand. ``budget`` is in bytes, 0 for none."""

    def __init__(self, pool: RunnerPool, budget: int) -> None:
        self._pool = pool
        self._residency = Residency(budget)
        self._rooms: dict[str, Room] = {}
        self._models: dict[str, RoomModel] = {}
        self._names: dict[tuple[str, str], RoomModel] = {}
        """By name and version, those of the plan in force."""
        self._numbers = itertools.count(1)
        self._free_slots: list[int] = []
        self._slots = itertools.count()
        self._idle: dict[str, float] = {}
        """Since when groups have had a process and no model in it."""
        self._moved = asyncio.Event()
        """Set, and made anew, whenever a model has come or gone."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._asking: asyncio.Task[None] | None = None
        self._first: asyncio.Task[None] | None = None
        """Starts the first process."""
        self._closing = False
        self.load_counts = [0] * (len(LOAD_BOUNDS_S) + 1)
        """Loads by the time that they took, from being wanted to listening."""
        self.load_seconds = 0.0
        self._overhead = _OVERHEAD_BYTES

    # Plans -----------------------------------------------------------------------------------------

    def place(self, entry: PlanEntry, bundle: StoredBundle) -> PlanEntry:
        """The entry with the place of its model. The place of the version in force is kept if it has the same model."""
        now = self._names.get((entry.name, entry.version))
        if now is not None and _same_model(now.entry, entry):
            return _with_place(entry, now.entry)
        group = entry.group or bundle.contract.owner
        room = self._rooms.get(group)
        if room is None:
            number = len(self._rooms) + 1
            room = self._rooms[group] = Room(
                group,
                self._pool.folder / f"room-{number}.marks",
                self._pool,
                on_end=self._ended,
                on_uses=self._used,
            )
        slot = self._free_slots.pop() if self._free_slots else next(self._slots)
        if slot >= MOST_MODELS:
            raise NotReady(f"a server can load {MOST_MODELS} models on demand")
        path = str(self._pool.folder / f"model-{next(self._numbers)}.sock")
        placed = msgspec.structs.replace(entry, sockets=(path,), marks=room.marks, slot=slot)
        self._models[path] = RoomModel(placed, room, file_bytes(bundle))
        return placed

    async def prove(self, entries: Iterable[PlanEntry], *, changed: bool) -> None:
        """Load what is pinned; and where what is served is ``changed``, what takes the place of something else.

        That shows whether it can be run, and nobody has to wait who did not before. Raises what loading raises.
        """
        if self._first is None and self._models:
            self._first = asyncio.create_task(self._start_first())
        wanted: list[RoomModel] = []
        for entry in entries:
            model = self._models.get(entry.sockets[0]) if entry.sockets else None
            if model is None or model.state == "loaded":
                continue
            now = self._names.get((entry.name, entry.version))
            if entry.pinned or (changed and now is not None and now is not model):
                model.entry = entry
                wanted.append(model)
        results = await asyncio.gather(*(self._want(model) for model in wanted), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def keep(self, entries: Sequence[PlanEntry]) -> None:
        """This is in force now: put away for good what is not in it."""
        placed = {entry.sockets[0]: entry for entry in entries if entry.on_demand and entry.sockets}
        self._names = {}
        gone: list[RoomModel] = []
        for path, model in list(self._models.items()):
            if path in placed:
                model.entry = placed[path]
                self._names[(model.entry.name, model.entry.version)] = model
                resident = self._residency.residents.get(path)
                if resident is not None:
                    resident.pinned = model.entry.pinned
            else:
                gone.append(model)
                del self._models[path]
        await asyncio.gather(*(self._remove(model) for model in gone))
        if self._first is not None:
            await self._first
        if self._names and self._asking is None:
            self._asking = asyncio.create_task(self._ask_uses())

    async def _remove(self, model: RoomModel) -> None:
        loading = model.loading
        if loading is not None and not loading.done():
            if model.state != "loading":
                loading.cancel()
            # A room cannot be told to forget what it is loading: first it has to have it.
            await asyncio.gather(loading, return_exceptions=True)
        await model.room.unload(model.socket)
        self._residency.forget(model.socket)
        self._free_slots.append(model.entry.slot)
        model.state = "asleep"
        model.left.set()
        self._tell()

    # Demand ----------------------------------------------------------------------------------------

    async def wanted(self, socket: str) -> None:
        """Load the model that listens there, if it does not; return when it does. Raises why it cannot be."""
        model = self._models.get(socket)
        if model is None:
            raise NotReady("this model is not served any more", retry_after_s=1.0)
        await self._want(model)

    async def _want(self, model: RoomModel) -> None:
        if model.state == "loaded":
            return
        if model.loading is None or model.loading.done():
            model.loading = asyncio.create_task(self._load(model))
        try:
            await asyncio.shield(model.loading)
        except asyncio.CancelledError:
            if model.loading.cancelled():
                raise NotReady("this model is not served any more", retry_after_s=1.0) from None
            raise

    async def _load(self, model: RoomModel) -> None:
        began = time.perf_counter()
        for attempt in range(_TRIES):
            if model.crashes >= _ENOUGH and time.monotonic() - model.crashed < _BARRED_S:
                raise NotReady(
                    f"the process of model {model.entry.name!r} ended each time that it was loaded",
                    hint=f"it is not tried again for {_BARRED_S:g} s; the log has its last words",
                    retry_after_s=_BARRED_S,
                )
            try:
                await self._load_once(model)
                model.crashes = 0
                break
            except RunnerDown:
                if attempt + 1 == _TRIES or self._closing:
                    raise
        self._note(time.perf_counter() - began)

    async def _load_once(self, model: RoomModel) -> None:
        path = model.socket
        if model.state == "leaving":
            await model.left.wait()
        # What it took when it was loaded last is the best guess.
        size = model.bytes or model.file_bytes + self._overhead
        residency = self._residency
        if not model.entry.pinned and not residency.fits(size):
            raise self._too_large(model, size)
        while (out := residency.admit(path, size, pinned=model.entry.pinned)) is None:
            await self._something()
            if not residency.fits(size):
                raise self._too_large(model, size)
        model.state = "loading"
        try:
            await self._put_away(out)
            loaded = await model.room.load(model.assignment, model.entry.slot)
        except BaseException:
            model.state = "asleep"
            residency.gone(path)
            self._tell()
            raise
        if model.state != "loading":
            # The process has ended in between.
            raise RunnerDown(f"the process for model {model.entry.name!r} ended", retry_after_s=1.0)
        model.state = "loaded"
        model.loads += 1
        model.bytes, model.row_us = loaded.bytes, loaded.row_us
        out = residency.settle(path, loaded.bytes, loaded.seconds)
        self._tell()
        self._overhead += round((max(loaded.bytes - model.file_bytes, 0) - self._overhead) / 8)
        if path in out:
            await self._put_away(out)
            if residency.fits(loaded.bytes):
                # Larger than was thought, and others are being loaded too: now that is known.
                await self._load_once(model)
                return
            raise self._too_large(model, loaded.bytes)
        if out:
            self._spawn(self._put_away(out))

    def _too_large(self, model: RoomModel, size: int) -> NotReady:
        budget, pinned = self._residency.budget, self._residency.pinned_bytes
        return NotReady(
            f"model {model.entry.name!r} takes {size} bytes of memory; the budget is {budget}"
            + (f", of which {pinned} are pinned" if pinned else ""),
            hint="raise memory_bytes, or pin less",
            retry_after_s=10.0,
        )

    async def _put_away(self, paths: Iterable[str]) -> None:
        """Evict these, which are leaving already as far as the budget goes."""
        await asyncio.gather(*(self._evict(self._models.get(path), path) for path in paths))

    async def _evict(self, model: RoomModel | None, path: str) -> None:
        if model is None:
            # Somebody else removes it.
            return
        model.state = "leaving"
        model.left.clear()
        model.evictions += 1
        try:
            await model.room.unload(path)
        finally:
            model.state = "asleep"
            model.left.set()
            self._residency.gone(path)
            self._tell()
        log().debug("model.put_away", deployment=model.entry.name, bytes=model.bytes)

    # What rooms say --------------------------------------------------------------------------------

    def _used(self, uses: Mapping[str, int]) -> None:
        now = time.time()
        for path, count in uses.items():
            model = self._models.get(path)
            if model is not None:
                model.uses += count
                model.last_used = now
        self._residency.used({path: count for path, count in uses.items() if path in self._models})

    def _ended(self, room: Room) -> None:
        """A room's process is gone, and with it all that was loaded there."""
        pinned: list[RoomModel] = []
        mine = [model for model in self._models.values() if model.room is room]
        self._accuse(mine)
        for model in mine:
            path = model.socket
            if model.state == "loaded":
                model.state = "asleep"
                self._residency.gone(path)
            if model.entry.pinned:
                pinned.append(model)
        self._tell()
        if not self._closing:
            for model in pinned:
                self._spawn(self._revive(model))

    def _accuse(self, models: Iterable[RoomModel]) -> None:
        """Whose fault was it that their process ended? If none was at work, that of the one that was being loaded."""
        loading: list[RoomModel] = []
        for model in models:
            mark = marks.read(model.entry.marks, model.entry.slot)
            if mark not in (marks.LOADING, marks.NOTHING) and model.state in ("loaded", "leaving"):
                return
            if mark == marks.LOADING and model.state == "loading":
                loading.append(model)
        for model in loading:
            model.crashes += 1
            model.crashed = time.monotonic()

    async def _revive(self, model: RoomModel) -> None:
        """What is pinned is there again as soon as it can be."""
        while not self._closing and self._models.get(model.socket) is model:
            try:
                await self._want(model)
                return
            except ParbakeError as error:
                log().error("model.not_loaded", deployment=model.entry.name, error=error.message)
                await asyncio.sleep(_REVIVE_S)

    async def _ask_uses(self) -> None:
        while True:
            await asyncio.sleep(_USES_S)
            await asyncio.gather(*(room.ask_uses() for room in list(self._rooms.values())))
            self._rest()

    def _rest(self) -> None:
        """A process without models takes megabytes all the same: one is enough."""
        busy = {id(model.room) for model in self._models.values() if model.state != "asleep"}
        now = time.monotonic()
        for room in self._rooms.values():
            if id(room) in busy or room.pid is None:
                self._idle.pop(room.group, None)
            elif now - self._idle.setdefault(room.group, now) > _REST_S and len(self.pids) > 1:
                room.rest()
                self._idle.pop(room.group, None)

    async def _start_first(self) -> None:
        """The first who wants a model shall not wait for a process."""
        groups = Counter(model.room.group for model in self._models.values())
        try:
            await self._rooms[groups.most_common(1)[0][0]].start()
        except (ParbakeError, OSError) as error:
            log().warning("room.not_started", error=str(error))

    def kill(self, socket: str, asked_at: float) -> bool:
        """Kill the process behind a socket, which has not answered since. Whether it is one of these."""
        model = self._models.get(socket)
        if model is None:
            return False
        if model.state == "loaded":
            model.room.kill_silent(asked_at)
        return True

    # Life ------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """End all rooms."""
        self._closing = True
        for task in (*self._tasks, *(m.loading for m in self._models.values() if m.loading is not None)):
            task.cancel()
        for waits in (self._asking, self._first):
            if waits is not None:
                waits.cancel()
        await asyncio.gather(*(room.close() for room in self._rooms.values()))

    def end_now(self) -> None:
        """End all processes without waiting for anything."""
        self._closing = True
        for room in self._rooms.values():
            room.kill()

    # What can be asked -----------------------------------------------------------------------------

    def model(self, entry: PlanEntry) -> RoomModel | None:
        """What is known of the model of an entry."""
        return self._models.get(entry.sockets[0]) if entry.on_demand and entry.sockets else None

    @property
    def models(self) -> list[RoomModel]:
        """Those of the plan in force, in its order."""
        return list(self._names.values())

    @property
    def budget(self) -> int:
        """Bytes that models may take; 0 for no limit."""
        return self._residency.budget

    @property
    def bytes(self) -> int:
        """Bytes that models take."""
        return self._residency.bytes

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes of all rooms."""
        return tuple(room.pid for room in self._rooms.values() if room.pid is not None)

    def metrics(self) -> RoomsState | None:
        """What metrics tell; None where no model is loaded on demand."""
        if not self._names:
            return None
        from parbake.app.metrics import DemandState, RoomsState

        return RoomsState(
            [
                DemandState(m.entry.name, m.entry.version, m.state == "loaded", m.bytes, m.loads, m.evictions)
                for m in self._names.values()
            ],
            self.budget,
            sum(room.restarts for room in self._rooms.values()),
            LOAD_BOUNDS_S,
            list(self.load_counts),
            self.load_seconds,
        )

    def _note(self, seconds: float) -> None:
        at = next((i for i, bound in enumerate(LOAD_BOUNDS_S) if seconds <= bound), len(LOAD_BOUNDS_S))
        self.load_counts[at] += 1
        self.load_seconds += seconds

    def _tell(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def _something(self) -> None:
        """Wait until a model has come or gone."""
        await self._moved.wait()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _same_model(now: PlanEntry, entry: PlanEntry) -> bool:
    names = ("bundle", "digest", "group", "threads", "allow_pickle", "allow_mismatch", "verify", "prove")
    return all(getattr(now, name) == getattr(entry, name) for name in names)


def _with_place(entry: PlanEntry, now: PlanEntry) -> PlanEntry:
    return msgspec.structs.replace(entry, sockets=now.sockets, marks=now.marks, slot=now.slot)
