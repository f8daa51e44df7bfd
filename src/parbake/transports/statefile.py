"""Where commands on this machine find a running server: one small file per port, readable by its owner only."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from parbake.errors import ServerNotFound
from parbake.logs import log


class Running(Struct, frozen=True):
    """A running server; ``token`` is that of its admin API."""

    pid: int
    host: str
    port: int
    grpc_port: int | None
    admin_url: str
    token: str
    tls: bool
    deployments: tuple[str, ...]

    @property
    def shown_host(self) -> str:
        """A host name that a person can put into a browser."""
        if self.host in ("", "0.0.0.0", "::"):  # noqa: S104  shown, not bound
            return "127.0.0.1"
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def url(self) -> str:
        """Of the serving port."""
        return f"{'https' if self.tls else 'http'}://{self.shown_host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Remembered:
    """The file of a running server, open and locked: the lock ends with the process, however that ends."""

    path: Path
    descriptor: int


def remember(running: Running) -> Remembered | None:
    """Write the file of a server that has just started, and lock it until `forget`.

    None where that cannot be: a server that cannot be found by its file serves all the same.
    """
    descriptor = -1
    staging: Path | None = None
    try:
        folder = _folder(create=True)
        if folder is None:
            log().warning("statefile.not_written", error="its folder is somebody else's, or open to others")
            return None
        path = folder / f"{running.port}.json"
        # A name of its own: another server, on another address with this port, may start at the same time.
        descriptor, name = tempfile.mkstemp(".new", f"{running.port}.", folder)
        staging = Path(name)
        # Locked before it has its name: whoever looks never takes it for that of a server which ended.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with os.fdopen(descriptor, "wb", closefd=False) as handle:
            handle.write(msgspec.json.encode(running))
        staging.rename(path)
    except OSError as error:
        log().warning("statefile.not_written", error=str(error))
        if staging is not None:
            staging.unlink(missing_ok=True)
        if descriptor >= 0:
            os.close(descriptor)
        return None
    return Remembered(path, descriptor)


def forget(remembered: Remembered) -> None:
    """Remove the file, unless another server has taken the port since, and let go of its lock."""
    try:
        _remove(remembered.path, remembered.descriptor)
    finally:
        os.close(remembered.descriptor)


def every() -> list[Running]:
    """All running servers of this user, by port; removes the files of those that ended without doing so."""
    folder = _folder(create=False)
    found: list[Running] = []
    for path in sorted(folder.glob("*.json")) if folder is not None else []:
        if _locked(path) and (running := _read(path)) is not None:
            found.append(running)
    return found


def find(port: int | None = None) -> Running:
    """The running server on a port, or the only one.

    Raises `ServerNotFound`.
    """
    found = every()
    if port is not None:
        found = [running for running in found if running.port == port]
    if not found:
        where = f" on port {port}" if port is not None else ""
        raise ServerNotFound(
            f"no server of yours is running{where} on this machine",
            hint="start one with parbake serve, or give --admin-url and --token",
        )
    if len(found) > 1:
        ports = ", ".join(str(running.port) for running in found)
        raise ServerNotFound("several servers are running", hint=f"say which with --port: {ports}")
    return found[0]


def _folder(*, create: bool) -> Path | None:
    base = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(base) / "parbake" if base else Path(tempfile.gettempdir()) / f"parbake-{os.getuid()}"
    if create:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        status = folder.lstat()
    except OSError:
        return None
    # In a shared folder somebody else may have been there first.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        return None
    return folder


def _read(path: Path) -> Running | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Running)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _locked(path: Path) -> bool:
    """Whether a server holds the file; one that nobody holds is removed, as it has a token."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path, descriptor)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _remove(path: Path, descriptor: int) -> None:
    """Remove a file that is open, unless another has its name by now."""
    try:
        if os.path.samestat(path.stat(follow_symlinks=False), os.fstat(descriptor)):
            path.unlink()
    except FileNotFoundError:
        pass
