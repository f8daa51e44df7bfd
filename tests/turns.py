"""An event loop that turns when the test says so: what was scheduled is seen, and nothing happens by the clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False)
class Later:
    """A call that was asked for with a delay."""

    delay: float
    callback: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        """Never call."""
        self.cancelled = True


@dataclass
class Turns:
    """The part of an event loop that a batcher uses, by hand."""

    soon: list[Callable[[], None]] = field(default_factory=list)
    later: list[Later] = field(default_factory=list)

    def call_soon(self, callback: Callable[[], None]) -> object:
        """Call in the next turn."""
        self.soon.append(callback)
        return callback

    def call_later(self, delay: float, callback: Callable[[], None]) -> Later:
        """Call when `elapse` comes to it."""
        timer = Later(delay, callback)
        self.later.append(timer)
        return timer

    def turn(self) -> None:
        """One turn: what has been scheduled so far, not what it schedules."""
        due, self.soon = self.soon, []
        for callback in due:
            callback()

    def settle(self, most: int = 10_000) -> None:
        """Turn until nothing is scheduled for the next turn."""
        for _ in range(most):
            if not self.soon:
                return
            self.turn()
        raise AssertionError(f"the loop never comes to rest: {self.soon}")

    def elapse(self) -> None:
        """Let all delays pass, once."""
        due, self.later = self.later, []
        for timer in due:
            if not timer.cancelled:
                timer.callback()
