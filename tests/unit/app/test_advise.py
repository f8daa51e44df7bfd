"""What an advice says beside its figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parbake.advisor.model import BatchTime, Costs, FrontCost, ModelCost, Traffic
from parbake.app.advise import _notes, asked_in_sequence

COSTS = Costs(
    ModelCost(0.0, 1e-3, (BatchTime(1, 1e-3, 1e-3),)),
    FrontCost(1e-5, 1e-5, 1e-5, 1e-5, 1e-5, 1e-5, 0.0),
    inline=False,
    threads=1,
    fronts=1,
    cores=2.0,
    table_row_bytes=40.0,
    head_row_bytes=400.0,
    most_batch_rows=64,
    pace=1000.0,
)
TRAFFIC = asked_in_sequence(np.arange(2000, dtype=np.uint64) % 50, "made").traffic


@pytest.mark.parametrize(
    ("costs", "traffic", "words"),
    [
        (COSTS, TRAFFIC, []),
        (replace(COSTS, unsteady=0.25), TRAFFIC, ["not equally quick while it was measured (by 25%"]),
        (replace(COSTS, pace=0.0), TRAFFIC, ["could not be seen"]),
        (COSTS, replace(TRAFFIC, requests=10), ["only 10 requests are known"]),
        (COSTS, replace(TRAFFIC, sampled=0.5), ["a sample of the keys"]),
        (replace(COSTS, pace=0.0, unsteady=0.25), TRAFFIC, ["not equally quick", "could not be seen"]),
    ],
)
def test_an_advice_says_what_makes_its_figures_less_sure(
    costs: Costs, traffic: Traffic, words: list[str]
) -> None:
    notes = list(_notes(traffic, costs))

    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))
