"""A bundle on disk: written in one step, verified against its digest when read.

::

    eta.bundle/
        manifest.json       files with their SHA-256, and the digest over them
        contract.json
        environment.json
        goldens.bin         inputs and outputs of the goldens (`pack_tensors`)
        model.onnx, source/...   whatever the contract's steps name
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Final, TypeVar

import msgspec

from parbake.contract.datatypes import NUMPY
from parbake.contract.model import (
    FORMAT,
    Contract,
    Environment,
    FileEntry,
    Manifest,
    TensorSpec,
)
from parbake.contract.tensors import Tensor, Tensors, from_raw, to_raw
from parbake.errors import BundleAltered, BundleTooNew, BundleTorn, PackRefused

MANIFEST: Final = "manifest.json"
CONTRACT: Final = "contract.json"
ENVIRONMENT: Final = "environment.json"
GOLDENS: Final = "goldens.bin"
SIGNATURES: Final = "signatures.json"
"""Beside the bundle's files, and none of them: see `parbake.contract.signatures`."""

_T = TypeVar("_T")

_MAX_JSON_BYTES: Final = 64 * 1024 * 1024
_LEFT_AFTER_S: Final = 60.0
_MAGIC: Final = b"PBT1"
_HEADER: Final = struct.Struct("<4sI")


@dataclass(frozen=True, slots=True)
class Goldens:
    """Example inputs with the outputs that training produced; the first axis is the row."""

    inputs: Tensors
    outputs: Tensors

    @property
    def rows(self) -> int:
        """Number of examples."""
        return len(next(iter(self.inputs.values()))) if self.inputs else 0


@dataclass(frozen=True, slots=True)
class StoredBundle:
    """A bundle directory whose manifest and contract have been read."""

    path: Path
    contract: Contract
    environment: Environment
    manifest: Manifest

    @property
    def digest(self) -> str:
        """``sha256:...`` over all files."""
        return self.manifest.digest

    def file(self, name: str) -> Path:
        """A file of the bundle, by the name a step gives."""
        return self.path / _safe(name)

    def goldens(self) -> Goldens:
        """Read the goldens. Raises `BundleTorn`."""
        tensors = unpack_tensors(_read(self.path, GOLDENS, 1 << 31), str(self.path / GOLDENS))
        inputs = {name[3:]: value for name, value in tensors.items() if name.startswith("in/")}
        outputs = {name[4:]: value for name, value in tensors.items() if name.startswith("out/")}
        return Goldens(inputs, outputs)


def write_bundle(
    out: Path,
    contract: Contract,
    files: Mapping[str, bytes],
    goldens: Goldens,
    environment: Environment,
    *,
    replace: bool = False,
) -> StoredBundle:
    """Write a bundle beside ``out``, then rename it there: a torn bundle never has the final name.

    Raises `PackRefused` where ``out`` exists and is not a bundle, or is one and ``replace`` is false.
    """
    if out.exists():
        is_bundle = (out / MANIFEST).is_file()
        if not is_bundle and (not out.is_dir() or any(out.iterdir())):
            raise PackRefused(f"{out} exists and is not a bundle", hint="name another --out")
        if is_bundle and not replace:
            raise PackRefused(f"{out} exists", hint="--replace overwrites it")
    content = {_safe(name).as_posix(): data for name, data in files.items()}
    content[CONTRACT] = msgspec.json.format(msgspec.json.encode(contract, order="deterministic"))
    content[ENVIRONMENT] = msgspec.json.format(msgspec.json.encode(environment, order="deterministic"))
    golden_tensors: dict[str, tuple[Tensor, TensorSpec]] = {}
    for spec in contract.inputs:
        golden_tensors[f"in/{spec.name}"] = (goldens.inputs[spec.name], spec)
    for spec in contract.outputs:
        golden_tensors[f"out/{spec.name}"] = (goldens.outputs[spec.name], spec)
    content[GOLDENS] = pack_tensors(golden_tensors)
    entries = tuple(
        FileEntry(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in sorted(content.items())
    )
    created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = Manifest(FORMAT, digest_of(entries), created, entries)
    content[MANIFEST] = msgspec.json.format(msgspec.json.encode(manifest))

    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(out, ".new-")
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
    # Held as long as this process lives, however it ends.
    lock = os.open(staging, os.O_RDONLY)
    try:
        _hold(lock)
        staging.chmod(0o755)
        for name, data in content.items():
            target = staging / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
        _publish(staging, out)
        _sweep(out, ".old-")
    finally:
        os.close(lock)
        shutil.rmtree(staging, ignore_errors=True)
    return StoredBundle(out, contract, environment, manifest)


def _hold(descriptor: int) -> bool:
    """Lock a folder that is open. False where another process has it, or the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sweep(out: Path, kind: str) -> None:
    """Remove what processes that were killed have left beside ``out``."""
    for left in out.parent.iterdir():
        if not left.name.startswith(f".{out.name}{kind}"):
            continue
        try:
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            # A young one may not have been locked yet, or may still be put back.
            if time.time() - os.fstat(descriptor).st_ctime > _LEFT_AFTER_S and _hold(descriptor):
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(descriptor)


def _publish(staging: Path, out: Path) -> None:
    """Rename ``staging`` to ``out``; what stood there is moved aside first, and back if the rename fails."""
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    if out.exists():
        out.rename(old)
    try:
        staging.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
    descriptor = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bundle(path: str | Path, *, verify: bool = True) -> StoredBundle:
    """Read a bundle; ``verify`` recomputes the hash of every file.

    Raises `BundleTorn`, `BundleAltered` or `BundleTooNew`, each naming the file.
    """
    path = Path(path)
    if not path.is_dir():
        raise BundleTorn(f"no bundle at {path}", hint="parbake pack MODEL --out DIR writes one")
    manifest = manifest_of(_read(path, MANIFEST, _MAX_JSON_BYTES), path)
    if digest_of(manifest.files) != manifest.digest:
        raise BundleAltered(f"{path / MANIFEST}: the list of files does not match the digest")
    listed = {entry.path for entry in manifest.files}
    for needed in (CONTRACT, ENVIRONMENT, GOLDENS):
        if needed not in listed:
            raise BundleTorn(f"{path / MANIFEST} does not list {needed}")
    for entry in manifest.files:
        _check_file(path, entry, verify)
    if verify:
        for extra in _files_of(path):
            if extra not in listed and extra not in (MANIFEST, SIGNATURES):
                raise BundleAltered(
                    f"{path / extra} is not part of the bundle", hint="remove the file, or pack again"
                )
    contract = _decode(_read(path, CONTRACT, _MAX_JSON_BYTES), Contract, path / CONTRACT)
    environment = _decode(_read(path, ENVIRONMENT, _MAX_JSON_BYTES), Environment, path / ENVIRONMENT)
    return StoredBundle(path, contract, environment, manifest)


def manifest_of(raw: bytes, where: Path | str) -> Manifest:
    """The manifest of the bundle at ``where``; its format comes first, as a newer one may say anything else.

    Raises `BundleTooNew`, `BundleTorn`.
    """
    named = f"{where}/{MANIFEST}"
    try:
        number = json.loads(raw).get("format")
    except (ValueError, AttributeError, RecursionError) as error:
        raise BundleTorn(f"{named} is not valid JSON: {error}") from error
    if isinstance(number, int) and number > FORMAT:
        raise BundleTooNew(
            f"{where} has bundle format {number}, this parbake reads up to {FORMAT}", hint="upgrade parbake"
        )
    return _decode(raw, Manifest, named)


def digest_of(entries: tuple[FileEntry, ...]) -> str:
    """The digest of a bundle: SHA-256 over the sorted lines ``sha256 bytes path``."""
    lines = sorted(f"{entry.sha256} {entry.bytes} {entry.path}\n" for entry in entries)
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def pack_tensors(tensors: Mapping[str, tuple[Tensor, TensorSpec]]) -> bytes:
    """Tensors as one blob: magic, length of a JSON header, the header, the raw bytes one after another."""
    header: list[dict[str, object]] = []
    body: list[bytes] = []
    for name, (array, spec) in tensors.items():
        raw = to_raw(array, spec.datatype)
        header.append(
            {"name": name, "datatype": spec.datatype, "shape": list(array.shape), "bytes": len(raw)}
        )
        body.append(raw)
    text = json.dumps(header).encode()
    return _HEADER.pack(_MAGIC, len(text)) + text + b"".join(body)


def unpack_tensors(blob: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a blob that `pack_tensors` made. Raises `BundleTorn` naming ``where``."""
    try:
        magic, size = _HEADER.unpack_from(blob)
        if magic != _MAGIC:
            raise ValueError(f"starts with {magic!r}, not {_MAGIC!r}")
        at = _HEADER.size + size
        tensors: dict[str, Tensor] = {}
        for item in json.loads(blob[_HEADER.size : at]):
            datatype, shape, length = item["datatype"], item["shape"], item["bytes"]
            if datatype not in NUMPY or length > len(blob) - at:
                raise ValueError(f"tensor {item['name']!r} does not fit")
            tensors[item["name"]] = from_raw(blob[at : at + length], datatype, shape)
            at += length
    except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise BundleTorn(f"{where} is torn: {error}") from error
    return tensors


def _check_file(root: Path, entry: FileEntry, verify: bool) -> None:
    target = root / _safe(entry.path, root)
    if not target.is_file() or target.is_symlink():
        raise BundleTorn(f"{target} is missing", hint="copy the bundle again")
    size = target.stat().st_size
    if size != entry.bytes:
        raise BundleTorn(f"{target} has {size} bytes, the manifest says {entry.bytes}")
    if verify:
        with target.open("rb") as handle:
            actual = hashlib.file_digest(handle, "sha256").hexdigest()
        if actual != entry.sha256:
            raise BundleAltered(
                f"{target} has SHA-256 {actual[:12]}..., the manifest says {entry.sha256[:12]}...",
                hint="the file was changed after packing: pack again, or copy it again",
            )


def _files_of(root: Path) -> Iterator[str]:
    for item in sorted(root.rglob("*")):
        if item.is_file():
            yield item.relative_to(root).as_posix()


def _safe(name: str, root: Path | None = None) -> PurePosixPath:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in name or "\0" in name:
        where = f" in {root}" if root else ""
        raise BundleAltered(f"file name {name!r}{where} leads out of the bundle")
    return pure


def _read(root: Path, name: str, limit: int) -> bytes:
    target = root / name
    try:
        size = target.stat().st_size
        if size > limit:
            raise BundleTorn(f"{target} has {size} bytes, more than the limit of {limit}")
        return target.read_bytes()
    except OSError as error:
        raise BundleTorn(
            f"{target} cannot be read: {error.strerror}", hint="is this the directory parbake pack wrote?"
        ) from error


def _decode(raw: bytes, kind: type[_T], where: Path | str) -> _T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleTorn(f"{where}: {error}") from error
