"""The admin API: status, inventory, reload, load, unload, metrics; on loopback, on a port of its own, with a token.

====== ================================ =====================================================
GET    /admin/status                    what is served, by which processes
POST   /admin/reload                    ``{"changes": [{"name", "bundle", "table", "mode"}]}``, all optional
POST   /admin/models/NAME/load          load a configured deployment (again)
POST   /admin/models/NAME/unload        unload it
GET    /admin/inventory                 what is served or could be, on what, whose it is
GET    /admin/routes/NAME               how the requests of a deployment are shared out, and what came of it
POST   /admin/routes/NAME               change it: ``{"route"}``, ``{"killed"}`` or ``{"remove": true}``; optional
                                        ``revision``, ``by``, ``why``
GET    /admin/releases/NAME             how the release of a deployment stands
POST   /admin/releases/NAME             release a version: gate, canary, judge
GET    /admin/releases/NAME/judge       all that its judge knows
POST   /admin/releases/NAME/promote     one step further
POST   /admin/releases/NAME/rollback    back to the version before, or to another one
POST   /admin/releases/NAME/parameters  change it while it runs
POST   /admin/labels/NAME               labels, as ``POST /v2/models/NAME/labels`` on the serving port has them
GET    /admin/jobs                      the jobs that there are, and those that were given up
POST   /admin/jobs/retry                begin again what was given up: ``{"id"}``, or ``{"all_dead": true}``, which a
                                        ``deployment`` may narrow
POST   /admin/jobs/remove               remove what was given up: ``{"all_dead": true}``, which a ``deployment`` may
                                        narrow
DELETE /admin/jobs/ID                   take back a job that waits, or remove one that has an end
GET    /admin/traffic                   cardinality, peakedness and coverage curve by deployment
GET    /metrics                         as on the serving port
GET    /admin/health                    no token needed
====== ================================ =====================================================
"""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass

import msgspec
from msgspec import Struct

from parbake.app.releases import Back, Releases, TuningChange, Wanted
from parbake.app.routes import RouteChange
from parbake.app.supervisor import Change, Supervisor
from parbake.errors import InvalidInput, NotAllowed, ParbakeError, RouteNotFound, SettingsError
from parbake.settings import ServerSettings
from parbake.transports.http.endpoint import fail_unexpectedly
from parbake.transports.http.labels import read_labels
from parbake.transports.http.oip import decode_json
from parbake.transports.http.protocol import JSON, Exchange, HttpProtocol, Limits, Site, allow

_MAX_BODY_BYTES = 1024 * 1024
_TICK_S = 1.0


class ReloadRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /admin/reload``."""

    changes: tuple[Change, ...] = ()


class RetryRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /admin/jobs/retry``: one job, or all that are dead."""

    id: str = ""
    all_dead: bool = False
    deployment: str | None = None
    """Of ``all_dead``: of this one only."""


class RemoveRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /admin/jobs/remove``: all that are dead."""

    all_dead: bool = False
    deployment: str | None = None
    """Of this one only."""


@dataclass(frozen=True, slots=True)
class AdminServer:
    """The listening admin API."""

    server: asyncio.Server
    port: int
    ticker: asyncio.Task[None]

    def close(self) -> None:
        """Stop listening."""
        self.ticker.cancel()
        self.server.close()


async def serve_admin(supervisor: Supervisor, releases: Releases, settings: ServerSettings) -> AdminServer:
    """Listen on 127.0.0.1. Raises `SettingsError` where the port is taken."""
    loop = asyncio.get_running_loop()
    limits = Limits(_MAX_BODY_BYTES, 100, settings.request_timeout_s, settings.idle_timeout_s)
    site = Site(_Admin(supervisor, releases, settings.admin_token), limits, loop)
    try:
        server = await loop.create_server(lambda: HttpProtocol(site), "127.0.0.1", settings.admin_port)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on 127.0.0.1:{settings.admin_port} for the admin API: {error.strerror or error}",
            hint="--admin-port 0 takes a free port",
        ) from error

    async def tick() -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            site.check_time()

    return AdminServer(server, server.sockets[0].getsockname()[1], asyncio.create_task(tick()))


class _Admin:
    def __init__(self, supervisor: Supervisor, releases: Releases, token: str) -> None:
        self._supervisor = supervisor
        self._releases = releases
        self._token = token
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, exchange: Exchange) -> None:
        task = asyncio.ensure_future(self._answer(exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, exchange: Exchange) -> None:
        try:
            payload, content_type = await self._route(exchange)
            exchange.reply(200, payload, content_type)
        except ParbakeError as error:
            exchange.fail(error)
        except Exception:
            fail_unexpectedly(exchange)

    async def _route(self, exchange: Exchange) -> tuple[bytes, bytes]:
        path = exchange.path.decode("latin-1")
        if path == "/admin/health":
            return b'{"live":true}', JSON
        self._authorize(exchange)
        parts = path.split("/")[1:]
        match parts:
            case ["admin", "status"]:
                allow(exchange, b"GET")
                return msgspec.json.encode(self._supervisor.status(await self._supervisor.counts())), JSON
            case ["admin", "inventory"]:
                allow(exchange, b"GET")
                return msgspec.json.encode(await self._supervisor.inventory()), JSON
            case ["admin", "traffic"]:
                allow(exchange, b"GET")
                return msgspec.json.encode(await self._supervisor.traffic()), JSON
            case ["metrics"]:
                allow(exchange, b"GET")
                return (
                    await self._supervisor.metrics()
                ).encode(), b"text/plain; version=0.0.4; charset=utf-8"
            case ["admin", "reload"]:
                allow(exchange, b"POST")
                request = ReloadRequest()
                if exchange.body:
                    request = decode_json(msgspec.json.Decoder(ReloadRequest), exchange.body)
                return msgspec.json.encode(await self._supervisor.reload(request.changes)), JSON
            case ["admin", "routes", name]:
                allow(exchange, b"GET", b"POST")
                if exchange.method == b"GET":
                    return msgspec.json.encode(await self._supervisor.route(name)), JSON
                change = decode_json(msgspec.json.Decoder(RouteChange), exchange.body)
                return msgspec.json.encode(await self._releases.set_route(name, change)), JSON
            case ["admin", "releases", name]:
                allow(exchange, b"GET", b"POST")
                if exchange.method == b"GET":
                    return msgspec.json.encode(await self._releases.status(name)), JSON
                wanted = decode_json(msgspec.json.Decoder(Wanted), exchange.body)
                return msgspec.json.encode(await self._releases.deploy(name, wanted)), JSON
            case ["admin", "releases", name, ("promote" | "rollback") as action]:
                allow(exchange, b"POST")
                back = decode_json(msgspec.json.Decoder(Back), exchange.body)
                act = self._releases.promote if action == "promote" else self._releases.rollback
                return msgspec.json.encode(await act(name, back)), JSON
            case ["admin", "releases", name, "judge"]:
                allow(exchange, b"GET")
                return msgspec.json.encode(await self._releases.judge(name)), JSON
            case ["admin", "releases", name, "parameters"]:
                allow(exchange, b"POST")
                tuning = decode_json(msgspec.json.Decoder(TuningChange), exchange.body)
                return msgspec.json.encode(await self._releases.tune(name, tuning)), JSON
            case ["admin", "jobs"]:
                allow(exchange, b"GET")
                return msgspec.json.encode(await self._supervisor.jobs()), JSON
            case ["admin", "jobs", "retry"]:
                allow(exchange, b"POST")
                retry = decode_json(msgspec.json.Decoder(RetryRequest), exchange.body)
                if bool(retry.id) == retry.all_dead or (retry.deployment is not None and not retry.all_dead):
                    raise InvalidInput(
                        "which jobs?",
                        hint='{"id": "..."}, or {"all_dead": true}, which a "deployment" may narrow',
                    )
                name = _named(retry.deployment)
                return msgspec.json.encode(await self._supervisor.retry_jobs(retry.id, name)), JSON
            case ["admin", "jobs", "remove"]:
                allow(exchange, b"POST")
                remove = decode_json(msgspec.json.Decoder(RemoveRequest), exchange.body)
                if not remove.all_dead:
                    raise InvalidInput(
                        "which jobs?",
                        hint='{"all_dead": true}, which a "deployment" may narrow; DELETE /admin/jobs/ID has one',
                    )
                name = _named(remove.deployment)
                return msgspec.json.encode(await self._supervisor.remove_dead(name)), JSON
            case ["admin", "jobs", job_id]:
                allow(exchange, b"DELETE")
                return msgspec.json.encode(await self._supervisor.remove_job(job_id)), JSON
            case ["admin", "labels", name]:
                allow(exchange, b"POST")
                name, labels = read_labels(self._supervisor.contract, exchange.body, name)
                accepted, unknown = self._supervisor.label(name, labels)
                return msgspec.json.encode({"accepted": accepted, "unknown": unknown}), JSON
            case ["admin", "models", name, ("load" | "unload") as action]:
                allow(exchange, b"POST")
                await self._supervisor.set_loaded(name, action == "load")
                return b"{}", JSON
        raise RouteNotFound(f"no such URL: {path[:200]}")

    def _authorize(self, exchange: Exchange) -> None:
        word, _, given = exchange.headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if word.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token.encode()):
            raise NotAllowed(
                "the admin API needs its token",
                hint="send 'authorization: Bearer TOKEN'; set the token with PARBAKE_ADMIN_TOKEN",
            )


def _named(deployment: str | None) -> str:
    """The deployment that is meant, "" for all. Raises `InvalidInput` where one is named, and has no name."""
    if deployment == "":
        # As of a variable that is not set: it must not mean the jobs of all.
        raise InvalidInput("no deployment has an empty name", hint='without "deployment" all are meant')
    return deployment or ""
