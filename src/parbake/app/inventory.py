"""Gather the inventory: from running servers, from bundles on disk, and from what the state store knows of releases."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np
from msgspec import Struct

from parbake.contract.bundle import MANIFEST, StoredBundle, read_bundle
from parbake.contract.environment import capture
from parbake.contract.model import Contract
from parbake.errors import BundleTorn, NotFound, ParbakeError
from parbake.release import advisories as known
from parbake.release.callers import Change, changes
from parbake.release.gate import Waiver
from parbake.release.inventory import (
    Inventory,
    Item,
    Machine,
    ReleaseFact,
    ReleaseFacts,
    item_of,
    judged,
    machine_of,
    with_facts,
)
from parbake.release.model import WaiverRecord
from parbake.runtime.session import differing_rows

if TYPE_CHECKING:
    from parbake.app.supervisor import Status
    from parbake.release.gate import GateReport
    from parbake.release.state import State

_DEPTH: Final = 4
_MOST: Final = 100_000


class ServerInventory(Struct, frozen=True):
    """What one server says of itself."""

    machine: Machine
    items: tuple[Item, ...]


class Delta(Struct, frozen=True):
    """One thing that differs between two bundles."""

    what: str
    before: str
    after: str
    note: str = ""


class BundleDiff(Struct, frozen=True):
    """How two bundles differ, part by part."""

    before: str
    after: str
    same: bool
    schema: tuple[Change, ...]
    contract: tuple[Delta, ...]
    libraries: tuple[Delta, ...]
    goldens: tuple[Delta, ...]
    size: tuple[Delta, ...]


def of_server(
    status: Status, bundles: Mapping[tuple[str, str], StoredBundle], unloaded: Sequence[tuple[str, str]]
) -> ServerInventory:
    """What a server serves, on this machine. ``unloaded`` are name and bundle of what it could serve. Reads files."""
    machine = machine_of(capture())
    found: list[Item] = []
    for version in status.versions:
        stored = bundles[(version.name, version.version)]
        item = item_of(stored, version=version.version, state="running", machine=machine)
        found.append(
            msgspec.structs.replace(
                item,
                # Its name here; the contract may have another.
                name=version.name,
                mode=version.mode,
                table=version.table,
                table_rows=version.table_rows,
                requests=version.requests,
                last_request=version.last_request,
            )
        )
    for name, path in unloaded:
        item = item_at(Path(path))
        found.append(msgspec.structs.replace(item, name=name, state="unloaded") if not item.problem else item)
    nobody, today = known.nothing_known("nobody was asked"), datetime.now(UTC).date()
    return ServerInventory(machine, tuple(judged(item, nobody, today) for item in found))


def gather(
    servers: Mapping[str, ServerInventory],
    paths: Sequence[Path],
    *,
    facts: ReleaseFacts | None = None,
    why_no_facts: str = "",
    advisories: str = "",
    now: datetime | None = None,
) -> Inventory:
    """Everything in servers (by address) and below paths. ``advisories`` is a source for `look_up`, "" for none.

    Raises `SettingsError` where advisories cannot be read.
    """
    found = [
        msgspec.structs.replace(item, where=where)
        for where, server in servers.items()
        for item in server.items
    ]
    # The same content is the same version, wherever copies of it lie.
    seen = {item.digest for item in found if item.digest}
    for path in paths:
        for bundle in bundles_below(path):
            item = item_at(bundle)
            if item.digest not in seen:
                seen |= {item.digest} - {""}
                found.append(msgspec.structs.replace(item, where=str(path)))
    items = tuple(found)
    if facts is not None:
        try:
            items = with_facts(found, facts.of({item.name for item in found}))
        except ParbakeError as error:
            why_no_facts = error.message
    if advisories:
        libraries = {library for item in items for library in item.machine.libraries}
        book = known.look_up(advisories, libraries)
    else:
        book = known.nothing_known("nobody was asked")
    moment = now or datetime.now(UTC)
    return Inventory(
        moment.isoformat(timespec="seconds"),
        tuple(judged(item, book, moment.date()) for item in items),
        book.looked,
        why_no_facts,
    )


class StoredFacts:
    """What the store of releases knows, as an inventory wants it."""

    def __init__(self, state: State) -> None:
        self._state = state

    def of(self, names: Collection[str]) -> Sequence[ReleaseFact]:
        """See `ReleaseFacts.of`."""
        pairs: dict[tuple[str, str], None] = {}
        for release in self._state.releases():
            pairs[(release.proposal.deployment, release.proposal.version)] = None
        let_pass = {name: self._state.waivers(name) for name in {name for name, _ in pairs} | set(names)}
        for name, kept in sorted(let_pass.items()):
            pairs.update({(name, waiver.version): None for waiver in kept})
        live = {name: self._state.live(name) for name in {name for name, _ in pairs}}
        found: list[ReleaseFact] = []
        for name, version in pairs:
            mine = tuple(waiver for waiver in let_pass[name] if waiver.version == version)
            waivers = tuple(Waiver(one.check, one.by, one.why, _moment(one.at)) for one in mine)
            known_of = self._state.facts(name, version)
            if known_of is None:
                digest = next((str(one.evidence["digest"]) for one in mine if "digest" in one.evidence), "")
                found.append(ReleaseFact(name, version, digest, waivers=waivers))
                continue
            champion = live[name]
            is_champion = champion is not None and champion.proposal.version == version
            found.append(
                ReleaseFact(
                    name,
                    version,
                    known_of.bundle_digest,
                    known_of.state,
                    known_of.source,
                    known_of.table,
                    ("champion",) if is_champion else (),
                    known_of.released_by,
                    _moment(known_of.released_at),
                    known_of.image,
                    waivers,
                )
            )
        return found


def keep_waivers(state: State, name: str, version: str, report: GateReport) -> None:
    """Write the waivers that a report needed into the history of a version. Raises `StateAway` and its like."""
    for check in report.checks:
        if check.waiver is not None:
            evidence = {
                "digest": report.digest,
                "words": check.words,
                "evidence": msgspec.to_builtins(check.evidence),
            }
            state.record_waiver(
                WaiverRecord(name, version, check.name, check.waiver.who, check.waiver.why, evidence)
            )


def item_at(path: Path) -> Item:
    """The bundle at a path, every file held against the digest; one that cannot be read is said to be damaged."""
    try:
        return item_of(read_bundle(path))
    except (ParbakeError, OSError) as error:
        words = error.message if isinstance(error, ParbakeError) else f"cannot be read: {error.strerror}"
        return Item(path.name, "", "damaged", "", str(path), problem=words)


def bundles_below(path: Path) -> Iterator[Path]:
    """The folders there that hold a manifest, links not followed. Raises `NotFound` where there is no such path."""
    if not path.exists():
        raise NotFound(f"no bundle or folder at {path}", hint="parbake pack MODEL --out DIR writes a bundle")
    pending = [(path, 0)]
    count = 0
    while pending and count < _MOST:
        folder, depth = pending.pop()
        count += 1
        if (folder / MANIFEST).is_file():
            yield folder
        elif depth < _DEPTH and folder.is_dir():
            try:
                inner = sorted(folder.iterdir(), reverse=True)
            except OSError:
                continue
            pending += [(one, depth + 1) for one in inner if one.is_dir() and not one.is_symlink()]


def diff(before: StoredBundle, after: StoredBundle) -> BundleDiff:
    """How two bundles differ. Raises `BundleTorn` where the goldens of one cannot be read."""
    old, new = before.contract, after.contract
    try:
        goldens = tuple(_goldens(before, after))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        # They are whole, but not what their contract says.
        raise BundleTorn(f"the goldens cannot be held against each other: {error}") from error
    return BundleDiff(
        before.digest,
        after.digest,
        before.digest == after.digest,
        changes(old, new),
        tuple(_contract(old, new)),
        tuple(_libraries(before, after)),
        goldens,
        tuple(_size(before, after)),
    )


def _contract(old: Contract, new: Contract) -> Iterator[Delta]:
    """What is no part of the schema."""
    told = ("inputs", "outputs", "key", "default", "format")
    for field in Contract.__struct_fields__:
        left, right = getattr(old, field), getattr(new, field)
        if field in told or left == right:
            continue
        yield Delta(field.replace("_", " "), _words(left), _words(right))


def _libraries(before: StoredBundle, after: StoredBundle) -> Iterator[Delta]:
    left, right = before.environment, after.environment
    for what in ("python", "implementation", "os", "system", "machine", "cpu"):
        one, other = getattr(left, what), getattr(right, what)
        if one != other:
            yield Delta(what, one or "-", other or "-")
    old, new = ({one.name: one.version for one in lock.libraries} for lock in (left, right))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            needed = name in left.required or name in right.required
            yield Delta(name, old.get(name, "-"), new.get(name, "-"), "needed by its code" if needed else "")


def _goldens(before: StoredBundle, after: StoredBundle) -> Iterator[Delta]:
    old, new = before.goldens(), after.goldens()
    if old.rows != new.rows:
        yield Delta("rows", f"{old.rows:,}", f"{new.rows:,}")
    same = old.rows == new.rows and all(
        name in new.inputs and _equal(value, new.inputs[name]) for name, value in old.inputs.items()
    )
    if not same:
        yield Delta("inputs", "-", "-", "other rows: the answers cannot be held against each other")
        return
    tolerance = before.contract.tolerance
    for spec in before.contract.outputs:
        if spec.name not in new.outputs:
            continue
        left, right = old.outputs[spec.name], new.outputs[spec.name]
        if left.dtype.kind != right.dtype.kind:
            continue
        rows = differing_rows(right, left, spec, tolerance.rtol, tolerance.atol)
        if len(rows):
            row = int(rows[0])
            one, other = (np.array2string(np.asarray(array[row]), threshold=8) for array in (left, right))
            yield Delta(
                f"output {spec.name}", one, other, f"row {row}, one of {len(rows)} that differ of {old.rows}"
            )


def _size(before: StoredBundle, after: StoredBundle) -> Iterator[Delta]:
    old, new = ({entry.path: entry for entry in stored.manifest.files} for stored in (before, after))
    left, right = (sum(entry.bytes for entry in files.values()) for files in (old, new))
    if left != right:
        yield Delta(
            "all files",
            f"{left:,} bytes",
            f"{right:,} bytes",
            f"{100 * (right / left - 1):+.0f} %" if left else "",
        )
    for path in sorted(old.keys() | new.keys()):
        one, other = old.get(path), new.get(path)
        if one is None or other is None or one.sha256 != other.sha256:
            words = ("-" if entry is None else f"{entry.bytes:,} bytes" for entry in (one, other))
            yield Delta(path, *words)


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _equal(left: np.ndarray, right: np.ndarray) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return bool(np.array_equal(left, right, equal_nan=left.dtype.kind == "f"))


def _words(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return f"{value:g}"
    return msgspec.json.encode(value).decode()
