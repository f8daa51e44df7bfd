"""Follow requests through front and model, event by event: what throughput and latency would be.

The model of the server: each front is one thread and reads requests in the order of arrival. At the end of a turn of
the front's event loop (it has read whatever had come when the turn began) those found in the table are answered, one
after another, and all others go as one batch, if the model is free. In a process of its own the model works beside
the front, and hits never wait for it; in the front it holds everybody up. The same key is computed once for all who
wait for it, where ``keys`` are told apart. While more threads want to run than there are cores, each gets its share
(processor sharing). But a model on several threads stands still where another thread takes a core from one of them
for a moment: after every step of its network all of them wait for the last. How quick things go changes every few
milliseconds, as it does where a scheduler moves threads about: lognormally, by as much as latencies were seen to
scatter.

What it leaves out: several fronts are taken for one that is as much quicker; a batch goes before the hits of its turn
if one of its rows was read first; other programs on the machine, the spread of the model's time around its median,
refusals by deadline, and requests of many rows.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np

from parbake.advisor.model import Costs, Load

_FRONT, _MODEL, _CLIENT = 0, 1, 2
_MODEL_ALONE: Final = 2
"""Who is at work, as `_shares` counts it."""
_ARRIVE, _RECEIVE, _BATCH, _BACK, _ANSWER = 0, 1, 2, 3, 4
_NEVER: Final = float("inf")
_SEED: Final = 0
_HELD_S: Final = 0.002
"""About as long as a scheduler lets a thread have a CPU: how long a pace lasts at least, and for how long others keep a
core from a model before cores are shared."""
_IN_A_ROW: Final = 32
"""Most hits that wait for the end of a turn, as in `parbake.transports.http.one_row`."""
_BLOCK: Final = 16


@dataclass(frozen=True, slots=True)
class Answers:
    """What is kept, request by request: numbers count from 0 in the order of arrival.

    ``hit`` says whether the request is answered without the model, ``computed`` tells that its answer was computed
    just now, ``key`` names its key for requests that are computed together (None: nobody shares), ``joined`` tells
    of one that waits for another's answer.
    """

    hit: Callable[[int], bool]
    computed: Callable[[int], None]
    key: Callable[[int], int] | None = None
    joined: Callable[[int], None] = lambda number: None


@dataclass(frozen=True, slots=True)
class Simulated:
    """What came of it, after the warm-up."""

    requests: int
    seconds: float
    p50_s: float
    p99_s: float
    mean_s: float
    coverage: float
    front_s: float
    """CPU seconds of the front per request."""
    model_s: float
    """Time of the model per request."""
    batch_rows: float
    """Mean batch; 0 where the model never ran."""
    arrived: int
    """All requests that came, the warm-up too."""

    @property
    def per_s(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds if self.seconds > 0 else 0.0


def simulate(
    costs: Costs,
    load: Load,
    answers: Answers,
    *,
    requests: int,
    warm_up: int = 0,
    client_s: float = 0.0,
    most_s: float = _NEVER,
    warm_up_s: float = 0.0,
    paces: Sequence[float] = (),
    pace_s: float = _NEVER,
) -> Simulated:
    """Follow ``requests`` requests (or ``most_s`` seconds); the first ``warm_up`` (``warm_up_s`` seconds) do not count.

    ``client_s`` is the CPU time that one client process on the same machine spends on each request. ``paces`` says how
    quick the machine is, in ratio to what ``costs`` are for, in each ``pace_s`` seconds in turn.
    """
    return _Simulation(costs, load, answers, client_s, paces, pace_s).run(
        requests, warm_up, most_s, warm_up_s
    )


class _Simulation:
    def __init__(
        self,
        costs: Costs,
        load: Load,
        answers: Answers,
        client_s: float,
        paces: Sequence[float],
        pace_s: float,
    ) -> None:
        front = costs.front
        quicker = max(costs.fronts, 1)
        self._costs = costs
        self._load = load
        self._answers = answers
        # Half of it when the request comes, half when its answer goes.
        self._hit_s = front.hit_s / quicker / 2
        self._miss_s = (front.miss_s + (front.learn_s if answers.key is not None else 0.0)) / quicker / 2
        self._turn_s = front.turn_s / quicker
        self._batch_s = front.batch_s / quicker
        self._slower_s = front.hit_s * (1 - 1 / quicker)
        self._wire_s = front.wire_s / 2
        self._hop_s = front.hop_s / 2
        self._client_s = client_s
        self._paces, self._pace_s = paces, pace_s
        self._scatter = costs.scatter
        self._spells = _spells(costs.scatter)
        # Of a slow model spells would be many and change nothing.
        self._spell_s = max(_HELD_S, costs.model.one_s / 10)
        self._pace, self._pace_until = 1.0, 0.0
        self._weights = (1.0 * quicker, float(costs.threads), 1.0)
        self._fair, self._bursts = _shares(self._weights, costs.cores)
        self._stood_s = 0.0
        self._now = 0.0
        self._left = [_NEVER, _NEVER, _NEVER]
        self._job: list[tuple[int, int]] = [(0, 0)] * 3
        self._busy_s = [0.0, 0.0, 0.0]
        self._events: list[tuple[float, int, int, int]] = []
        self._order = 0
        self._queue: deque[tuple[int, int]] = deque()
        self._turn = 0
        self._client: deque[int] = deque()
        self._waiting: deque[int] = deque()
        self._running: list[int] = []
        self._found: list[int] = []
        self._landing: deque[int] = deque()
        self._model_free = True
        self._flights: dict[int, list[int]] = {}
        self._sent: list[float] = []
        self._latency: list[float] = []
        self._hits: list[bool] = []
        self._done = 0
        self._ended: list[int] = []
        self._ran: list[int] = []
        self._random = np.random.default_rng(_SEED)

    def run(self, requests: int, warm_up: int, most_s: float, warm_up_s: float) -> Simulated:
        self._most = requests
        if self._load.rate_per_s is None:
            for _ in range(min(self._load.connections, requests)):
                self._send()
        else:
            self._after(0.0, _ARRIVE, 0)
        since_s, since = 0.0, [0.0, 0.0, 0.0]
        since_done = since_ran = 0
        warm = not warm_up and not warm_up_s
        while self._done < requests and self._now < most_s:
            if not warm and self._done >= warm_up and self._now >= warm_up_s:
                warm, since_s, since = True, self._now, list(self._busy_s)
                since_done, since_ran = self._done, len(self._ran)
            self._step()
        counted = self._ended[since_done:]
        latencies = np.array([self._latency[i] for i in counted]) if counted else np.zeros(1)
        batches = self._ran[since_ran:]
        many = max(len(counted), 1)
        return Simulated(
            requests=len(counted),
            seconds=self._now - since_s,
            p50_s=float(np.quantile(latencies, 0.5)) + self._slower_s,
            p99_s=float(np.quantile(latencies, 0.99)) + self._slower_s,
            mean_s=float(latencies.mean()) + self._slower_s,
            coverage=sum(self._hits[i] for i in counted) / many,
            front_s=(self._busy_s[_FRONT] - since[_FRONT]) * self._weights[_FRONT] / many,
            model_s=(self._busy_s[_MODEL] - since[_MODEL]) / many,
            batch_rows=sum(batches) / len(batches) if batches else 0.0,
            arrived=len(self._sent),
        )

    def _step(self) -> None:
        """Go on to whatever happens next."""
        front_s, model_s, client_s = left = self._left
        if self._now >= self._pace_until:
            self._change_pace()
        at_work = 4 * (front_s != _NEVER) + 2 * (model_s != _NEVER) + (client_s != _NEVER)
        shares, change_s = self._fair[at_work], self._pace_until
        burst, burst_until = self._bursts[at_work], _NEVER
        if burst is not None and self._stood_s < _HELD_S:
            shares, burst_until = burst, self._now + (_HELD_S - self._stood_s)
            change_s = min(change_s, burst_until)
        ends = [
            self._now + rest / (share * self._pace) if share else _NEVER
            for rest, share in zip(left, shares, strict=True)
        ]
        first_s = min(ends)
        event_s = self._events[0][0] if self._events else _NEVER
        next_s = min(first_s, event_s)
        if at_work and change_s < next_s:
            next_s = change_s
        if burst_until != _NEVER:
            self._stood_s = _HELD_S if next_s >= burst_until else self._stood_s + next_s - self._now
        elif at_work == _MODEL_ALONE:
            self._stood_s = max(self._stood_s - (next_s - self._now), 0.0)
        self._pass(next_s, shares)
        if next_s < min(first_s, event_s):
            return
        if first_s != _NEVER and first_s <= event_s:
            station = ends.index(first_s)
            left[station] = _NEVER
            self._finished(station)
            return
        _, _, kind, item = heapq.heappop(self._events)
        if kind == _ARRIVE:
            self._send()
            if len(self._sent) < self._most and self._load.rate_per_s is not None:
                self._after(float(self._random.exponential(1 / self._load.rate_per_s)), _ARRIVE, 0)
        elif kind == _RECEIVE:
            self._into_front((_RECEIVE, item))
        elif kind == _BATCH:
            self._start(_MODEL, self._costs.model.seconds(len(self._running)), (_BATCH, 0))
        elif kind == _BACK:
            if item < 0:
                self._into_front((_BATCH, 0))
            else:
                self._reply_is_here(item)

    def _change_pace(self) -> None:
        """How quick things go from now on; the mean is what the costs are for."""
        # A request that is alone meets nobody: what it costs was measured that way.
        scattered = self._scatter > 0 and len(self._sent) - self._done > 1
        self._pace = next(self._spells) if scattered else 1.0
        self._pace_until = self._now + self._spell_s if self._scatter > 0 else _NEVER
        if self._paces:
            at = min(int(self._now / self._pace_s + 1e-6), len(self._paces) - 1)
            self._pace *= self._paces[at]
            if at < len(self._paces) - 1:
                self._pace_until = min(self._pace_until, (at + 1) * self._pace_s)

    def _pass(self, until_s: float, shares: Sequence[float]) -> None:
        passed_s = (until_s - self._now) * self._pace
        self._now = until_s
        for station, rest in enumerate(self._left):
            if rest != _NEVER:
                work_s = passed_s * shares[station]
                self._left[station] = max(rest - work_s, 0.0)
                self._busy_s[station] += work_s

    def _start(self, station: int, seconds: float, job: tuple[int, int]) -> None:
        self._left[station] = seconds
        self._job[station] = job

    def _after(self, seconds: float, kind: int, item: int) -> None:
        self._order += 1
        heapq.heappush(self._events, (self._now + seconds, self._order, kind, item))

    def _send(self) -> None:
        number = len(self._sent)
        if number >= self._most:
            return
        self._sent.append(self._now)
        self._latency.append(0.0)
        self._hits.append(False)
        self._after(self._wire_s, _RECEIVE, number)

    def _into_front(self, item: tuple[int, int]) -> None:
        self._queue.append(item)
        if self._left[_FRONT] == _NEVER:
            self._begin_turn()

    def _begin_turn(self) -> None:
        """Take who has come by now; with nobody, the front rests."""
        self._turn = len(self._queue)
        if self._turn:
            self._next(self._turn_s)

    def _next(self, more_s: float = 0.0) -> None:
        kind, number = self._queue[0]
        if kind == _BATCH:
            seconds = self._batch_s
        else:
            hit = self._hits[number] = self._answers.hit(number)
            seconds = self._hit_s if hit else self._miss_s
        self._start(_FRONT, seconds + more_s, (kind, number))

    def _finished(self, station: int) -> None:
        kind, number = self._job[station]
        if station == _CLIENT:
            self._send()
            if self._client:
                self._take_reply()
            return
        if station == _MODEL:
            self._after(self._hop_s, _BACK, -1)
            return
        if kind == _BATCH and self._costs.inline and number:
            # The model has run inside the front: now its answers go out.
            self._start(_FRONT, self._batch_s, (_BATCH, 0))
            return
        if kind == _BATCH:
            self._land()
        elif kind == _ANSWER:
            self._reply(number)
        elif self._hits[number]:
            self._found.append(number)
            if len(self._found) >= _IN_A_ROW:
                self._send_found()
        else:
            self._wait(number)
        if self._answers_next():
            return
        if self._turn:
            self._queue.popleft()
            self._turn -= 1
            if self._turn:
                self._next()
                return
        self._send_found()
        if self._answers_next():
            return
        if self._waiting and self._model_free and self._dispatch():
            return
        self._begin_turn()

    def _send_found(self) -> None:
        self._landing.extend(self._found)
        self._found.clear()

    def _answers_next(self) -> bool:
        """One answer after another goes out: who gets the first asks again while the last is written."""
        if not self._landing:
            return False
        number = self._landing.popleft()
        self._start(_FRONT, self._hit_s if self._hits[number] else self._miss_s, (_ANSWER, number))
        return True

    def _wait(self, number: int) -> None:
        """Queue a request for the model, or let it wait for one of the same key that is under way."""
        if self._answers.key is not None:
            key = self._answers.key(number)
            flight = self._flights.get(key)
            if flight is not None:
                flight.append(number)
                self._answers.joined(number)
                return
            self._flights[key] = [number]
        self._waiting.append(number)

    def _dispatch(self) -> bool:
        """Give the model its next batch; says whether the front itself is busy with that."""
        count = min(len(self._waiting), self._costs.most_batch_rows)
        self._running = [self._waiting.popleft() for _ in range(count)]
        self._ran.append(count)
        self._model_free = False
        if self._costs.inline:
            seconds = self._costs.model.seconds(count)
            self._busy_s[_MODEL] += seconds
            self._busy_s[_FRONT] -= seconds / self._weights[_FRONT]
            self._turn = 0
            self._start(_FRONT, seconds, (_BATCH, 1))
            return True
        self._after(self._hop_s, _BATCH, 0)
        return False

    def _land(self) -> None:
        running, self._running = self._running, []
        self._model_free = True
        for number in running:
            self._answers.computed(number)
            self._landing.append(number)
            if self._answers.key is not None:
                self._landing.extend(self._flights.pop(self._answers.key(number), ())[1:])

    def _reply(self, number: int) -> None:
        self._after(self._wire_s, _BACK, number)

    def _reply_is_here(self, number: int) -> None:
        if self._load.rate_per_s is None and self._client_s:
            self._client.append(number)
            if self._left[_CLIENT] == _NEVER:
                self._take_reply()
            return
        self._end(number)
        if self._load.rate_per_s is None:
            self._send()

    def _take_reply(self) -> None:
        number = self._client.popleft()
        self._end(number)
        self._start(_CLIENT, self._client_s, (0, number))

    def _end(self, number: int) -> None:
        self._latency[number] = self._now - self._sent[number]
        self._ended.append(number)
        self._done += 1


def _shares(
    weights: Sequence[float], cores: float
) -> tuple[list[tuple[float, ...]], list[tuple[float, ...] | None]]:
    """How quick each station is, by who is at work: 4 for the front, 2 for the model, 1 for the client, added up.

    First where cores are shared by threads, then for a moment in which others keep a whole core or more from a model on
    several threads; None where they do not.
    """
    fair: list[tuple[float, ...]] = []
    bursts: list[tuple[float, ...] | None] = []
    for at_work in range(8):
        busy = [weight if at_work & 4 >> station else 0.0 for station, weight in enumerate(weights)]
        others = busy[_FRONT] + busy[_CLIENT]
        share = min(1.0, cores / sum(busy)) if at_work else 0.0
        fair.append(tuple(share if weight else 0.0 for weight in busy))
        kept = others > 0 and busy[_MODEL] > 1 and cores - others <= busy[_MODEL] - 1
        alone = min(1.0, cores / others) if kept else 0.0
        bursts.append(tuple(alone if busy[i] and i != _MODEL else 0.0 for i in range(3)) if kept else None)
    return fair, bursts


def _spells(sigma: float) -> Iterator[float]:
    """Paces that are lognormal, with a mean of 1 in every `_BLOCK` of them.

    Short simulations are no lottery: each slow one has its quick one beside it (antithetic variates).
    """
    normal = NormalDist()
    paces = np.exp([sigma * normal.inv_cdf((i + 0.5) / _BLOCK) for i in range(_BLOCK)])
    paces /= paces.mean()
    pairs = np.column_stack([paces, paces[::-1]])[: _BLOCK // 2]
    random = np.random.default_rng(_SEED)
    while True:
        for pair in random.permutation(pairs):
            yield from random.permutation(pair).tolist()


def largest_batch(fixed_s: float, row_s: float, longest_s: float, most: int) -> int:
    """The largest batch that takes at most ``longest_s``, or whose rows cost as much as the batch itself."""
    if row_s <= 0:
        return most
    return max(1, min(most, int(max((longest_s - fixed_s) / row_s, fixed_s / row_s))))
