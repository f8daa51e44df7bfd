"""API keys: a file that names who may ask for what, and has of each key nothing but its hash.

A key is 256 random bits. Nobody guesses these, so a plain SHA-256 keeps them as well as a slow hash would, and a
server may compute it for each new connection.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Struct

from parbake.errors import Conflict, NotFound, SettingsError
from parbake.names import Name

PREFIX: Final = "pbk_"
"""How keys begin, so that tools which look for secrets in texts find them."""

_HEADER: Final = (
    "# API keys of parbake, as hashes: who may ask, and for what. `parbake keys` writes this file.\n"
)
_MAX_BYTES: Final = 16 * 1024 * 1024
_OTHERS_WRITE: Final = 0o022


class ApiKey(Struct, frozen=True, forbid_unknown_fields=True):
    """One key: whose it is, and what it is good for."""

    name: Name
    """The client's, as metrics show it."""
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    deployments: tuple[Name, ...] = ()
    """What it may ask for; empty: everything."""
    rate_per_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Most requests a second, over all fronts; None: no limit of its own."""
    created: str = ""


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    keys: tuple[ApiKey, ...] = ()


def hash_of(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file. Raises `SettingsError` where it is not there, not valid, or open to others."""
    try:
        with path.open("rb") as handle:
            if os.fstat(handle.fileno()).st_mode & _OTHERS_WRITE:
                raise SettingsError(
                    f"{path} can be written by others, who could let themselves in", hint=f"chmod 600 {path}"
                )
            raw = handle.read(_MAX_BYTES + 1)
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be read: {error.strerror}", hint=f"parbake keys add NAME --file {path} makes it"
        ) from error
    if len(raw) > _MAX_BYTES:
        raise SettingsError(f"{path} is larger than {_MAX_BYTES} bytes")
    try:
        keys = msgspec.convert(tomllib.loads(raw.decode()), _File).keys
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise SettingsError(f"{path}: {error}", hint="parbake keys writes this file") from error
    for what, values in (("name", [key.name for key in keys]), ("key", [key.sha256 for key in keys])):
        if len(set(values)) != len(values):
            raise SettingsError(f"{path} has the same {what} twice")
    return keys


def add_key(path: Path, name: str, deployments: Sequence[str] = (), rate_per_s: float | None = None) -> str:
    """Make a key and write its hash to the file, which is made if need be; gives the key, which is not kept.

    Raises `Conflict` where the name has a key, `SettingsError` for what cannot be a name or a rate.
    """
    secret = PREFIX + secrets.token_urlsafe(32)
    values = {
        "name": name,
        "sha256": hash_of(secret),
        "deployments": list(deployments),
        "rate_per_s": rate_per_s,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        key = msgspec.convert(values, ApiKey)
    except msgspec.ValidationError as error:
        raise SettingsError(
            str(error), hint="names have letters, digits, dots, dashes and underscores"
        ) from error

    def change(keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        if any(other.name == name for other in keys):
            raise Conflict(
                f"{name} has a key in {path}",
                hint=f"parbake keys remove {name}, or add one under another name",
            )
        return (*keys, key)

    _change(path, change)
    return secret


def remove_key(path: Path, name: str) -> None:
    """Take a key out of the file. Raises `NotFound`."""

    def change(keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        kept = tuple(key for key in keys if key.name != name)
        if len(kept) == len(keys):
            names = ", ".join(key.name for key in keys[:20]) or "none"
            raise NotFound(f"{name[:80]!r} has no key in {path}", hint=f"keys there: {names}")
        return kept

    _change(path, change)


def _change(path: Path, change: Callable[[tuple[ApiKey, ...]], tuple[ApiKey, ...]]) -> None:
    """Read, change and replace the file: whoever reads it meets the old or the new one, never half of it."""
    with _alone(path.parent):
        keys = change(read_keys(path) if path.exists() else ())
        # Made for its owner only, whatever the umask.
        descriptor, staging = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
                handle.write(_HEADER + "".join(map(_block, keys)))
                handle.flush()
                os.fsync(handle.fileno())
            Path(staging).rename(path)
        except BaseException:
            Path(staging).unlink(missing_ok=True)
            raise


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until nobody else changes keys in a folder. Raises `SettingsError`."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise SettingsError(f"no folder {folder}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    except OSError as error:
        raise SettingsError(f"the keys in {folder} cannot be written: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _block(key: ApiKey) -> str:
    lines = ["", "[[keys]]", f'name = "{key.name}"', f'sha256 = "{key.sha256}"']
    if key.deployments:
        lines.append(f"deployments = {json.dumps(key.deployments)}")
    if key.rate_per_s is not None:
        lines.append(f"rate_per_s = {key.rate_per_s!r}")
    if key.created:
        lines.append(f"created = {json.dumps(key.created)}")
    return "\n".join(lines) + "\n"
