"""What every bundle store promises: a directory, and an S3-compatible server that runs for real."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from parbake.app.registry import open_bundles
from parbake.contract.bundle import MANIFEST, StoredBundle, read_bundle
from parbake.contract.signatures import new_key, sign
from parbake.errors import (
    BundleAltered,
    BundleError,
    BundleMissing,
    BundleTooNew,
    BundleTorn,
    InvalidInput,
    SettingsError,
    StoreAway,
)
from parbake.release.bundles import BundleStore, fetch_bundle, folder_name
from tests.functions import write_scaled
from tests.s3 import BUCKET, Moto

pytestmark = pytest.mark.xdist_group("s3")

Change = Callable[[str, str, bytes | None], None]
"""``change(digest, file, content)``: put other content into a store behind its back, or (None) remove a file."""


@pytest.fixture
def bundle(tmp_path: Path) -> StoredBundle:
    return write_scaled(tmp_path / "scaled.bundle", 2)


@pytest.fixture
def change(store_place: str) -> Change:
    """Behind the back of the store."""

    def in_directory(digest: str, name: str, content: bytes | None) -> None:
        path = Path(store_place) / folder_name(digest) / name
        path.unlink() if content is None else path.write_bytes(content)

    def in_bucket(digest: str, name: str, content: bytes | None) -> None:
        import obstore
        from obstore.store import S3Store

        bucket, _, prefix = store_place.removeprefix("s3://").partition("/")
        behind = S3Store(bucket, client_options={"allow_http": True})
        key = f"{prefix}/{folder_name(digest)}/{name}"
        if content is None:
            obstore.delete(behind, key)
        else:
            obstore.put(behind, key, content)

    return in_bucket if store_place.startswith("s3://") else in_directory


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_bundle_comes_out_as_it_went_in(store: BundleStore, bundle: StoredBundle, tmp_path: Path) -> None:
    where = store.put(bundle)
    assert where.startswith(store.where)
    fetched = fetch_bundle(store, bundle.digest, tmp_path / "cache")
    assert files(fetched.path) == files(bundle.path)
    assert [held.digest for held in store.list()] == [bundle.digest]
    assert store.list()[0].bytes == sum(map(len, files(bundle.path).values()))
    # Again, from the cache.
    assert fetch_bundle(store, bundle.digest, tmp_path / "cache").path == fetched.path


def test_a_signature_travels_with_it(store: BundleStore, bundle: StoredBundle, tmp_path: Path) -> None:
    store.put(bundle)
    new_key(tmp_path / "key")
    sign(bundle, tmp_path / "key")
    store.put(bundle)
    fetched = fetch_bundle(store, bundle.digest, tmp_path / "cache")
    assert files(fetched.path) == files(bundle.path)


def test_what_is_not_there_is_missing(store: BundleStore, bundle: StoredBundle, tmp_path: Path) -> None:
    store.put(bundle)
    with pytest.raises(BundleMissing, match="no bundle sha256:000000000000"):
        fetch_bundle(store, f"sha256:{0:064x}", tmp_path / "cache")
    for wrong in ("sha256:../../x", "md5:1", "sha256:" + "G" * 64, ""):
        with pytest.raises(InvalidInput):
            fetch_bundle(store, wrong, tmp_path / "cache")


@pytest.mark.parametrize("content", [None, b"", b"something else"])
@pytest.mark.parametrize("file", ["model.onnx", "contract.json", "goldens.bin"])
def test_what_was_torn_or_altered_in_the_store_never_gets_out(
    store: BundleStore, bundle: StoredBundle, change: Change, tmp_path: Path, file: str, content: bytes | None
) -> None:
    store.put(bundle)
    change(bundle.digest, file, content)
    with pytest.raises(BundleError):
        fetch_bundle(store, bundle.digest, tmp_path / "cache")
    assert files(tmp_path / "cache") == {}
    # Putting it again mends it.
    store.put(bundle)
    assert fetch_bundle(store, bundle.digest, tmp_path / "cache").digest == bundle.digest


def test_a_bundle_under_anothers_digest_is_refused(
    store: BundleStore, bundle: StoredBundle, change: Change, tmp_path: Path
) -> None:
    store.put(bundle)
    other = write_scaled(tmp_path / "other.bundle", 3)
    for name, content in files(other.path).items():
        change(bundle.digest, name, content)
    with pytest.raises(BundleAltered):
        fetch_bundle(store, bundle.digest, tmp_path / "cache")
    assert files(tmp_path / "cache") == {}


def test_what_has_no_manifest_is_not_there(
    store: BundleStore, bundle: StoredBundle, change: Change, tmp_path: Path
) -> None:
    store.put(bundle)
    change(bundle.digest, MANIFEST, None)
    assert list(store.list()) == []
    with pytest.raises(BundleMissing):
        fetch_bundle(store, bundle.digest, tmp_path / "cache")


def test_a_bundle_of_a_newer_format_is_told_by_name(
    store: BundleStore, bundle: StoredBundle, change: Change, tmp_path: Path
) -> None:
    store.put(bundle)
    change(bundle.digest, MANIFEST, b'{"format": 99, "what": "nobody knows yet"}')
    with pytest.raises(BundleTooNew, match="has bundle format 99, this parbake reads up to"):
        fetch_bundle(store, bundle.digest, tmp_path / "cache")
    assert files(tmp_path / "cache") == {}


def test_a_file_of_the_same_length_in_the_store_is_found_out(
    store: BundleStore, bundle: StoredBundle, change: Change, tmp_path: Path
) -> None:
    store.put(bundle)
    content = bytearray((bundle.path / "model.onnx").read_bytes())
    content[-1] ^= 1
    change(bundle.digest, "model.onnx", bytes(content))
    with pytest.raises(BundleAltered):
        fetch_bundle(store, bundle.digest, tmp_path / "cache")


def test_an_altered_bundle_is_not_taken_in(store: BundleStore, bundle: StoredBundle) -> None:
    (bundle.path / "model.onnx").write_bytes(b"altered")
    with pytest.raises((BundleError, StoreAway)):
        store.put(bundle)
    assert list(store.list()) == []


def test_garbage_is_what_is_neither_kept_nor_young(
    store: BundleStore, bundle: StoredBundle, tmp_path: Path
) -> None:
    other = write_scaled(tmp_path / "other.bundle", 3)
    store.put(bundle)
    store.put(other)
    assert store.collect([]).digests == ()
    collected = store.collect([other.digest], grace_s=0)
    assert collected.digests == (bundle.digest,)
    assert collected.bytes > 0
    assert [held.digest for held in store.list()] == [other.digest]
    with pytest.raises(BundleMissing):
        fetch_bundle(store, bundle.digest, tmp_path / "cache")
    store.put(bundle)
    assert len(store.list()) == 2


def test_a_torn_copy_in_the_cache_is_fetched_again(
    store: BundleStore, bundle: StoredBundle, tmp_path: Path
) -> None:
    store.put(bundle)
    fetched = fetch_bundle(store, bundle.digest, tmp_path / "cache")
    (fetched.path / "model.onnx").write_bytes(b"torn")
    assert files(fetch_bundle(store, bundle.digest, tmp_path / "cache").path) == files(bundle.path)


def test_many_at_once_put_and_fetch_the_same(
    store: BundleStore, bundle: StoredBundle, tmp_path: Path
) -> None:
    def work(_: int) -> str:
        store.put(bundle)
        return fetch_bundle(store, bundle.digest, tmp_path / "cache").digest

    with ThreadPoolExecutor(6) as crew:
        assert set(crew.map(work, range(12))) == {bundle.digest}
    assert files(tmp_path / "cache" / folder_name(bundle.digest)) == files(bundle.path)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder_name(bundle.digest)]


def _put_and_die(place: str, path: str) -> None:
    store = open_bundles(place)
    while True:
        store.put(read_bundle(path))


def test_killed_writers_leave_nothing_that_counts(bundle: StoredBundle, tmp_path: Path) -> None:
    place = str(tmp_path / "store")
    spawn = multiprocessing.get_context("spawn")
    for _ in range(3):
        shutil.rmtree(place, ignore_errors=True)
        process = spawn.Process(target=_put_and_die, args=(place, str(bundle.path)))
        process.start()
        while not list(Path(place).glob("*")) and process.is_alive():
            pass
        process.kill()
        process.join()
        store = open_bundles(place)
        for held in store.list():
            assert fetch_bundle(store, held.digest, tmp_path / "cache").digest == bundle.digest
        store.put(bundle)
        assert fetch_bundle(store, bundle.digest, tmp_path / "other").digest == bundle.digest
        shutil.rmtree(tmp_path / "other")


def test_a_store_that_dies_is_away_and_leaves_nothing_half(
    own_moto: Moto, bundle: StoredBundle, tmp_path: Path
) -> None:
    store = open_bundles(f"s3://{BUCKET}")
    store.put(bundle)
    own_moto.kill()
    with pytest.raises(StoreAway, match=f"s3://{BUCKET} does not answer"):
        fetch_bundle(store, bundle.digest, tmp_path / "cache")
    with pytest.raises(StoreAway):
        store.put(bundle)
    with pytest.raises(StoreAway):
        store.list()
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.usefixtures("moto")
def test_a_bucket_that_is_not_there_is_said(bundle: StoredBundle) -> None:
    with pytest.raises(StoreAway, match="s3://nowhere/x does not answer"):
        open_bundles("s3://nowhere/x").put(bundle)


def test_a_directory_that_is_not_mounted_is_away(tmp_path: Path) -> None:
    with pytest.raises(StoreAway, match="is not there"):
        fetch_bundle(open_bundles(str(tmp_path / "mnt" / "store")), f"sha256:{1:064x}", tmp_path / "cache")
    with pytest.raises(SettingsError, match="is no bundle store"):
        open_bundles("gs://somewhere")


def test_a_file_name_that_leads_out_is_refused(
    store: BundleStore, bundle: StoredBundle, change: Change, tmp_path: Path
) -> None:
    store.put(bundle)
    manifest = (bundle.path / MANIFEST).read_bytes()
    change(bundle.digest, MANIFEST, manifest.replace(b'"model.onnx"', b'"../escaped"'))
    with pytest.raises((BundleAltered, BundleTorn)):
        fetch_bundle(store, bundle.digest, tmp_path / "cache")
    assert not list(tmp_path.rglob("escaped"))
