"""Who may ask for what: requests are held against the API keys in force.

The fronts of a server count together: of each key with a rate there is one number in memory that all of them map,
the time from which the key is free to ask again (the generic cell rate algorithm, ITU-T I.371). Two fronts that
write it in the same moment may let one request through uncounted; none waits for the other.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Final, Protocol

from parbake.app.keys import ApiKey, hash_of
from parbake.errors import NotAllowed, RateLimited, Unauthenticated
from parbake.logs import log

BURST_S: Final = 1.0
"""What a client has not asked for in this time it may ask for at once."""

_CELL_BYTES: Final = 8


class Cells(Protocol):
    """Numbers by place."""

    def __getitem__(self, place: int, /) -> float:
        """The number there."""

    def __setitem__(self, place: int, value: float, /) -> None:
        """Put a number there."""


class Holder:
    """A client, by its key, in one front."""

    __slots__ = ("_cell", "_cells", "_interval_s", "_tolerance_s", "deployments", "name", "requests", "valid")

    def __init__(
        self,
        name: str,
        deployments: frozenset[str] = frozenset(),
        rate_per_s: float | None = None,
        cells: Cells | None = None,
        cell: int = 0,
    ) -> None:
        self.name = name
        self.deployments = deployments
        """What it may ask for; empty: everything."""
        self.requests = 0
        """Requests let in by this front."""
        self.valid = True
        """Whether the key is in force."""
        self._cells: Cells = cells if cells is not None else [0.0]
        self._cell = cell
        self._interval_s = 1.0 / rate_per_s if rate_per_s else 0.0
        # A little more, as sums of fractions of seconds are not exact.
        self._tolerance_s = max(BURST_S - self._interval_s, 0.0) + 1e-3 * self._interval_s

    def may(self, deployment: str) -> bool:
        """Whether the key is good for a deployment."""
        return not self.deployments or deployment in self.deployments

    def take(self) -> None:
        """Count one request. Raises `RateLimited`."""
        if self._interval_s:
            now = perf_counter()
            free = self._cells[self._cell]
            ahead = free - now
            if ahead > self._tolerance_s:
                raise RateLimited(
                    f"client {self.name!r} asks more than {1 / self._interval_s:g} times a second",
                    hint="the rate belongs to the API key",
                    retry_after_s=ahead - self._tolerance_s,
                )
            # Nobody is free before now: what was not asked for is not saved up.
            self._cells[self._cell] = (free if ahead > 0 else now) + self._interval_s
        self.requests += 1


EVERYBODY: Final = Holder("")
"""Who asks for what needs no key."""


class Gate:
    """The keys in force in one front. `use` changes them while requests come in."""

    def __init__(self) -> None:
        self._holders: dict[str, Holder] = {}
        self._before: dict[str, int] = {}
        """Requests of holders whose keys have been read again since."""

    def use(self, keys: Sequence[ApiKey], rates: Path) -> None:
        """Put these keys in force, in the place of those before; ``rates`` is a file with a number for each."""
        cells = _map(rates, len(keys))
        before, self._before = self._holders, self.counts()
        self._holders = {
            key.sha256: Holder(key.name, frozenset(key.deployments), key.rate_per_s, cells, at)
            for at, key in enumerate(keys)
        }
        # What has been found out about heads of requests that came before holds no more.
        for holder in before.values():
            holder.valid = False

    def counts(self) -> dict[str, int]:
        """Requests that were let in, by client."""
        counts = dict(self._before)
        for holder in self._holders.values():
            counts[holder.name] = counts.get(holder.name, 0) + holder.requests
        return counts

    def holder(self, headers: Mapping[bytes, bytes]) -> Holder:
        """Whose key a request has, given its headers by their names in lower case. Raises `Unauthenticated`."""
        word, _, key = headers.get(b"authorization", b"").partition(b" ")
        if word.lower() != b"bearer":
            key = headers.get(b"x-api-key", b"")
        return self.holder_of(key.strip().decode("latin-1"))

    def named(self, name: str) -> Holder:
        """Who asked some time ago, by the name. Raises `Unauthenticated` where no key of that name is in force."""
        for holder in self._holders.values():
            if holder.name == name:
                return holder
        raise Unauthenticated(
            f"there is no API key of {name!r} any more" if name else "this was asked for without an API key",
            hint="parbake keys list shows which clients have one",
        )

    def holder_of(self, key: str) -> Holder:
        """Whose key this is. Raises `Unauthenticated`."""
        if not key:
            raise Unauthenticated(
                "an API key is needed here",
                hint="send 'authorization: Bearer KEY', or 'x-api-key: KEY'",
            )
        # How long the search takes depends on hashes, and from these nobody learns about a key.
        holder = self._holders.get(hash_of(key))
        if holder is None:
            raise Unauthenticated(
                "the API key is not known here", hint="parbake keys list shows which clients have one"
            )
        return holder


def check_deployment(holder: Holder, deployment: str) -> None:
    """Raise `NotAllowed` unless the key is good for a deployment, be there one of that name or not."""
    if not holder.may(deployment):
        raise NotAllowed(
            f"the API key of {holder.name!r} is not for {deployment[:80]!r}",
            hint=f"it is for {', '.join(sorted(holder.deployments)[:12])}",
        )


def check_everything(holder: Holder) -> None:
    """Raise `NotAllowed` unless the key is good for all deployments."""
    if holder.deployments:
        raise NotAllowed(
            f"the API key of {holder.name!r} is for some deployments, and this concerns all of them",
            hint="use a key that was added without --deployments",
        )


def _map(path: Path, count: int) -> Cells:
    """The numbers that all fronts share, or some of our own where the file is gone."""
    size = max(count, 1) * _CELL_BYTES
    try:
        with path.open("r+b") as handle:
            shared = memoryview(mmap.mmap(handle.fileno(), size)).cast("d")
    except (OSError, ValueError) as error:
        log().warning("keys.rates_not_shared", error=str(error), hint="each front counts for itself")
        return array("d", bytes(size))
    return shared
