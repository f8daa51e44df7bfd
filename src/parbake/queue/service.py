"""What becomes of a job: which replies are its answer, what is tried again, when, and how often.

A reply that says that nobody could answer just now is none: the job is tried again after a pause that doubles, with a
part of it by chance, so that jobs that failed together do not come back together. Everything else is the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from parbake.errors import NotReady, Overloaded, RateLimited, StateAway
from parbake.queue.model import Options, Reply

AGAIN: Final = frozenset((429, 503, 504))
"""Statuses that say nothing about the request."""

_UNTRIED: Final = frozenset((Overloaded.code, NotReady.code, RateLimited.code, StateAway.code))
"""Refusals before any work was done."""

_FIRST_PAUSE_S: Final = 0.25
_LONGEST_PAUSE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Answered:
    """The reply is the answer."""

    failed: bool


@dataclass(frozen=True, slots=True)
class Again:
    """To be begun again, after a pause."""

    delay_s: float
    counted: bool
    error: str


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Not to be begun any more."""

    error: str


class _Error(msgspec.Struct):
    code: str = ""
    error: str = ""


def judge(
    reply: Reply, *, attempts: int, refusals: int, options: Options, chance: float
) -> Answered | Again | GivenUp:
    """What a reply means for a job that was begun ``attempts`` times. ``chance`` is from 0 to 1."""
    if reply.status not in AGAIN:
        return Answered(failed=reply.status >= 400)
    try:
        said = msgspec.json.decode(reply.body, type=_Error)
    except msgspec.MsgspecError:
        said = _Error()
    words = f"{reply.status} {said.code}: {said.error}"[:500]
    counted = said.code not in _UNTRIED
    if counted and attempts >= options.attempts:
        return GivenUp(f"attempt {attempts} of {options.attempts} failed: {words}")
    return Again(pause_s(refusals, chance), counted, words)


def pause_s(before: int, chance: float) -> float:
    """Seconds until a job is begun again that was put off ``before`` times already."""
    whole = min(_FIRST_PAUSE_S * 2.0 ** min(before, 32), _LONGEST_PAUSE_S)
    return whole * (0.5 + 0.5 * chance)


def share_out(
    able: Iterable[str], busy: Mapping[str, int], options: Options, *, alone: bool
) -> dict[str, int]:
    """How many more jobs of each deployment a front may take.

    ``able`` are deployments that could answer now, ``busy`` the jobs that are under way. No deployment takes all
    places, as long as it is not served alone: its model may be slow, and others' jobs would wait for it.
    """
    most = options.at_once if alone else max(1, options.at_once - 1)
    free = options.at_once - sum(busy.values())
    return {name: room for name in able if (room := min(free, most - busy.get(name, 0))) > 0}
