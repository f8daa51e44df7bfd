"""Draw the pictures of docs/concepts: ``python -m docs.pictures``. Seeds and costs are fixed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from parbake.advisor.choose import choose
from parbake.advisor.model import (
    BatchTime,
    Costs,
    FrontCost,
    Load,
    ModelCost,
    Prices,
    Promise,
)
from parbake.advisor.predict import Question, predictions
from parbake.app.advise import Asked, LearnedHead, asked_in_sequence
from parbake.cli.pictures import new_figure, save, write_verdict
from parbake.monitoring.trace import zipf_keys
from parbake.release.judge import Decision, Judge, Margins
from parbake.runtime.observation import LATENCY_EDGES_MS, Observation

FOLDER: Final = Path(__file__).parent / "concepts"
REQUESTS: Final = 20_000
KINDS: Final = (
    ("few keys", 0.8, 200, "-"),
    ("many, flat", 0.2, 100_000, ":"),
    ("many, peaked", 1.2, 100_000, "--"),
)
"""What, Zipf exponent, keys there are, line."""
EXPONENTS: Final = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
KEYS: Final = (100, 1_000, 10_000, 100_000, 1_000_000)
ROW_S: Final = (2e-5, 1e-3)


def main() -> int:
    """Write all pictures."""
    curves()
    choices()
    verdict()
    return 0


def curves() -> None:
    """Three kinds of traffic, as coverage curves."""
    figure, (left, right) = new_figure(2)
    for what, exponent, keys, line in KINDS:
        asked = _asked(exponent, keys, REQUESTS)
        traffic = asked.traffic
        label = f"{what}: {traffic.distinct.value:,.0f} keys, peakedness {traffic.peakedness:.2f}"
        points = traffic.curve
        left.plot(
            [point.keys for point in points],
            [100 * point.share for point in points],
            line,
            color="black",
            label=label,
        )
        right.plot(
            [100 * point.keys / traffic.distinct.value for point in points],
            [100 * point.share for point in points],
            line,
            color="black",
        )
    left.set_xscale("log")
    left.set_xlabel("most asked-for keys")
    left.set_ylabel(f"% of {REQUESTS:,} requests")
    left.set_title("how many keys must be kept")
    right.set_xlabel("most asked-for keys, % of all")
    right.set_ylabel("% of the requests")
    right.set_title("how peaked the traffic is")
    figure.legend(loc="outside lower center", frameon=False, ncols=1)
    figure.set_size_inches(10.4, 4.6)
    save(figure, FOLDER / "coverage-curves.svg")


def verdict() -> None:
    """A challenger that fails more often and is slower by a quarter, until it is rolled back."""
    random = np.random.default_rng(4)

    def seen(requests: int, failures: float, slower: float) -> Observation:
        ms = slower * random.lognormal(2.0, 0.5, requests)
        counts = np.bincount(np.searchsorted(LATENCY_EDGES_MS, ms), minlength=len(LATENCY_EDGES_MS))
        return Observation(requests, int(random.binomial(requests, failures)), tuple(counts.tolist()))

    judge = Judge.start(Margins())
    for second in range(3600):
        judge, found = judge.look(seen(95, 0.01, 1.0), seen(5, 0.02, 1.25), second)
        if found.decision is Decision.ROLL_BACK:
            break
    write_verdict(judge, FOLDER / "verdict.svg")


def choices() -> None:
    """What the advisor chooses over cardinality and peakedness, for a quick and a slow model."""
    figure, panels = new_figure(len(ROW_S), 4.2)
    marks = {"static": ("s", "black"), "dynamic": ("o", "white"), "hybrid": ("D", "0.65")}
    for panel, row_s in zip(panels, ROW_S, strict=True):
        for exponent in EXPONENTS:
            for keys in KEYS:
                mode, distinct = chosen(row_s, exponent, keys)
                mark, colour = marks[mode]
                panel.scatter(distinct, exponent, marker=mark, c=colour, edgecolors="black", s=90)
        panel.set_xscale("log")
        panel.set_xlabel(f"keys among {REQUESTS:,} requests")
        panel.set_ylabel("Zipf exponent: flat below, peaked above")
        panel.set_title(f"a model of {row_s * 1e3:g} ms a row")
    for mode, (mark, colour) in marks.items():
        panels[0].scatter([], [], marker=mark, c=colour, edgecolors="black", s=90, label=mode)
    figure.legend(loc="outside lower center", frameon=False, ncols=3)
    save(figure, FOLDER / "choices.svg")


def chosen(row_s: float, exponent: float, keys: int) -> tuple[str, float]:
    """Mode for Zipf traffic, and how many different keys that has."""
    asked = _asked(exponent, keys, REQUESTS)
    question = Question(
        asked.traffic,
        costs(row_s),
        Promise(deadline_s=10.0),
        Load(32),
        Prices(),
        asked.keys,
        LearnedHead,
        followed=1500,
    )
    said = choose(list(predictions(question)), asked.traffic, question.costs)
    return said.best.mode, asked.traffic.distinct.value


def costs(row_s: float, sizes: Sequence[int] = (1, 8, 64)) -> Costs:
    """Made-up costs of round figures, about those of a small machine."""
    inline = row_s < 1e-4
    return Costs(
        model=ModelCost(0.0, row_s, tuple(BatchTime(n, row_s * n, row_s * n) for n in sizes)),
        front=FrontCost(
            hit_s=1.5e-5,
            miss_s=2.5e-5,
            learn_s=1e-5,
            batch_s=1e-4,
            turn_s=1e-5,
            wire_s=2e-5,
            hop_s=0.0 if inline else 2e-4,
        ),
        inline=inline,
        threads=1,
        fronts=1,
        cores=2.0,
        table_row_bytes=40.0,
        head_row_bytes=400.0,
        most_batch_rows=64,
    )


def _asked(exponent: float, keys: int, requests: int) -> Asked:
    return asked_in_sequence(zipf_keys(exponent, keys, requests, seed=1), "Zipf")


if __name__ == "__main__":
    sys.exit(main())
