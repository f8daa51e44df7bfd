"""What supervisor and fronts say to each other: calls with replies, as JSON lines over a socket pair."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import msgspec
from msgspec import Struct

from parbake.app.jobs import DeadRemoved, JobCounts, JobRemoved, JobsReport, JobsRetried
from parbake.app.keys import ApiKey
from parbake.app.labels import Labelled
from parbake.app.plan import Placed, Plan
from parbake.app.routes import RouteCounts
from parbake.errors import NotReady, ParbakeError, by_code
from parbake.logs import log
from parbake.serving.observer import Foretold
from parbake.serving.route import Route
from parbake.serving.stats import Counts
from parbake.settings import QueueSettings, ServerSettings

_LIMIT_BYTES: Final = 64 * 1024 * 1024


class UseKeys(Struct, frozen=True, tag=True):
    """To a front: the API keys in force from now on; ``rates`` is a file with a number for each."""

    keys: tuple[ApiKey, ...]
    rates: str


class Configure(Struct, frozen=True, tag=True):
    """To a front: begin to listen."""

    settings: ServerSettings
    grpc_port: int | None
    number: int = 0
    """Of the front."""
    at_once: bool = True
    """Whether to accept connections now, or with the first plan: a front that takes the place of one that died
    would only say that it is not ready."""
    keys: UseKeys | None = None
    """None where requests need none."""
    queue: QueueSettings = QueueSettings()
    queue_file: str = ""
    """Where jobs are kept; "" where none are taken."""


class UseRoutes(Struct, frozen=True, tag=True):
    """To a front: the routes in force from now on, all of them."""

    routes: tuple[Route, ...]


class Ping(Struct, frozen=True, tag=True):
    """To the supervisor: answer at once, so that a front can measure what a hop costs."""


class Prepare(Struct, frozen=True, tag=True):
    """To a front: load what is new in this plan, change nothing yet."""

    plan: Plan


class Prepared(Struct, frozen=True, tag=True):
    """Reply to `Prepare`."""

    placed: tuple[Placed, ...] = ()


class Commit(Struct, frozen=True, tag=True):
    """To a front: serve the prepared plan from now on. Replied to when the old versions have drained."""

    generation: int


class Abort(Struct, frozen=True, tag=True):
    """To a front: drop the prepared plan."""

    generation: int


class StopListening(Struct, frozen=True, tag=True):
    """To a front: accept no more connections, another front takes in the last ones."""


class Drain(Struct, frozen=True, tag=True):
    """To a front: take no more, answer what was accepted, reply, end."""


class GetCounts(Struct, frozen=True, tag=True):
    """To a front: what has been counted."""


class HeadCounts(Struct, frozen=True):
    """The learned head of one version."""

    rows: int = 0
    bytes: int = 0
    stored: int = 0
    evicted: int = 0
    refused: int = 0
    """Answers that were not kept."""
    expired: int = 0
    warmed: int = 0
    """Rows baked for which nobody waited."""
    joined: int = 0
    """Rows answered with the answer to an identical one."""
    from_table: int = 0
    """Rows answered from the prediction table."""

    def plus(self, other: HeadCounts) -> HeadCounts:
        """The sum of both."""
        return HeadCounts(*(getattr(self, name) + getattr(other, name) for name in self.__struct_fields__))

    def without_process(self) -> HeadCounts:
        """What remains when the process is gone that had the head in its memory."""
        return msgspec.structs.replace(self, rows=0, bytes=0)


class LogRows(Struct, frozen=True):
    """What became of the rows that the prediction log was given, and what it takes on disk."""

    written: int = 0
    sampled_out: int = 0
    dropped_ring: int = 0
    dropped_disk: int = 0
    files: int = 0
    bytes: int = 0

    def plus(self, other: LogRows) -> LogRows:
        """The sum of two fronts; both look at the same folder."""
        return LogRows(
            self.written + other.written,
            self.sampled_out + other.sampled_out,
            self.dropped_ring + other.dropped_ring,
            self.dropped_disk + other.dropped_disk,
            max(self.files, other.files),
            max(self.bytes, other.bytes),
        )


class VersionCounts(Struct, frozen=True):
    """Counts of one version."""

    name: str
    version: str
    counts: Counts
    head: HeadCounts | None = None


class AllCounts(Struct, frozen=True, tag=True):
    """Reply to `GetCounts` and `GetStatistics`."""

    versions: tuple[VersionCounts, ...]
    connections: int = 0
    refused: dict[str, int] = {}
    """Requests that reached no deployment, by error code."""
    log: LogRows | None = None
    clients: dict[str, int] = {}
    """Requests that were let in, by the name of their API key."""
    routes: RouteCounts = RouteCounts()
    """Of deployments that have or had a route."""
    jobs: JobCounts | None = None
    """None where there never was a job."""


class GetProfiles(Struct, frozen=True, tag=True):
    """To a front: the profiles of its traffic."""


class Profiles(Struct, frozen=True, tag=True):
    """Reply to `GetProfiles`: per deployment what `TrafficProfile.from_bytes` reads."""

    profiles: dict[str, bytes] = {}


class GetRoutes(Struct, frozen=True, tag=True):
    """To a front: what came of its routes."""


class RoutesCounted(Struct, frozen=True, tag=True):
    """Reply to `GetRoutes`."""

    counts: RouteCounts


class Foretell(Struct, frozen=True, tag=True):
    """To the supervisor: predictions that labels may come for, by deployment; some there was no room for."""

    predictions: dict[str, tuple[Foretold, ...]]
    untold: int = 0


class Label(Struct, frozen=True, tag=True):
    """To the supervisor: what was true, of predictions of a deployment."""

    deployment: str
    labels: tuple[Labelled, ...]


class LabelsTaken(Struct, frozen=True, tag=True):
    """Reply to `Label`."""

    accepted: int
    unknown: int


class GetJobs(Struct, frozen=True, tag=True):
    """To a front: the jobs that there are."""


class JobsTold(Struct, frozen=True, tag=True):
    """Reply to `GetJobs`."""

    report: JobsReport


class RetryJobs(Struct, frozen=True, tag=True):
    """To a front: have a dead job begun again; without ``id`` all of a deployment, or of all."""

    id: str = ""
    deployment: str = ""


class RetryTold(Struct, frozen=True, tag=True):
    """Reply to `RetryJobs`."""

    retried: JobsRetried


class RemoveJob(Struct, frozen=True, tag=True):
    """To a front: take a job back, or remove it."""

    id: str


class RemoveTold(Struct, frozen=True, tag=True):
    """Reply to `RemoveJob`."""

    removed: JobRemoved


class RemoveDead(Struct, frozen=True, tag=True):
    """To a front: remove what was given up, of a deployment, or of all for ""."""

    deployment: str = ""


class DeadTold(Struct, frozen=True, tag=True):
    """Reply to `RemoveDead`."""

    removed: DeadRemoved


class GetMetrics(Struct, frozen=True, tag=True):
    """To the supervisor: the page for Prometheus."""


class Text(Struct, frozen=True, tag=True):
    """A text."""

    text: str


class GetStatistics(Struct, frozen=True, tag=True):
    """To the supervisor: counts over all fronts."""


class Load(Struct, frozen=True, tag=True):
    """To the supervisor: load a configured deployment, or load it again."""

    name: str


class Unload(Struct, frozen=True, tag=True):
    """To the supervisor: unload a deployment."""

    name: str


class Wedged(Struct, frozen=True, tag=True):
    """To the supervisor: a runner did not answer in time what it was asked at ``asked_at`` (of `time.monotonic`)."""

    socket: str
    asked_at: float


class Wanted(Struct, frozen=True, tag=True):
    """To the supervisor: load the model that listens there. Replied to when it does."""

    socket: str


class Done(Struct, frozen=True, tag=True):
    """Reply to whatever has no answer of its own."""


class Failed(Struct, frozen=True, tag=True):
    """Reply: an error, by the code of its class."""

    code: str
    message: str
    hint: str = ""
    path: str = ""


Message = (
    Configure
    | UseKeys
    | UseRoutes
    | Ping
    | Prepare
    | Prepared
    | Commit
    | Abort
    | Drain
    | StopListening
    | GetCounts
    | AllCounts
    | GetProfiles
    | Profiles
    | GetRoutes
    | RoutesCounted
    | Foretell
    | Label
    | LabelsTaken
    | GetJobs
    | JobsTold
    | RetryJobs
    | RetryTold
    | RemoveJob
    | RemoveTold
    | RemoveDead
    | DeadTold
    | GetMetrics
    | Text
    | GetStatistics
    | Load
    | Unload
    | Wedged
    | Wanted
    | Done
    | Failed
)


class Envelope(Struct, frozen=True):
    """A numbered call, or the reply to the call of that number."""

    id: int
    reply: bool
    body: Message


Handler = Callable[[Message], Awaitable[Message]]


class Channel:
    """One end of the line. Both ends may call; a call waits for its reply."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handler: Handler) -> None:
        self._reader = reader
        self._writer = writer
        self._handler = handler
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._encoder = msgspec.json.Encoder()
        self._decoder = msgspec.json.Decoder(Envelope)
        self._tasks: set[asyncio.Task[None]] = set()
        self.closed = asyncio.Event()
        self._spawn(self._read())

    @classmethod
    async def open(cls, end: socket.socket, handler: Handler) -> Channel:
        """A channel over one end of a socket pair."""
        end.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=end, limit=_LIMIT_BYTES)
        return cls(reader, writer, handler)

    async def call(self, message: Message, timeout_s: float | None = None) -> Message:
        """Send a call and wait for the reply. Raises what the other end raised, `NotReady` if it is gone."""
        number = next(self._ids)
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        if self.closed.is_set():
            raise NotReady("the other process has ended")
        self._waiting[number] = future
        try:
            self._send(Envelope(number, False, message))
            reply = await asyncio.wait_for(future, timeout_s)
        except TimeoutError as error:
            raise NotReady(f"no reply to {type(message).__name__} within {timeout_s} s") from error
        finally:
            self._waiting.pop(number, None)
        if isinstance(reply, Failed):
            raise by_code(reply.code, reply.message, hint=reply.hint, path=reply.path)
        return reply

    def tell(self, message: Message) -> None:
        """Send a call whose reply nobody waits for."""
        if not self.closed.is_set():
            self._send(Envelope(next(self._ids), False, message))

    def close(self) -> None:
        """Hang up."""
        self._writer.close()

    def _send(self, envelope: Envelope) -> None:
        self._writer.write(self._encoder.encode(envelope) + b"\n")

    def _spawn(self, work: Awaitable[None]) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                envelope = self._decoder.decode(line)
                if envelope.reply:
                    future = self._waiting.get(envelope.id)
                    if future is not None and not future.done():
                        future.set_result(envelope.body)
                else:
                    self._spawn(self._answer(envelope))
        except ConnectionError:
            log().debug("control.reset")
        finally:
            self.closed.set()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(NotReady("the other process has ended"))

    async def _answer(self, envelope: Envelope) -> None:
        try:
            body = await self._handler(envelope.body)
        except ParbakeError as error:
            body = failure_of(error)
        except Exception as error:
            # The caller waits: it gets a line, the log gets the traceback.
            log().exception("control.failed", call=type(envelope.body).__name__)
            body = Failed("error", f"{type(error).__name__}: {error}")
        if not self.closed.is_set():
            self._send(Envelope(envelope.id, True, body))


async def ask_one(
    channels: Iterable[Channel], message: Message, timeout_s: float, *, changes: bool
) -> Message | None:
    """What one of several says for all, who can answer alike; None where none is there.

    Where it ``changes`` something, nobody else is asked after one that falls silent: it may be at work on it still.
    Raises what the other end raised, `NotReady` if nobody answers.
    """
    failure: NotReady | None = None
    for channel in channels:
        if channel.closed.is_set():
            continue
        try:
            return await channel.call(message, timeout_s)
        except NotReady as error:
            if changes:
                raise NotReady(f"{error.message}: what was asked may have happened all the same") from error
            failure = error
    if failure is not None:
        raise failure
    return None


def failure_of(error: ParbakeError) -> Failed:
    """An error as a message."""
    return Failed(error.code, error.message, error.hint, error.path)
