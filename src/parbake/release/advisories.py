"""Known vulnerabilities of installed libraries: from a file in OSV's format, or from a service that speaks its API.

The format is that of https://ossf.github.io/osv-schema/; https://osv-vulnerabilities.storage.googleapis.com/PyPI/all.zip
holds all of PyPI's, for machines that reach no service.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct
from packaging.version import Version

from parbake.contract.model import Library
from parbake.errors import SettingsError

OSV: Final = "https://api.osv.dev"

_ECOSYSTEM: Final = "PyPI"
_TIMEOUT_S: Final = 5.0
_BATCH: Final = 500
_MAX_PAGES: Final = 20
_MAX_ENTRY_BYTES: Final = 16 * 1024**2
_MAX_TOTAL_BYTES: Final = 2 * 1024**3
_MAX_REPLY_BYTES: Final = 64 * 1024**2


class _Package(Struct, frozen=True):
    ecosystem: str = ""
    name: str = ""


class _Range(Struct, frozen=True):
    type: str = ""
    events: tuple[dict[str, str], ...] = ()


class _Affected(Struct, frozen=True):
    package: _Package = _Package()
    ranges: tuple[_Range, ...] = ()
    versions: tuple[str, ...] = ()


class _Entry(Struct, frozen=True):
    id: str
    aliases: tuple[str, ...] = ()
    withdrawn: str | None = None
    affected: tuple[_Affected, ...] = ()


class Looked(Struct, frozen=True):
    """Where vulnerabilities were looked up."""

    source: str
    """File or URL; "" where nobody asked."""
    at: str
    """When it was asked; of a file, when it was written."""
    known: bool
    """Whether anything can be said: nothing found elsewhere means nothing."""
    words: str = ""
    """Why nothing can be said."""


@dataclass(frozen=True, slots=True)
class Advisories:
    """What is known of the vulnerabilities of libraries. Where nothing is known, that is what it says."""

    looked: Looked
    entries: Mapping[str, Sequence[tuple[_Entry, _Affected]]] = field(default_factory=dict)
    """From a file, by canonical name of the library."""
    answers: Mapping[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    """From a service, by canonical name and version."""

    def of(self, library: Library) -> tuple[str, ...] | None:
        """Ids of the vulnerabilities of this version; None where that is not known."""
        if not self.looked.known:
            return None
        name = _canonical(library.name)
        if not self.entries and self.answers:
            return self.answers.get((name, library.version))
        if not self.entries:
            # A service that was asked about nothing, or a file of other ecosystems.
            return ()
        found: set[str] = set()
        for entry, affected in self.entries.get(name, ()):
            hit = _affects(affected, library.version)
            if hit is None:
                return None
            if hit:
                found.add(next((alias for alias in entry.aliases if alias.startswith("CVE-")), entry.id))
        return tuple(sorted(found))


def nothing_known(why: str, source: str = "") -> Advisories:
    """Advisories of which there are none to ask."""
    return Advisories(Looked(source, _now(), False, why))


def look_up(source: str, libraries: Iterable[Library]) -> Advisories:
    """Ask a URL of OSV's API, a zip, a folder or a JSON file. A service that does not answer is no error: unknown.

    Raises `SettingsError` where a file cannot be read as OSV's format.
    """
    if source.startswith(("http://", "https://")):
        return ask(source, libraries)
    return read(Path(source))


def read(path: Path) -> Advisories:
    """The advisories of a file. Raises `SettingsError`."""
    entries: dict[str, list[tuple[_Entry, _Affected]]] = {}
    decoder = msgspec.json.Decoder(_Entry)
    count = 0
    try:
        for where, raw in _documents(path):
            try:
                entry = decoder.decode(raw)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise SettingsError(f"{where} is no advisory in OSV's format: {error}", hint=_HINT) from error
            count += 1
            for affected in entry.affected if entry.withdrawn is None else ():
                if affected.package.ecosystem.partition(":")[0] == _ECOSYSTEM:
                    entries.setdefault(_canonical(affected.package.name), []).append((entry, affected))
        written = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise SettingsError(f"advisories cannot be read from {path}: {error}", hint=_HINT) from error
    if not entries:
        words = f"{path} has {count} advisories, none of them of {_ECOSYSTEM}"
        return Advisories(Looked(str(path), written, False, words))
    return Advisories(Looked(str(path), written, True), entries)


def ask(url: str, libraries: Iterable[Library]) -> Advisories:
    """What a service of OSV's API says of these libraries. Where it does not answer, nothing is known."""
    asked = sorted({(_canonical(library.name), library.version) for library in libraries})
    answers: dict[tuple[str, str], tuple[str, ...]] = {}
    try:
        for start in range(0, len(asked), _BATCH):
            answers.update(_ask_batch(url, asked[start : start + _BATCH]))
    except (urllib.error.URLError, OSError, ValueError, msgspec.DecodeError) as error:
        return nothing_known(f"{url} does not answer: {error}", url)
    return Advisories(Looked(url, _now(), True), answers=answers)


class _Found(Struct, frozen=True):
    id: str


class _Result(Struct, frozen=True):
    vulns: tuple[_Found, ...] = ()
    next_page_token: str = ""


class _Reply(Struct, frozen=True):
    results: tuple[_Result, ...]


def _ask_batch(url: str, asked: Sequence[tuple[str, str]]) -> dict[tuple[str, str], tuple[str, ...]]:
    found: dict[tuple[str, str], set[str]] = {one: set() for one in asked}
    pending = [(one, "") for one in asked]
    for _ in range(_MAX_PAGES):
        queries = [
            {"package": {"ecosystem": _ECOSYSTEM, "name": name}, "version": version}
            | ({"page_token": token} if token else {})
            for (name, version), token in pending
        ]
        request = urllib.request.Request(  # noqa: S310  whoever asks names the URL, and it begins with http
            url.rstrip("/") + "/v1/querybatch",
            json.dumps({"queries": queries}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:  # noqa: S310  as above
            reply = msgspec.json.decode(response.read(_MAX_REPLY_BYTES), type=_Reply)
        if len(reply.results) != len(pending):
            raise ValueError(f"{len(reply.results)} answers to {len(pending)} questions")
        for (one, _token), result in zip(pending, reply.results, strict=True):
            found[one].update(vulnerability.id for vulnerability in result.vulns)
        pending = [
            (one, result.next_page_token)
            for (one, _token), result in zip(pending, reply.results, strict=True)
            if result.next_page_token
        ]
        if not pending:
            return {one: tuple(sorted(ids)) for one, ids in found.items()}
    raise ValueError(f"more than {_MAX_PAGES} pages")


_HINT: Final = "a zip as OSV publishes it for PyPI, a folder of its JSON files, or one of them"


def _documents(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every JSON document. Raises `SettingsError` where one is too large."""
    total = 0
    if path.is_dir():
        for file in sorted(path.rglob("*.json")):
            if file.stat().st_size > _MAX_ENTRY_BYTES:
                raise SettingsError(f"{file} is larger than {_MAX_ENTRY_BYTES} bytes", hint=_HINT)
            yield str(file), file.read_bytes()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for item in archive.infolist():
                if not item.filename.endswith(".json"):
                    continue
                with archive.open(item) as handle:
                    # What the archive says of sizes need not be so.
                    raw = handle.read(_MAX_ENTRY_BYTES + 1)
                total += len(raw)
                if len(raw) > _MAX_ENTRY_BYTES or total > _MAX_TOTAL_BYTES:
                    raise SettingsError(f"{path}: {item.filename} is too large", hint=_HINT)
                yield f"{path}: {item.filename}", raw
    else:
        with path.open("rb") as handle:
            yield str(path), handle.read(_MAX_ENTRY_BYTES)


def _affects(affected: _Affected, version: str) -> bool | None:
    """Whether a version is among those affected; None where the versions cannot be compared.

    The order of events decides, as the schema says under "Evaluation": the last one at or before the version.
    """
    if version in affected.versions:
        return True
    ranges = [one for one in affected.ranges if one.type in ("ECOSYSTEM", "SEMVER")]
    if not ranges:
        return False
    try:
        here = Version(version)
        return any(_in_range(one, here) for one in ranges)
    except ValueError:
        # InvalidVersion is one, and so is a number with more digits than Python reads.
        return None


def _in_range(one: _Range, here: Version) -> bool:
    # At the same version, what is introduced stands behind what is fixed.
    order = {"fixed": 0, "last_affected": 1, "introduced": 2}
    events: list[tuple[Version, int, str]] = []
    for event in one.events:
        for kind, text in event.items():
            if kind in order:
                events.append((Version("0.dev0" if text == "0" else text), order[kind], kind))
    hit = False
    for at, _, kind in sorted(events):
        if kind == "introduced" and at <= here:
            hit = True
        elif (kind == "fixed" and at <= here) or (kind == "last_affected" and at < here):
            hit = False
    return hit


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
