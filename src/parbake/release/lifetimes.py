"""Until when Pythons and operating systems get security fixes: a small table, and where to look the dates up."""

from __future__ import annotations

from datetime import date
from typing import Final

AS_OF: Final = "2026-11-21"
"""Day on which the table was read off its sources; projects change such dates, so look up what matters."""

SOURCES: Final = (
    "https://peps.python.org/api/release-cycle.json",
    "https://packages.debian.org/source/stable/distro-info-data",
)
"""Where the dates are from: of Pythons the file behind the release schedules (PEP 569, 596, 619, 664, 693, 719, 745 and
790, in the order of the versions); of systems ``debian.csv`` and ``ubuntu.csv`` of distro-info-data 0.58+deb12u6."""

UNKNOWN: Final = "unknown"

# The last day of the month where the source names only the month.
_PYTHON: Final = {
    "3.8": "2024-10-07",
    "3.9": "2025-10-31",
    "3.10": "2026-10-31",
    "3.11": "2027-10-31",
    "3.12": "2028-10-31",
    "3.13": "2029-10-31",
    "3.14": "2030-10-31",
    "3.15": "2031-10-31",
}
# Of Debian the column eol-lts, of Ubuntu eol-server: what is free and for everybody. Interim releases are left out.
_OS: Final = {
    "debian 9": "2022-06-30",
    "debian 10": "2024-06-30",
    "debian 11": "2026-08-31",
    "debian 12": "2028-06-30",
    "debian 13": "2030-06-30",
    "ubuntu 20.04": "2025-05-29",
    "ubuntu 22.04": "2027-06-01",
    "ubuntu 24.04": "2029-05-31",
    "ubuntu 26.04": "2031-05-29",
}


def end_of_python(version: str) -> str:
    """The last day on which a Python gets fixes, as ``2027-10-31``, or ``unknown``."""
    return _PYTHON.get(".".join(version.split(".")[:2]), UNKNOWN)


def end_of_os(name: str) -> str:
    """The same of an operating system, named as in the environment lock: ``debian 12``."""
    return _OS.get(name, UNKNOWN)


def ended(day: str, today: date) -> bool | None:
    """Whether that day has passed; None where it is unknown."""
    return None if day == UNKNOWN else date.fromisoformat(day) < today
