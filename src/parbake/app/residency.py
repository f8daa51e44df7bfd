"""Which of many models stay in memory: a budget, what is pinned, and who has to go. Values in, values out.

Who goes is chosen by GreedyDual-Size-Frequency (L. Cherkasova, "Improving WWW Proxies Performance with
Greedy-Dual-Size-Frequency Caching Policy", HP Labs HPL-98-69R1, 1998): a model is worth its uses times its seconds
of loading per byte, on top of the worth of the last one that went, so that what is not used any more ages.

A newcomer for whom others had to go is on probation, in a small part of the budget, until it is used again when some
others have come; and newcomers put away newcomers first. So models that are asked for in turn, all of them, do not
push each other out just before their next turn, as they would if the least recently used one went (compare
T. Johnson, D. Shasha, "2Q", VLDB 1994). Now and then one of the others goes instead, and a newcomer stays for it:
nobody rests on old merits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

_PROBATION: Final = 1 / 8
"""Part of the budget that newcomers may have before they put each other away."""
_TURN: Final = 8
"""Of so many that go, one goes that is not a newcomer."""
_BURST: Final = 1 / 32
"""Until so many have come, as part of all that are there, uses of a newcomer are those that it came for."""
_MEMORY: Final = 16
"""Uses per known model after which all that was counted counts half."""
_LOAD_S: Final = 0.02
"""Taken for what loading costs until it was measured."""

State = Literal["loading", "loaded", "leaving"]


@dataclass(slots=True)
class Resident:
    """A model in memory, or on its way in or out."""

    bytes: int
    state: State
    pinned: bool
    came: int = 0
    """Number of its admission."""
    worth: float = 0.0
    newcomer: bool = False
    """Whether it is on probation."""


class Residency:
    """Keeps the account of one budget in bytes; 0 for none. Models go by keys of the caller's.

    The caller loads and puts away. It asks `admit` before it loads, and puts away who that names before it does; says
    `settle` when it has loaded, and puts away who that names; and says `gone` for whoever is no longer in memory.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.residents: dict[str, Resident] = {}
        """In the order in which they came."""
        self._uses: dict[str, float] = {}
        self._counted = 0
        self._cost_s: dict[str, float] = {}
        self._age = 0.0
        self._came = self._went = 0

    @property
    def bytes(self) -> int:
        """Memory of all that is there or on its way in; what is on its way out is as good as gone."""
        return sum(r.bytes for r in self.residents.values() if r.state != "leaving")

    @property
    def pinned_bytes(self) -> int:
        """Memory of what is never put away."""
        return sum(r.bytes for r in self.residents.values() if r.pinned)

    def fits(self, size: int) -> bool:
        """Whether there would be room if all went that may go."""
        return not self.budget or self.pinned_bytes + size <= self.budget

    def admit(self, key: str, size: int, *, pinned: bool = False) -> list[str] | None:
        """Reserve room for a model that shall be loaded, and name those who go for it.

        None where there is no room now, because others are being loaded; where `fits` says no there never will be.
        """
        self._came += 1
        if pinned:
            self.residents[key] = Resident(size, "loading", pinned=True)
            out = self._over(0)
            return self._everybody() if out is None else out
        out = self._over(size)
        if out is None:
            return None
        crowded = self.budget > 0 and self.bytes + size > (1 - _PROBATION) * self.budget
        self.residents[key] = Resident(size, "loading", False, self._came, newcomer=bool(out) or crowded)
        return out

    def settle(self, key: str, size: int, cost_s: float) -> list[str]:
        """It was loaded, and takes so much; name those who go because that is more than was thought.

        That may be itself, where not enough others can go.
        """
        resident = self.residents[key]
        resident.bytes, resident.state = size, "loaded"
        self._cost_s[key] = cost_s
        self._value(key, resident)
        out = self._over(0, spare=key)
        if out is not None:
            return out
        # Others are being loaded, and cannot go: it gives way, or what can go for it does.
        if resident.pinned:
            return self._everybody(spare=key)
        resident.state = "leaving"
        return [key]

    def gone(self, key: str) -> None:
        """It is not in memory any more."""
        self.residents.pop(key, None)

    def forget(self, key: str) -> None:
        """It will never be asked for again."""
        self.gone(key)
        self._uses.pop(key, None)
        self._cost_s.pop(key, None)

    def used(self, uses: Mapping[str, int]) -> None:
        """Models were used so many times."""
        for key, times in uses.items():
            self._uses[key] = self._uses.get(key, 0.0) + times
            self._counted += times
            resident = self.residents.get(key)
            if resident is not None:
                if self._came - resident.came > _BURST * len(self.residents):
                    resident.newcomer = False
                self._value(key, resident)
        if self._counted > _MEMORY * len(self._uses):
            self._counted //= 2
            self._uses = {key: count / 2 for key, count in self._uses.items() if count > 2**-10}

    def _value(self, key: str, resident: Resident) -> None:
        cost_s = self._cost_s.get(key, _LOAD_S)
        uses = max(self._uses.get(key, 0.0), 1.0)
        resident.worth = self._age + uses * cost_s / max(resident.bytes, 1)

    def _evictable(self, spare: str = "") -> list[str]:
        return [
            key
            for key, resident in self.residents.items()
            if resident.state == "loaded" and not resident.pinned and key != spare
        ]

    def _everybody(self, spare: str = "") -> list[str]:
        """Name all who can go; they are leaving then."""
        out = self._evictable(spare)
        for key in out:
            self.residents[key].state = "leaving"
        return out

    def _over(self, more: int, spare: str = "") -> list[str] | None:
        """Name who goes, so that ``more`` bytes fit; they are leaving then. None where that is not enough."""
        if not self.budget:
            return []
        excess = self.bytes + more - self.budget
        if excess <= 0:
            return []
        evictable = self._evictable(spare)
        if sum([self.residents[key].bytes for key in evictable]) < excess:
            return None
        newcomers: list[str] = []
        proven: list[str] = []
        for key in evictable:
            (newcomers if self.residents[key].newcomer else proven).append(key)
        newcomers.reverse()
        probation = max(_PROBATION * self.budget - more, 0.0)
        new_bytes = sum([self.residents[key].bytes for key in newcomers])
        out: list[str] = []
        while excess > 0:
            self._went += 1
            if newcomers and proven and new_bytes > probation and self._went % _TURN == 0:
                stays = newcomers.pop()
                new_bytes -= self.residents[stays].bytes
                self.residents[stays].newcomer = False
                key = self._least_worth(proven)
                proven.append(stays)
            elif newcomers and (new_bytes > probation or not proven):
                key = newcomers.pop()
                new_bytes -= self.residents[key].bytes
            else:
                key = self._least_worth(proven)
            excess -= self.residents[key].bytes
            self.residents[key].state = "leaving"
            out.append(key)
        return out

    def _least_worth(self, keys: list[str]) -> str:
        """Take out who has to go first; from then on everybody is measured against that."""
        key = min(keys, key=lambda key: self.residents[key].worth)
        keys.remove(key)
        self._age = max(self._age, self.residents[key].worth)
        return key
