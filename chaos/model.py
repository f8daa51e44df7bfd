"""What a scenario is, and what it finds: promises, and whether they held."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from msgspec import Struct

from chaos.load import Heard, Noted

_LATE: Final = frozenset(("deadline_exceeded", "overloaded"))
"""Refusals for want of time: a machine that stands still for a second has a part in them."""
_FEW: Final = 20
"""As many fail where a handful of callers meet a machine that stands still; more have been kept waiting by a fault."""
_FAR: Final = 5.0
"""So many times over its limit, a time tells of a fault and not of a busy machine."""


class NotTested(Exception):
    """The scenario cannot be played here; the words say why, and what it would take."""


class Check(Struct, frozen=True):
    """One thing that was promised, and what was observed."""

    promise: str
    wanted: str
    """In words: ``at most 1,000 ms``."""
    got: float | None
    """None for what never came."""
    unit: str
    held: bool
    nearly: bool = False
    """Of a time or a size, in which other programs have a part: within `_FAR` times its limit; of requests that
    failed: few, and nothing but the want of time stood in their way."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Where and how long a scenario plays."""

    folder: Path
    seconds: float
    """Of load while something is broken, about."""
    quick: bool
    say: Callable[[str], None]
    """Names what is under way."""


@dataclass(slots=True)
class Observed:
    """What a scenario saw."""

    heard: list[Heard]
    checks: list[Check]
    figures: dict[str, float]
    """Other numbers that are worth knowing, by name with unit."""
    hopeless: tuple[str, ...] = ()
    """Streams that can have no right answer, or do not wait for one."""

    @property
    def outage_ms(self) -> float:
        """Longest time that any callers were without a right answer who could have had one."""
        return max((h.outage_ms() for h in self.heard if h.name not in self.hopeless), default=0.0)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One way to break a server."""

    name: str
    broken: str
    """What is done to it, in words."""
    promised: str
    """What its callers are promised then, in words."""
    play: Callable[[Stage], Observed]


class Finding(Struct, frozen=True):
    """What one scenario came to."""

    name: str
    broken: str
    promised: str
    seconds: float
    checks: tuple[Check, ...] = ()
    requests: int = 0
    failed: dict[str, int] = {}
    """Requests without an answer, by what their callers were told."""
    wrong: int = 0
    complaint: str = ""
    outage_ms: float = 0.0
    figures: dict[str, float | None] = {}
    not_tested: str = ""
    """Why it could not be played here."""

    @property
    def held(self) -> bool:
        """Whether every promise did."""
        return all(check.held for check in self.checks)

    @property
    def late(self) -> bool:
        """Whether times and sizes alone were over their limits, and not far: nothing was lost, wrong or forgotten."""
        return not self.held and all(check.held or check.nearly for check in self.checks)


def none(promise: str, got: float) -> Check:
    """A promise that something never happens."""
    return Check(promise, "0", _number(got), "", got == 0)


def no_failures(promise: str, failed: Sequence[Noted]) -> Check:
    """A promise that no request fails, or none in this way; nearly kept where deadlines alone stood in a few's way."""
    late = 0 < len(failed) <= _FEW and all(noted.code in _LATE for noted in failed)
    return Check(promise, "0", _number(len(failed)), "", not failed, late)


def at_most(promise: str, got: float, most: float, unit: str = "", *, measured: bool = True) -> Check:
    """A promise with a limit that is not passed."""
    wanted = f"at most {most:,g} {unit}".rstrip()
    return Check(promise, wanted, _number(got), unit, got <= most, measured and got <= _FAR * most)


def at_least(promise: str, got: float, least: float, unit: str = "", *, measured: bool = True) -> Check:
    """A promise with a limit that is reached."""
    wanted = f"at least {least:,g} {unit}".rstrip()
    return Check(promise, wanted, _number(got), unit, got >= least, measured and got >= least / _FAR)


def held(promise: str, got: object) -> Check:
    """A promise of a fact: something is so, or is there."""
    return at_least(promise, bool(got), 1, measured=False)


def _number(got: float) -> float | None:
    """As JSON can have it."""
    return float(got) if math.isfinite(got) else None


def finding(scenario: Scenario, seen: Observed, seconds: float) -> Finding:
    """Sum up what was seen. A wrong answer breaks a promise in every scenario."""
    wrong = sum(heard.wrong for heard in seen.heard)
    failed: dict[str, int] = {}
    for heard in seen.heard:
        for reason, count in heard.reasons().items():
            failed[reason] = failed.get(reason, 0) + count
    return Finding(
        scenario.name,
        scenario.broken,
        scenario.promised,
        seconds,
        (none("wrong answers", wrong), *seen.checks),
        sum(len(heard.noted) for heard in seen.heard),
        failed,
        wrong,
        next((heard.complaint for heard in seen.heard if heard.complaint), ""),
        seen.outage_ms,
        {name: _number(value) for name, value in seen.figures.items()},
    )
