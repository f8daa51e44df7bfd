"""What `measure` makes of a server's own figures, without a server."""

from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from parbake.advisor.model import BatchTime, Costs, ModelCost
from parbake.app import measure as module
from parbake.app.measure import Examples, _front_cost, _model_cost

_LATENCIES = [2e-3] * 50 + [4e-3] * 50


def _front(monkeypatch: pytest.MonkeyPatch, pace: float, cpu_s: list[float]) -> Any:
    async def ask(*words: object) -> list[float]:
        return _LATENCIES

    spent = iter(cpu_s * 100)
    monkeypatch.setattr(module, "_ask", ask)
    monkeypatch.setattr(module, "_cpu_s", lambda pids: next(spent))
    server = SimpleNamespace(port=0, front_pids=(1,), inline=False, counts=lambda name: np.zeros(4))
    paced = SimpleNamespace(between=lambda since: pace)
    model = ModelCost(0.0, 1e-5, (BatchTime(1, 1e-5, 1e-5),))
    return _front_cost(cast(Any, server), model, [b"x"], [b"x"] * 8, 4, cast(Any, paced), lambda words: None)


def test_what_is_seen_at_twice_the_pace_is_twice_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    # 0.1 s of CPU time for 100 requests, again and again.
    usual, scatter = _front(monkeypatch, 1.0, [0.0, 0.1])
    quick, also = _front(monkeypatch, 2.0, [0.0, 0.1])

    assert usual.hit_s == pytest.approx(1e-3)
    assert quick.hit_s == pytest.approx(2e-3)
    assert quick.wire_s == pytest.approx(2 * usual.wire_s)
    assert scatter == also == pytest.approx(np.log(2) / 2)


def test_where_cpu_times_cannot_be_read_the_costs_are_numbers_that_can_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    front, scatter = _front(monkeypatch, 1.0, [float("nan")])
    model = ModelCost(0.0, 1e-5, (BatchTime(1, 1e-5, 1e-5),))

    costs = Costs(model, front, False, 1, 1, 2.0, 40.0, 400.0, 64, scatter)

    assert msgspec.json.decode(msgspec.json.encode(costs), type=Costs) == costs


def test_calls_of_the_model_are_told_at_a_pace_of_1() -> None:
    session = SimpleNamespace(run_raw=lambda raws, rows, shapes: sum(range(1000)))
    examples = Examples(((b"x",),), ((1,),), (), (), ())

    # Far enough apart for any machine.
    slow, quick = (
        _model_cost(
            cast(Any, session),
            examples,
            cast(Any, SimpleNamespace(of=lambda spans, pace=pace: np.full(len(spans), pace))),
            lambda words: None,
        )[0]
        for pace in (1.0, 1e6)
    )

    assert 1e4 < quick.one_s / slow.one_s < 1e8
    assert quick.batches[-1].p99_s / slow.batches[-1].p50_s > 1e4
