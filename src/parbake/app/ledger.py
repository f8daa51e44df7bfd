"""The store of releases as a server uses it: opened late, away for a while, with what is still to be written down.

What protects callers happens in the fronts first and is written down as soon as the store takes it. Such an entry is
*owed*: it looks at the store again when its turn comes, so it may be tried however often.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from parbake.app.state import STATE_FILE, open_state, state_dir
from parbake.errors import MissingExtra, ParbakeError, StateAway
from parbake.logs import log
from parbake.settings import Settings

if TYPE_CHECKING:
    from parbake.release.state import State

_T = TypeVar("_T")

_THREADS: Final = 4
_PAY_S: Final = 1.0
"""How long a rollback waits, at most, for what has just happened to be written down; it goes on behind that."""


@dataclass(frozen=True, slots=True)
class Owed:
    """Something that has happened and that the history does not know yet."""

    deployment: str
    what: str
    verb: Callable[[State], object]


class Ledger:
    """The store of one server. Who never released anything pays nothing for it, not even an import."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._state: State | None = None
        self._owed: list[Owed] = []
        self._paying = asyncio.Lock()
        self._opening = asyncio.Lock()
        self._payments: set[asyncio.Task[None]] = set()
        # Its own: a store that hangs must not take the threads in which bundles are read.
        self._threads = ThreadPoolExecutor(_THREADS, "ledger")
        self.away_since = 0.0
        """Unix time from which on the store has not answered; 0 while it does."""
        self.lost: dict[str, str] = {}
        """By deployment: why what happened last to it could not be written, now or ever."""

    @property
    def is_open(self) -> bool:
        """Whether the store was reached once."""
        return self._state is not None

    @property
    def is_there(self) -> bool:
        """Whether there is a store to open, as far as one can say without opening it."""
        settings = self._settings
        # Not `Path.exists`, which raises where the folder must not be looked into.
        return bool(settings.release.store) or os.path.exists(state_dir(settings) / STATE_FILE)

    async def open(self, *, create: bool = True) -> None:
        """Open it, if it is not. Raises as `open_state`."""
        async with self._opening:
            if self._state is not None:
                return
            try:
                self._state = await self._in_thread(lambda: open_state(self._settings, create=create))
            except StateAway as error:
                if self.is_there:
                    # What cannot be made, and never was, is not away.
                    self._is_away(error)
                raise
            self._is_back()

    async def ask(self, verb: Callable[[State], _T], about: str = "") -> _T:
        """One verb of the store, in a thread: it may wait. Raises `StateAway` and what the verb raises.

        ``about`` is the deployment of which it writes down what happened last.
        """
        if self._state is None:
            await self.open()
        state = self._state
        assert state is not None
        try:
            answer = await self._in_thread(lambda: verb(state))
        except StateAway as error:
            self._is_away(error)
            raise
        self._is_back()
        self.lost.pop(about, None)
        return answer

    def owe(self, owed: Owed) -> None:
        """Have something written down some time, behind what is owed already."""
        self._owed.append(owed)

    async def note(self, owed: Owed, wait_s: float = _PAY_S) -> None:
        """Write something down, now or when the store is back. Raises nothing, and waits for so long at most."""
        self.owe(owed)
        await self.hurry(wait_s)

    async def hurry(self, wait_s: float = _PAY_S) -> None:
        """Write down what is owed, now or when the store is back; see `note`."""
        payment = asyncio.get_running_loop().create_task(self.pay())
        self._payments.add(payment)
        payment.add_done_callback(self._payments.discard)
        await asyncio.wait({payment}, timeout=wait_s)

    def owes(self, deployment: str) -> bool:
        """Whether something about a deployment is still to be written down."""
        return any(owed.deployment == deployment for owed in self._owed)

    async def pay(self) -> None:
        """Write down what is owed, in its order, as far as the store takes it. Raises nothing."""
        async with self._paying:
            while self._owed:
                owed = self._owed[0]
                try:
                    await self.ask(owed.verb, owed.deployment)
                except Exception as error:
                    there = self.is_open or self.is_there
                    if isinstance(error, StateAway) and there:
                        return
                    # Without a store, and what it takes to have one, there is no history that lacks it.
                    if there or not isinstance(error, MissingExtra):
                        self._lose(owed, error)
                else:
                    log().info("release.written", deployment=owed.deployment, what=owed.what)
                self._owed.pop(0)

    def _lose(self, owed: Owed, error: Exception) -> None:
        # It will not be right the next time either, and others wait behind it.
        words = error.message if isinstance(error, ParbakeError) else repr(error)
        self.lost[owed.deployment] = words
        log().error("release.not_written", deployment=owed.deployment, what=owed.what, error=words)

    async def close(self) -> None:
        """Write down what is owed, and close."""
        await self.pay()
        for owed in self._owed:
            log().error("release.not_written", deployment=owed.deployment, what=owed.what)
        if self._state is not None:
            await self._in_thread(self._state.close)
        self._threads.shutdown(wait=False)

    async def _in_thread(self, do: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, do)

    def _is_away(self, error: StateAway) -> None:
        if not self.away_since:
            self.away_since = time.time()
            log().error("releases.store_away", error=error.message)

    def _is_back(self) -> None:
        if self.away_since:
            log().info("releases.store_back", seconds=round(time.time() - self.away_since, 1))
            self.away_since = 0.0
