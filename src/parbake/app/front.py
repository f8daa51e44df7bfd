"""The state of one front process: which versions it serves, and how a new plan takes the place of the old."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from parbake.app.control import (
    Abort,
    AllCounts,
    Channel,
    Commit,
    DeadTold,
    Done,
    Foretell,
    GetCounts,
    GetJobs,
    GetProfiles,
    GetRoutes,
    HeadCounts,
    JobsTold,
    LogRows,
    Message,
    Ping,
    Prepare,
    Prepared,
    Profiles,
    RemoveDead,
    RemoveJob,
    RemoveTold,
    RetryJobs,
    RetryTold,
    RoutesCounted,
    UseRoutes,
    VersionCounts,
    Wanted,
    Wedged,
)
from parbake.app.jobs import JobCounts, Jobs
from parbake.app.plan import Placed, Plan, PlanEntry
from parbake.app.routes import FrontRoutes
from parbake.app.wiring import front_count, hold_table, job_store, monitor_of, open_table, table_facts
from parbake.contract.bundle import StoredBundle, read_bundle
from parbake.contract.record import Records
from parbake.errors import (
    ModelNotFound,
    NotReady,
    ParbakeError,
    RunnerDown,
    TableForeign,
    VersionNotFound,
)
from parbake.logs import log
from parbake.monitoring.recorder import Recorder
from parbake.monitoring.service import Monitor
from parbake.runtime import marks
from parbake.runtime.asleep import SleepingBackend
from parbake.runtime.backends import InlineBackend, RunnerBackend
from parbake.runtime.batcher import Backend, Batcher
from parbake.runtime.costs import BatchCost
from parbake.runtime.runner import check_digest, check_environment, time_one_row
from parbake.runtime.session import Session, check_goldens
from parbake.serving.defaults import default_record
from parbake.serving.fallback import Fallback, LastAnswers
from parbake.serving.head import Head
from parbake.serving.service import ServedVersion
from parbake.serving.stats import Stats
from parbake.serving.warm import Handover, Warmer, takes
from parbake.settings import DEFAULT_ANSWER, LAST_ANSWER, QueueSettings, ServerSettings
from parbake.tables.lease import Lease

_INLINE_BYTES: Final = 64 * 1024 * 1024
"""Larger models are not copied into every front."""

_INLINE_BATCH_S: Final = 0.002
"""Longest that a batch may hold up a front's event loop."""

_LONGEST_BATCH_S: Final = 0.25

_TEND_S: Final = 0.5
"""How often the learned heads are looked after."""

_GIVE_BACK_S: Final = 0.1
"""Time from the release of a version to that of its memory."""

_FORETELL_S: Final = 0.5
_FORETELL_ROWS: Final = 10_000
"""Most predictions of a deployment that are told at once."""

_WANT_S: Final = 300.0
"""Longest that loading a model is waited for; callers have deadlines of their own."""

_STEP: Final = 1000
"""Keys that are handled at once."""
_SETTLE: Final = 4096
"""Requests that a head takes in at once: within a millisecond."""

_FRESHNESS_MARGIN: Final = 0.1
"""Part of the freshness at whose end a record counts as stale already: nobody looks at the clock for each request."""


@dataclass(slots=True)
class Slot:
    """One plan entry, loaded."""

    entry: PlanEntry
    served: ServedVersion
    backends: list[RunnerBackend] = field(default_factory=list)
    warmer: Warmer | None = None
    recorder: Recorder | None = None
    idling: asyncio.Task[None] | None = None
    """Bakes in idle moments."""
    lease: Lease | None = None
    """Tells before somebody changes the table where it lies."""


class Front:
    """Holds what is served now. ``on_change`` is called after every swap, so that routes can be rebuilt."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_change: Callable[[], None]) -> None:
        self._loop = loop
        self._on_change = on_change
        self._slots: list[Slot] = []
        self._by_name: dict[str, list[ServedVersion]] = {}
        self.routes = FrontRoutes(loop)
        self.routed = self.routes.routed
        """Deployments under a route, by name."""
        self.jobs = Jobs(loop, self._able)
        """Requests whose callers do not wait."""
        self._prepared: dict[int, list[Slot]] = {}
        self._sessions: dict[tuple[str, str], Session] = {}
        self._stats: dict[tuple[str, str], Stats] = {}
        self._hop_us = 0.0
        self._drain_s = 0.0
        self._plan: Plan | None = None
        self._pending_plan: Plan | None = None
        self.channel: Channel | None = None
        self.draining = False
        self.connections: Callable[[], int] = lambda: 0
        self.discreet = False
        """Whether not every caller may know what is served."""
        self.clients: Callable[[], dict[str, int]] = dict
        """Requests that were let in, by client."""
        self.refused: dict[str, int] = {}
        self._giving_back: asyncio.TimerHandle | None = None
        self._tending: asyncio.Task[None] | None = None
        self._foretelling: asyncio.Task[None] | None = None
        self._leasing = False
        """Whether this process is told of changes to tables."""
        self._monitor: Monitor | None = None

    # What transports ask ---------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether a plan is in force, nothing is being drained, and every version can answer."""
        return (
            self._plan is not None
            and not self.draining
            # A server that was started empty has nothing to answer with yet.
            and bool(self._plan.entries or self._plan.unloaded)
            and all(
                slot.served.ready for slot in self._slots if slot.entry.pinned or not slot.entry.on_demand
            )
        )

    def versions(self) -> list[ServedVersion]:
        """Everything served, in the plan's order."""
        return [slot.served for slot in self._slots]

    def unloaded(self) -> tuple[str, ...]:
        """Deployments that are configured and not loaded."""
        return self._plan.unloaded if self._plan else ()

    def find(self, name: str, version: str = "") -> ServedVersion:
        """A version, by default the champion of the route or else the last of its name.

        Raises `ModelNotFound`, `VersionNotFound`, `NotReady`.
        """
        if self._plan is None:
            raise NotReady("models are still being loaded", retry_after_s=1.0)
        found = self._by_name.get(name)
        if not found:
            if name in self._plan.unloaded:
                raise NotReady(
                    f"model {name!r} is not loaded",
                    hint=f"parbake reload {name}, or POST /v2/repository/models/{name}/load, loads it",
                    retry_after_s=5.0,
                )
            names = ", ".join(dict.fromkeys(slot.served.name for slot in self._slots)) or "none"
            hint = "the index shows what there is" if self.discreet else f"models here: {names}"
            raise ModelNotFound(f"no model {name[:80]!r}", hint=hint)
        if not version:
            return self.routed[name].champion if name in self.routed else found[-1]
        for served in found:
            if served.version == version:
                return served
        versions = ", ".join(served.version for served in found)
        raise VersionNotFound(f"model {name!r} has no version {version[:80]!r}", hint=f"versions: {versions}")

    def configure(self, settings: ServerSettings, number: int, queue: QueueSettings, queue_file: str) -> None:
        """Take the settings in that concern the front as a whole. Raises `SettingsError`."""
        self._drain_s = settings.drain_timeout_s
        self._monitor = monitor_of(settings, number)
        self.routes.turn = number, front_count(settings)
        # Once, before there is any model: what is frozen with an old version in it would never be given back, and
        # looking at all libraries again holds up every caller for tens of milliseconds.
        settle_memory()
        if queue_file:
            self.jobs.configure(queue, Path(queue_file), job_store, settings.max_body_bytes)

    # What the supervisor asks ----------------------------------------------------------------------

    async def handle(self, message: Message) -> Message:
        """Answer one call of the supervisor (`Drain` and `Configure` are the transports' business)."""
        if isinstance(message, Prepare):
            return Prepared(await self._prepare(message.plan))
        if isinstance(message, Commit):
            await self._commit(message.generation)
            return Done()
        if isinstance(message, Abort):
            prepared = self._prepared.pop(message.generation, [])
            # What is in force was not loaded for this plan, and stays.
            self._release([slot for slot in prepared if slot not in self._slots])
            self._sessions.clear()
            return Done()
        if isinstance(message, UseRoutes):
            if self.routes.use(message.routes, self._by_name):
                self._on_change()
            if self.routes.expects_labels and self._foretelling is None:
                self._foretelling = self._loop.create_task(self._foretell())
            return Done()
        if isinstance(message, Ping):
            return Done()
        if isinstance(message, GetCounts):
            # A few at a time: there may be a thousand, and requests are answered in between.
            for number, stats in enumerate(list(self._stats.values())):
                stats.fold()
                if number % 16 == 15:
                    await asyncio.sleep(0)
            return self._counts(await self.jobs.counts())
        if isinstance(message, GetRoutes):
            return RoutesCounted(self.routes.counts())
        if isinstance(message, GetProfiles):
            monitor = self._monitor
            return Profiles(await asyncio.to_thread(monitor.current) if monitor is not None else {})
        if isinstance(message, GetJobs):
            return JobsTold(await self.jobs.report())
        if isinstance(message, RetryJobs):
            jobs, name = self.jobs, message.deployment
            return RetryTold(await (jobs.retry(message.id) if message.id else jobs.retry_dead(name)))
        if isinstance(message, RemoveJob):
            return RemoveTold(await self.jobs.remove(message.id))
        if isinstance(message, RemoveDead):
            return DeadTold(await self.jobs.remove_dead(message.deployment))
        raise NotReady(f"a front does not answer {type(message).__name__}")

    async def drain(self) -> None:
        """Wait until nothing is pending."""
        self.draining = True
        await self.jobs.drain(self._drain_s)
        self.routes.close()
        for slot in self._slots:
            if slot.idling is not None:
                slot.idling.cancel()
        while any(slot.served.pending for slot in self._slots):
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        """Write what is left for the prediction log. Nothing is answered any more."""
        await self.jobs.close()
        if self._monitor is not None:
            await asyncio.to_thread(self._monitor.close)

    async def _prepare(self, plan: Plan) -> tuple[Placed, ...]:
        """Load what is new. Raises `ParbakeError`, and then nothing has changed."""
        placed: list[Placed] = []
        slots: list[Slot] = []
        have = {slot.entry: slot for slot in self._slots}
        try:
            for entry in plan.entries:
                if entry.placement == "auto":
                    placed.append(await self._place(entry))
                elif entry in have:
                    slots.append(have[entry])
                else:
                    slots.append(await self._load(entry))
                    await self._warm(slots[-1])
                    # Of a thousand each takes a millisecond, and the supervisor wants to know that this one is there.
                    await asyncio.sleep(0)
        except BaseException:
            self._release([slot for slot in slots if slot.entry not in have])
            raise
        if not placed:
            self._prepared[plan.generation] = slots
            self._pending_plan = plan
        return tuple(placed)

    async def _place(self, entry: PlanEntry) -> Placed:
        """Decide by measurement whether a model belongs into this process."""
        bundle = await asyncio.to_thread(read_bundle, entry.bundle, verify=entry.verify)
        size = sum(item.bytes for item in bundle.manifest.files)
        # Code of its own may crash, hang or hold the interpreter's lock: never where the requests come in.
        if bundle.contract.own_code or size > _INLINE_BYTES:
            return Placed(entry.name, entry.version, "process", 0.0, 0.0)
        goldens = bundle.goldens()
        if not goldens.rows:
            return Placed(entry.name, entry.version, "process", 0.0, 0.0)
        session = await asyncio.to_thread(self._open_session, bundle, entry)
        row_us = await asyncio.to_thread(time_one_row, session, goldens.inputs)
        if not self._hop_us:
            self._hop_us = await self._measure_hop()
        inline = row_us <= self._hop_us
        if inline:
            self._sessions[(entry.digest, entry.bundle)] = session
        return Placed(entry.name, entry.version, "inline" if inline else "process", row_us, self._hop_us)

    async def _measure_hop(self, calls: int = 25) -> float:
        """Median microseconds to another process and back."""
        if self.channel is None:
            return 0.0
        times: list[float] = []
        for _ in range(calls):
            started = time.perf_counter()
            await self.channel.call(Ping(), 5.0)
            times.append(time.perf_counter() - started)
        return sorted(times)[calls // 2] * 1e6

    def _open_session(self, bundle: StoredBundle, entry: PlanEntry) -> Session:
        check_digest(bundle, entry.digest)
        check_environment(bundle.environment, entry.allow_mismatch)
        session = Session(bundle, threads=1, allow_pickle=entry.allow_pickle)
        if entry.prove:
            check_goldens(session, bundle)
        return session

    async def _load(self, entry: PlanEntry) -> Slot:
        bundle = await asyncio.to_thread(read_bundle, entry.bundle, verify=entry.verify)
        check_digest(bundle, entry.digest)
        contract = bundle.contract
        default = default_record(contract, Records(contract))
        table = (
            open_table(Path(entry.table), bundle_digest=entry.digest, verify=False) if entry.table else None
        )
        if table is not None and table_facts(Path(entry.table)).digest != entry.table_digest:
            table.close()
            raise TableForeign(
                f"another table has been published at {entry.table} since it was verified",
                hint="parbake reload takes it in",
            )
        stats = self._stats.setdefault((entry.name, entry.version), Stats())
        batcher: Batcher | None = None
        runners: list[RunnerBackend] = []
        try:
            if entry.mode != "static":
                backends: list[Backend] = []
                if entry.placement == "inline":
                    session = self._sessions.pop((entry.digest, entry.bundle), None)
                    if session is None:
                        session = await asyncio.to_thread(self._open_session, bundle, entry)
                    backends.append(InlineBackend(session))
                    longest_s = _INLINE_BATCH_S
                else:
                    runners = [self._connect(entry, path) for path in entry.sockets]
                    backends.extend(runners)
                    longest_s = min(entry.deadline_ms / 4000, _LONGEST_BATCH_S)
                batcher = Batcher(
                    contract,
                    backends,
                    self._loop,
                    longest_s=longest_s,
                    max_queue_rows=entry.max_queue_rows,
                    max_batch_rows=entry.max_batch_rows,
                    delay_s=entry.batch_delay_ms / 1000,
                    cost=BatchCost(),
                    observe=stats.batch,
                )
                await self._connected(entry, runners, batcher)
        except BaseException:
            for runner in runners:
                runner.close()
            if table is not None:
                table.close()
            raise
        head = self._head(entry, contract.freshness_s) if batcher is not None else None
        recorder = (
            self._monitor.recorder(entry.name, entry.version, entry.mode, entry.digest)
            if self._monitor is not None
            else None
        )
        served = ServedVersion(
            entry.name,
            entry.version,
            contract,
            entry.digest,
            mode=entry.mode,
            table=table,
            batcher=batcher,
            deadline_s=entry.deadline_ms / 1000,
            stats=stats,
            default=default,
            head=head,
            recorder=recorder,
        )
        served.fallback = self._fallback(entry, default)
        slot = Slot(entry, served, runners, recorder=recorder)
        if table is not None:
            slot.lease = self._hold(entry)
        if head is not None and batcher is not None:
            slot.warmer = Warmer(served, head, batcher)
        if entry.table_expires:
            self._expire_in_time(slot)
        return slot

    def _hold(self, entry: PlanEntry) -> Lease | None:
        """Be told before the table of a version is changed where it lies."""
        if not self._leasing:
            try:
                # Without a handler the signal would end the process.
                self._loop.add_signal_handler(signal.SIGIO, self._give_tables_up)
            except (NotImplementedError, RuntimeError, ValueError):
                # Not in the main thread: a server in a notebook, say.
                return None
            self._leasing = True
        return hold_table(Path(entry.table))

    def _give_tables_up(self) -> None:
        """Somebody is about to change a table: let go of it before a page of it goes, and this process with it."""
        for slot in [*self._slots, *(slot for slots in self._prepared.values() for slot in slots)]:
            if slot.lease is None or not slot.lease.broken:
                continue
            log().error(
                "table.lost",
                deployment=slot.entry.name,
                table=slot.entry.table,
                hint="it is being changed where it lies: bake or copy it again, then parbake reload",
            )
            slot.served.lose_table()
            slot.lease.close()
            slot.lease = None
        self._on_change()

    def _fallback(self, entry: PlanEntry, default: bytes | None) -> Fallback | None:
        """What answers where the model of a version cannot."""
        name = entry.fallback
        if not name:
            return None
        if name == DEFAULT_ANSWER:
            return Fallback(name, default=default)
        if name == LAST_ANSWER:
            return Fallback(name, last=LastAnswers())
        return Fallback(name, other=lambda: self.find(name))

    def _head(self, entry: PlanEntry, freshness_s: float | None) -> Head | None:
        """What a version learns to keep baked, in hybrid mode."""
        if entry.mode != "hybrid" or not entry.head_rows or not entry.head_bytes:
            return None
        return Head(
            most_rows=entry.head_rows,
            most_bytes=entry.head_bytes,
            clock=time.monotonic,
            freshness_s=None if freshness_s is None else freshness_s * (1 - _FRESHNESS_MARGIN),
        )

    async def _warm(self, slot: Slot) -> None:
        """A release never starts cold: bake the head of the version that is being replaced."""
        entry = slot.entry
        before = [old for old in self._slots if old.entry.name == entry.name]
        same = [old for old in before if old.entry.version == entry.version]
        if slot.warmer is None or not before:
            return
        served, old = slot.served, (same or before)[-1].served
        if served.head is None or old.head is None or not takes(served.contract, old.contract):
            return
        started = time.monotonic()
        handover = Handover(served, served.head, old.head, same_bundle=served.digest == old.digest)
        share = await slot.warmer.before_traffic(handover, entry.warm_s)
        log().info(
            "head.warmed",
            deployment=entry.name,
            version=entry.version,
            rows=served.head.rows,
            baked=slot.warmer.baked,
            share_of_hits=round(share, 3),
            ms=round((time.monotonic() - started) * 1000),
        )

    async def _tend(self) -> None:
        """Drop from the heads what is not fresh any more, and bake in idle moments what soon would not be."""
        while True:
            fresh = [slot.served.contract.freshness_s or 60.0 for slot in self._slots if slot.warmer]
            await asyncio.sleep(min(_TEND_S, _FRESHNESS_MARGIN / 2 * min(fresh, default=60.0)))
            for slot in list(self._slots):
                if slot.recorder is not None:
                    slot.recorder.trim()
                head, warmer = slot.served.head, slot.warmer
                if head is None or warmer is None or slot.served.closed:
                    continue
                try:
                    # In steps, so that requests are answered in between.
                    while head.expire(_STEP) == _STEP or head.settle(_SETTLE):
                        await asyncio.sleep(0)
                except Exception:
                    log().exception("head.not_tended", deployment=slot.entry.name)
                if slot.entry.on_demand and slot.served.batcher is not None and not slot.served.batcher.up:
                    # Nobody is woken for what nobody waits for.
                    continue
                # A model may be slow: nobody else's records get old while it runs.
                if not self.draining and (slot.idling is None or slot.idling.done()):
                    slot.idling = self._loop.create_task(_use_idle_time(slot, warmer))

    async def _foretell(self) -> None:
        """Tell the supervisor what was predicted, where labels may come for it."""
        while True:
            await asyncio.sleep(_FORETELL_S)
            predictions, untold = self.routes.foretold(_FORETELL_ROWS)
            if (predictions or untold) and self.channel is not None:
                try:
                    # One at a time: a supervisor that is busy is not given more than it takes.
                    await self.channel.call(Foretell(predictions, untold), _WANT_S)
                except ParbakeError as error:
                    if self.channel.closed.is_set():
                        return
                    log().warning("predictions.not_told", error=error.message)
                except Exception:
                    log().exception("predictions.not_told")

    def _expire_in_time(self, slot: Slot) -> None:
        """Answer nothing from the table any more when the contract's freshness ends."""
        if slot.served.closed:
            return
        remaining_s = slot.entry.table_expires - time.time()
        if remaining_s > 0:
            # Wall clocks jump: look again now and then, instead of once at the end.
            self._loop.call_later(min(remaining_s, 5.0), self._expire_in_time, slot)
            return
        slot.served.expire()
        log().warning("table.expired", deployment=slot.entry.name, table=slot.entry.table)
        if slot in self._slots:
            self._on_change()

    def _connect(self, entry: PlanEntry, path: str) -> RunnerBackend:
        wedged_s = entry.deadline_ms / 1000 + 0.5

        def on_wedged(asked_at: float) -> None:
            if self.channel is not None:
                self.channel.tell(Wedged(path, asked_at))

        def at_work(request_id: int) -> bool:
            return marks.was_at_work(entry.marks, entry.slot, request_id)

        if not entry.on_demand:
            return RunnerBackend(entry.name, path, self._loop, wedged_s=wedged_s, on_wedged=on_wedged)
        if entry.pinned:
            return RunnerBackend(
                entry.name, path, self._loop, wedged_s=wedged_s, on_wedged=on_wedged, at_work=at_work
            )
        return SleepingBackend(
            entry.name,
            path,
            self._loop,
            wedged_s=wedged_s,
            on_wedged=on_wedged,
            want=lambda: self._want(path),
            at_work=at_work,
        )

    async def _want(self, path: str) -> None:
        """Have the model loaded that listens there."""
        if self.channel is None:
            raise NotReady("the supervisor is not there")
        await self.channel.call(Wanted(path), _WANT_S)

    async def _connected(self, entry: PlanEntry, runners: list[RunnerBackend], batcher: Batcher) -> None:
        """Connect to all runners, and from then on let the batcher know when they come and go."""
        for runner in runners:
            if isinstance(runner, SleepingBackend):
                batcher.wake = runner.wake
                runner.on_refused(batcher.refuse)
            runner.watch(on_up=batcher.backend_up, on_down=batcher.backend_down)
            runner.connect()
        limit = self._loop.time() + 30
        while not all(runner.up or isinstance(runner, SleepingBackend) for runner in runners):
            if self._loop.time() > limit:
                raise RunnerDown(f"the process of model {entry.name!r} does not accept connections")
            await asyncio.sleep(0.002)

    async def _commit(self, generation: int) -> None:
        """Switch, then wait until the versions that are no longer served have answered everything."""
        slots = self._prepared.pop(generation, None)
        if slots is None:
            raise NotReady(f"plan {generation} was not prepared")
        for slot in slots:
            # What was baked ahead may have waited for other versions, or other fronts.
            if slot.served.head is not None:
                while slot.served.head.expire(_STEP) == _STEP:
                    await asyncio.sleep(0)
        old, self._slots = self._slots, slots
        self._by_name = {}
        for slot in slots:
            self._by_name.setdefault(slot.served.name, []).append(slot.served)
        self._plan = self._pending_plan
        self.routes.follow(self._by_name)
        self._on_change()
        if self._tending is None:
            self._tending = self._loop.create_task(self._tend())
        kept = {id(slot) for slot in slots}
        gone = [slot for slot in old if id(slot) not in kept]
        while any(slot.served.pending for slot in gone):
            await asyncio.sleep(0.005)
        del old
        self._sessions.clear()
        self._release(gone)

    def _release(self, slots: list[Slot]) -> None:
        for slot in slots:
            slot.served.closed = True
            batcher, slot.served.batcher = slot.served.batcher, None
            if slot.idling is not None:
                slot.idling.cancel()
            for backend in slot.backends:
                backend.close()
            if batcher is not None:
                batcher.close()
            if slot.recorder is not None and self._monitor is not None:
                self._monitor.retire(slot.recorder)
            if slot.served.table is not None:
                slot.served.table.close()
            if slot.lease is not None:
                slot.lease.close()
        if slots:
            slots.clear()
            if self._giving_back is None:
                # A millisecond that nobody needs to wait for who is waiting for the swap already.
                self._giving_back = self._loop.call_later(_GIVE_BACK_S, self._give_back)

    def _give_back(self) -> None:
        self._giving_back = None
        give_memory_back()

    def _able(self) -> tuple[list[str], bool]:
        """Deployments whose versions can answer, and in front of none of which anybody waits; whether it is one."""
        able: list[str] = []
        if self.draining:
            return able, False
        for name, versions in self._by_name.items():
            ready = any(served.ready for served in versions)
            if ready and not any(s.batcher is not None and s.batcher.queued_rows for s in versions):
                able.append(name)
        return able, len(self._by_name) == 1

    def _counts(self, jobs: JobCounts | None) -> AllCounts:
        now_ms = int(time.time() * 1000)
        # A model that is loaded on demand has nothing to tell until it was asked for the first time.
        heads = {
            (slot.entry.name, slot.entry.version): head_counts(slot)
            for slot in self._slots
            if not slot.entry.on_demand or slot.served.stats.asked
        }
        return AllCounts(
            tuple(
                VersionCounts(name, version, stats.counts(now_ms), heads.get((name, version)))
                for (name, version), stats in self._stats.items()
                if (name, version) in heads or stats.asked
            ),
            self.connections(),
            dict(self.refused),
            self._log_rows(),
            self.clients(),
            self.routes.counts(),
            jobs,
        )

    def _log_rows(self) -> LogRows | None:
        if self._monitor is None or not self._monitor.logging:
            return None
        counts = self._monitor.counts()
        return LogRows(
            counts.written,
            counts.sampled_out,
            counts.dropped_ring,
            counts.dropped_disk,
            counts.files,
            counts.bytes,
        )

    def refuse(self, error: ParbakeError) -> None:
        """Count a request that reached no deployment."""
        self.refused[error.code] = self.refused.get(error.code, 0) + 1


async def _use_idle_time(slot: Slot, warmer: Warmer) -> None:
    freshness_s = slot.served.contract.freshness_s
    try:
        await warmer.when_idle(_TEND_S / 2, 0.0 if freshness_s is None else freshness_s / 5)
    except Exception:
        log().exception("head.not_warmed", deployment=slot.entry.name)


def head_counts(slot: Slot) -> HeadCounts | None:
    """What a version's head holds and did; None where nothing is learned."""
    head, flights = slot.served.head, slot.served.flights
    if head is None:
        return None
    return HeadCounts(
        head.rows,
        head.bytes,
        head.stored,
        head.evicted,
        head.refused,
        head.expired,
        slot.warmer.baked if slot.warmer is not None else 0,
        flights.joined if flights is not None else 0,
        head.found_below,
    )


def settle_memory() -> None:
    """Tell the garbage collector that what lives now stays, and to look at the rest less often.

    Requests make no reference cycles that last; looking at every loaded library again and again for them
    costs more than the requests.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def give_memory_back() -> None:
    """Collect garbage and hand freed memory back to the operating system."""
    gc.collect()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        # musl has no such function, and gives memory back by itself.
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
