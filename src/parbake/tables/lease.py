"""Know of a change to a file before it happens: a read lease, as Linux has them (fcntl(2), F_SETLEASE).

A prediction table is mapped into memory, and a page that is cut off a file under a mapping ends the process that reads
it. Whoever wants to open the file for writing, or to cut it, is held up by the kernel until the lease is given back
(or some 45 s have passed); meanwhile the holder lets go of the table.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class Lease:
    """A file that nobody may change without `broken` becoming true first. Its holder gets SIGIO then."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    @property
    def broken(self) -> bool:
        """Whether somebody waits for the lease to be given back."""
        return (
            self._descriptor is not None and fcntl.fcntl(self._descriptor, fcntl.F_GETLEASE) != fcntl.F_RDLCK
        )

    def close(self) -> None:
        """Give it back. The file must not be read any more."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            # The lease ends with the last descriptor of this opening.
            os.close(descriptor)


def take_lease(path: Path) -> Lease | None:
    """A lease of a file; None where the system has none, or does not give one to this user for this file."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        os.close(descriptor)
        return None
    return Lease(descriptor)
