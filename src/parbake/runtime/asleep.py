"""The backend of a model that is loaded when it is wanted, and put away when others are wanted more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from parbake.errors import NotReady, ParbakeError, Unavailable
from parbake.runtime.backends import RunnerBackend

_AGAIN_S: Final = 0.02
_REFUSED_S: Final = 1.0
"""Time in which a model that could not be loaded is not asked for again."""


class SleepingBackend(RunnerBackend):
    """A `RunnerBackend` that connects when `wake` is called, and sleeps again when the room says goodbye.

    ``want`` has the model loaded and returns when it listens, or raises why it cannot be; ``refused`` is called with
    that.
    """

    def __init__(
        self,
        name: str,
        path: str,
        loop: asyncio.AbstractEventLoop,
        *,
        wedged_s: float,
        on_wedged: Callable[[float], None],
        want: Callable[[], Awaitable[object]],
        at_work: Callable[[int], bool] | None = None,
    ) -> None:
        super().__init__(name, path, loop, wedged_s=wedged_s, on_wedged=on_wedged, at_work=at_work)
        self._want = want
        self._refused: Callable[[ParbakeError], None] = lambda error: None
        self._waking: asyncio.Task[None] | None = None
        self._why: ParbakeError | None = None
        self._why_until = 0.0

    @property
    def answers(self) -> bool:
        """Whether it is loaded and answers, or can be loaded as far as anybody knows."""
        if not self.up:
            return self._reason() is None
        return super().answers

    def on_refused(self, refused: Callable[[ParbakeError], None]) -> None:
        """Call this when the model cannot be loaded."""
        self._refused = refused

    def wake(self) -> None:
        """Begin to have it loaded, unless that is under way. Raises what was said when it was tried a moment ago."""
        if (why := self._reason()) is not None:
            raise why
        if not self._closed and (self._waking is None or self._waking.done()):
            self._waking = self._loop.create_task(self._wake())

    def connect(self) -> None:
        """Nothing: it sleeps until it is wanted."""

    def close(self) -> None:
        """Close for good. A batch in flight fails."""
        super().close()
        if self._waking is not None:
            self._waking.cancel()

    async def _wake(self) -> None:
        while not self._closed and self._transport is None and self._greeted is None:
            try:
                await self._want()
            except ParbakeError as error:
                why = error if isinstance(error, Unavailable) else self._cannot(error)
                self._why, self._why_until = why, self._loop.time() + _REFUSED_S
                self._refused(why)
                return
            try:
                await self._loop.create_unix_connection(lambda: self, self._path)
            except OSError:
                # Put away again in between, or its process has ended.
                await asyncio.sleep(_AGAIN_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """The model sleeps again, or its process has ended: whoever waits has it loaded again."""
        waiting = self._greeted is not None
        super().connection_lost(exc)
        if waiting and not self._closed:
            # It was not up yet: nobody else says so.
            self._on_down()

    def _reason(self) -> ParbakeError | None:
        return self._why if self._why is not None and self._loop.time() < self._why_until else None

    def _cannot(self, error: ParbakeError) -> NotReady:
        return NotReady(
            f"model {self._name!r} cannot be loaded: {error.message}", hint=error.hint, retry_after_s=5.0
        )
