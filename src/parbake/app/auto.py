"""Mode ``auto``: ask the advisor now and then in a process of its own, and follow it, but not at every turn."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from parbake.advisor.model import Costs, Prediction
from parbake.errors import NotReady
from parbake.monitoring.model import Traffic
from parbake.settings import Mode, Placement

ENOUGH_REQUESTS: Final = 1000
"""Rows that must have come since the last time before the advisor is asked."""

ALL: Final = 0.999
"""Share of the rows that a table must have answered before auto leaves all of them to it."""

_AGREEING: Final = 2
"""How often in a row the advisor must say the same before it is followed."""
_LEAST_GAIN: Final = 0.1
"""By how much its choice must be better than what is in force."""
_MOST_LOSS: Final = 0.03
"""How much better what is in force may be when dynamic mode, the simplest, takes its place all the same. What is
between the two changes nothing."""
_FOLLOWED: Final = 4000
"""Requests that are followed through the queues for each way: medians need no more."""
_LONGEST_S: Final = 300.0
_END_S: Final = 5.0
"""How long it may take to end."""
_LESS_URGENT: Final = 10
"""Niceness of the process that measures: requests go first."""


class Question(Struct, frozen=True):
    """What the advisor is asked about one deployment."""

    bundle: str
    name: str
    traffic: Traffic
    mode: Mode
    """In force."""
    head_rows: int
    may_be_static: bool
    """Whether the table has been seen to answer nearly everything."""
    deadline_ms: float
    placement: Placement
    allow_pickle: bool
    costs: Costs | None = None
    """As measured before; None: to be measured."""


class Advised(Struct, frozen=True):
    """What the advisor said."""

    mode: Mode
    gain: float
    """By how much it is better than what is in force: 0.5 is half of its cost times latency."""
    reason: str
    costs: Costs


class Pilot:
    """Decides for one deployment when to follow the advisor: hysteresis, so that a mode is not left for a moment."""

    def __init__(self) -> None:
        self.costs: Costs | None = None
        self.digest = ""
        self.asked_at = 0
        """Rows that had come when the advisor was asked last."""
        self.counted: tuple[int, int] = (0, 0)
        """Rows answered until then, and those of them from the table."""
        self._said: Mode | None = None
        self._times = 0

    def table_share(self, rows: int, from_table: int) -> float:
        """Share of the rows since the last call that the table answered; 0 where too few came to tell."""
        before_rows, before_from_table = self.counted
        self.counted = (rows, from_table)
        came = rows - before_rows
        return (from_table - before_from_table) / came if came >= ENOUGH_REQUESTS else 0.0

    def hear(self, now: Mode, advised: Advised) -> bool:
        """Take advice in; says whether to follow it."""
        needed = -_MOST_LOSS if advised.mode == "dynamic" else _LEAST_GAIN
        if advised.mode == now or advised.gain < needed:
            self._said, self._times = None, 0
            return False
        if advised.mode != self._said:
            self._said, self._times = advised.mode, 0
        self._times += 1
        if self._times < _AGREEING:
            return False
        self._said, self._times = None, 0
        return True


async def ask(question: Question) -> Advised:
    """Have the advisor answer, in a process of its own. Raises `NotReady` where it cannot."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "parbake.app.auto",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # It starts a server to measure with: both are ended together.
        start_new_session=True,
    )
    try:
        said, words = await asyncio.wait_for(process.communicate(msgspec.json.encode(question)), _LONGEST_S)
    except TimeoutError as error:
        raise NotReady(f"the advisor took more than {_LONGEST_S:g} s") from error
    finally:
        if process.returncode is None:
            # Asked first, so that it removes its files.
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            try:
                await asyncio.wait_for(process.wait(), _END_S)
            except (TimeoutError, asyncio.CancelledError):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
    if process.returncode:
        last = words.decode(errors="replace").strip().rpartition("\n")[2]
        raise NotReady(f"the advisor ended with {process.returncode}: {last[:500]}")
    return msgspec.json.decode(said, type=Advised)


def answer(question: Question) -> Advised:
    """Measure, predict and choose; takes a quarter to half a minute, longer for a slow model."""
    from parbake.advisor.choose import choose
    from parbake.advisor.model import Load, Prices
    from parbake.advisor.predict import Question as Predicted
    from parbake.advisor.predict import predictions
    from parbake.app.advise import CONNECTIONS, asked_of_server, promise_of
    from parbake.app.measure import measure
    from parbake.contract.bundle import read_bundle

    stored = read_bundle(Path(question.bundle))
    promise = promise_of(stored.contract, question.deadline_ms)
    traffic = asked_of_server(question.traffic, question.name).traffic
    costs = question.costs or measure(
        stored,
        connections=CONNECTIONS,
        deadline_s=promise.deadline_s,
        placement=question.placement,
        allow_pickle=question.allow_pickle,
    )
    predicted = Predicted(
        traffic=traffic,
        costs=costs,
        promise=promise,
        load=Load(CONNECTIONS, traffic.rate_per_s),
        prices=Prices(),
        followed=_FOLLOWED,
    )
    budget = min(1.0, question.head_rows / max(traffic.distinct.value, 1.0))
    options = [
        option
        for option in predictions(predicted, (budget,) if budget > 0 else ())
        if option.mode != "static" or question.may_be_static
    ]
    found = choose(options, traffic, costs)
    return Advised(found.best.mode, gain_over(question.mode, found.best, options), found.reason, costs)


def gain_over(mode: Mode, best: Prediction, options: Sequence[Prediction]) -> float:
    """By how much the best is better than the mode in force; 1 where that does not keep its promises, or may not be."""
    from parbake.advisor.choose import score

    now = next((option for option in options if option.mode == mode), None)
    if now is None or (now.refused and not best.refused):
        return 1.0
    before = score(now)
    return 1 - score(best) / before if before > 0 else 0.0


def main() -> None:
    """Entry point of the process: a `Question` on stdin, `Advised` on stdout."""
    os.nice(_LESS_URGENT)
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    sys.stdout.buffer.write(msgspec.json.encode(answer(question)))


if __name__ == "__main__":
    main()
