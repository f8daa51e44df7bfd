"""The supervisor: starts fronts and runners, watches them, changes what is served, owns the metrics.

It answers no prediction itself. A change of models or tables is a new `Plan`: verified here, prepared by every
front beside the old one, then committed; if any part of that fails the old plan stays in force.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import sys
import time
from collections.abc import Awaitable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
from msgspec import Struct

from parbake.app.control import (
    Abort,
    AllCounts,
    Channel,
    Commit,
    Configure,
    DeadTold,
    Done,
    Drain,
    Foretell,
    GetCounts,
    GetJobs,
    GetMetrics,
    GetProfiles,
    GetRoutes,
    GetStatistics,
    HeadCounts,
    JobsTold,
    Label,
    LabelsTaken,
    Load,
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
    StopListening,
    Text,
    Unload,
    UseKeys,
    UseRoutes,
    VersionCounts,
    Wanted,
    Wedged,
    ask_one,
)
from parbake.app.follow import Follower, Following, Taken
from parbake.app.jobs import DeadRemoved, JobCounts, JobRemoved, JobsReport, JobsRetried
from parbake.app.keys import read_keys
from parbake.app.labels import Labelled, LabelStore
from parbake.app.plan import Placed, Plan, PlanEntry
from parbake.app.rooms import RoomModel, Rooms
from parbake.app.routes import (
    RouteBook,
    RouteChange,
    RouteCounts,
    RouteStatus,
    added,
    default_watch,
    rebalanced,
    share_of,
)
from parbake.app.routes import add_counts as add_route_counts
from parbake.app.state import queue_file
from parbake.app.wiring import TableFacts, front_count, open_table, table_facts
from parbake.contract.bundle import StoredBundle, read_bundle
from parbake.contract.model import Contract, TensorSpec
from parbake.contract.signatures import PublicKey, check_signed, read_trusted
from parbake.errors import (
    BundleError,
    Conflict,
    ModelNotFound,
    NotReady,
    ParbakeError,
    SettingsError,
    TableError,
    TableForeign,
    Unavailable,
)
from parbake.logs import log
from parbake.release.registry import is_reference, parse_reference
from parbake.runtime import cpu, memory
from parbake.runtime.confine import Confinement
from parbake.runtime.observation import Bins
from parbake.runtime.pool import Runner, RunnerPool, end_process
from parbake.serving.route import Route, Watch, check_watch
from parbake.settings import (
    DEADLINE_MS,
    DEFAULT_ANSWER,
    LAST_ANSWER,
    DeploymentSettings,
    Mode,
    Settings,
    WantedMode,
)

if TYPE_CHECKING:
    from parbake.app.auto import Pilot
    from parbake.app.inventory import ServerInventory
    from parbake.app.traffic import TrafficReport

_T = TypeVar("_T")

_RESTART_S: Final = 0.2
_LONGEST_RESTART_S: Final = 5.0
_START_S: Final = 30.0
_COUNTS_TIMEOUT_S: Final = 2.0
_COUNTS_EVERY_S: Final = 5.0
_QUEUE_S: Final = 10.0
"""Longest that a front may take to answer for the queue of jobs: its file may be busy, and it may be hung."""
_CHECK_EVERY_S: Final = 1.0
_REWARDS_S: Final = 2.0
"""How often the weights of bandits are looked at."""
_GROWN: Final = 1.5
"""How many times as large as after its start a runner must be to be replaced for its size."""
_SILENT_S: Final = 2.5
"""A front that does not answer twice for this long hangs, and is replaced."""


@dataclass(slots=True)
class FrontProcess:
    """One front: its process and the line to it."""

    number: int
    process: asyncio.subprocess.Process
    channel: Channel
    counts: AllCounts | None = None
    watcher: asyncio.Task[None] | None = field(default=None, repr=False)


@dataclass(slots=True)
class Target:
    """One configured version: what shall be served, and what is."""

    settings: DeploymentSettings
    bundle: str
    table: str
    name: str = ""
    version: str = ""
    loaded: bool = True
    mode: Mode | None = None
    """How to answer; None takes hybrid where there is a table, else dynamic."""
    auto: bool = False
    """Whether the mode follows the advisor."""
    waived: tuple[str, ...] = ()
    """Checks of the gate that this version need not pass, by somebody's word in the history."""
    reference: str = ""
    """Of a bundle that is a version in the registry: which; ``bundle`` is then where it lies."""
    registered: str = ""
    """Number of that version."""

    def take(self, taken: Taken) -> None:
        """Serve what the reference came to."""
        self.bundle, self.registered, self.reference = taken.path, taken.version, taken.reference


class VersionStatus(Struct, frozen=True):
    """One served version, for people and machines."""

    name: str
    version: str
    mode: str
    digest: str
    bundle: str
    table: str
    table_rows: int
    placement: str
    row_us: float
    hop_us: float
    owner: str
    purpose: str
    runner_pids: tuple[int, ...]
    runner_restarts: int
    auto: bool = False
    """Whether the mode follows the advisor."""
    why: str = ""
    """Why the mode was changed last, where the advisor did it."""
    requests: int = 0
    errors: int = 0
    """Of the requests, those that were refused or failed."""
    table_expires: float = 0.0
    """Unix time at which the table stops to be used; 0 for never."""
    head_rows: int = 0
    """Predictions that the learned heads of all fronts keep now."""
    rows: int = 0
    """Rows that were answered."""
    baked_rows: int = 0
    """Of those, the ones that were answered without the model."""
    state: str = ""
    """Of a model that is loaded on demand: asleep, loading, loaded, leaving, or pinned; "" for others."""
    memory_bytes: int = 0
    """Memory that it takes now."""
    last_used: float = 0.0
    """Unix time at which the model ran last; 0 for never."""
    loads: int = 0
    evictions: int = 0
    """Of those, how often it was put away again for want of memory."""
    last_request: float = 0.0
    """Unix time of the last request since the start; 0 for none."""
    share: float = 1.0
    """Of the requests that name no version: what the route gives it; without a route the last version has all."""


class Status(Struct, frozen=True):
    """The whole server."""

    pid: int
    generation: int
    started: float
    front_pids: tuple[int, ...]
    front_restarts: int
    spare_pid: int | None
    unloaded: tuple[str, ...]
    versions: tuple[VersionStatus, ...]
    memory_bytes: int = 0
    """Budget of the models that are loaded on demand; 0 for no limit."""
    room_pids: tuple[int, ...] = ()
    """Processes of those models."""
    following: tuple[Following, ...] = ()
    """Deployments whose bundle is a version in the registry."""


class Change(Struct, frozen=True, forbid_unknown_fields=True):
    """One thing to change when reloading: another bundle or table under a deployment."""

    name: str = ""
    bundle: str = ""
    table: str | None = None
    mode: WantedMode | None = None


class Arranged(Struct, frozen=True):
    """One version of a deployment, as a release wants it."""

    version: str
    bundle: str
    table: str = ""
    waived: tuple[str, ...] = ()
    """Checks of the gate that it need not pass."""


class Reloaded(Struct, frozen=True):
    """What a reload did."""

    generation: int
    changed: tuple[str, ...]
    seconds: float


@dataclass(slots=True)
class Resolved:
    """What targets come to: entries for a plan, and what status and metrics tell of them."""

    entries: list[PlanEntry] = field(default_factory=list)
    bundles: dict[tuple[str, str], StoredBundle] = field(default_factory=dict)
    table_rows: dict[tuple[str, str], int] = field(default_factory=dict)


class Supervisor:
    """Runs one server until `stop`. ``folder`` is for its sockets, and is its own."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        if not settings.deployments and not settings.server.empty:
            raise SettingsError(
                "nothing to serve", hint="parbake serve BUNDLE..., or [[deployments]] in parbake.toml"
            )
        self.settings = settings
        self._folder = folder
        self._keys: UseKeys | None = None
        """API keys in force; None where requests need none."""
        self._pool = RunnerPool(
            folder, Confinement(settings.server.runner_network, settings.server.runner_user)
        )
        self._rooms = Rooms(self._pool, settings.server.memory_bytes)
        self._targets = [_target(d) for d in settings.deployments]
        self._follower = Follower(settings)
        self._listener: socket.socket | None = None
        self._grpc_reserved: socket.socket | None = None
        self._fronts: list[FrontProcess] = []
        self._starting: set[asyncio.subprocess.Process] = set()
        self._front_restarts = 0
        self._gone = AllCounts(())
        self._gone_restarts: dict[tuple[str, str], int] = {}
        """Restarts of runners that are no longer there."""
        self._why: dict[str, str] = {}
        self._routes = RouteBook()
        self._labels = LabelStore()
        self.earned_elsewhere: dict[str, Mapping[str, tuple[float, float]]] = {}
        """By deployment and version, what labels have told other servers with the same store, as `rewards` has it."""
        self._plan = Plan(0)
        self._placed: dict[tuple[str, str], Placed] = {}
        self._bundles: dict[tuple[str, str], StoredBundle] = {}
        self._bins: dict[tuple[str, str, int], Bins | None] = {}
        """By digest of the champion, output and place: what values are counted by."""
        self._table_rows: dict[tuple[str, str], int] = {}
        self._runners: dict[PlanEntry, list[Runner]] = {}
        self._lock = asyncio.Lock()
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._watchers: set[asyncio.Task[None]] = set()
        """Of the fronts, those too that start one again."""
        self.started = time.time()
        self.port = 0
        self.grpc_port: int | None = None

    # Life ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start everything, and return when every model answers. Raises `ParbakeError`; then call `stop`."""
        self._keys = self._read_keys(1)
        self._listener = listen(self.settings.server.host, self.settings.server.port)
        self.port = self._listener.getsockname()[1]
        if self.settings.server.grpc_port is not None:
            self._grpc_reserved, self.grpc_port = reserve(
                self.settings.server.host, self.settings.server.grpc_port
            )
        if any(t.settings.placement == "process" or t.settings.load == "on-demand" for t in self._targets):
            self._pool.keep_spare()
        workers = front_count(self.settings.server)
        # A reload that is asked for now waits until there is something to reload.
        async with self._lock:
            resolving = asyncio.create_task(self._first_resolved())
            fronts = await asyncio.gather(
                *(self._start_front(number) for number in range(workers)), return_exceptions=True
            )
            self._fronts = [front for front in fronts if isinstance(front, FrontProcess)]
            for front in self._fronts:
                front.watcher = self._watcher(front)
            for front_or_error in fronts:
                if isinstance(front_or_error, BaseException):
                    resolving.cancel()
                    raise front_or_error
            try:
                resolved = await resolving
            finally:
                resolving.cancel()
            await self._apply(resolved)
        self._spawn(self._poll_counts())
        self._spawn(self._follow_advice())
        self._spawn(self._follow_rewards())
        self._spawn(self._follow_registry())
        self._spawn(self._check_fronts())
        self._spawn(self._check_runners())

    async def stop(self, *, drain: bool = True) -> None:
        """Drain the fronts (answer what was accepted), then end all processes."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        # The fronts close theirs: from then on nobody is let in whom no front would answer.
        if self._listener is not None:
            self._listener.close()
        if drain:
            timeout_s = self.settings.server.drain_timeout_s
            # The first front accepts what still waits in the kernel, when the others do not any more.
            await asyncio.gather(
                *(front.channel.call(StopListening(), timeout_s) for front in self._fronts[1:]),
                return_exceptions=True,
            )
            calls = (front.channel.call(Drain(), timeout_s) for front in self._fronts)
            for result in await asyncio.gather(*calls, return_exceptions=True):
                if isinstance(result, BaseException):
                    log().warning("front.not_drained", error=str(result))
        # Those too that start one again: nobody else would end it.
        for watcher in list(self._watchers):
            watcher.cancel()
        for front in self._fronts:
            await end_process(front.process)
            front.channel.close()
        await self._rooms.close()
        await self._pool.close()
        if self._grpc_reserved is not None:
            self._grpc_reserved.close()

    def end_now(self) -> None:
        """End all processes without waiting for anything."""
        self._stopping = True
        for process in (*(front.process for front in self._fronts), *self._starting):
            if process.returncode is None:
                process.kill()
        self._rooms.end_now()
        for runner in self._pool.runners:
            if runner.process is not None and runner.process.returncode is None:
                runner.process.kill()

    # Changes ---------------------------------------------------------------------------------------

    async def reload(self, changes: Sequence[Change] = ()) -> Reloaded:
        """Read bundles and tables again, with these changes, and serve what is new.

        Where changes are given, only the deployments that they name are looked at.

        Callers notice nothing: the old versions answer until the new ones are warm. Raises `ParbakeError`, and
        then everything stays as it was; but API keys, which are read again too, are in force if they were valid.
        """
        taken = await self._references(changes)
        async with self._lock:
            self._refuse_if_stopping()
            started = time.perf_counter()
            # First: who may ask no more shall not wait for a bundle that has a fault.
            await self._renew_keys()
            targets = [replace(target) for target in self._targets]
            old = {(e.name, e.version): e for e in self._plan.entries}
            for target in targets:
                if target.reference in taken:
                    target.take(taken[target.reference])
            named = [await asyncio.to_thread(self._change, targets, change, taken) for change in changes]
            resolved = await asyncio.to_thread(self._resolve, targets, only=frozenset(named))
            for name, change in zip(named, changes, strict=True):
                if change.mode is not None and not change.bundle and change.table is None:
                    # Who changes the mode changes nothing else.
                    self._refuse_other_bundles(resolved, name)
            await self._apply(resolved, targets)
            if taken or any(change.bundle for change in changes):
                await self._keep_references(taken.values())
            changed = tuple(
                f"{e.name}:{e.version}" for e in self._plan.entries if old.get((e.name, e.version)) != e
            )
            seconds = time.perf_counter() - started
            log().info(
                "reloaded", generation=self._plan.generation, changed=list(changed), ms=round(seconds * 1000)
            )
            return Reloaded(self._plan.generation, changed, seconds)

    def _read_keys(self, number: int) -> UseKeys | None:
        """The API keys, and a file of that number for what fronts count together. Raises `SettingsError`."""
        if not self.settings.server.api_keys:
            return None
        keys = read_keys(Path(self.settings.server.api_keys))
        if not keys:
            log().warning("keys.none", file=self.settings.server.api_keys, hint="parbake keys add NAME")
        rates = self._folder / f"rates-{number}"
        rates.touch(0o600)
        rates.write_bytes(bytes(8 * max(len(keys), 1)))
        return UseKeys(keys, str(rates))

    async def _renew_keys(self) -> None:
        """Read the API keys again, and put them in force in all fronts. Raises `SettingsError`."""
        before = self._keys
        if before is None:
            return
        number = int(Path(before.rates).name.partition("-")[2]) + 1
        keys = self._keys = await asyncio.to_thread(self._read_keys, number)
        if keys is None:
            return
        fronts = list(self._fronts)
        results = await asyncio.gather(
            *(front.channel.call(keys, 2 * _SILENT_S) for front in fronts), return_exceptions=True
        )
        for front, result in zip(fronts, results, strict=True):
            if isinstance(result, BaseException):
                log().error("front.without_keys", number=front.number, error=str(result))
                # It must not go on with keys that are no longer in force.
                _kill(front.process)
        Path(before.rates).unlink(missing_ok=True)
        if keys.keys != before.keys:
            log().info("keys.read", clients=len(keys.keys))

    async def arrange(self, name: str, versions: Sequence[Arranged]) -> None:
        """Serve exactly these versions of a deployment; the last one is for who names none, where there is no route.

        What is there already stays as it is; callers notice nothing. Raises `ModelNotFound`, and what loading a
        bundle raises; then everything stays as it was.
        """
        async with self._lock:
            self._refuse_if_stopping()
            mine = [target for target in self._targets if target.name == name]
            if not mine:
                raise self._no_deployment(name)
            wanted: list[Target] = []
            kept: set[tuple[str, str]] = set()
            for item in versions:
                bundle = str(Path(item.bundle).resolve())
                known = [
                    t for t in mine if t.version == item.version and str(Path(t.bundle).resolve()) == bundle
                ]
                if known and known[0].loaded:
                    kept.add((name, item.version))
                settings = msgspec.structs.replace(mine[-1].settings, version=item.version, bundle=bundle)
                wanted.append(
                    replace(known[0], loaded=True)
                    if known
                    else replace(
                        mine[-1],
                        settings=settings,
                        bundle=bundle,
                        table=item.table,
                        version=item.version,
                        waived=item.waived,
                        reference="",
                        registered="",
                    )
                )
            # A name given in the settings would follow the bundle; a version has to stay what it is called.
            for target in wanted:
                if not target.settings.version:
                    target.settings = msgspec.structs.replace(target.settings, version=target.version)
            if [(t.version, t.bundle, t.table) for t in wanted] == [
                (t.version, t.bundle, t.table) for t in mine
            ]:
                return
            at = self._targets.index(mine[0])
            others = [replace(target) for target in self._targets if target.name != name]
            targets = [*others[:at], *wanted, *others[at:]]
            resolved = await asyncio.to_thread(
                self._resolve, targets, only=frozenset((name,)), kept=frozenset(kept)
            )
            await self._apply(resolved, targets)

    @property
    def entries(self) -> tuple[PlanEntry, ...]:
        """The plan in force."""
        return self._plan.entries

    @property
    def pool(self) -> RunnerPool:
        """The processes of models."""
        return self._pool

    async def fetched(self, reference: str) -> Taken:
        """A version of the registry, with its bundle at hand. Raises what asking for it raises."""
        return await self._follower.find(reference)

    def followed(self, name: str) -> str:
        """The reference that a deployment follows, or ""."""
        return next((target.reference for target in self._targets if target.name == name), "")

    def default_entry(self, name: str) -> PlanEntry:
        """The version of a deployment for who names none. Raises `ModelNotFound`."""
        mine = [entry for entry in self._plan.entries if entry.name == name]
        if not mine:
            raise self._no_deployment(name)
        return mine[-1]

    def arranged(self, name: str, version: str) -> Arranged:
        """A version that is served, as `arrange` takes it. Raises `ModelNotFound`."""
        for target in self._targets:
            if (target.name, target.version) == (name, version):
                return Arranged(version, target.bundle, target.table, target.waived)
        raise self._no_deployment(name)

    def deployment_settings(self, name: str) -> DeploymentSettings:
        """The settings of a deployment. Raises `ModelNotFound`."""
        mine = [target.settings for target in self._targets if target.name == name]
        if not mine:
            raise self._no_deployment(name)
        return mine[-1]

    def trusted(self) -> Sequence[PublicKey] | None:
        """The keys one of which must have signed a bundle; None where nobody need have."""
        trusted_keys = self.settings.server.trusted_keys
        return read_trusted(Path(trusted_keys)) if trusted_keys else None

    def check_watch(self, name: str, watch: Watch) -> None:
        """Raise `InvalidInput` where the versions of a deployment have no such output or column."""
        entry = self.default_entry(name)
        check_watch(self._bundles[(name, entry.version)].contract, watch)

    def has_route(self, name: str) -> bool:
        """Whether a route is in force."""
        return self.in_force(name) is not None

    def in_force(self, name: str) -> Route | None:
        """The route in force, without what came of it."""
        return self._routes.get(name)

    async def set_route(self, name: str, change: RouteChange) -> RouteStatus:
        """Change how the requests of a deployment are shared out; in force in all fronts when this returns.

        Nothing is loaded, and no request fails. What is given back ends with this change, whatever others do
        meanwhile. Raises `ModelNotFound`, `Conflict`, `InvalidInput`.
        """
        async with self._lock:
            self._refuse_if_stopping()
            contracts = {
                version: bundle.contract
                for (deployment, version), bundle in self._bundles.items()
                if deployment == name
            }
            if not contracts:
                raise self._no_deployment(name)
            route = change.route
            if route is not None and route.watch is not None and route.champion in contracts:
                watch = await self._with_bins(route.watch, self._bundles[(name, route.champion)])
                change = msgspec.structs.replace(change, route=msgspec.structs.replace(route, watch=watch))
            revision = self._routes.plan(name, change, contracts)
            self._routes.enter(name, revision)
            revisions = self._routes.revisions(name)
            self._labels.watch(self._routes.in_force)
            await self._tell_all(UseRoutes(self._routes.in_force))
            log().info("route.changed", deployment=name, revision=revision.revision)
        return msgspec.structs.replace(await self.route(name), route=revision.route, revisions=revisions)

    async def _with_bins(self, watch: Watch, bundle: StoredBundle) -> Watch:
        """A watch with bins by the champion's goldens, which are read once: later its folder may be gone."""
        place = bundle.digest, watch.output, watch.place
        if watch.bins is None and place not in self._bins:
            found = await asyncio.to_thread(default_watch, watch, bundle)
            served = {bundle.digest for bundle in self._bundles.values()}
            self._bins = {known: bins for known, bins in self._bins.items() if known[0] in served}
            self._bins[place] = found.bins
        return watch if watch.bins is not None else msgspec.structs.replace(watch, bins=self._bins[place])

    async def route(self, name: str) -> RouteStatus:
        """The route of a deployment, and what came of it. Raises `ModelNotFound`."""
        revisions = self._routes.revisions(name)
        if not revisions and all(entry.name != name for entry in self._plan.entries):
            raise self._no_deployment(name)
        counts = await self._route_counts()
        route = self._routes.get(name)
        since = route.since if route is not None and route.watch is not None else -1
        observed = [o for o in counts.observed if (o.deployment, o.since) == (name, since)]
        return RouteStatus(
            name,
            route,
            revisions,
            counts.requests.get(name, {}),
            counts.shadows.get(name, {}),
            tuple(self._labels.labelled(item) for item in observed),
        )

    async def _route_counts(self) -> RouteCounts:
        """What came of the routes in all fronts, those that ended too: nothing here ever falls."""
        fronts = list(self._fronts)
        replies = await asyncio.gather(
            *(front.channel.call(GetRoutes(), _COUNTS_TIMEOUT_S) for front in fronts), return_exceptions=True
        )
        for front, reply in zip(fronts, replies, strict=True):
            if isinstance(reply, RoutesCounted):
                # For when it ends: what was seen stays.
                front.counts = msgspec.structs.replace(front.counts or AllCounts(()), routes=reply.counts)
        return add_route_counts(
            [self._gone.routes, *(front.counts.routes for front in self._fronts if front.counts is not None)]
        )

    def contract(self, name: str) -> Contract:
        """The contract of a deployment: of the champion of its route, or else of its last version.

        Raises `ModelNotFound`.
        """
        mine = {version: bundle.contract for (n, version), bundle in self._bundles.items() if n == name}
        if not mine:
            raise self._no_deployment(name)
        route = self._routes.get(name)
        return mine.get(route.champion if route is not None else "") or list(mine.values())[-1]

    def label(self, name: str, labels: Sequence[Labelled]) -> tuple[int, int]:
        """Join labels to the predictions of a deployment: how many found theirs, and how many did not.

        Raises `Conflict`, `InvalidInput`.
        """
        return self._labels.take(name, labels)

    def rewards(self, name: str) -> dict[str, tuple[float, float]]:
        """By version the rewards that labels have told of here, and what was missing to 1 each."""
        return self._labels.rewards(name)

    async def _follow_rewards(self) -> None:
        """Give the versions of a bandit's route weights by what labels say that they earned."""
        while True:
            await asyncio.sleep(_REWARDS_S)
            for route in self._routes.in_force:
                if route.kind != "bandit" or route.killed:
                    continue
                here, elsewhere = (
                    self.rewards(route.deployment),
                    self.earned_elsewhere.get(route.deployment, {}),
                )
                changed = rebalanced(route, added(here, elsewhere))
                if changed is None:
                    continue
                try:
                    await self.set_route(
                        route.deployment, RouteChange(changed, revision=self._routes.number(route.deployment))
                    )
                except ParbakeError as error:
                    log().warning("route.not_rebalanced", deployment=route.deployment, error=error.message)

    def _no_deployment(self, name: str) -> ModelNotFound:
        names = ", ".join(dict.fromkeys(t.name for t in self._targets))
        return ModelNotFound(f"no deployment {name[:80]!r}", hint=f"deployments: {names}")

    async def _tell_all(self, message: Message) -> None:
        """Have every front take note of something, and end those that do not."""
        fronts = list(self._fronts)
        results = await asyncio.gather(
            *(front.channel.call(message, 2 * _SILENT_S) for front in fronts), return_exceptions=True
        )
        for front, result in zip(fronts, results, strict=True):
            if isinstance(result, BaseException):
                log().error(
                    "front.not_told", number=front.number, call=type(message).__name__, error=str(result)
                )
                # It must not go on with what is no longer in force.
                _kill(front.process)

    async def set_loaded(self, name: str, loaded: bool) -> None:
        """Load a configured deployment (again, if it is), or unload it; the others stay as they are.

        Raises `ModelNotFound`, or what loading raises.
        """
        async with self._lock:
            self._refuse_if_stopping()
            targets = [replace(target) for target in self._targets]
            mine = [target for target in targets if target.name == name]
            if not mine:
                raise ModelNotFound(
                    f"no model {name[:80]!r} is configured",
                    hint=f"configured: {', '.join(dict.fromkeys(t.name for t in targets))}",
                )
            for target in mine:
                target.loaded = loaded
            await self._apply(
                await asyncio.to_thread(self._resolve, targets, only=frozenset([name])), targets
            )
            log().info("model.loaded" if loaded else "model.unloaded", deployment=name)

    async def _first_resolved(self) -> Resolved:
        """What the targets come to at the start, those in the registry too, however long it is away."""
        taken = await self._follower.begin([t.reference for t in self._targets if t.reference])
        for target in self._targets:
            if target.reference:
                target.take(taken[target.reference])
        resolved = await asyncio.to_thread(self._resolve, self._targets)
        await asyncio.to_thread(self._follower.took, taken.values())
        return resolved

    async def _references(self, changes: Sequence[Change]) -> dict[str, Taken]:
        """What references mean now that are changed to, or read again because of ``changes``.

        Where nothing is named, all are, as far as the registry answers. Raises what is said of one that was named.
        """
        wanted = [change.bundle for change in changes if is_reference(change.bundle)]
        for change in changes:
            if not change.bundle and change.table is None and change.mode is None:
                wanted += [t.reference for t in self._targets if t.name == change.name and t.reference]
        if changes:
            found = [await self._follower.find(reference) for reference in dict.fromkeys(wanted)]
            return {taken.reference: taken for taken in found}
        taken: dict[str, Taken] = {}
        for reference in dict.fromkeys(t.reference for t in self._targets if t.reference):
            try:
                meaning = (await self._follower.ask([reference]))[reference]
                meaning.check()
                taken[reference] = await self._follower.fetch(meaning)
            except Unavailable:
                # It has said so; what it came to before stays.
                break
        return taken

    async def _follow_registry(self) -> None:
        """Ask the registry now and then what is followed, and take in what has moved."""
        while True:
            if not self.settings.release.follow_s:
                return
            await asyncio.sleep(self._follower.delay_s())
            try:
                await self._look_at_registry()
            except Unavailable:
                # It has said so, and status and metrics tell since when.
                continue
            except Exception:
                log().exception("registry.failed")

    async def _look_at_registry(self) -> None:
        followed = [
            t.reference
            for t in self._targets
            if t.loaded and t.reference and parse_reference(t.reference).follows
        ]
        if not followed:
            return
        for meaning in self._follower.moved((await self._follower.ask(followed)).values()):
            fetched = False
            try:
                taken = await self._follower.fetch(meaning)
                fetched = True
                await self._take_in(taken)
            except ParbakeError as error:
                self._follower.refuse(meaning, error, fetched=fetched)

    async def _take_in(self, taken: Taken) -> None:
        """Serve what a reference means now. Raises `ParbakeError`, and then everything stays as it was."""
        async with self._lock:
            self._refuse_if_stopping()
            started = time.perf_counter()
            targets = [replace(target) for target in self._targets]
            mine = [target for target in targets if target.reference == taken.reference and target.loaded]
            if not mine:
                return
            for target in mine:
                target.take(taken)
            names = frozenset(target.name for target in mine)
            await self._apply(await asyncio.to_thread(self._resolve, targets, only=names), targets)
            await self._keep_references([taken])
            log().info(
                "alias.followed",
                reference=taken.reference,
                version=taken.version,
                digest=taken.digest,
                ms=round((time.perf_counter() - started) * 1000),
            )

    async def _keep_references(self, taken: Iterable[Taken]) -> None:
        """Remember what is served now, and put away what nobody serves any more."""
        await asyncio.to_thread(self._follower.took, list(taken))
        self._follower.forget([target.reference for target in self._targets])
        await asyncio.to_thread(self._follower.tidy, {entry.digest for entry in self._plan.entries})

    async def _follow_advice(self) -> None:
        """Where the mode is auto, ask the advisor now and then, and change the mode when it is sure."""
        from parbake.app.auto import Pilot

        pilots: dict[str, Pilot] = {}
        while True:
            await asyncio.sleep(self.settings.server.auto_s)
            for name in dict.fromkeys(t.name for t in self._targets if t.auto and t.loaded):
                try:
                    await self._consider(name, pilots.setdefault(name, Pilot()))
                except ParbakeError as error:
                    log().warning("advice.none", deployment=name, error=error.message)
                except Exception:
                    log().exception("advice.failed", deployment=name)

    async def _consider(self, name: str, pilot: Pilot) -> None:
        """Ask the advisor about one deployment, and follow it where the pilot says so."""
        from parbake.app.auto import ALL, ENOUGH_REQUESTS, Question, ask

        target = next(t for t in reversed(self._targets) if t.name == name and t.auto and t.loaded)
        entry = self._entry(name, target.version)
        report = (await self.traffic()).get(name)
        if entry is None or report is None:
            return
        requests = report.traffic.requests
        if requests < pilot.asked_at:
            # A front was started again, and its profile anew.
            pilot.asked_at = 0
        if requests < pilot.asked_at + ENOUGH_REQUESTS:
            return
        pilot.asked_at = requests
        share = pilot.table_share(*await self._answered(entry))
        if pilot.digest != entry.digest:
            pilot.digest, pilot.costs = entry.digest, None
        settings = target.settings
        contract = self._bundles[(entry.name, entry.version)].contract
        advised = await ask(
            Question(
                bundle=entry.bundle,
                name=name,
                traffic=report.traffic,
                mode=entry.mode,
                head_rows=settings.head_rows,
                # Without a default, static mode has no answer for keys that were never baked; and with one it
                # would answer that, whatever the table was made of.
                may_be_static=contract.default is not None and share >= ALL,
                deadline_ms=entry.deadline_ms,
                placement=settings.placement,
                allow_pickle=entry.allow_pickle,
                costs=pilot.costs,
            )
        )
        pilot.costs = advised.costs
        if pilot.hear(entry.mode, advised):
            await self._switch(entry, advised.mode, advised.reason)

    def _entry(self, name: str, version: str) -> PlanEntry | None:
        """What is in force of a version."""
        return next((e for e in self._plan.entries if (e.name, e.version) == (name, version)), None)

    async def _answered(self, entry: PlanEntry) -> tuple[int, int]:
        """Rows that a version has answered so far, and those of them from the prediction table."""
        found = next(
            (v for v in (await self.counts()).versions if (v.name, v.version) == (entry.name, entry.version)),
            None,
        )
        if found is None:
            return 0, 0
        baked = found.counts.baked_rows if entry.mode == "static" else 0
        return found.counts.rows, baked or (found.head.from_table if found.head is not None else 0)

    async def _switch(self, asked: PlanEntry, mode: Mode, why: str) -> None:
        """Change the mode of a deployment whose mode is auto, which it stays; ``asked`` is what the advice is on."""
        async with self._lock:
            self._refuse_if_stopping()
            targets = [replace(target) for target in self._targets]
            mine = [t for t in targets if (t.name, t.version) == (asked.name, asked.version) and t.auto]
            if not mine or self._entry(asked.name, asked.version) != asked:
                # Something else was put there since.
                return
            mine[0].mode = mode
            resolved = await asyncio.to_thread(self._resolve, targets, only=frozenset([asked.name]))
            self._refuse_other_bundles(resolved, asked.name)
            await self._apply(resolved, targets)
            self._why[asked.name] = why
            log().info("mode.changed", deployment=asked.name, before=asked.mode, now=mode, why=why)

    def _refuse_other_bundles(self, resolved: Resolved, name: str) -> None:
        """Raise `Conflict` where bundles or tables of a deployment are not those in force any more."""
        for entry in resolved.entries:
            now = self._entry(entry.name, entry.version)
            if entry.name != name or now is None:
                continue
            for what, path, found, was in (
                ("bundle", entry.bundle, entry.digest, now.digest),
                ("table", entry.table, entry.table_digest, now.table_digest),
            ):
                if found and was and found != was:
                    raise Conflict(
                        f"the {what} at {path} is another one than that in force",
                        hint="parbake reload takes it in; then change the mode",
                    )

    def _refuse_if_stopping(self) -> None:
        if self._stopping:
            raise NotReady("the server is stopping")

    def _change(self, targets: list[Target], change: Change, taken: dict[str, Taken]) -> str:
        """Take a change into the targets, and give the name of the deployment."""
        name = change.name
        if not name and is_reference(change.bundle):
            name = parse_reference(change.bundle).name
        if not name and change.bundle:
            name = read_bundle(change.bundle, verify=False).contract.name
        if not name and change.table and len({t.name for t in targets}) == 1:
            name = targets[0].name
        mine = [target for target in targets if target.name == name]
        if not mine and change.bundle and self.settings.server.empty:
            mine = [_target(DeploymentSettings(bundle=change.bundle, name=change.name or None), name)]
            targets += mine
        if not mine:
            raise ModelNotFound(
                f"no deployment {name[:80]!r}",
                hint=f"deployments: {', '.join(dict.fromkeys(t.name for t in targets))}",
            )
        # Of several versions the one that callers get by default changes.
        target = mine[-1]
        if change.bundle in taken:
            target.take(taken[change.bundle])
        elif change.bundle:
            target.bundle = str(Path(change.bundle).resolve())
            target.reference = target.registered = ""
        if change.table is not None:
            target.table = str(Path(change.table).resolve()) if change.table else ""
        if change.bundle or change.table:
            target.loaded = True
        elif change.mode is None:
            # Who asks for a deployment by its name wants it to answer, all of it.
            for version in mine:
                version.loaded = True
        if change.mode is not None:
            target.auto = change.mode == "auto"
            if change.mode != "auto":
                target.mode = change.mode
            elif target.mode is None:
                target.mode = "hybrid"
        return name

    def _resolve(
        self,
        targets: list[Target],
        *,
        only: frozenset[str] = frozenset(),
        kept: frozenset[tuple[str, str]] = frozenset(),
    ) -> Resolved:
        """Verify bundles and tables, and say what to serve. Reads files: call it in a thread.

        ``only`` names the deployments to be looked at (none: all); of the others what is in force stays. So do the
        versions ``kept``, whatever has become of their files.
        """
        resolved = Resolved()
        trusted_keys = self.settings.server.trusted_keys
        # Each time anew: whoever is trusted no more has nothing taken in.
        trusted = read_trusted(Path(trusted_keys)) if trusted_keys else ()
        entries = resolved.entries
        in_force = {(entry.name, entry.version): entry for entry in self._plan.entries}
        numbers: dict[str, int] = {}
        always = sum(target.settings.load == "always" for target in targets)
        # Those that are loaded on demand are many, and rarely at work at the same time.
        total = always + (always < len(targets)) or 1
        read = read_bundles(
            [
                t.bundle
                for t in targets
                if t.loaded
                and (not only or t.name in only or not t.name)
                and not ((t.name, t.version) in kept and (t.name, t.version) in in_force)
            ]
        )
        taken: set[tuple[str, str]] = set()
        for target in targets:
            settings = target.settings
            if not target.loaded:
                numbers[target.name] = numbers.get(target.name, 0) + 1
                continue
            identity = (target.name, target.version)
            if only and (target.name not in only or identity in kept) and identity in in_force:
                numbers[target.name] = numbers.get(target.name, 0) + 1
                entries.append(in_force[identity])
                taken.add(identity)
                resolved.bundles[identity] = self._bundles[identity]
                resolved.table_rows[identity] = self._table_rows.get(identity, 0)
                continue
            path = str(Path(target.bundle).resolve())
            bundle = read[path] if path in read else read_bundle(path)
            if trusted_keys:
                check_signed(bundle, trusted)
            has_pickle = any(step.kind == "pickle" for step in bundle.contract.steps)
            if has_pickle and not self.settings.server.allow_pickle:
                raise SettingsError(
                    f"{path} holds a pickle, which can run any code when it is loaded",
                    hint="--allow-pickle, if you trust whoever packed it",
                )
            registered = parse_reference(target.reference).name if target.reference else ""
            name = settings.name or registered or bundle.contract.name
            numbers[name] = numbers.get(name, 0) + 1
            if target.name and target.name != name:
                raise Conflict(
                    f"{path} holds model {name!r}, the deployment is {target.name!r}",
                    hint="set name for the deployment to serve another model under it",
                )
            target.name = name
            target.version = settings.version or target.registered or str(numbers[name])
            if (name, target.version) in taken:
                raise SettingsError(f"model {name!r} has two versions {target.version!r}")
            taken.add((name, target.version))
            on_demand = settings.load == "on-demand"
            if (settings.pinned or settings.group) and not on_demand:
                raise SettingsError(
                    f"{name!r} is {'pinned' if settings.pinned else 'in a group'}, which says nothing of a model that "
                    "is always loaded",
                    hint='load = "on-demand"',
                )
            mode = target.mode or ("hybrid" if target.table else "dynamic")
            table_digest, expires = "", 0.0
            if mode == "hybrid" and not target.table and not settings.head_rows:
                raise SettingsError(
                    f"mode hybrid of {name!r} needs a prediction table or a head that learns",
                    hint="--table TABLE, or head_rows above 0",
                )
            if mode == "static" or (mode == "hybrid" and target.table):
                if not target.table:
                    raise SettingsError(
                        f"mode {mode} of {name!r} needs a prediction table",
                        hint=f"parbake bake {target.bundle} --input FILE --out TABLE, then --table TABLE",
                    )
                facts, rows = self._verify_table(target, bundle)
                table_digest = facts.digest
                if bundle.contract.freshness_s is not None:
                    expires = facts.baked_at + bundle.contract.freshness_s
                resolved.table_rows[(name, target.version)] = rows
            resolved.bundles[(name, target.version)] = bundle
            runs = settings.runners
            entries.append(
                PlanEntry(
                    name=name,
                    version=target.version,
                    bundle=path,
                    digest=bundle.digest,
                    mode=mode,
                    placement="process" if on_demand else settings.placement,
                    deadline_ms=settings.deadline_ms or bundle.contract.deadline_ms or DEADLINE_MS,
                    max_queue_rows=settings.max_queue_rows,
                    max_batch_rows=settings.max_batch_rows,
                    batch_delay_ms=settings.batch_delay_ms,
                    table=str(Path(target.table).resolve()) if mode != "dynamic" and target.table else "",
                    table_digest=table_digest,
                    table_expires=expires,
                    # Never runners x threads > cores.
                    threads=settings.threads or max(1, cpu.quota() // (total * runs)),
                    allow_pickle=self.settings.server.allow_pickle,
                    allow_mismatch=self.settings.server.allow_mismatch or "environment" in target.waived,
                    prove="goldens" not in target.waived,
                    verify=bool(trusted_keys),
                    head_rows=settings.head_rows if mode == "hybrid" else 0,
                    head_bytes=settings.head_bytes if mode == "hybrid" else 0,
                    warm_s=settings.warm_s if mode == "hybrid" else 0.0,
                    fallback=settings.fallback,
                    on_demand=on_demand and mode != "static",
                    pinned=settings.pinned and mode != "static",
                    group=settings.group,
                )
            )
        for entry in entries:
            self._check_fallback(entry, resolved)
        return resolved

    def _check_fallback(self, entry: PlanEntry, resolved: Resolved) -> None:
        """Raise `SettingsError` where a version could not be answered for by its fallback."""
        if not entry.fallback or entry.fallback == LAST_ANSWER:
            return
        contract = resolved.bundles[(entry.name, entry.version)].contract
        if entry.fallback == DEFAULT_ANSWER:
            if contract.default is None:
                raise SettingsError(
                    f"the contract of {entry.name!r} has no default to fall back to",
                    hint="parbake pack --default, or another fallback",
                )
            return
        others = [e for e in resolved.entries if e.name == entry.fallback and e.name != entry.name]
        if not others:
            # One that is not loaded now may be again; until then the error stands.
            if any(t.name == entry.fallback != entry.name for t in self._targets):
                return
            raise SettingsError(
                f"{entry.name!r} falls back to {entry.fallback!r}, which is no other deployment",
                hint="default, last, or the name of another deployment",
            )
        other = resolved.bundles[(others[-1].name, others[-1].version)].contract
        for what, ours, theirs in (
            ("inputs", contract.inputs, other.inputs),
            ("outputs", contract.outputs, other.outputs),
        ):
            if [_form(spec) for spec in ours] != [_form(spec) for spec in theirs]:
                raise SettingsError(
                    f"{entry.name!r} cannot fall back to {entry.fallback!r}: their {what} differ",
                    hint="a fallback takes the same inputs and gives the same outputs, in the same order",
                )

    def _verify_table(self, target: Target, bundle: StoredBundle) -> tuple[TableFacts, int]:
        """What tells this table from others, and the number of its keys. Raises `TableError`."""
        path = Path(target.table)
        try:
            table = open_table(path, bundle_digest=bundle.digest, verify=True)
        except TableForeign as error:
            raise TableForeign(
                error.message,
                path=error.path,
                hint=f"parbake bake {target.bundle} --input FILE --out {target.table}",
            ) from error
        rows = table.rows
        table.close()
        return table_facts(path), rows

    async def _apply(self, wanted: Resolved, targets: list[Target] | None = None) -> None:
        """Prepare a plan on every front, then commit it."""
        self._routes.check(wanted.bundles)
        generation = self._plan.generation + 1
        started: list[Runner] = []
        before = dict(self._runners)
        try:
            in_force = {(now.name, now.version): now for now in self._plan.entries}
            entries = [_as_before(e, in_force.get((e.name, e.version))) for e in wanted.entries]
            entries = [
                self._rooms.place(e, wanted.bundles[(e.name, e.version)]) if e.on_demand else e
                for e in entries
            ]
            auto = [entry for entry in entries if entry.placement == "auto" and entry.mode != "static"]
            if auto:
                # One front measures, and all follow.
                reply = await self._first().channel.call(Prepare(Plan(generation, tuple(auto))))
                if isinstance(reply, Prepared):
                    self._placed.update({(p.name, p.version): p for p in reply.placed})
            resolved = await _all(self._with_runners(entry, started) for entry in entries)
            await self._rooms.prove(resolved, changed=bool(self._plan.generation))
            unloaded = tuple(
                dict.fromkeys(t.name for t in targets or self._targets if not t.loaded and t.name)
            )
            plan = Plan(generation, tuple(resolved), unloaded)
            await _all(front.channel.call(Prepare(plan)) for front in self._fronts)
        except BaseException:
            await asyncio.gather(
                *(front.channel.call(Abort(generation)) for front in self._fronts), return_exceptions=True
            )
            self._runners = before
            for runner in started:
                await self._pool.stop(runner)
            await self._rooms.keep(self._plan.entries)
            raise
        self._plan = plan
        self._bundles = wanted.bundles
        self._table_rows = wanted.table_rows
        if targets is not None:
            self._targets = targets
        # A front that dies here is started again with this plan.
        fronts = list(self._fronts)
        results = await asyncio.gather(
            *(front.channel.call(Commit(generation)) for front in fronts), return_exceptions=True
        )
        for front, result in zip(fronts, results, strict=True):
            if isinstance(result, BaseException):
                log().error("front.not_committed", number=front.number, error=str(result))
                # It must not go on with a plan that is no longer in force.
                if front.process.returncode is None:
                    front.process.kill()
        needed = [runner for entry in plan.entries for runner in self._runners.get(entry, [])]
        for entry in [entry for entry in self._runners if entry not in plan.entries]:
            gone = [r for r in self._runners.pop(entry) if not any(r is other for other in needed)]
            identity = (entry.name, entry.version)
            self._gone_restarts[identity] = self._gone_restarts.get(identity, 0) + sum(
                runner.restarts for runner in gone
            )
            for runner in gone:
                await self._pool.stop(runner)
        await self._rooms.keep(plan.entries)
        if any(entry.placement == "process" and entry.mode != "static" for entry in plan.entries):
            self._pool.keep_spare()
        else:
            await self._pool.drop_spare()

    async def _with_runners(self, entry: PlanEntry, started: list[Runner]) -> PlanEntry:
        if entry.mode == "static":
            return msgspec.structs.replace(entry, placement="inline") if entry.placement == "auto" else entry
        if entry.placement == "auto":
            placed = self._placed[(entry.name, entry.version)]
            entry = msgspec.structs.replace(entry, placement=placed.placement)
        if entry.placement != "process" or entry.sockets:
            return entry
        count = next(
            (t.settings.runners for t in self._targets if (t.name, t.version) == (entry.name, entry.version)),
            1,
        )
        for now, runners in list(self._runners.items()):
            # Another table or another way to answer from it: the processes that have the model stay.
            if now in self._plan.entries and _runs_the_same(now, entry):
                served = msgspec.structs.replace(entry, sockets=now.sockets)
                self._runners[served] = runners
                return served

        async def start() -> Runner:
            runner = await self._pool.start(
                entry.bundle,
                digest=entry.digest,
                threads=entry.threads,
                allow_pickle=entry.allow_pickle,
                allow_mismatch=entry.allow_mismatch,
                prove=entry.prove,
                verify=entry.verify,
            )
            started.append(runner)
            return runner

        runners = await _all(start() for _ in range(count))
        placed_entry = msgspec.structs.replace(entry, sockets=tuple(runner.socket for runner in runners))
        self._runners[placed_entry] = runners
        return placed_entry

    # Fronts ----------------------------------------------------------------------------------------

    def _first(self) -> FrontProcess:
        if not self._fronts:
            raise NotReady("no front process is running")
        return self._fronts[0]

    async def _start_front(self, number: int, *, at_once: bool = True) -> FrontProcess:
        """Start a front, which accepts connections ``at_once`` or with its first plan."""
        if self._listener is None or self._stopping:
            raise NotReady("the server is not listening")
        ours, theirs = socket.socketpair()
        descriptors = (theirs.fileno(), self._listener.fileno())
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "parbake.transports.front",
                *map(str, descriptors),
                pass_fds=descriptors,
                stdin=asyncio.subprocess.DEVNULL,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._starting.add(process)
        try:
            channel = await Channel.open(ours, self._handle)
            await channel.call(
                Configure(
                    self.settings.server,
                    self.grpc_port,
                    number,
                    at_once,
                    self._keys,
                    self.settings.queue,
                    str(queue_file(self.settings)),
                ),
                _START_S,
            )
        except BaseException:
            _kill(process)
            raise
        finally:
            self._starting.discard(process)
        return FrontProcess(number, process, channel)

    def _watcher(self, front: FrontProcess) -> asyncio.Task[None]:
        """What starts a front again when it ends."""
        watcher = asyncio.create_task(self._watch(front))
        # The loop does not keep tasks, and by then the front, which has it, is among those gone: garbage, mid-start.
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        return watcher

    async def _watch(self, front: FrontProcess) -> None:
        """Start a front again when it ends."""
        status = await front.process.wait()
        front.channel.close()
        if front.counts is not None:
            # What it counted stays counted; what it had open is closed.
            gone = add_counts([self._gone, front.counts])
            versions = tuple(
                msgspec.structs.replace(v, head=v.head.without_process()) if v.head is not None else v
                for v in gone.versions
            )
            jobs = gone.jobs.without_process() if gone.jobs is not None else None
            self._gone = msgspec.structs.replace(gone, versions=versions, connections=0, jobs=jobs)
        if front in self._fronts:
            self._fronts.remove(front)
        if not self._stopping:
            log().error("front.ended", number=front.number, status=status, restart_in_s=_RESTART_S)
        delay_s = _RESTART_S
        while not self._stopping:
            await asyncio.sleep(delay_s)
            replacement: FrontProcess | None = None
            try:
                replacement = await self._start_front(front.number, at_once=False)
                await self._catch_up(replacement)
                self._fronts.append(replacement)
            except Exception as error:
                delay_s = min(2 * delay_s, _LONGEST_RESTART_S)
                log().error(
                    "front.not_started", number=front.number, error=str(error), retry_in_s=round(delay_s, 1)
                )
                if replacement is not None:
                    _kill(replacement.process)
                    replacement.channel.close()
                continue
            self._front_restarts += 1
            replacement.watcher = self._watcher(replacement)
            return

    async def _check_fronts(self) -> None:
        """Replace fronts that are there and do nothing: nobody else would notice."""
        while True:
            await asyncio.sleep(_CHECK_EVERY_S)
            await asyncio.gather(*(self._check(front) for front in list(self._fronts)))

    async def _check_runners(self) -> None:
        """Replace runners that grow too large, while they still work: the kernel would choose its own moment."""
        half = memory.limit() // 2
        while True:
            await asyncio.sleep(_CHECK_EVERY_S)
            for entry, runners in list(self._runners.items()):
                settings = next(
                    (t.settings for t in self._targets if (t.name, t.version) == (entry.name, entry.version)),
                    None,
                )
                most = (settings.max_runner_bytes if settings is not None else 0) or half
                for runner in runners:
                    size = memory.resident(runner.pid) if runner.pid is not None else 0
                    # A model that is too large by itself would be so again.
                    if size <= most or size < _GROWN * runner.first_bytes:
                        continue
                    log().warning(
                        "runner.too_large", deployment=entry.name, pid=runner.pid, bytes=size, limit=most
                    )
                    try:
                        await self._pool.renew(runner)
                    except Exception as error:
                        log().error("runner.not_renewed", deployment=entry.name, error=str(error))

    async def _check(self, front: FrontProcess) -> None:
        # Twice, because on a machine that slept every time is up at once.
        for _ in range(2):
            try:
                await front.channel.call(Ping(), _SILENT_S)
                return
            except NotReady:
                if front.channel.closed.is_set() or front.process.returncode is not None:
                    # It ended, and whoever watches it knows.
                    return
        log().error("front.wedged", number=front.number, pid=front.process.pid, silent_s=2 * _SILENT_S)
        _kill(front.process)

    async def _catch_up(self, front: FrontProcess) -> None:
        """Have a front that was started late serve what the others serve.

        A change may be under way: if it comes into force meanwhile, the front follows it.
        """
        while True:
            plan, keys, routes = self._plan, self._keys, self._routes.in_force
            if not plan.generation:
                return
            if keys is not None:
                await front.channel.call(keys)
            await front.channel.call(UseRoutes(routes))
            try:
                await front.channel.call(Prepare(plan))
            except (BundleError, TableError) as error:
                # Bundle or table were changed where they lay. Callers of these get 503 until a reload looks at them.
                rest = await asyncio.to_thread(what_is_sound, plan)
                log().error(
                    "front.without_models",
                    number=front.number,
                    error=str(error),
                    without=[name for name in rest.unloaded if name not in plan.unloaded],
                    hint="parbake reload",
                )
                await front.channel.call(Prepare(rest))
            await front.channel.call(Commit(plan.generation))
            if plan is self._plan and keys is self._keys and routes == self._routes.in_force:
                return

    async def _handle(self, message: Message) -> Message:
        """Answer one call of a front."""
        if isinstance(message, Ping):
            return Done()
        if isinstance(message, GetMetrics):
            return Text(await self.metrics())
        if isinstance(message, GetStatistics):
            return await self.counts()
        if isinstance(message, Foretell):
            self._labels.foretold(message.predictions, message.untold)
            return Done()
        if isinstance(message, Label):
            return LabelsTaken(*self.label(message.deployment, message.labels))
        if isinstance(message, Load):
            await self.set_loaded(message.name, loaded=True)
            return Done()
        if isinstance(message, Unload):
            await self.set_loaded(message.name, loaded=False)
            return Done()
        if isinstance(message, Wedged):
            if not self._rooms.kill(message.socket, message.asked_at):
                self._pool.kill(message.socket, message.asked_at)
            return Done()
        if isinstance(message, Wanted):
            await self._rooms.wanted(message.socket)
            return Done()
        raise NotReady(f"the supervisor does not answer {type(message).__name__}")

    # What can be asked -----------------------------------------------------------------------------

    async def counts(self) -> AllCounts:
        """Counts over all fronts, of those that ended too."""
        await self._ask_counts()
        # Of the fronts that are there now: one that ended meanwhile is among those gone.
        return add_counts([self._gone, *(front.counts for front in self._fronts if front.counts is not None)])

    async def _ask_counts(self) -> None:
        fronts = list(self._fronts)
        replies = await asyncio.gather(
            *(front.channel.call(GetCounts(), _COUNTS_TIMEOUT_S) for front in fronts), return_exceptions=True
        )
        for front, reply in zip(fronts, replies, strict=True):
            if isinstance(reply, AllCounts):
                front.counts = reply

    async def jobs(self) -> JobsReport:
        """The jobs that there are. Raises `QueueAway`, `QueueTorn`, `Overloaded`, `NotReady`."""
        return (await self._ask_queue(GetJobs(), JobsTold, changes=False)).report

    async def retry_jobs(self, job_id: str = "", deployment: str = "") -> JobsRetried:
        """Have a dead job begun again, or all of them, or those of one deployment.

        Raises `JobNotFound`, `Conflict` where there is nothing to begin again, and as `jobs`; after a `NotReady` it may
        have happened.
        """
        return (await self._ask_queue(RetryJobs(job_id, deployment), RetryTold, changes=True)).retried

    async def remove_job(self, job_id: str) -> JobRemoved:
        """Take back a job that waits, or remove one that has an end.

        Raises `JobNotFound`, `Conflict`, or as `retry_jobs`.
        """
        return (await self._ask_queue(RemoveJob(job_id), RemoveTold, changes=True)).removed

    async def remove_dead(self, deployment: str = "") -> DeadRemoved:
        """Remove all dead jobs, or those of one deployment. Raises as `retry_jobs`."""
        return (await self._ask_queue(RemoveDead(deployment), DeadTold, changes=True)).removed

    async def _ask_queue(self, message: Message, kind: type[_T], *, changes: bool) -> _T:
        """What any front says for all: they have one queue."""
        fronts = [front.channel for front in self._fronts]
        try:
            reply = await ask_one(fronts, message, _QUEUE_S, changes=changes)
        except NotReady as error:
            if changes:
                error.hint = "parbake jobs shows how it is"
            raise
        if isinstance(reply, kind):
            return reply
        raise NotReady("no front is there to look into the queue of jobs")

    async def traffic(self) -> dict[str, TrafficReport]:
        """The traffic of each deployment, over the fronts that run now."""
        # It needs a library that takes its time to import.
        from parbake.app.traffic import report

        replies = await asyncio.gather(
            *(front.channel.call(GetProfiles(), _COUNTS_TIMEOUT_S) for front in self._fronts),
            return_exceptions=True,
        )
        parts = [reply.profiles for reply in replies if isinstance(reply, Profiles)]
        return await asyncio.to_thread(report, parts)

    async def metrics(self) -> str:
        """The page for Prometheus."""
        # Not needed to start, and a start should be quick.
        from parbake.app.metrics import (
            MOST_IN_DETAIL,
            RoutesState,
            RunnerState,
            ServerState,
            VersionState,
            render,
        )

        counts = await self.counts()
        versions = [
            VersionState(
                e.name,
                e.version,
                e.mode,
                e.digest,
                self._table_rows.get((e.name, e.version), 0) if e.mode != "dynamic" else 0,
                e.table_expires if e.table else None,
            )
            for e in self._plan.entries
        ]
        runners = [
            RunnerState(*identity, self._restarts(identity), sum(r.pid is not None for r in there))
            for identity in dict.fromkeys((e.name, e.version) for e in self._runners)
            for there in [self._runners_of(identity)]
        ]
        state = ServerState(
            self.started,
            len(self._fronts),
            self._front_restarts,
            self._plan.generation,
            self._follower.status(),
        )
        # What a profile says takes milliseconds to work out: of very many it would hold up those who want answers.
        few = len(self._rooms.models) <= MOST_IN_DETAIL
        traffic = {name: report.traffic for name, report in (await self.traffic()).items()} if few else {}
        labels = self._labels
        routes = RoutesState(self._routes.in_force, labels.accepted, labels.unknown, labels.untold)
        # With many models it takes a while, in which others want something too.
        return await asyncio.to_thread(
            render,
            state,
            versions,
            runners,
            counts,
            traffic,
            self._rooms.metrics(),
            routes if self._routes.any_ever else None,
        )

    def _runners_of(self, identity: tuple[str, str]) -> list[Runner]:
        """The runners of a version. While it changes there are old and new ones, and some are both."""
        runners = (r for e, rs in self._runners.items() if (e.name, e.version) == identity for r in rs)
        return list({id(runner): runner for runner in runners}.values())

    def _restarts(self, identity: tuple[str, str]) -> int:
        """How often runners of a version were started again, those that have been replaced since too."""
        return self._gone_restarts.get(identity, 0) + sum(r.restarts for r in self._runners_of(identity))

    def status(self, counts: AllCounts | None = None) -> Status:
        """What is served, by which processes, and (given ``counts``) what it was asked."""
        counted = {(v.name, v.version): v for v in counts.versions} if counts else {}
        autos = {(t.name, t.version) for t in self._targets if t.auto}
        versions: list[VersionStatus] = []
        last = {entry.name: entry.version for entry in self._plan.entries}
        for entry in self._plan.entries:
            model = self._rooms.model(entry)
            room_pid = model.room.pid if model is not None and model.state == "loaded" else None
            bundle = self._bundles[(entry.name, entry.version)]
            runners = self._runners.get(entry, [])
            placed = self._placed.get((entry.name, entry.version))
            loaded = [r.loaded.row_us for r in runners if r.loaded is not None]
            mine = counted.get((entry.name, entry.version))
            asked = mine.counts.outcomes if mine else {}
            versions.append(
                VersionStatus(
                    entry.name,
                    entry.version,
                    entry.mode,
                    entry.digest,
                    entry.bundle,
                    entry.table,
                    self._table_rows.get((entry.name, entry.version), 0) if entry.table else 0,
                    entry.placement,
                    round(_row_us(placed, loaded, model), 1),
                    round(placed.hop_us, 1) if placed else 0.0,
                    bundle.contract.owner,
                    bundle.contract.purpose,
                    (room_pid,) if room_pid else tuple(r.pid for r in runners if r.pid is not None),
                    model.room.restarts if model is not None else self._restarts((entry.name, entry.version)),
                    (entry.name, entry.version) in autos,
                    self._why.get(entry.name, ""),
                    sum(asked.values()),
                    sum(asked.values()) - asked.get("ok", 0),
                    entry.table_expires,
                    mine.head.rows if mine and mine.head else 0,
                    mine.counts.rows if mine else 0,
                    mine.counts.baked_rows if mine else 0,
                    "" if model is None else "pinned" if entry.pinned and room_pid else model.state,
                    model.bytes if room_pid and model is not None else 0,
                    model.last_used if model is not None else 0.0,
                    model.loads if model is not None else 0,
                    model.evictions if model is not None else 0,
                    mine.counts.last_ms / 1000 if mine else 0.0,
                    share_of(self._routes.get(entry.name), entry.version, last[entry.name]),
                )
            )
        return Status(
            os.getpid(),
            self._plan.generation,
            self.started,
            tuple(front.process.pid for front in self._fronts),
            self._front_restarts,
            self._pool.spare_pid,
            self._plan.unloaded,
            tuple(versions),
            self._rooms.budget,
            self._rooms.pids,
            self._follower.status(),
        )

    async def inventory(self) -> ServerInventory:
        """What is served or could be, on what."""
        from parbake.app.inventory import of_server

        status = self.status(await self.counts())
        unloaded = [(target.name, target.bundle) for target in self._targets if not target.loaded]
        return await asyncio.to_thread(of_server, status, dict(self._bundles), unloaded)

    async def _poll_counts(self) -> None:
        """Ask now and then, so that the counts of a front that dies are not lost with it."""
        while True:
            await asyncio.sleep(_COUNTS_EVERY_S)
            await self._ask_counts()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _all(works: Iterable[Awaitable[_T]]) -> list[_T]:
    """Do all of it at the same time and wait for every part; then raise what the first of them raised, if any."""
    results = await asyncio.gather(*works, return_exceptions=True)
    done: list[_T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    return done


def _target(settings: DeploymentSettings, name: str = "") -> Target:
    auto = settings.mode == "auto"
    # Learning costs little and is what there is to decide by: auto begins with it.
    mode: Mode | None = "hybrid" if settings.mode == "auto" else settings.mode
    reference = str(parse_reference(settings.bundle)) if is_reference(settings.bundle) else ""
    return Target(settings, settings.bundle, settings.table, name, mode=mode, auto=auto, reference=reference)


def read_bundles(paths: Sequence[str]) -> dict[str, StoredBundle]:
    """Read and verify many bundles at the same time, by their whole paths. Raises what the first that fails raises."""
    whole = list(dict.fromkeys(str(Path(path).resolve()) for path in paths))
    if not whole:
        return {}
    # One first, and alone: two threads in which msgspec meets a type for the first time crash the process.
    read = {whole[0]: read_bundle(whole[0])}
    with ThreadPoolExecutor(max(1, cpu.quota())) as crew:
        return read | dict(zip(whole[1:], crew.map(read_bundle, whole[1:]), strict=True))


def _as_before(entry: PlanEntry, now: PlanEntry | None) -> PlanEntry:
    """The entry with placement and runners of the one in force, where nothing else about it differs."""
    if now is not None:
        same = msgspec.structs.replace(now, placement=entry.placement, sockets=(), marks="", slot=0)
        if same == entry and entry.placement in ("auto", now.placement):
            return now
    return entry


def _row_us(placed: Placed | None, loaded: Sequence[float], model: RoomModel | None) -> float:
    """What a row costs, measured in a front, in a runner, or in a room."""
    if placed is not None and placed.row_us:
        return placed.row_us
    return loaded[0] if loaded else model.row_us if model is not None else 0.0


def _runs_the_same(now: PlanEntry, entry: PlanEntry) -> bool:
    """Whether the processes of one entry can run the other."""
    names = (
        "name",
        "version",
        "bundle",
        "digest",
        "placement",
        "threads",
        "allow_pickle",
        "allow_mismatch",
        "prove",
    )
    return all(getattr(now, name) == getattr(entry, name) for name in names)


def _form(spec: TensorSpec) -> tuple[object, ...]:
    """What callers see of a tensor."""
    return spec.name, spec.datatype, spec.shape


def what_is_sound(plan: Plan) -> Plan:
    """A plan without the versions whose bundle or table is not what it was. Reads files: call it in a thread.

    A version of hybrid mode does without its table.
    """
    entries: list[PlanEntry] = []
    for entry in plan.entries:
        try:
            if read_bundle(entry.bundle, verify=False).digest != entry.digest:
                continue
        except BundleError:
            continue
        if entry.table:
            path = Path(entry.table)
            try:
                open_table(path, bundle_digest=entry.digest, verify=False).close()
                sound = table_facts(path).digest == entry.table_digest
            except TableError:
                sound = False
            if not sound and entry.mode != "hybrid":
                continue
            if not sound:
                entry = msgspec.structs.replace(entry, table="", table_digest="", table_expires=0.0)
        entries.append(entry)
    lost = [entry.name for entry in plan.entries if all(entry.name != e.name for e in entries)]
    return Plan(plan.generation, tuple(entries), tuple(dict.fromkeys((*plan.unloaded, *lost))))


def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()


def add_counts(parts: Sequence[AllCounts]) -> AllCounts:
    """The sum of several fronts' counts."""
    merged: dict[tuple[str, str], VersionCounts] = {}
    refused: dict[str, int] = {}
    for part in parts:
        for item in part.versions:
            key = (item.name, item.version)
            if key in merged:
                merged[key].counts.add(item.counts)
                if item.head is not None:
                    mine = merged[key].head or HeadCounts()
                    merged[key] = msgspec.structs.replace(merged[key], head=mine.plus(item.head))
            else:
                # A copy: adding must not change what a front reported.
                merged[key] = msgspec.json.decode(msgspec.json.encode(item), type=VersionCounts)
        for code, count in part.refused.items():
            refused[code] = refused.get(code, 0) + count
    clients: dict[str, int] = {}
    for part in parts:
        for client, count in part.clients.items():
            clients[client] = clients.get(client, 0) + count
    logs = [part.log for part in parts if part.log is not None]
    rows = functools.reduce(LogRows.plus, logs) if logs else None
    routes = add_route_counts([part.routes for part in parts])
    queues = [part.jobs for part in parts if part.jobs is not None]
    jobs = functools.reduce(JobCounts.plus, queues) if queues else None
    return AllCounts(
        tuple(merged.values()), sum(part.connections for part in parts), refused, rows, clients, routes, jobs
    )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket that all fronts share. Raises `SettingsError` where the address is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(4096)
        listener.setblocking(False)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host}:{port}: {error.strerror or error}", hint="--port 0 takes a free port"
        ) from error
    return listener


def reserve(host: str, port: int) -> tuple[socket.socket, int]:
    """Hold a port that several gRPC servers will share, without listening on it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # A port that may be shared would be shared with another server too: this one says if it is taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
        held = socket.socket(family, kind, protocol)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(address)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host}:{port} for gRPC: {error.strerror or error}",
            hint="--grpc-port 0 takes a free port",
        ) from error
    return held, held.getsockname()[1]
