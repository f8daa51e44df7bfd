"""What the model of the server must agree with: arithmetic where that knows the answer, and itself."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parbake.advisor.model import BatchTime, Costs, FrontCost, Load, ModelCost
from parbake.advisor.queueing import Answers, largest_batch, simulate

FREE = FrontCost(hit_s=1e-5, miss_s=2e-5, learn_s=0.0, batch_s=0.0, turn_s=0.0, wire_s=0.0, hop_s=0.0)


def costs(row_s: float = 1e-3, fixed_s: float = 0.0, *, inline: bool = False, **changed: object) -> Costs:
    sizes = (1, 2, 4, 8, 16, 32, 64)
    batches = tuple(BatchTime(n, fixed_s + row_s * n, fixed_s + row_s * n) for n in sizes)
    made = Costs(
        model=ModelCost(fixed_s, row_s, batches),
        front=FREE,
        inline=inline,
        threads=1,
        fronts=1,
        cores=4.0,
        table_row_bytes=40.0,
        head_row_bytes=400.0,
        most_batch_rows=64,
    )
    return replace(made, **changed)  # type: ignore[arg-type]  # fields by name


ALL = Answers(lambda number: True, lambda number: None)
NONE = Answers(lambda number: False, lambda number: None)


def test_hits_alone_are_limited_by_the_front() -> None:
    seen = simulate(costs(), Load(16), ALL, requests=2000, warm_up=200)

    assert seen.per_s == pytest.approx(1 / FREE.hit_s, rel=0.01)
    # Whoever gets one of the first answers of a turn asks again while the others are written.
    assert seen.p50_s == pytest.approx(16 * FREE.hit_s, abs=FREE.hit_s)
    assert (seen.coverage, seen.batch_rows) == (1.0, 0.0)


def test_a_slow_model_of_its_own_is_the_limit_and_batches_fill_up_with_who_waits() -> None:
    seen = simulate(costs(row_s=1e-3), Load(16), NONE, requests=2000, warm_up=200)

    # While one half is in the model, the other half waits.
    assert seen.per_s == pytest.approx(1000, rel=0.05)
    assert 7 <= seen.batch_rows <= 16
    assert seen.model_s == pytest.approx(1e-3, rel=0.02)


def test_in_the_front_the_model_adds_to_what_the_front_costs() -> None:
    seen = simulate(costs(row_s=5e-5, inline=True), Load(16), NONE, requests=2000, warm_up=200)

    assert seen.per_s == pytest.approx(1 / (FREE.miss_s + 5e-5), rel=0.02)


def test_one_caller_waits_for_all_there_is_and_for_nobody_else() -> None:
    front = replace(FREE, batch_s=1e-4, turn_s=3e-5, wire_s=5e-5, hop_s=2e-4)

    seen = simulate(costs(row_s=1e-3, front=front), Load(1), NONE, requests=50)

    # A turn for the request, and one for the answer.
    whole = FREE.miss_s + 1e-4 + 2 * 3e-5 + 5e-5 + 2e-4 + 1e-3
    assert seen.p50_s == pytest.approx(whole, rel=1e-6)


def test_hits_do_not_wait_for_a_model_in_a_process_of_its_own() -> None:
    mixed = Answers(lambda number: number % 10 != 0, lambda number: None)

    apart = simulate(costs(row_s=5e-3), Load(8, 200.0), mixed, requests=3000, warm_up=300)
    inside = simulate(costs(row_s=5e-3, inline=True), Load(8, 200.0), mixed, requests=3000, warm_up=300)

    assert apart.p50_s < 1.2 * FREE.hit_s
    assert inside.mean_s > apart.mean_s


def test_one_key_asked_for_by_everybody_is_computed_once() -> None:
    same = Answers(lambda number: False, lambda number: None, lambda number: 0)

    seen = simulate(costs(row_s=1e-3), Load(32), same, requests=2000, warm_up=200)

    assert seen.batch_rows == 1.0
    assert seen.per_s > 10_000


def test_threads_share_the_cores_when_there_are_fewer() -> None:
    alone = simulate(costs(row_s=1e-3), Load(16), NONE, requests=1000, warm_up=100, client_s=4e-4)
    crowded = simulate(
        costs(row_s=1e-3, cores=1.0), Load(16), NONE, requests=1000, warm_up=100, client_s=4e-4
    )

    assert alone.per_s == pytest.approx(1000, rel=0.05)
    assert crowded.per_s == pytest.approx(1 / (1e-3 + 4e-4 + FREE.miss_s), rel=0.05)


def test_a_model_on_all_cores_stands_still_while_another_thread_has_one_of_them() -> None:
    def rate(threads: int) -> float:
        made = costs(row_s=1e-3, cores=2.0, threads=threads, most_batch_rows=1)
        # Between two batches there is next to no time without a request at work elsewhere.
        return simulate(made, Load(8), NONE, requests=2000, warm_up=200, client_s=2e-4).per_s

    assert rate(1) == pytest.approx(1 / 1e-3, rel=0.01)
    assert rate(2) == pytest.approx(1 / (1e-3 + FREE.miss_s + 2e-4), rel=0.02)


def test_what_goes_on_for_long_shares_the_cores_with_a_model() -> None:
    made = costs(row_s=5e-2, cores=2.0, threads=2, most_batch_rows=1)

    # Hits keep the front busy without an end; the first request is a miss, and comes back.
    seen = simulate(made, Load(8), Answers(lambda n: n > 0, lambda n: None), requests=20_000)

    assert seen.requests == 20_000
    assert seen.p99_s < 5e-3 < 5e-2 < seen.model_s * 20_000 * 1.01


@pytest.mark.parametrize("every", [3, 50])
def test_a_front_without_rest_leaves_a_model_its_share(every: int) -> None:
    made = costs(row_s=1e-4, cores=2.0, threads=2, most_batch_rows=1)

    # Whoever has an answer asks again at once: the front rests for no time at all.
    seen = simulate(made, Load(2), Answers(lambda n: n % every > 0, lambda n: None), requests=20_000)

    # Two thirds of two cores for a model on two threads.
    work_s = seen.model_s * seen.requests
    assert seen.requests == 20_000
    assert seen.seconds < 1.05 * (work_s * 3 / 2 + seen.front_s * seen.requests)


def test_hits_are_answered_when_all_requests_of_a_turn_have_been_read() -> None:
    front = replace(FREE, hit_s=1e-4, miss_s=3e-4)
    hits = Answers(lambda number: number == 1, lambda number: None)

    # The first one is a turn of its own. Of the three that come meanwhile one is found, and waits for the others.
    seen = simulate(costs(row_s=1e-3, front=front), Load(4), hits, requests=4, most_s=6e-4)

    assert seen.requests == 1
    assert seen.mean_s == pytest.approx((3e-4 + 1e-4 + 3e-4 + 3e-4 + 1e-4) / 2)


def test_a_rate_above_what_can_be_done_makes_everybody_wait() -> None:
    below = simulate(costs(row_s=1e-3, most_batch_rows=1), Load(1, 500.0), NONE, requests=3000, warm_up=300)
    above = simulate(costs(row_s=1e-3, most_batch_rows=1), Load(1, 1500.0), NONE, requests=3000, warm_up=300)

    # M/D/1 at half load: mean wait of half a service (Pollaczek-Khinchine).
    assert below.mean_s == pytest.approx(1.5e-3, rel=0.1)
    assert above.per_s == pytest.approx(1000, rel=0.05)
    assert above.p50_s > 100 * below.p50_s


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.floats(1e-6, 1e-2),
    st.floats(0.0, 1.0),
    st.booleans(),
    st.floats(0.5, 4.0),
    st.floats(0.0, 1e-4),
)
def test_work_is_conserved(
    connections: int, row_s: float, share: float, inline: bool, cores: float, client_s: float
) -> None:
    """Little's law holds, nothing is answered twice, and nobody is busier than there are cores."""
    hits = [(i * 0.61803) % 1 < share for i in range(400)]
    answers = Answers(hits.__getitem__, lambda number: None)

    seen = simulate(
        costs(row_s, inline=inline, cores=cores), Load(connections), answers, requests=400, client_s=client_s
    )

    assert seen.requests == 400
    assert seen.coverage == pytest.approx(sum(hits) / 400)
    assert (seen.front_s + seen.model_s + client_s) * seen.per_s <= cores * 1.001 + 1e-9 or client_s > 0
    # Callers that wait or are served are never more than there are.
    assert seen.mean_s * seen.per_s <= connections * 1.01


def test_the_largest_batch_fits_into_the_time_or_doubles_what_a_batch_costs() -> None:
    assert largest_batch(0.0, 0.02, 0.25, 1024) == 12
    assert largest_batch(0.1, 0.001, 0.05, 1024) == 100
    assert largest_batch(0.0, 0.0, 0.25, 1024) == 1024
    assert largest_batch(0.0, 1.0, 0.25, 1024) == 1


def test_scatter_leaves_the_throughput_and_puts_the_median_below_the_mean() -> None:
    steady = simulate(costs(), Load(16), ALL, requests=32_000)
    scattered = simulate(costs(scatter=0.5), Load(16), ALL, requests=32_000)

    # Ten times sixteen spells of 2 ms.
    assert scattered.per_s == pytest.approx(steady.per_s, rel=0.02)
    # Lognormal: the median is exp(-sigma^2 / 2) of the mean.
    assert scattered.p50_s / scattered.mean_s == pytest.approx(0.88, abs=0.05)
    assert scattered.p99_s > 2 * scattered.p50_s


def test_a_request_that_is_alone_takes_what_was_measured_of_one_that_is_alone() -> None:
    load = Load(1, rate_per_s=20.0)

    steady, scattered = (simulate(costs(scatter=sigma), load, ALL, requests=2000) for sigma in (0.0, 1.0))

    assert scattered.p50_s == pytest.approx(steady.p50_s)
    assert scattered.mean_s == pytest.approx(steady.mean_s, rel=0.05)


def test_a_machine_that_is_half_as_quick_for_half_of_the_time_answers_three_quarters() -> None:
    usual = simulate(costs(), Load(16), ALL, requests=1 << 60, most_s=0.4)
    slowed = simulate(costs(), Load(16), ALL, requests=1 << 60, most_s=0.4, paces=(1.0, 0.5) * 2, pace_s=0.1)

    assert slowed.requests == pytest.approx(0.75 * usual.requests, rel=0.01)


@settings(deadline=None, max_examples=60)
@given(
    paces=st.lists(st.floats(0.05, 20), max_size=8),
    pace_s=st.floats(1e-3, 0.2),
    scatter=st.sampled_from([0.0, 0.3, 1.0]),
    connections=st.integers(1, 8),
    rate=st.sampled_from([None, 50.0, 5000.0]),
    inline=st.booleans(),
)
def test_whatever_the_pace_each_request_is_answered_once(
    paces: list[float],
    pace_s: float,
    scatter: float,
    connections: int,
    rate: float | None,
    inline: bool,
) -> None:
    answers = Answers(lambda number: number % 3 > 0, lambda number: None)
    made = costs(row_s=5e-4, inline=inline, scatter=scatter)

    seen = simulate(made, Load(connections, rate), answers, requests=300, paces=paces, pace_s=pace_s)

    assert (seen.requests, seen.arrived) == (300, 300)
    assert 0 < seen.p50_s <= seen.p99_s
    assert seen.seconds > 0


@given(factor=st.floats(0.1, 10))
def test_where_everything_takes_longer_so_does_every_answer(factor: float) -> None:
    made = costs(row_s=1e-3, fixed_s=1e-4, pace=2.0)
    before, after = (simulate(one, Load(4), NONE, requests=200) for one in (made, made.times(factor)))

    assert after.p50_s == pytest.approx(factor * before.p50_s)
    assert after.per_s == pytest.approx(before.per_s / factor)
    assert made.times(factor).pace == pytest.approx(2.0 / factor)
