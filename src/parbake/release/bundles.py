"""Where bundles are kept by their digest: what a store promises, and how a bundle gets out of it unharmed.

A store holds whole bundles or nothing: what was put half-way is not listed and cannot be fetched. What comes out is
held against its digest before anybody sees it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

from msgspec import Struct

from parbake.contract.bundle import StoredBundle, read_bundle
from parbake.errors import BundleAltered, BundleError, InvalidInput, StoreAway

DIGEST_PREFIX: Final = "sha256:"
GRACE_S: Final = 3600.0
"""Age below which garbage is left alone: somebody may be about to register it."""
_HEX: Final = frozenset("0123456789abcdef")


class Held(Struct, frozen=True):
    """A bundle in a store."""

    digest: str
    bytes: int
    since: float
    """Unix time at which it was put there last."""


class Collected(Struct, frozen=True):
    """What a garbage collection removed."""

    digests: tuple[str, ...]
    bytes: int


class BundleStore(Protocol):
    """Bundles by digest. Safe to use from several threads and processes at once.

    All verbs raise `StoreAway` where the store does not answer or cannot be written.
    """

    where: str
    """What people know it by: a path, or a URL."""

    def put(self, bundle: StoredBundle) -> str:
        """Keep a bundle, as a whole, and say where. Putting it again renews its age. Raises `BundleError`."""

    def fetch(self, digest: str, into: Path) -> None:
        """Write a bundle's files into the empty folder ``into``, without looking at them.

        `fetch_bundle` is what others call. Raises `BundleMissing`.
        """

    def list(self) -> Sequence[Held]:
        """All bundles, in the order of their digests."""

    def collect(self, keep: Collection[str], *, grace_s: float = GRACE_S) -> Collected:
        """Remove what is not among the digests to ``keep`` and older than ``grace_s``."""


def folder_name(digest: str) -> str:
    """``sha256-...``: a digest as the name of a folder. Raises `InvalidInput` for what is no digest."""
    value = digest.removeprefix(DIGEST_PREFIX)
    if not digest.startswith(DIGEST_PREFIX) or len(value) != 64 or not _HEX.issuperset(value):
        raise InvalidInput(
            f"{digest[:80]!r} is no digest of a bundle", hint="sha256: and 64 hexadecimal digits"
        )
    return f"sha256-{value}"


def digest_of_folder(name: str) -> str | None:
    """The digest that a folder is named after; None for other folders."""
    digest = DIGEST_PREFIX + name.removeprefix("sha256-")
    try:
        return digest if folder_name(digest) == name else None
    except InvalidInput:
        return None


def fetch_bundle(store: BundleStore, digest: str, root: Path) -> StoredBundle:
    """A bundle of ``store`` under ``root``, in a folder named after its digest; fetched if it is not there whole.

    It appears there at once, verified, or not at all. Raises `BundleMissing`, `BundleTorn`, `BundleAltered`,
    `BundleTooNew`, `StoreAway`.
    """
    target = root / folder_name(digest)
    with contextlib.suppress(BundleError):
        return _right(target, digest)
    try:
        with staged(target) as staging:
            store.fetch(digest, staging)
            _right(staging, digest)
            publish(staging, target)
    except OSError as error:
        raise StoreAway(
            f"{root} cannot be written: {error.strerror or error}", hint="look for free space on the disk"
        ) from error
    return _right(target, digest)


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder beside ``target``, which is gone afterwards; so are those that killed processes left there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    staging = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
    # Held as long as this process lives, however it ends.
    lock = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        staging.chmod(0o755)
        yield staging
    finally:
        os.close(lock)
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, target: Path) -> None:
    """Give a folder its name when all of it is on the disk; one that is there and torn is moved aside."""
    for item in staging.rglob("*"):
        _sync(item)
    _sync(staging)
    try:
        staging.rename(target)
    except OSError:
        # Two at once: the other's is as good, if it is whole.
        with contextlib.suppress(BundleError):
            read_bundle(target)
            return
        aside = target.with_name(f".new-torn-{os.getpid()}-{time.monotonic_ns()}")
        target.rename(aside)
        staging.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    _sync(target.parent)


def sweep(root: Path) -> None:
    """Remove what killed processes have left under ``root``."""
    for left in root.glob(".new-*"):
        try:
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            # A young one may not have been locked yet.
            if time.time() - os.fstat(descriptor).st_ctime > 60:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        except OSError:
            pass
        finally:
            os.close(descriptor)


def _right(path: Path, digest: str) -> StoredBundle:
    """The bundle in a folder, verified. Raises `BundleError` where it is not the one of that digest."""
    bundle = read_bundle(path)
    if bundle.digest != digest:
        raise BundleAltered(f"{path} holds {bundle.digest[:19]}..., not {digest[:19]}...")
    return bundle


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
