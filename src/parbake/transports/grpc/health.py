"""The health checking protocol of gRPC, for probes that speak nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc

from parbake.app.front import Front
from parbake.errors import ModelNotFound, NotFound, ParbakeError
from parbake.transports.grpc.messages import INFERENCE, message, parse, serialize
from parbake.transports.grpc.service import Failure, Handlers, InferenceService, abort

_LOOK_EVERY_S: Final = 0.25
_SERVING: Final = 1
_NOT_SERVING: Final = 2
_SERVICE_UNKNOWN: Final = 3


class HealthService:
    """``grpc.health.v1.Health``. A service is the server ("", or the name of its service) or one model."""

    def __init__(self, front: Front, inference: InferenceService) -> None:
        self._front = front
        self._inference = inference
        self._request = message("grpc.health.v1.HealthCheckRequest")
        self._response = message("grpc.health.v1.HealthCheckResponse")

    def handlers(self) -> Handlers:
        """The handler of each RPC, by its name."""
        return {
            "Check": grpc.unary_unary_rpc_method_handler(self._check),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
        }

    def _status(self, service: str) -> int:
        if service in ("", INFERENCE):
            return _SERVING if self._front.ready else _NOT_SERVING
        try:
            self._front.find(service)
        except NotFound:
            return _SERVICE_UNKNOWN
        except ParbakeError:
            return _NOT_SERVING
        return _SERVING if self._inference.model_ready(service) else _NOT_SERVING

    async def _check(self, data: bytes, context: Any) -> bytes:
        try:
            service = parse(self._request, data).service
            status = self._status(service)
            if status == _SERVICE_UNKNOWN:
                raise ModelNotFound(f"no service or model {service[:80]!r}", hint="ask without a name")
        except ParbakeError as error:
            return await abort(context, Failure(error))
        return serialize(self._response(status=status))

    async def _watch(self, data: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            service = parse(self._request, data).service
        except ParbakeError as error:
            await abort(context, Failure(error))
            return
        last = -1
        stopping = self._inference.stopping
        while True:
            status = self._status(service)
            if status != last:
                last = status
                yield serialize(self._response(status=status))
            if stopping.is_set():
                return
            try:
                await asyncio.wait_for(stopping.wait(), _LOOK_EVERY_S)
            except TimeoutError:
                continue
