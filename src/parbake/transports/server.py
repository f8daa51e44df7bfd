"""Run a whole server in the foreground: supervisor, admin API, signals, and the line that says where it is."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from parbake.app.controller import Controller
from parbake.app.releases import Releases
from parbake.app.supervisor import Supervisor
from parbake.errors import ParbakeError, SettingsError
from parbake.logs import FORMAT_VARIABLE, log
from parbake.settings import DeploymentSettings, QueueSettings, ServerSettings, Settings
from parbake.transports.access import is_loopback
from parbake.transports.admin import serve_admin
from parbake.transports.front import tls_context
from parbake.transports.statefile import Remembered, Running, forget, remember

_END_S: Final = 5.0
_LONGEST_FOLDER: Final = 80


def run(settings: Settings, *, on_ready: Callable[[Running], None] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; gives the exit status. SIGHUP reloads; a second signal ends at once.

    ``on_ready`` is called once, when every model answers; by default the addresses are printed on stdout.
    Raises `ParbakeError` where the server cannot start.
    """
    return asyncio.run(_run(settings, on_ready or _announce))


def serve(
    *bundles: object,
    mode: str | None = None,
    table: str = "",
    host: str = "127.0.0.1",
    port: int = 8000,
    **options: object,
) -> int:
    """Serve bundles from Python, as ``parbake serve`` does.

    ``bundles`` are paths, or what `parbake.pack` and `parbake.load` gave. ``mode``, ``table`` and further options
    are the settings of `parbake.toml`, and hold for all bundles: ``serve(bundle, placement="process", workers=2)``.
    Call it from the main thread: it handles signals. Blocks until Ctrl-C or SIGTERM; gives the exit status.
    Raises `SettingsError`, `BundleError` or `TableError` where it cannot start.
    """
    server_names = {field.name for field in msgspec.structs.fields(ServerSettings)}
    server = {name: value for name, value in options.items() if name in server_names}
    queue_names = {field.name for field in msgspec.structs.fields(QueueSettings)}
    queue = {name: value for name, value in options.items() if name in queue_names}
    rest = {name: value for name, value in options.items() if name not in server_names | queue_names}
    try:
        settings = Settings(
            msgspec.convert({"host": host, "port": port, **server}, ServerSettings),
            tuple(
                msgspec.convert(
                    {"bundle": str(getattr(bundle, "path", bundle)), "mode": mode, "table": table, **rest},
                    DeploymentSettings,
                )
                for bundle in bundles
            ),
            queue=msgspec.convert(queue, QueueSettings),
        )
    except msgspec.ValidationError as error:
        raise SettingsError(str(error), hint="docs/reference/settings.md lists the options") from error
    return run(settings)


async def _run(settings: Settings, on_ready: Callable[[Running], None]) -> int:
    os.environ[FORMAT_VARIABLE] = settings.server.log_format
    _check(settings.server)
    if not settings.server.admin_token:
        token = secrets.token_urlsafe(24)
        settings = msgspec.structs.replace(
            settings, server=msgspec.structs.replace(settings.server, admin_token=token)
        )
    folder = _socket_folder()
    supervisor = Supervisor(settings, folder)
    controller = Controller(supervisor)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    hurry = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    reloads: set[asyncio.Task[None]] = set()

    def on_hangup() -> None:
        task = loop.create_task(_reload(supervisor))
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    remembered: Remembered | None = None
    try:
        starting = asyncio.ensure_future(supervisor.start())
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            supervisor.end_now()
            # What is being started ends before its folder goes.
            await asyncio.wait({starting}, timeout=_END_S)
            supervisor.end_now()
            return 0
        await starting
        await controller.start()
        admin = await serve_admin(supervisor, Releases(controller), settings.server)
        running = Running(
            pid=os.getpid(),
            host=settings.server.host,
            port=supervisor.port,
            grpc_port=supervisor.grpc_port,
            admin_url=f"http://127.0.0.1:{admin.port}",
            token=settings.server.admin_token,
            tls=bool(settings.server.tls_cert),
            deployments=tuple(dict.fromkeys(v.name for v in supervisor.status().versions)),
        )
        remembered = remember(running)
        on_ready(running)
        await stopping
        log().info("server.draining")
        controller.stop()
        draining = asyncio.ensure_future(supervisor.stop())
        hurrying = asyncio.ensure_future(hurry.wait())
        await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            log().warning("server.ended_at_once")
            draining.cancel()
            supervisor.end_now()
            return 130
        await draining
        # Behind everything that callers wait for: the store may take its time.
        await controller.close()
        admin.close()
        return 0
    except BaseException:
        controller.stop()
        await supervisor.stop(drain=False)
        raise
    finally:
        if remembered is not None:
            forget(remembered)
        shutil.rmtree(folder, ignore_errors=True)


def _socket_folder() -> Path:
    """A new folder whose name is short enough: a socket's path may have about a hundred bytes."""
    folder = Path(tempfile.mkdtemp(prefix="parbake-"))
    if len(os.fsencode(folder)) <= _LONGEST_FOLDER:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="parbake-", dir="/tmp"))


async def _reload(supervisor: Supervisor) -> None:
    try:
        await supervisor.reload()
    except ParbakeError as error:
        # What was served before goes on being served.
        log().error("reload.refused", error=error.message, hint=error.hint)
    except Exception:
        log().exception("reload.failed")


def _check(server: ServerSettings) -> None:
    if server.api_keys and not server.tls_cert and not is_loopback(server.host):
        log().warning(
            "keys.in_clear", host=server.host, hint="--tls-cert and --tls-key, or a proxy that has them"
        )
    for path in (server.tls_cert, server.tls_key, server.tls_client_ca):
        if path and not Path(path).is_file():
            raise SettingsError(f"no file {path}", hint="tls_cert, tls_key and tls_client_ca are PEM files")
    try:
        context = tls_context(server)
    except OSError as error:
        raise SettingsError(
            f"the certificate cannot be used: {error}",
            hint="are all PEM, and do key and certificate belong together?",
        ) from error
    if server.tls_client_ca and context is not None and not context.cert_store_stats()["x509_ca"]:
        # Nobody would ever be let in; and who wrote it down meant another certificate.
        raise SettingsError(
            f"{server.tls_client_ca} is no certificate of an authority",
            hint="tls_client_ca is the certificate that signs those of the clients",
        )


def _announce(running: Running) -> None:
    names = ", ".join(running.deployments) or "nothing yet"
    scheme = "https" if running.tls else "http"
    print(f"serving {names} on {running.url}", flush=True)  # noqa: T201  what scripts wait for
    if running.grpc_port is not None:
        print(f"gRPC on {running.host}:{running.grpc_port}", flush=True)  # noqa: T201
    if sys.stdout.isatty():
        print(f"try it: {scheme}://{running.shown_host}:{running.port}/   stop: Ctrl-C", flush=True)  # noqa: T201
