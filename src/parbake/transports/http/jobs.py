"""Jobs over HTTP: ``Prefer: respond-async`` (RFC 7240) makes a request for a prediction one, ``/v2/jobs`` has the rest.

The answer to a job is the reply that its request would have got: when its turn comes, the same handler answers it, with
nobody behind the connection but the queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from time import perf_counter
from typing import Final, Literal

import msgspec
from msgspec import Struct

from parbake.app.front import Front
from parbake.app.jobs import LONGEST_KEY, LONGEST_WAIT_S
from parbake.errors import InvalidInput, ParbakeError, RouteNotFound
from parbake.queue.model import Form, Job, Reply, Request
from parbake.transports.http.endpoint import PredictionEndpoint, fail_unexpectedly
from parbake.transports.http.protocol import JSON, Exchange, Handler, Head, allow, preferences
from parbake.transports.http.routed import RoutedEndpoint
from parbake.transports.keys import EVERYBODY, Gate, Holder, check_deployment

_PREFIX: Final = "/v2/jobs/"
_KEPT: Final = frozenset(
    (
        b"accept-encoding",
        b"content-encoding",
        b"content-type",
        b"inference-header-content-length",
        b"x-request-id",
    )
)
"""Headers that read the body, or show in the answer. Those that a route goes by are kept too."""
_NEVER: Final = frozenset(
    (
        b"authorization",
        b"cookie",
        b"idempotency-key",
        b"prefer",
        b"proxy-authorization",
        b"x-api-key",
    )
)
"""What is no business of a disk, or would make a job of the job, whatever a route goes by."""
_OWN: Final = frozenset((b"content-length", b"connection", b"content-type"))
_AGAIN: Final = (b"retry-after", b"1")
_POST: Final = b"POST"


class JobBody(Struct, frozen=True):
    """A job as its caller is told of it."""

    id: str
    state: Literal["queued", "running", "done", "failed", "cancelled", "dead"]
    model_name: str
    attempts: int
    """How often it was begun."""
    age_s: float
    ahead: int
    """Unanswered jobs of the deployment that came before it."""
    created: float
    """Unix time."""
    result: str
    """Where the answer is, or will be."""
    model_version: str | None = None
    """As the request named it."""
    status: int | None = None
    """HTTP status of the answer."""
    error: str | None = None
    """What was wrong the last time that it was begun."""


class JobPages:
    """What callers ask of jobs in one front. ``gate`` has the API keys in force, where any are needed."""

    def __init__(self, front: Front, answer: Handler, gate: Gate | None = None) -> None:
        self._front = front
        self._gate = gate
        self._answer = answer
        self._tasks: set[asyncio.Task[None]] = set()
        front.jobs.answer = self.replay

    # A request whose caller does not wait ----------------------------------------------------------

    def take(self, exchange: Exchange, parts: list[str], handlers: Mapping[bytes, Handler]) -> bool:
        """Make a request for a prediction a job; False where it is none, or no jobs are taken.

        ``handlers`` has who answers a path.
        """
        match parts:
            case ["v2", "models", name, "infer"] | ["predict", name]:
                version = ""
            case ["v2", "models", name, "versions", version, "infer"] | [
                "predict",
                name,
                "versions",
                version,
            ]:
                pass
            case _:
                return False
        form: Form = "predict" if parts[0] == "predict" else "infer"
        endpoint = getattr(handlers.get(_path(form, name, version)), "__self__", None)
        if not self._front.jobs.on or not isinstance(endpoint, PredictionEndpoint | RoutedEndpoint):
            return False
        key = _key(exchange)
        # Without a key nothing is known of it, and it is refused in the same turn.
        if not key and not endpoint.check(exchange):
            return True
        kept = _KEPT | endpoint.headers - _NEVER if isinstance(endpoint, RoutedEndpoint) else _KEPT
        request = Request(
            name,
            version,
            form,
            exchange.query,
            tuple((header, value) for header, value in exchange.headers.items() if header in kept),
            exchange.body,
        )

        async def accept() -> None:
            jobs = self._front.jobs
            if key:
                # The model may be another one since the job was taken: only a new one must fit it.
                job = await jobs.take_once(request, exchange.client, key, lambda: endpoint.check(exchange))
                if job is None:
                    return
            else:
                job = await jobs.take(request, exchange.client, "")
            headers = ((b"location", _url(job.id)), (b"preference-applied", b"respond-async"))
            exchange.reply(202, _shown(job), JSON, headers)

        self._later(exchange, accept)
        return True

    # Asking for jobs -------------------------------------------------------------------------------

    def page(self, exchange: Exchange, job_id: str, what: str) -> None:
        """``/v2/jobs/ID`` and ``/v2/jobs/ID/result``. Raises `ParbakeError`."""
        methods = (b"GET", b"HEAD", b"DELETE") if not what else (b"GET", b"HEAD")
        if what not in ("", "result"):
            raise RouteNotFound(f"a job has no {what[:60]!r}", hint=f"GET {_PREFIX}{job_id[:60]}/result")
        allow(exchange, *methods)
        jobs, owner = self._front.jobs, exchange.client
        holder = exchange.head.holder or EVERYBODY
        wait_s = 0.0 if exchange.method == b"DELETE" else _wait_s(exchange)

        def gone() -> bool:
            return exchange.closed

        async def check() -> None:
            if holder.deployments:
                check_deployment(holder, (await jobs.find(job_id, owner)).deployment)

        async def show() -> None:
            await check()
            if exchange.method == b"DELETE":
                job = await jobs.cancel(job_id, owner)
            else:
                job = await jobs.find(job_id, owner, wait_s, gone)
            exchange.reply(200, _shown(job), JSON, () if job.finished else (_AGAIN,))

        async def result() -> None:
            await check()
            found = await jobs.result(job_id, owner, wait_s, gone)
            if isinstance(found, Job):
                exchange.reply(202, _shown(found), JSON, (_AGAIN, (b"location", _url(job_id))))
                return
            kind = next((value for name, value in found.headers if name == b"content-type"), JSON)
            rest = tuple(item for item in found.headers if item[0] not in _OWN)
            exchange.reply(found.status, found.body, kind, rest)

        self._later(exchange, result if what else show)

    # Answering -------------------------------------------------------------------------------------

    def replay(self, request: Request, owner: str, done: Callable[[Reply], None]) -> Callable[[], None]:
        """Have a request answered as if it had just come in, behind all whose callers wait."""
        head = Head()
        head.headers = {**dict(request.headers), b"parbake-priority": b"low"}
        path = _path(request.form, request.deployment, request.version)
        head.finish(path + b"?" + request.query if request.query else path, _POST, True)
        # Whatever was kept of it: a job never makes another one.
        head.later, head.route = False, path
        desk = _Desk(done)
        exchange = Exchange()
        exchange.protocol, exchange.place, exchange.head = desk, 0, head
        exchange.body = request.body
        exchange.arrived = perf_counter()
        exchange.patience_s = self._front.jobs.patience_s
        try:
            head.holder = self._holder(owner, request.deployment)
        except ParbakeError as error:
            self._front.refuse(error)
            exchange.fail(error)
            return desk.leave
        self._answer(exchange)
        return desk.leave

    def _holder(self, owner: str, deployment: str) -> Holder | None:
        """Whose job it is, by the keys as they are now. Raises `Unauthenticated`, `NotAllowed`."""
        if self._gate is None:
            return Holder(owner) if owner else None
        holder = self._gate.named(owner)
        check_deployment(holder, deployment)
        return holder

    # Later -----------------------------------------------------------------------------------------

    def _later(self, exchange: Exchange, work: Callable[[], Awaitable[None]]) -> None:
        async def answer() -> None:
            try:
                await work()
            except ParbakeError as error:
                self._front.refuse(error)
                exchange.fail(error)
            except Exception:
                self._front.refuse(fail_unexpectedly(exchange))

        task = asyncio.ensure_future(answer())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Desk:
    """Stands where a client's connection would, and takes one reply."""

    peer = ""
    alone = False

    def __init__(self, done: Callable[[Reply], None]) -> None:
        self._done = done
        self.closed = False

    def send(self, exchange: Exchange, data: bytes) -> None:
        """Take the reply apart, and hand it on."""
        if self.closed:
            return
        self.closed = True
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.split(b"\r\n")
        headers = tuple(
            (name, value)
            for name, _, value in (line.partition(b": ") for line in lines)
            if name not in _FRAMING
        )
        self._done(Reply(int(first.split(b" ", 2)[1]), headers, body))

    def soon(self, callback: Callable[[], None]) -> None:
        """See `Connection`."""
        asyncio.get_running_loop().call_soon(callback)

    def abort(self) -> None:
        """See `Connection`: nobody is there to hang up on."""

    def leave(self) -> None:
        """Wait for the reply no longer."""
        self.closed = True


_FRAMING: Final = frozenset((b"content-length", b"connection"))


def _path(form: Form, name: str, version: str) -> bytes:
    """The URL of a request."""
    numbered = f"/versions/{version}" if version else ""
    return (
        f"/predict/{name}{numbered}" if form == "predict" else f"/v2/models/{name}{numbered}/infer"
    ).encode()


def _url(job_id: str) -> bytes:
    return (_PREFIX + job_id).encode()


def _shown(job: Job) -> bytes:
    body = JobBody(
        job.id,
        job.state,
        job.deployment,
        job.attempts,
        round(job.age_s, 3),
        job.ahead,
        round(job.created, 3),
        f"{_PREFIX}{job.id}/result",
        job.version or None,
        job.status or None,
        job.error or None,
    )
    return msgspec.json.encode({name: v for name, v in msgspec.structs.asdict(body).items() if v is not None})


def _key(exchange: Exchange) -> str:
    """The idempotency key of a request, "" for none. Raises `InvalidInput`."""
    value = exchange.headers.get(b"idempotency-key")
    if value is None:
        return ""
    if not 0 < len(value) <= LONGEST_KEY:
        raise InvalidInput(
            f"an idempotency key has 1 to {LONGEST_KEY} characters, got {len(value)}",
            path="idempotency-key",
            hint="a random UUID for each request does well",
        )
    return value.decode("latin-1")


def _wait_s(exchange: Exchange) -> float:
    """How long a caller would wait for the job to finish. Raises `InvalidInput`."""
    for part in exchange.query.split(b"&"):
        name, _, value = part.partition(b"=")
        if name == b"wait":
            return _seconds(value, "wait")
    return _seconds(preferences(exchange.headers).get(b"wait", b"0"), "prefer: wait")


def _seconds(value: bytes, path: str) -> float:
    if not value.isdigit() or len(value) > 9:
        raise InvalidInput(
            f"expected whole seconds, got {value[:40].decode('latin-1')!r}",
            path=path,
            hint=f"for example ?wait=30; more than {LONGEST_WAIT_S:g} means {LONGEST_WAIT_S:g}",
        )
    return min(float(value), LONGEST_WAIT_S)
