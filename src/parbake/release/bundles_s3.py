"""Bundles in an S3-compatible object store: one prefix each, and the manifest last, which makes it count.

Keys and region come from the environment (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_REGION``,
``AWS_ENDPOINT_URL`` for a store that is not Amazon's), or from the machine's role.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from parbake.contract.bundle import MANIFEST, SIGNATURES, StoredBundle, digest_of, manifest_of, read_bundle
from parbake.errors import BundleAltered, BundleMissing, BundleTorn, MissingExtra, SettingsError, StoreAway
from parbake.release.bundles import GRACE_S, Collected, Held, digest_of_folder, folder_name

if TYPE_CHECKING:
    from obstore.store import S3Store as Bucket

SCHEME: Final = "s3://"
_TIMEOUT: Final = timedelta(seconds=60)
_RETRY: Final = timedelta(seconds=20)
_MAX_MANIFEST: Final = 64 * 1024 * 1024


class S3Store:
    """A store at ``s3://BUCKET/PREFIX``. Raises `SettingsError` for another URL, `MissingExtra`."""

    def __init__(self, url: str) -> None:
        bucket, _, prefix = url.removeprefix(SCHEME).partition("/")
        if not url.startswith(SCHEME) or not bucket:
            raise SettingsError(f"{url!r} is no bundle store", hint="s3://BUCKET/PREFIX, or a directory")
        self.where = url.rstrip("/")
        self._prefix = prefix.strip("/")
        self._bucket = _open(bucket)

    def put(self, bundle: StoredBundle) -> str:
        """As `BundleStore.put`."""
        import obstore

        # What is altered here must not become what everybody fetches.
        bundle = read_bundle(bundle.path)
        names = [entry.path for entry in bundle.manifest.files]
        if (bundle.path / SIGNATURES).is_file():
            names.append(SIGNATURES)
        for name in (*names, MANIFEST):
            with self._asked(), (bundle.path / name).open("rb") as handle:
                obstore.put(self._bucket, self._key(bundle.digest, name), handle)
        return f"{self.where}/{folder_name(bundle.digest)}"

    def fetch(self, digest: str, into: Path) -> None:
        """As `BundleStore.fetch`."""
        raw = self._read(digest, MANIFEST, _MAX_MANIFEST)
        if raw is None:
            raise BundleMissing(f"no bundle {digest[:19]}... in {self.where}")
        manifest = manifest_of(raw, f"{self.where}/{folder_name(digest)}")
        if manifest.digest != digest or digest_of(manifest.files) != digest:
            raise BundleAltered(f"{self.where} holds another bundle in the place of {digest[:19]}...")
        for entry in manifest.files:
            target = into / entry.path
            # The digest is over the paths too, but it may have been made to lead out.
            if not target.resolve().is_relative_to(into.resolve()) or target == into:
                raise BundleAltered(f"file name {entry.path!r} leads out of the bundle")
            target.parent.mkdir(parents=True, exist_ok=True)
            self._download(digest, entry.path, target, entry.bytes)
        signatures = self._read(digest, SIGNATURES, _MAX_MANIFEST)
        if signatures is not None:
            (into / SIGNATURES).write_bytes(signatures)
        (into / MANIFEST).write_bytes(raw)

    def list(self) -> Sequence[Held]:
        """As `BundleStore.list`."""
        sizes: dict[str, int] = {}
        since: dict[str, float] = {}
        for digest, name, item in self._objects():
            sizes[digest] = sizes.get(digest, 0) + int(item["size"])
            if name == MANIFEST:
                since[digest] = item["last_modified"].timestamp()
        return [Held(digest, sizes[digest], since[digest]) for digest in sorted(since)]

    def collect(self, keep: Collection[str], *, grace_s: float = GRACE_S) -> Collected:
        """As `BundleStore.collect`."""
        import time

        import obstore

        keys: dict[str, list[str]] = {}
        newest: dict[str, float] = {}
        sizes: dict[str, int] = {}
        for digest, name, item in self._objects():
            # The manifest first: without it, the rest is not found.
            keys.setdefault(digest, []).insert(
                0 if name == MANIFEST else len(keys[digest]), str(item["path"])
            )
            newest[digest] = max(newest.get(digest, 0.0), item["last_modified"].timestamp())
            sizes[digest] = sizes.get(digest, 0) + int(item["size"])
        gone = [d for d in sorted(keys) if d not in keep and time.time() - newest[d] >= grace_s]
        for digest in gone:
            for key in keys[digest]:
                with self._asked():
                    obstore.delete(self._bucket, key)
        return Collected(tuple(gone), sum(sizes[digest] for digest in gone))

    def _objects(self) -> Iterator[tuple[str, str, Any]]:
        """Digest, name of the file and facts of everything that belongs to a bundle."""
        import obstore

        with self._asked():
            for chunk in obstore.list(self._bucket, prefix=self._prefix or None):
                for item in chunk:
                    path = str(item["path"])
                    inner = path.removeprefix(f"{self._prefix}/") if self._prefix else path
                    folder, _, name = inner.partition("/")
                    if name and (digest := digest_of_folder(folder)) is not None:
                        yield digest, name, item

    def _read(self, digest: str, name: str, limit: int) -> bytes | None:
        """A small object as a whole; None where there is none."""
        import obstore

        with self._asked():
            try:
                found = obstore.get(self._bucket, self._key(digest, name))
            except FileNotFoundError:
                return None
            if found.meta["size"] > limit:
                raise BundleAltered(
                    f"{name} of {digest[:19]}... in {self.where} has {found.meta['size']} bytes"
                )
            return bytes(found.bytes())

    def _download(self, digest: str, name: str, target: Path, size: int) -> None:
        import obstore

        with self._asked():
            try:
                found = obstore.get(self._bucket, self._key(digest, name))
            except FileNotFoundError as error:
                raise BundleTorn(f"{name} of {digest[:19]}... is missing in {self.where}") from error
            if found.meta["size"] != size:
                raise BundleTorn(
                    f"{name} of {digest[:19]}... has {found.meta['size']} bytes in {self.where}, "
                    f"its manifest says {size}"
                )
            with target.open("wb") as handle:
                for chunk in found.stream():
                    handle.write(chunk)

    def _key(self, digest: str, name: str) -> str:
        return "/".join(part for part in (self._prefix, folder_name(digest), name) if part)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """What errors of the library mean. A missing object is told by those who ask for one."""
        from obstore.exceptions import BaseError

        try:
            yield
        # What is missing here is a whole bucket.
        except (BaseError, OSError) as error:
            words = next(
                (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
            )
            raise StoreAway(
                f"the bundle store {self.where} does not answer as it should: {words[:300]}",
                hint="AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; what is cached goes on serving",
            ) from error


def _open(bucket: str) -> Bucket:
    try:
        from obstore.store import S3Store as Bucket
    except ImportError as error:
        raise MissingExtra("obstore", "s3") from error
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    config: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    if "AWS_REGION" not in os.environ and "AWS_DEFAULT_REGION" not in os.environ:
        config["region"] = "us-east-1"
    return Bucket(
        bucket,
        **config,
        client_options={
            "timeout": _TIMEOUT,
            "connect_timeout": timedelta(seconds=5),
            "allow_http": endpoint.startswith("http://"),
        },
        retry_config={"max_retries": 3, "retry_timeout": _RETRY},
    )
