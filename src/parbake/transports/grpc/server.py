"""Serve gRPC in a front's event loop, beside HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio

from parbake.app.front import Front
from parbake.errors import SettingsError
from parbake.settings import ServerSettings
from parbake.transports.access import Access
from parbake.transports.grpc.health import HealthService
from parbake.transports.grpc.messages import HEALTH, INFERENCE
from parbake.transports.grpc.service import InferenceService
from parbake.transports.keys import Gate

_STILL_ANSWERED_S: Final = 0.2
_TURNED_AWAY_S: Final = 0.2


async def serve_grpc(
    front: Front, settings: ServerSettings, access: Access, port: int, gate: Gate | None = None
) -> Callable[[], Awaitable[None]]:
    """Listen on ``port``, which several fronts may share; gives what stops it after answering what it has.

    Raises `SettingsError` where the port or the certificate cannot be used.
    """
    inference = InferenceService(front, access, gate)
    health = HealthService(front, inference)
    server: Any = grpc.aio.server(
        maximum_concurrent_rpcs=settings.max_connections,
        options=(
            ("grpc.so_reuseport", 1),
            ("grpc.max_receive_message_length", settings.max_body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_connection_idle_ms", round(settings.idle_timeout_s * 1000)),
        ),
    )
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(INFERENCE, inference.handlers()),
            grpc.method_handlers_generic_handler(HEALTH, health.handlers()),
        )
    )
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{port}"
    try:
        if settings.tls_cert:
            server.add_secure_port(address, _credentials(settings))
        else:
            server.add_insecure_port(address)
    except (OSError, RuntimeError) as error:
        raise SettingsError(
            f"cannot listen on {address} for gRPC: {error}", hint="--grpc-port 0 takes a free port"
        ) from error
    await server.start()

    async def stop() -> None:
        # Callers whose connection stands are answered for a moment yet, then told to go elsewhere. Only after that
        # gRPC is stopped: what it has received by then and not handed out, it cancels.
        await asyncio.sleep(_STILL_ANSWERED_S)
        inference.stopping.set()
        await asyncio.sleep(_TURNED_AWAY_S)
        await server.stop(settings.drain_timeout_s)

    return stop


def _credentials(settings: ServerSettings) -> Any:
    pair = (Path(settings.tls_key).read_bytes(), Path(settings.tls_cert).read_bytes())
    if not settings.tls_client_ca:
        return grpc.ssl_server_credentials((pair,))
    authority = Path(settings.tls_client_ca).read_bytes()
    return grpc.ssl_server_credentials((pair,), root_certificates=authority, require_client_auth=True)
