"""The rules of the literature come out of the numbers."""

from dataclasses import replace

import numpy as np
import pytest

from parbake.advisor.choose import antipatterns_of, choose
from parbake.advisor.model import (
    BatchTime,
    Costs,
    FrontCost,
    Load,
    ModelCost,
    Prices,
    Promise,
    Recommendation,
    Served,
)
from parbake.advisor.predict import Question, predictions
from parbake.app.advise import Asked, LearnedHead, asked_in_sequence


def costs(one_s: float) -> Costs:
    """A machine of two cores and a model that gains nothing from company."""
    sizes = (1, 2, 4, 8, 16, 32, 64)
    inline = one_s < 5e-5
    return Costs(
        model=ModelCost(0.0, one_s, tuple(BatchTime(n, one_s * n, one_s * n) for n in sizes)),
        front=FrontCost(1.2e-5, 2.5e-5, 5e-6, 5e-5, 1e-5, 2e-5, 0.0 if inline else 1e-4),
        inline=inline,
        threads=1,
        fronts=1,
        cores=2.0,
        table_row_bytes=40.0,
        head_row_bytes=400.0,
        most_batch_rows=1 if one_s > 0.1 else 64,
    )


def zipf(keys: int, requests: int = 8_000, exponent: float = 1.0) -> Asked:
    weights = np.arange(1, keys + 1) ** -exponent
    drawn = np.random.default_rng(3).choice(keys, requests, p=weights / weights.sum())
    return asked_in_sequence(drawn.astype(np.uint64), "zipf")


def asked(
    one_s: float, traffic: Asked, promise: Promise | None = None, rate: float | None = None
) -> Recommendation:
    question = Question(
        traffic.traffic,
        costs(one_s),
        promise or Promise(10.0),
        Load(32, rate),
        Prices(),
        traffic.keys,
        LearnedHead,
        followed=2000,
    )
    options = list(predictions(question))
    return choose(options, traffic.traffic, question.costs)


def test_low_cardinality_is_static() -> None:
    said = asked(1e-3, zipf(50))

    assert said.best.mode == "static"
    assert "only 50 different keys are asked for" in said.reason


def test_high_and_flat_is_dynamic() -> None:
    said = asked(1e-3, zipf(2_000_000, exponent=0.0))

    assert said.best.mode == "dynamic"
    assert "so evenly" in said.reason


def test_high_and_peaked_is_hybrid() -> None:
    said = asked(1e-3, zipf(50_000, exponent=1.1))

    assert said.best.mode == "hybrid"
    assert "keys" in said.reason
    assert said.best.coverage > 0.4


def test_a_model_no_slower_than_a_lookup_needs_a_table_less() -> None:
    said = asked(1e-7, zipf(50_000, exponent=0.3))

    assert said.best.mode == "dynamic"
    assert "next to nothing" in said.reason


def test_predictions_that_must_be_fresher_than_a_bake_takes_cannot_be_static() -> None:
    promise = Promise(10.0, freshness_s=10.0)

    said = asked(2e-2, zipf(2000), promise, rate=20.0)

    static = next(option for option in said.options if option.mode == "static")
    assert said.best.mode != "static"
    assert any("longer than the 10 s for which a prediction holds" in words for words in static.refused)


def test_a_model_slower_than_the_deadline_is_baked_ahead() -> None:
    promise = Promise(0.2)
    slow = costs(0.5)

    said = asked(0.5, zipf(50), promise, rate=1.0)

    assert said.best.mode == "static"
    assert "while dynamic mode fails: p99 of" in said.reason
    found = antipatterns_of(slow, promise, said.options)
    assert [item.code for item in found] == ["slow_model"]
    assert found[0].what == "the model takes 500 ms for one row, the deadline is 200 ms"


def test_where_nothing_keeps_every_promise_the_reason_says_so() -> None:
    said = asked(0.5, zipf(50_000, exponent=0.5), Promise(0.2), rate=1.0)

    assert all(option.refused for option in said.options)
    assert said.reason.startswith("nothing keeps every promise")


def test_a_rate_above_what_a_mode_can_do_refuses_it() -> None:
    said = asked(1e-2, zipf(50), rate=1000.0)

    dynamic = next(option for option in said.options if option.mode == "dynamic")
    assert any(words.endswith("requests/s of the 1e+03 that come") for words in dynamic.refused)
    assert said.best.mode == "static"


def test_the_best_stands_first_and_the_refused_last() -> None:
    said = asked(1e-3, zipf(50_000))

    assert said.options[0] is said.best
    refused = [bool(option.refused) for option in said.options]
    assert refused == sorted(refused)


def test_a_larger_head_never_covers_less() -> None:
    said = asked(1e-3, zipf(50_000))

    hybrids = sorted((o for o in said.options if o.mode == "hybrid"), key=lambda o: o.budget or 0)
    shares = [option.coverage for option in hybrids]
    assert shares == sorted(shares)


def test_without_the_sequence_the_curve_stands_in_for_it() -> None:
    traffic = zipf(50_000, requests=50_000)
    question = Question(traffic.traffic, costs(1e-3), Promise(10.0), Load(32), Prices(), followed=500)
    known = replace(question, keys=traffic.keys, make_kept=LearnedHead)

    by_curve, by_sequence = (
        {option.name: option.coverage for option in predictions(q, (0.05,))} for q in (question, known)
    )

    assert by_curve["hybrid 5 %"] == pytest.approx(by_sequence["hybrid 5 %"], abs=0.08)


@pytest.mark.parametrize(
    ("served", "codes"),
    [
        (Served("eta", "hybrid", False, 0, 1000, 5000, 0.6), []),
        (Served("eta", "hybrid", False, 0, 1000, 5000, 0.001), ["unread_table"]),
        (Served("eta", "hybrid", False, 0, 1000, 10, 0.0), []),
        (Served("eta", "dynamic", True, 2, 0, 5000, 0.0), ["all_in_one"]),
        (Served("eta", "dynamic", True, 0, 0, 5000, 0.0, logged=False), ["no_log"]),
    ],
)
def test_what_is_known_to_hurt_is_named_where_it_is_seen(served: Served, codes: list[str]) -> None:
    assert [item.code for item in antipatterns_of(costs(1e-3), Promise(10.0), (), served)] == codes
