"""The URL for predictions of a deployment under a route: read once, answered by one of its versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any
from urllib.parse import parse_qsl

from parbake.errors import ParbakeError
from parbake.serving.fallback import Asked
from parbake.serving.model import Answer
from parbake.serving.route import NO_HINTS, Hints
from parbake.serving.routed import Routed
from parbake.serving.service import ServedVersion
from parbake.transports.http.endpoint import Codec, PredictionEndpoint
from parbake.transports.http.protocol import Exchange


class RoutedEndpoint:
    """Answers requests of one form that name no version."""

    def __init__(self, routed: Routed, codec: Callable[[ServedVersion], Codec], max_body_bytes: int) -> None:
        self._routed = routed
        self._arms = {
            version: PredictionEndpoint(served, codec(served), max_body_bytes)
            for version, served in routed.versions.items()
        }
        self._reader = self._arms[routed.reader.version]

    def answer(self, exchange: Exchange) -> None:
        """Handle one request; the reply is written now or later."""
        routed = self._routed
        arm = self._arms[routed.champion.version]
        try:
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
                self._arms[served.version].take(exchange, call, result, parsed)

            hints = _hints(exchange, call.parameters or {}) if routed.chooser.needs_hints else NO_HINTS
            routed.predict(asked, done, hints)
        except ParbakeError as error:
            arm.refuse(exchange, error)
        except Exception:
            arm.fail_unexpectedly(exchange)


def _hints(exchange: Exchange, parameters: Mapping[str, Any]) -> Hints:
    """What a request says beside its rows; what the body says goes before what the URL says."""
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in exchange.headers.items()}
    query = (
        dict(parse_qsl(exchange.query.decode("latin-1"), keep_blank_values=True)) if exchange.query else {}
    )
    return Hints(headers, {**query, **parameters})
