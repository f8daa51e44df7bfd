"""What `measure` makes of a server's own figures, without a server."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from parbake.advisor.model import BatchTime, Costs, ModelCost
from parbake.app import measure as module
from parbake.app.measure import Examples, _front_cost, _ModelTimes, _scatter

_LATENCIES = [2e-3] * 75 + [4e-3] * 25


def _front(
    monkeypatch: pytest.MonkeyPatch, pace: float, cpu_s: list[float], looks: list[int] | None = None
) -> Any:
    async def ask(*words: object) -> list[float]:
        return _LATENCIES

    spent = iter(cpu_s * 100)
    monkeypatch.setattr(module, "_ask", ask)
    monkeypatch.setattr(module, "_cpu_s", lambda pids: next(spent))
    server = SimpleNamespace(port=0, front_pids=(1,), inline=False, counts=lambda name: np.zeros(4))
    paced = SimpleNamespace(between=lambda since: pace)
    model = ModelCost(0.0, 1e-5, (BatchTime(1, 1e-5, 1e-5),))
    seen = [] if looks is None else looks
    times = SimpleNamespace(look=lambda stage: seen.append(len(seen)), cost=model)
    return _front_cost(
        cast(Any, server),
        cast(Any, times),
        [b"x"],
        [b"x"] * 8,
        4,
        cast(Any, paced),
        lambda words: None,
    )


def test_what_is_seen_at_twice_the_pace_is_twice_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    # 0.1 s of CPU time for 100 requests, again and again.
    usual, scatter = _front(monkeypatch, 1.0, [0.0, 0.1])
    quick, also = _front(monkeypatch, 2.0, [0.0, 0.1])

    assert usual.hit_s == pytest.approx(1e-3)
    assert quick.hit_s == pytest.approx(2e-3)
    assert quick.wire_s == pytest.approx(2 * usual.wire_s)
    # A mean of 2.5 ms and a median of 2.
    assert scatter == also == pytest.approx(np.sqrt(2 * np.log(1.25)))


def test_where_cpu_times_cannot_be_read_the_costs_are_numbers_that_can_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    front, scatter = _front(monkeypatch, 1.0, [float("nan")])
    model = ModelCost(0.0, 1e-5, (BatchTime(1, 1e-5, 1e-5),))

    costs = Costs(model, front, False, 1, 1, 2.0, 40.0, 400.0, 64, scatter)

    assert msgspec.json.decode(msgspec.json.encode(costs), type=Costs) == costs


@pytest.mark.parametrize("long_s", [module._LONG_S, 0.0])
def test_a_pass_that_was_disturbed_changes_nothing_and_a_slow_model_has_fewer(
    monkeypatch: pytest.MonkeyPatch, long_s: float
) -> None:
    passes = module._PASSES if long_s else module._FEWEST_PASSES
    runs_of_a_pass = 6
    monkeypatch.setattr(module, "_LONG_S", long_s)
    usual, _ = _front(monkeypatch, 1.0, [0.0, 0.1])
    looks: list[int] = []

    # Three runs come before the first pass.
    disturbed = [0.0, 0.1] * (3 + runs_of_a_pass) + [0.0, 9.0] * runs_of_a_pass + [0.0, 0.1] * 99
    found, _ = _front(monkeypatch, 1.0, disturbed, looks)

    assert found == usual
    assert len(looks) == passes


def test_scatter_is_that_of_a_lognormal_and_a_moment_of_standing_still_is_none() -> None:
    latencies = np.random.default_rng(0).lognormal(-8, 0.5, 20_000)
    assert _scatter(latencies.tolist(), 32) == pytest.approx(0.5, abs=0.03)
    for connections in (32, 256):
        stood = np.concatenate([latencies[: 60 * connections], np.full(connections, 0.05)])
        assert _scatter(stood.tolist(), connections) == pytest.approx(0.5, abs=0.08)
    assert _scatter([1e-3] * 100, 1) == pytest.approx(0, abs=1e-6)


def test_calls_of_the_model_are_told_at_a_pace_of_1() -> None:
    session = SimpleNamespace(run_raw=lambda raws, rows, shapes: sum(range(1000)))
    examples = Examples(((b"x",),), ((1,),), (), (), ())

    def cost(pace: float) -> ModelCost:
        paced = SimpleNamespace(of=lambda spans: np.full(len(spans), pace))
        times = _ModelTimes(cast(Any, session), examples, cast(Any, paced))
        times.look(lambda words: None)
        return times.cost

    # Far enough apart for any machine.
    slow, quick = cost(1.0), cost(1e6)

    assert 1e4 < quick.one_s / slow.one_s < 1e8
    assert quick.batches[-1].p99_s / slow.batches[-1].p50_s > 1e4


def test_what_disturbs_the_model_for_a_while_does_not_change_the_median() -> None:
    seconds = 0.0

    def of(spans: Sequence[tuple[float, float]]) -> Any:
        # The pace at which each call took as many seconds.
        return np.array([seconds / (end - since) for since, end in spans])

    session = SimpleNamespace(run_raw=lambda raws, rows, shapes: sum(range(1000)))
    examples = Examples(((b"x",),), ((1,),), (), (), ())
    times = _ModelTimes(cast(Any, session), examples, cast(Any, SimpleNamespace(of=of)))

    # Two looks of five meet a machine that does something else.
    for seconds in (1.0, 5.0, 1.0, 5.0, 1.0):  # noqa: B007  # `of` reads it
        times.look(lambda words: None)

    assert [batch.p50_s for batch in times.cost.batches] == pytest.approx([1.0] * len(module.ROWS), rel=0.01)
