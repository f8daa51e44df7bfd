"""Until when Pythons and operating systems get security fixes: a small table, and where to look the dates up."""

from __future__ import annotations

from datetime import date
from typing import Final

AS_OF: Final = "2026-11-21"
"""Day on which the table was written; projects change such dates, so look up what matters."""

SOURCES: Final = (
    "https://devguide.python.org/versions/",
    "https://wiki.debian.org/LTS",
    "https://ubuntu.com/about/release-cycle",
)
"""Where the projects themselves say it."""

UNKNOWN: Final = "unknown"

# Last day of the month where a source names only the month; of Debian, the end of LTS.
_PYTHON: Final = {
    "3.8": "2024-10-31",
    "3.9": "2025-10-31",
    "3.10": "2026-10-31",
    "3.11": "2027-10-31",
    "3.12": "2028-10-31",
    "3.13": "2029-10-31",
    "3.14": "2030-10-31",
}
_OS: Final = {
    "debian 9": "2022-06-30",
    "debian 10": "2024-06-30",
    "debian 11": "2026-08-31",
    "debian 12": "2028-06-30",
    "debian 13": "2030-06-30",
    "ubuntu 20.04": "2025-05-31",
    "ubuntu 22.04": "2027-04-30",
    "ubuntu 24.04": "2029-04-30",
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
