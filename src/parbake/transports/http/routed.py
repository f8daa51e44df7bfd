"""The URL for predictions of a deployment under a route: read once, answered by one of its versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any
from urllib.parse import parse_qsl

from parbake.errors import ParbakeError
from parbake.runtime.waiting import NORMAL
from parbake.serving.fallback import Asked
from parbake.serving.model import Answer
from parbake.serving.route import NO_HINTS, Hints
from parbake.serving.routed import Routed
from parbake.serving.service import ServedVersion
from parbake.transports.http.endpoint import Codec, PredictionEndpoint
from parbake.transports.http.oip import InferCall, InferCodec
from parbake.transports.http.protocol import Exchange
from parbake.transports.inputs import Inputs


class RoutedEndpoint:
    """Answers requests of one form that name no version."""

    def __init__(self, routed: Routed, codec: Callable[[ServedVersion], Codec], max_body_bytes: int) -> None:
        self._routed = routed
        codecs = {version: codec(served) for version, served in routed.versions.items()}
        self._arms = {
            version: PredictionEndpoint(served, codecs[version], max_body_bytes)
            for version, served in routed.versions.items()
        }
        self._reader = self._arms[routed.reader.version]
        short = {
            version: codec
            for version, codec in codecs.items()
            if isinstance(codec, InferCodec) and codec.has_short_way
        }
        self._short = short if len(short) == len(codecs) else {}
        """Codecs of all versions, where one row of numbers can be read and written the short way."""
        self._read_row = self._short[routed.reader.version].read_row if self._short else _nothing
        self._shapes = (routed.reader.contract.inputs[0].shape,)

    def check(self, exchange: Exchange) -> bool:
        """Whether a request can be read and fits the contract; where it does not, the reply has been given."""
        return self._arms[self._routed.champion.version].check(exchange, self._reader)

    @property
    def headers(self) -> frozenset[bytes]:
        """Names of the headers that the route goes by."""
        return self._routed.chooser.headers

    def answer(self, exchange: Exchange) -> None:
        """Handle one request; the reply is written now or later."""
        routed = self._routed
        arm = self._arms[routed.champion.version]
        try:
            row = self._read_row(exchange.body) if exchange.head.plain else None
            if row is not None:
                call = InferCall(Inputs([row[0]], 1, self._shapes), row[1])
                deadline, priority = exchange.arrived + routed.reader.deadline_s, NORMAL
            else:
                call, deadline, priority = self._reader.read(exchange)
            parsed = perf_counter()
            inputs = call.inputs
            asked = Asked(
                inputs.raws,
                inputs.rows,
                inputs.shapes,
                deadline,
                exchange,
                exchange.arrived,
                priority,
                exchange.client,
            )

            def done(served: ServedVersion, result: Answer | ParbakeError) -> None:
                arm = self._arms[served.version]
                if (
                    row is None
                    or isinstance(result, ParbakeError)
                    or result.fallback
                    or not exchange.keep_alive
                ):
                    arm.take(exchange, call, result, parsed)
                    return
                try:
                    reply = self._short[served.version].write_row(b"".join(result.raws), call.id)
                except Exception:
                    arm.fail_unexpectedly(exchange)
                    return
                exchange.protocol.send(exchange, reply)
                arrived = exchange.arrived
                total_s = perf_counter() - arrived
                served.stats.answered(
                    parsed - arrived, result.queue_s, result.model_s, total_s, 1, result.baked_rows
                )

            hints = _hints(exchange, call.parameters or {}) if routed.chooser.needs_hints else NO_HINTS
            routed.predict(asked, done, hints, call.id or _request_id(exchange))
        except ParbakeError as error:
            arm.refuse(exchange, error)
        except Exception:
            arm.fail_unexpectedly(exchange)


def _nothing(body: bytes) -> None:
    """What the short way reads where there is none."""


def _request_id(exchange: Exchange) -> str:
    return exchange.headers.get(b"x-request-id", b"").decode("latin-1")


def _hints(exchange: Exchange, parameters: Mapping[str, Any]) -> Hints:
    """What a request says beside its rows; what the body says goes before what the URL says."""
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in exchange.headers.items()}
    query = (
        dict(parse_qsl(exchange.query.decode("latin-1"), keep_blank_values=True)) if exchange.query else {}
    )
    return Hints(headers, {**query, **parameters})
