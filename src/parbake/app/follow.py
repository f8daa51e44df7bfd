"""Deployments whose bundle is a version in the registry: what it means now, where it lies, and since when nobody says.

What a reference came to is remembered in the state directory, so that a server that starts while the registry is away
serves what it served last.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import random
import tempfile
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from parbake.app.registry import cache_root, registry_url, store_place
from parbake.app.resolve import Fetch, Look, Meaning, fetch, look
from parbake.app.state import state_dir
from parbake.contract.bundle import read_bundle
from parbake.errors import BundleError, BundleMissing, ParbakeError, Unavailable, by_code
from parbake.logs import log
from parbake.release.bundles import Collected, folder_name
from parbake.release.registry import parse_reference
from parbake.settings import Settings

LOOK_TIMEOUT_S: Final = 30.0
_JITTER: Final = 0.2
_RETRY_S: Final = 1.0
_LONGEST_RETRY_S: Final = 15.0
_LONGEST_AGAIN_S: Final = 300.0
"""Most between two attempts at a bundle that does not come out of its store whole."""
_FOLDER: Final = "followed"
_KEPT_S: Final = 24 * 3600.0
"""Age below which the cache keeps what nobody serves."""


class Taken(Struct, frozen=True):
    """What a reference came to."""

    reference: str
    version: str
    digest: str
    path: str
    remembered: bool = False
    """Whether nobody could be asked, and this is what it came to last."""


class Following(Struct, frozen=True):
    """A deployment's reference, for people and machines."""

    reference: str
    name: str
    version: str
    digest: str
    answered: float = 0.0
    """Unix time at which the registry answered last; 0 for never since the start."""
    away_since: float = 0.0
    """Unix time since which it does not; 0 while it does."""
    problem: str = ""
    """Why what the reference means now is not served."""
    wanted: str = ""
    """The version that it means, where that is not the one served."""


class _Memory(Struct, frozen=True):
    """What is remembered of one reference."""

    registry: str
    reference: str
    version: str
    digest: str
    before: str = ""
    """Digest of what it meant before."""


@dataclass(slots=True)
class _State:
    """What is known of one reference."""

    taken: Taken
    answered: float = 0.0
    problem: str = ""
    wanted: str = ""
    refused: str = ""
    """Digest of what was refused: it is tried again when the reference means something else, or somebody asks."""
    code: str = ""
    """Of the error by which it was."""
    attempts: int = 0
    again_at: float = 0.0
    """By the monotonic clock: from then on it is tried again by itself."""


@dataclass(slots=True)
class Follower:
    """Keeps what references of one server came to. Nothing in here waits for the registry but `asyncio`."""

    settings: Settings
    away_since: float = 0.0
    _states: dict[str, _State] = field(default_factory=dict)
    _stamp: tuple[int, ...] | None = None
    """Of the registry's file at the last look, and what it said then: a file that is as it was says the same."""
    _meanings: dict[str, Meaning] = field(default_factory=dict)

    async def begin(self, references: Collection[str]) -> dict[str, Taken]:
        """What references come to, at a start: as the registry says, else as remembered, else when it is back.

        Raises what the registry says of a reference that means nothing, or what is wrong with its bundle.
        """
        delay_s = _RETRY_S
        while True:
            try:
                return {reference: await self.find(reference) for reference in dict.fromkeys(references)}
            except Unavailable as error:
                log().warning(
                    "registry.awaited", error=error.message, hint=error.hint, retry_in_s=round(delay_s, 1)
                )
            await asyncio.sleep(delay_s * random.uniform(1 - _JITTER, 1 + _JITTER))  # noqa: S311  no secret
            delay_s = min(2 * delay_s, _LONGEST_RETRY_S)

    async def find(self, reference: str) -> Taken:
        """What a reference comes to, with its bundle at hand; as remembered where nobody can be asked.

        Raises `Unavailable` where nothing is remembered either, `VersionNotFound`, `ModelNotFound`, `BundleError`.
        """
        try:
            meaning = (await self.ask([reference]))[reference]
            meaning.check()
            return await self.fetch(meaning)
        except Unavailable as error:
            remembered = await asyncio.to_thread(self._remembered, reference)
            if remembered is None:
                raise
            log().warning(
                "registry.away",
                reference=reference,
                error=error.message,
                serving=f"version {remembered.version}, from the cache",
            )
            return remembered

    async def ask(self, references: Iterable[str]) -> dict[str, Meaning]:
        """What references mean now. Raises `RegistryAway`, and says so once."""
        wanted = tuple(references)
        url = registry_url(self.settings)
        stamp = _stamp(url)
        if stamp is not None and stamp == self._stamp and all(r in self._meanings for r in wanted):
            return {reference: self._meanings[reference] for reference in wanted}
        try:
            meanings = await look(Look(url, wanted), LOOK_TIMEOUT_S)
        except Unavailable as error:
            if not self.away_since:
                self.away_since = time.time()
                log().warning(
                    "registry.away", error=error.message, hint=error.hint, serving="what it served before"
                )
            raise
        self._stamp, self._meanings = stamp, meanings
        if self.away_since:
            log().info("registry.back", after_s=round(time.time() - self.away_since, 1))
            self.away_since = 0.0
        for reference in meanings:
            if reference in self._states:
                self._states[reference].answered = time.time()
        return meanings

    async def fetch(self, meaning: Meaning) -> Taken:
        """The bundle of a meaning, verified, on this machine. Raises `StoreAway`, `BundleMissing`, `BundleError`."""
        root = cache_root(self.settings)
        path = root / folder_name(meaning.digest)
        if not await asyncio.to_thread(_is_whole, path, meaning.digest):
            question = Fetch(store_place(self.settings), meaning.digest, str(root))
            path = await fetch(question, self.settings.release.fetch_timeout_s)
        return Taken(meaning.reference, meaning.version, meaning.digest, str(path))

    def moved(self, meanings: Iterable[Meaning]) -> list[Meaning]:
        """Those that mean something else than what is served, and were not refused for good before."""
        found: list[Meaning] = []
        for meaning in meanings:
            state = self._states.get(meaning.reference)
            if state is None:
                continue
            if meaning.code:
                self.refuse(meaning, by_code(meaning.code, meaning.message, hint=meaning.hint))
            elif (meaning.version, meaning.digest) == (state.taken.version, state.taken.digest):
                state.problem = state.wanted = state.refused = state.code = ""
                state.attempts = 0
            elif meaning.digest != state.refused or time.monotonic() >= state.again_at:
                found.append(meaning)
        return found

    def refuse(self, meaning: Meaning, error: ParbakeError, *, fetched: bool = False) -> None:
        """Note that what a reference means is not served, and why.

        A bundle that was ``fetched`` and refused is as it is. One that could not be fetched is tried again: the
        store may be back, or have it, or have it whole, by then.
        """
        state = self._states.get(meaning.reference)
        if state is None:
            return
        # Words of libraries tell how long they tried: each time others.
        if (state.code, state.wanted) != (error.code, meaning.version):
            log().error(
                "alias.not_followed",
                reference=meaning.reference,
                wanted=meaning.version,
                serving=state.taken.version,
                error=error.message,
            )
        same = meaning.digest == state.refused
        state.problem, state.wanted, state.code = error.message, meaning.version, error.code
        state.refused = meaning.digest
        if isinstance(error, Unavailable | BundleMissing):
            state.attempts, state.again_at = 0, 0.0
        elif fetched:
            state.again_at = math.inf
        else:
            # All of it is fetched each time to be found torn.
            state.attempts = state.attempts + 1 if same else 1
            wait_s = self.settings.release.follow_s * 2.0 ** min(state.attempts, 30)
            state.again_at = time.monotonic() + min(wait_s, _LONGEST_AGAIN_S)

    def took(self, taken: Iterable[Taken]) -> None:
        """Note what is served now, for good. Writes files: call it in a thread."""
        for item in taken:
            before = self._states.get(item.reference)
            answered = 0.0 if item.remembered else time.time()
            self._states[item.reference] = _State(item, answered or (before.answered if before else 0.0))
            if item.remembered:
                continue
            old = self._read(item.reference)
            former = "" if old is None else old.digest if old.digest != item.digest else old.before
            self._write(
                _Memory(registry_url(self.settings), item.reference, item.version, item.digest, former)
            )

    def forget(self, references: Collection[str]) -> None:
        """Keep to these references: the others are not served any more."""
        for reference in [r for r in self._states if r not in references]:
            del self._states[reference]

    def taken(self, reference: str) -> Taken | None:
        """What a reference is served as."""
        state = self._states.get(reference)
        return state.taken if state is not None else None

    def status(self) -> tuple[Following, ...]:
        """All references."""
        return tuple(
            Following(
                reference, parse_reference(reference).name, state.taken.version, state.taken.digest,
                state.answered, self.away_since, state.problem, state.wanted,
            )
            for reference, state in self._states.items()
        )  # fmt: skip

    def delay_s(self) -> float:
        """How long to wait until the next look: servers that started together do not ask together."""
        return self.settings.release.follow_s * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311  no secret

    def tidy(self, in_use: Collection[str]) -> Collected:
        """Remove from the cache what nobody here serves or served before. Writes files: call it in a thread."""
        from parbake.release.bundles_directory import DirectoryStore

        root = cache_root(self.settings)
        if store_place(self.settings) == str(root):
            # It is the bundle store itself, and those who prune that know what is registered.
            return Collected((), 0)
        keep = set(in_use)
        for file in self._folder.glob("*.json"):
            memory = self._read_file(file)
            if memory is not None:
                keep |= {memory.digest, memory.before}
        return DirectoryStore(root).collect(keep, grace_s=_KEPT_S)

    @property
    def _folder(self) -> Path:
        return state_dir(self.settings).absolute() / _FOLDER

    def _file(self, reference: str) -> Path:
        key = f"{registry_url(self.settings)}\n{reference}"
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def _remembered(self, reference: str) -> Taken | None:
        memory = self._read(reference)
        if memory is None:
            return None
        path = cache_root(self.settings) / folder_name(memory.digest)
        if not _is_whole(path, memory.digest):
            return None
        return Taken(reference, memory.version, memory.digest, str(path), remembered=True)

    def _read(self, reference: str) -> _Memory | None:
        return self._read_file(self._file(reference))

    def _read_file(self, file: Path) -> _Memory | None:
        try:
            return msgspec.json.decode(file.read_bytes(), type=_Memory)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return None

    def _write(self, memory: _Memory) -> None:
        file = self._file(memory.reference)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(".new", dir=self._folder)
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(msgspec.json.encode(memory))
                handle.flush()
                os.fsync(handle.fileno())
            Path(name).rename(file)
        except OSError as error:
            # It serves all the same; only a start without the registry would not.
            log().warning("reference.not_remembered", reference=memory.reference, error=str(error))


def _is_whole(path: Path, digest: str) -> bool:
    try:
        return path.is_dir() and read_bundle(path).digest == digest
    except BundleError as error:
        log().warning("cache.torn", path=str(path), error=error.message)
        return False


def _stamp(url: str) -> tuple[int, ...] | None:
    """What changes with every write of a registry that is a file; None for others."""
    if not url.startswith("sqlite:///"):
        return None
    stamp: list[int] = []
    for suffix in ("", "-wal"):
        try:
            found = Path(url.removeprefix("sqlite:///") + suffix).stat()
        except OSError:
            stamp += [0, 0, 0]
        else:
            stamp += [found.st_ino, found.st_mtime_ns, found.st_size]
    return tuple(stamp)
