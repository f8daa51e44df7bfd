"""Bundles in a directory, one folder each, named after the digest: on this machine, or shared between several."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from parbake.contract.bundle import MANIFEST, SIGNATURES, StoredBundle, read_bundle
from parbake.errors import BundleError, BundleMissing, StoreAway
from parbake.release.bundles import (
    GRACE_S,
    Collected,
    Held,
    digest_of_folder,
    folder_name,
    publish,
    staged,
    sweep,
)


class DirectoryStore:
    """A store under ``root``, which is made when something is put there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.where = str(root)

    def put(self, bundle: StoredBundle) -> str:
        """As `BundleStore.put`."""
        target = self.root / folder_name(bundle.digest)
        try:
            with contextlib.suppress(BundleError):
                read_bundle(target)
                self._sign(bundle.path, target)
                os.utime(target)
                return str(target)
            with staged(target) as staging:
                _copy(bundle.path, staging)
                # What is kept is what was read, not what is being written there meanwhile.
                if read_bundle(staging).digest != bundle.digest:
                    raise StoreAway(f"{bundle.path} changed while it was copied", hint="ask again")
                publish(staging, target)
        except OSError as error:
            raise self._away(error, "written") from error
        return str(target)

    def fetch(self, digest: str, into: Path) -> None:
        """As `BundleStore.fetch`."""
        source = self.root / folder_name(digest)
        if not (source / MANIFEST).is_file():
            if self.root.parent.is_dir():
                raise BundleMissing(f"no bundle {digest[:19]}... in {self.where}")
            raise StoreAway(f"the bundle store {self.where} is not there", hint="is it mounted?")
        try:
            _copy(source, into)
        except OSError as error:
            raise self._away(error, "read") from error

    def list(self) -> Sequence[Held]:
        """As `BundleStore.list`."""
        held: list[Held] = []
        for path in sorted(self.root.glob("sha256-*")):
            digest = digest_of_folder(path.name)
            try:
                if digest is not None and (path / MANIFEST).is_file():
                    held.append(Held(digest, _size(path), path.stat().st_mtime))
            except OSError:
                # Somebody removed it meanwhile.
                continue
        return held

    def collect(self, keep: Collection[str], *, grace_s: float = GRACE_S) -> Collected:
        """As `BundleStore.collect`."""
        removed: list[Held] = []
        for held in self.list():
            if held.digest in keep or time.time() - held.since < grace_s:
                continue
            path = self.root / folder_name(held.digest)
            aside = self.root / f".new-gone-{os.getpid()}-{path.name}"
            try:
                # In one step: nobody finds half of it.
                path.rename(aside)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self._away(error, "written") from error
            shutil.rmtree(aside, ignore_errors=True)
            removed.append(held)
        if self.root.is_dir():
            sweep(self.root)
        return Collected(tuple(held.digest for held in removed), sum(held.bytes for held in removed))

    def _sign(self, source: Path, target: Path) -> None:
        """Take the signatures over, in one step."""
        signatures = source / SIGNATURES
        if signatures.is_file() and source.resolve() != target.resolve():
            beside = self.root / f".signatures-{os.getpid()}-{time.monotonic_ns()}"
            shutil.copyfile(signatures, beside)
            beside.rename(target / SIGNATURES)

    def _away(self, error: OSError, what: str) -> StoreAway:
        return StoreAway(
            f"the bundle store {self.where} cannot be {what}: {error.strerror or error}",
            hint="look for free space and rights there; what is cached goes on serving",
        )


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True, copy_function=shutil.copyfile)


def _size(path: Path) -> int:
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
