"""Which URL is whose: predictions by exact path, everything else by its parts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import msgspec
from msgspec import Struct

from parbake.app.front import Front
from parbake.app.repository import Repository
from parbake.contract.model import Contract
from parbake.errors import NotReady, ParbakeError, RouteNotFound
from parbake.serving.service import ServedVersion
from parbake.settings import ServerSettings
from parbake.transports.access import Access
from parbake.transports.http.endpoint import PredictionEndpoint, fail_unexpectedly
from parbake.transports.http.jobs import JobPages
from parbake.transports.http.labels import read_labels
from parbake.transports.http.memo import ReplyMemo
from parbake.transports.http.oip import InferCodec, decode_json
from parbake.transports.http.one_row import endpoint
from parbake.transports.http.openapi import openapi
from parbake.transports.http.page import page
from parbake.transports.http.people import PeopleCodec
from parbake.transports.http.protocol import JSON, Exchange, Head, allow
from parbake.transports.http.routed import RoutedEndpoint
from parbake.transports.keys import EVERYBODY, Gate, Holder, check_deployment, check_everything
from parbake.transports.metadata import (
    model_config,
    model_metadata,
    repository_index,
    server_metadata,
    statistics,
)
from parbake.transports.parameters import refuse_overrides

_HTML: Final = b"text/html; charset=utf-8"
_TEXT: Final = b"text/plain; version=0.0.4; charset=utf-8"


class IndexRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /v2/repository/index``."""

    ready: bool = False


class ControlRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /v2/repository/models/NAME/load`` and ``unload``."""

    parameters: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class _Answering:
    """What answers for one version, as it was when it had changed so often."""

    served: ServedVersion
    changes: int
    infer: PredictionEndpoint
    people: PredictionEndpoint


class Router:
    """Hands each request of one front to what answers it. `rebuild` follows every change of plan."""

    def __init__(
        self, front: Front, settings: ServerSettings, access: Access, gate: Gate | None = None
    ) -> None:
        self._front = front
        self._gate = gate
        self._repository = Repository(front)
        self._settings = settings
        self._access = access
        self._exact: dict[bytes, Callable[[Exchange], None]] = {}
        self._memo = ReplyMemo()
        self._answering: dict[int, _Answering] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs = JobPages(front, self.answer, gate)
        self._fixed: dict[bytes, Callable[[Exchange], None]] = {
            b"/v2": self._server,
            b"/v2/": self._server,
            b"/v2/health/live": self._live,
            b"/v2/health/ready": self._ready,
            b"/v2/models/stats": self._all_statistics,
            b"/v2/repository/index": self._index,
            b"/labels": self._labels,
            b"/metrics": self._metrics,
            b"/openapi.json": self._openapi,
            b"/": self._page,
            b"/docs": self._page,
        }
        self.rebuild()

    def rebuild(self) -> None:
        """Make the table of URLs for what is served now."""
        exact = dict(self._fixed)
        limit = self._settings.max_body_bytes
        before, self._answering = self._answering, {}
        for served in self._front.versions():
            name, version = served.name.encode(), served.version.encode()
            # What did not change goes on as it is: there may be a thousand versions, and callers wait meanwhile.
            answering = before.get(id(served))
            if answering is None or answering.changes != served.changes:
                answering = _Answering(
                    served,
                    served.changes,
                    endpoint(served, InferCodec(served), limit, self._memo),
                    PredictionEndpoint(served, PeopleCodec(served), limit),
                )
            else:
                del before[id(served)]
            self._answering[id(served)] = answering
            # The last version of a name is the one without a number: later entries overwrite.
            # Bound methods, because an object with __call__ takes Python longer to call.
            exact[b"/v2/models/%s/infer" % name] = answering.infer.answer
            exact[b"/v2/models/%s/versions/%s/infer" % (name, version)] = answering.infer.answer
            exact[b"/predict/%s" % name] = answering.people.answer
            exact[b"/predict/%s/versions/%s" % (name, version)] = answering.people.answer
        for gone in before.values():
            gone.infer.forget()
        for deployment, routed in self._front.routed.items():
            name = deployment.encode()
            exact[b"/v2/models/%s/infer" % name] = RoutedEndpoint(routed, InferCodec, limit).answer
            exact[b"/predict/%s" % name] = RoutedEndpoint(routed, PeopleCodec, limit).answer
        self._exact = exact

    def answer(self, exchange: Exchange) -> None:
        """Answer one request, whatever happens."""
        try:
            handler = self._exact.get(exchange.head.route)
            if handler is not None:
                handler(exchange)
            else:
                self._by_parts(exchange)
        except ParbakeError as error:
            self._front.refuse(error)
            exchange.fail(error)
        except Exception:
            self._front.refuse(fail_unexpectedly(exchange))

    def answer_known(self, exchange: Exchange) -> None:
        """Answer one request where API keys are needed, if its key is good for it."""
        head = exchange.head
        try:
            holder = head.holder
            if holder is None or not holder.valid:
                # Heads are remembered, and what is found out about one holds for all that are equal to the byte.
                holder = head.holder = self._holder(head)
            holder.take()
        except ParbakeError as error:
            self._front.refuse(error)
            exchange.fail(error)
            return
        except Exception:
            self._front.refuse(fail_unexpectedly(exchange))
            return
        self.answer(exchange)

    def _holder(self, head: Head) -> Holder:
        """Whose key a request has. Raises `Unauthenticated`, or `NotAllowed` where it is not for this URL.

        Whether there is such a deployment, or such a URL, is for those to know who may ask.
        """
        if self._gate is None or head.path in _FOR_EVERYBODY:
            return EVERYBODY
        if head.path in self._fixed:
            holder = self._gate.holder(head.headers)
            if head.path == b"/metrics":
                check_everything(holder)
            return holder
        match [_text(part) for part in head.path.split(b"/")[1:]]:
            case ["v2", "models", _, "ready"] | ["v2", "models", _, "versions", _, "ready"]:
                return EVERYBODY
            case ["v2", "repository", "models", _, "load" | "unload"]:
                # For this there is another rule, and another token.
                return EVERYBODY
            case ["v2", "models", name, *_] | ["predict", name, *_]:
                holder = self._gate.holder(head.headers)
                check_deployment(holder, name)
                return holder
            case _:
                return self._gate.holder(head.headers)

    def _by_parts(self, exchange: Exchange) -> None:
        parts = [_text(part) for part in exchange.path.split(b"/")[1:]]
        if exchange.head.later:
            if self._jobs.take(exchange, parts, self._exact):
                return
            # Nobody has to do as is preferred.
            handler = self._exact.get(exchange.path)
            if handler is not None:
                handler(exchange)
                return
        match parts:
            case ["v2", "jobs", job_id, *rest] if len(rest) < 2:
                self._jobs.page(exchange, job_id, rest[0] if rest else "")
            case ["v2", "models", name, *rest] if (
                rest[-1:] == ["infer"] or not rest or rest[0] in _MODEL_PARTS
            ):
                self._model(exchange, name, rest)
            case ["predict", name] | ["predict", name, "versions", _]:
                served = self._front.find(name, parts[3] if len(parts) == 4 else "")
                named = len(parts) == 4
                url = (
                    b"/predict/%s/versions/%s" % _bytes(served)
                    if named
                    else b"/predict/%s" % served.name.encode()
                )
                self._exact[url](exchange)
            case ["v2", "models", name, "labels"]:
                self._labels(exchange, name)
            case ["v2", "repository", "models", name, ("load" | "unload") as action]:
                allow(exchange, b"POST")
                self._control(exchange, name, action)
            case ["v2", "repository", _, "index"]:
                raise RouteNotFound("this server has one repository", hint="POST /v2/repository/index")
            case _:
                raise _no_route(exchange)

    def _model(self, exchange: Exchange, name: str, rest: list[str]) -> None:
        version = ""
        if rest[:1] == ["versions"] and len(rest) > 1:
            version, rest = rest[1], rest[2:]
        if rest == ["ready"]:
            allow(exchange, b"GET", b"HEAD")
            served = self._front.find(name, version)
            if not served.ready or self._front.draining:
                raise NotReady(f"model {name!r} is not ready")
            exchange.reply_json(b'{"name":%s,"ready":true}' % msgspec.json.encode(name))
            return
        served = self._front.find(name, version)
        if rest in ([], [""]):
            allow(exchange, b"GET", b"HEAD")
            versions = [other.version for other in self._front.versions() if other.name == name]
            exchange.reply_json(msgspec.json.encode(model_metadata(served, versions)))
        elif rest == ["config"]:
            allow(exchange, b"GET", b"HEAD")
            exchange.reply_json(msgspec.json.encode(model_config(served)))
        elif rest == ["stats"]:
            allow(exchange, b"GET", b"HEAD")
            self._later(exchange, lambda: self._statistics(name, version))
        elif rest == ["infer"]:
            # A URL that was written with escapes.
            url = b"/v2/models/%s/versions/%s/infer" % _bytes(served)
            self._exact[url if version else b"/v2/models/%s/infer" % served.name.encode()](exchange)
        else:
            raise _no_route(exchange)

    # Server ----------------------------------------------------------------------------------------

    def _server(self, exchange: Exchange) -> None:
        allow(exchange, b"GET", b"HEAD")
        exchange.reply_json(msgspec.json.encode(server_metadata()))

    def _live(self, exchange: Exchange) -> None:
        allow(exchange, b"GET", b"HEAD")
        exchange.reply_json(b'{"live":true}')

    def _ready(self, exchange: Exchange) -> None:
        allow(exchange, b"GET", b"HEAD")
        if self._front.ready:
            exchange.reply_json(b'{"ready":true}')
            return
        waiting = [served.name for served in self._front.versions() if not served.ready]
        why = "draining" if self._front.draining else f"waiting for {', '.join(waiting) or 'models to load'}"
        exchange.fail(NotReady(f"not ready: {why}"))

    def _metrics(self, exchange: Exchange) -> None:
        allow(exchange, b"GET", b"HEAD")

        async def page_() -> tuple[bytes, bytes]:
            return (await self._repository.metrics()).encode(), _TEXT

        self._later(exchange, page_)

    def _all_statistics(self, exchange: Exchange) -> None:
        allow(exchange, b"GET", b"HEAD")
        self._later(exchange, lambda: self._statistics("", "", exchange.head.holder or EVERYBODY))

    async def _statistics(self, name: str, version: str, holder: Holder = EVERYBODY) -> tuple[bytes, bytes]:
        counts = await self._repository.counts()
        versions = [served for served in self._repository.versions(name, version) if holder.may(served.name)]
        return msgspec.json.encode(statistics(versions, counts)), JSON

    def _labels(self, exchange: Exchange, name: str = "") -> None:
        """What was true, of predictions that were made."""
        allow(exchange, b"POST")
        body = exchange.content(self._settings.max_body_bytes)
        holder = exchange.head.holder or EVERYBODY

        def contract_of(deployment: str) -> Contract:
            check_deployment(holder, deployment)
            return self._front.find(deployment).contract

        name, labels = read_labels(contract_of, body, name)

        async def take() -> tuple[bytes, bytes]:
            taken = await self._repository.label(name, labels)
            return msgspec.json.encode({"accepted": taken.accepted, "unknown": taken.unknown}), JSON

        self._later(exchange, take, 202)

    # People ----------------------------------------------------------------------------------------

    def _openapi(self, exchange: Exchange) -> None:
        allow(exchange, b"GET", b"HEAD")
        holder = exchange.head.holder or EVERYBODY
        versions = [served for served in self._front.versions() if holder.may(served.name)]
        exchange.reply_json(openapi(versions, keys=self._gate is not None))

    def _page(self, exchange: Exchange) -> None:
        allow(exchange, b"GET", b"HEAD")
        headers = (
            (
                b"content-security-policy",
                b"default-src 'self' 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
            ),
            (b"x-content-type-options", b"nosniff"),
        )
        exchange.reply(200, page(), _HTML, headers)

    # Model repository extension --------------------------------------------------------------------

    def _index(self, exchange: Exchange) -> None:
        allow(exchange, b"POST", b"GET")
        ready_only = False
        if body := exchange.content(self._settings.max_body_bytes):
            ready_only = decode_json(msgspec.json.Decoder(IndexRequest), body).ready
        holder = exchange.head.holder or EVERYBODY
        listed = [item for item in self._repository.index(ready_only=ready_only) if holder.may(item.name)]
        exchange.reply_json(msgspec.json.encode(repository_index(listed)))

    def _control(self, exchange: Exchange, name: str, action: str) -> None:
        self._access.check(
            exchange.peer,
            exchange.headers.get(b"authorization", b"").decode("latin-1"),
            browser=b"origin" in exchange.headers or b"sec-fetch-site" in exchange.headers,
            forwarded=any(
                header in exchange.headers for header in (b"forwarded", b"x-forwarded-for", b"via")
            ),
        )
        if body := exchange.content(self._settings.max_body_bytes):
            refuse_overrides(decode_json(msgspec.json.Decoder(ControlRequest), body).parameters)

        async def change() -> tuple[bytes, bytes]:
            await self._repository.set_loaded(name, loaded=action == "load")
            return b"{}", JSON

        self._later(exchange, change)

    # Later -----------------------------------------------------------------------------------------

    def _later(
        self, exchange: Exchange, work: Callable[[], Awaitable[tuple[bytes, bytes]]], status: int = 200
    ) -> None:
        async def answer() -> None:
            try:
                payload, content_type = await work()
                exchange.reply(status, payload, content_type)
            except ParbakeError as error:
                self._front.refuse(error)
                exchange.fail(error)
            except Exception:
                self._front.refuse(fail_unexpectedly(exchange))

        task = asyncio.ensure_future(answer())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


_FOR_EVERYBODY: Final = frozenset((b"/v2/health/live", b"/v2/health/ready", b"/", b"/docs"))
"""Probes have no key; the page holds nothing, and asks for one."""
_MODEL_PARTS: Final = frozenset({"", "versions", "ready", "config", "stats"})


def _no_route(exchange: Exchange) -> RouteNotFound:
    return RouteNotFound(
        f"no such URL: {exchange.path[:200].decode('latin-1')}", hint="GET / shows what there is to ask"
    )


def _bytes(served: ServedVersion) -> tuple[bytes, bytes]:
    return served.name.encode(), served.version.encode()


def _text(part: bytes) -> str:
    return unquote_to_bytes(part).decode("utf-8", errors="replace")
