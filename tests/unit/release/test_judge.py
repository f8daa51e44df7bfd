"""The judge: sees harm, is not misled, never looks too often, and survives whatever it is fed."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from parbake.cli.pictures import write_verdict
from parbake.errors import SettingsError
from parbake.release.judge import MOST_SEGMENTS, Decision, Judge, Margins, Verdict, thresholds
from parbake.release.sequential import (
    EFFECTS,
    SHARES,
    STAKES,
    bet_on_means,
    bet_on_share,
    bet_on_shares,
    share_of_alpha,
    wealth,
)
from parbake.runtime.observation import LATENCY_EDGES_MS, TURNS, Bins, Observation, empty, latency_bucket
from parbake.serving.observer import KeyTurns

BINS = Bins(edges=(0.25, 0.5, 0.75))
RATE = st.floats(0.0005, 0.999)


def seen(
    random: np.random.Generator,
    requests: int,
    *,
    failures: float = 0.01,
    slower: float = 1.0,
    shift: float = 0.0,
    loss: float = 0.2,
) -> Observation:
    """What a version did in a while."""
    ms = slower * random.lognormal(2.0, 0.5, requests)
    values = np.clip(random.random(requests) + shift, 0, 1)
    losses = (random.random(requests) < loss).astype(float)
    at = np.bincount(np.array([latency_bucket(float(value)) for value in ms], np.int64))
    outputs = tuple(np.bincount(np.searchsorted(BINS.edges, values), minlength=5).tolist())
    total = float(losses.sum())
    failed = int(random.binomial(requests, failures))
    return Observation(
        requests,
        failed,
        tuple(int(count) for count in at),
        {"": outputs},
        {"": (requests, total, total)},
        {"": (requests, failed)},
        (requests, failed),
    )


def released(seed: int, looks: int, margins: Margins | None = None, **worse: Any) -> tuple[Judge, Verdict]:
    """A canary of 10 % that is looked at until it is rolled back."""
    random = np.random.default_rng(seed)
    judge = Judge.start(margins or Margins(), BINS)
    verdict = judge.verdict()
    for second in range(looks):
        judge, verdict = judge.look(seen(random, 90), seen(random, 10, **worse), second)
        if verdict.decision is Decision.ROLL_BACK:
            break
    return judge, verdict


@given(RATE, st.floats(-0.4, 0.4), RATE, st.integers(1, 6), st.integers(1, 6), st.sampled_from(EFFECTS))
def test_a_bet_on_shares_is_fair_at_best(
    rate: float, margin: float, guess: float, n: int, base_n: int, effect: float
) -> None:
    own = min(max(rate + margin, 0.0), 1.0)
    rate = own - margin
    if not 0 <= rate <= 1:
        return
    expected = 0.0
    for hits in range(n + 1):
        for base_hits in range(base_n + 1):
            chance = math.comb(n, hits) * own**hits * (1 - own) ** (n - hits)
            chance *= math.comb(base_n, base_hits) * rate**base_hits * (1 - rate) ** (base_n - base_hits)
            expected += chance * math.exp(bet_on_shares(n, hits, base_n, base_hits, guess, margin, effect))
    assert expected <= 1 + 1e-9


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=2),
    RATE, st.floats(0, 1), st.floats(0, 1), st.sampled_from(STAKES),
)  # fmt: skip
def test_a_bet_on_means_is_fair_at_best(
    values: list[tuple[float, float]], chance: float, guess: float, base_guess: float, stake: float
) -> None:
    """Both arms take one of two values each, by the same chance."""
    (one, other), (base_one, base_other) = values
    mean, base_mean = (chance * a + (1 - chance) * b for a, b in values)
    expected = 0.0
    for x, weight in ((one, chance), (other, 1 - chance)):
        for y, base_weight in ((base_one, chance), (base_other, 1 - chance)):
            log = bet_on_means(1, x, x * x, 1, y, y * y, guess, base_guess, mean - base_mean, stake)
            expected += weight * base_weight * math.exp(log)
    assert expected <= 1 + 1e-9


@given(st.integers(1, 200), st.integers(1, 200), st.data())
def test_more_failures_of_the_challenger_never_speak_for_it(n: int, base_n: int, data: Any) -> None:
    base_hits = data.draw(st.integers(0, base_n))
    logs = [bet_on_shares(n, hits, base_n, base_hits, 0.02, 0.005, 0.02) for hits in range(n + 1)]
    assert all(a < b for a, b in pairwise(logs))


@given(st.floats(0.01, 0.9), st.floats(0, 1), st.sampled_from(SHARES))
def test_a_bet_on_one_share_is_fair_at_best(most: float, below: float, share: float) -> None:
    chance = below * most
    miss, hit = (float(bet_on_share(1, hits, most, share)) for hits in (0, 1))
    assert chance * math.exp(hit) + (1 - chance) * math.exp(miss) <= 1 + 1e-9
    assert bet_on_share(1, 1, most, share) > 0
    assert bet_on_share(7, 3, most, share) == pytest.approx(3 * hit + 4 * miss)


def test_one_may_look_after_every_window() -> None:
    random = np.random.default_rng(5)
    canaries, alpha, log = 4000, 0.05, np.zeros((4000, len(EFFECTS)))
    worst = np.zeros(canaries)
    for look in range(400):
        rate = 0.02 + 0.3 * (look % 50 == 0)  # A burst hits both.
        hits, base_hits = random.binomial(3, rate, canaries), random.binomial(97, rate, canaries)
        log += bet_on_shares(3, hits[:, None], 97, base_hits[:, None], 0.02, 0.0, np.array(EFFECTS))
        worst = np.maximum(worst, wealth(log))
    assert (worst >= -math.log(alpha)).mean() <= alpha


def test_alpha_suffices_for_however_many_segments() -> None:
    assert sum(map(share_of_alpha, range(10_000))) == pytest.approx(1, abs=1e-3)
    assert sum(map(share_of_alpha, range(10_000))) < 1


@pytest.mark.parametrize("quantile", [0.5, 0.99])
def test_buckets_only_excuse_the_challenger(quantile: float) -> None:
    base = np.random.default_rng(1).integers(0, 100, (50, len(LATENCY_EDGES_MS))).astype(float)
    at, above = thresholds(base, quantile, 0.1)
    edges = np.array(LATENCY_EDGES_MS)
    assert (edges[above] >= 1.1 * edges[at] * (1 - 1e-8)).all()
    assert (above - at <= 1).all()


@pytest.mark.parametrize(
    ("worse", "test", "words"),
    [
        ({"failures": 0.06}, "failures", "points worse, surely to 1 %"),
        ({"slower": 1.5}, "p50", "more than 10 % slower, surely to 1 %"),
        ({"shift": 0.3}, "outputs", "outputs differ by 0.3"),
        ({"loss": 0.5}, "labels", "worse by more than 0.02, surely to 1 %"),
    ],
)
def test_harm_is_rolled_back_with_the_reason(worse: dict[str, Any], test: str, words: str) -> None:
    judge, verdict = released(7, 600, None, **worse)
    assert verdict.decision is Decision.ROLL_BACK
    assert verdict.evidence[0].test == test
    assert words in verdict.reason
    later, again = judge.look(seen(np.random.default_rng(1), 90), seen(np.random.default_rng(2), 10), 1e4)
    assert again.decision is Decision.ROLL_BACK
    assert later.tests[0].peaks >= judge.tests[0].peaks


def test_at_least_so_much_worse_is_not_more_than_it_is() -> None:
    _, verdict = released(3, 3000, failures=0.05)
    (failures,) = [found for found in verdict.evidence if found.test == "failures"]
    assert failures.at_least is not None
    assert 0.005 <= failures.at_least <= 0.04


def test_a_good_one_is_promoted_after_its_requests_and_each_step_asks_again() -> None:
    judge, verdict = released(11, 50, Margins(requests=1000))
    assert verdict.decision is Decision.HOLD
    assert verdict.reason == "about 500 more requests of the challenger"
    random = np.random.default_rng(12)
    for second in range(50, 100):
        judge, verdict = judge.look(seen(random, 90), seen(random, 10), second)
    assert verdict.decision is Decision.PROMOTE
    assert judge.next_step().verdict().decision is Decision.HOLD
    # Keys count anew in each step, so what was bet on them does not go on; what labels said does.
    anew, before = judge.next_step().tests, judge.tests
    assert [(test.name, test.segment, test.alpha, test.base) for test in anew] == [
        (test.name, test.segment, test.alpha, test.base) for test in before
    ]
    assert all(any(test.logs) for test in before)
    assert {test.name for test in anew if any(test.logs)} == {"labels", "rescued"}


def test_who_cannot_be_compared_yet_is_not_promoted_and_not_kept_for_ever() -> None:
    random = np.random.default_rng(5)
    # All that there is in the first look has nothing before it that it could be held against.
    judge, verdict = Judge.start(Margins(requests=100)).look(
        seen(random, 450), seen(random, 118, slower=21), 1
    )
    assert verdict.decision is Decision.HOLD
    assert verdict.reason.startswith("p50 and p99 were not compared yet")
    judge, verdict = judge.look(seen(random, 60), seen(random, 15, slower=21), 2)
    assert verdict.decision is Decision.ROLL_BACK
    # Ten keys, whose first requests are all that is counted, are never enough.
    judge = Judge.start(Margins(requests=100))
    for second in range(4):
        few = msgspec.structs.replace(seen(random, 5), requests=80)
        judge, verdict = judge.look(few, few, second)
        assert verdict.decision is (Decision.HOLD if second < 3 else Decision.PROMOTE)
    assert "(p50 and p99 were not compared: too few keys)" in verdict.reason


def test_other_margins_hold_from_then_on_and_keep_what_they_are_not_about() -> None:
    judge, _ = released(3, 100)
    other = judge.with_margins(Margins(p99=0.3, alpha=0.02))
    assert {test.name for test in other.tests if not any(test.logs)} == {"p99"}
    assert [test.alpha for test in other.tests] == pytest.approx([2 * test.alpha for test in judge.tests])
    assert judge.with_margins(judge.margins) is judge
    # Harm that is within the margin now is none.
    judge, verdict = released(7, 200, Margins(failures=0.2), failures=0.1)
    assert verdict.decision is not Decision.ROLL_BACK
    random = np.random.default_rng(7)
    judge = judge.with_margins(Margins())
    for second in range(200, 500):
        judge, verdict = judge.look(seen(random, 90), seen(random, 10, failures=0.1), second)
    assert "failures" in verdict.reason
    assert verdict.decision is Decision.ROLL_BACK


def test_what_counts_each_key_in_each_step_has_a_part_of_alpha_in_each() -> None:
    both = seen(np.random.default_rng(1), 9)
    one, four = (Judge.start(Margins(), BINS, steps).look(both, both, 1)[0] for steps in (1, 4))
    alphas = [(a.name, b.alpha / a.alpha) for a, b in zip(one.tests, four.tests, strict=True)]
    assert dict(alphas) == {
        "failures": 0.25, "rescued": 1.0, "p50": 0.25, "p99": 0.25, "outputs": 0.25, "labels": 1.0,
    }  # fmt: skip


def zipf_canary(random: np.random.Generator, *, once: bool, rate: float = 0.0) -> Verdict:
    """A canary of 20 %, where one key in twenty always fails in both versions; ``rate``: of requests that the
    challenger alone fails. ``once`` counts as fronts do, else each request counts."""
    keys, requests = 3000, 600
    popular = 1 / np.arange(1, keys + 1) ** 1.2
    popular /= popular.sum()
    fails, moved = random.random(keys) < 0.05, random.random(keys) < 0.2
    turns = KeyTurns()
    judge = Judge.start(Margins(failures=0.0, requests=10**9))
    verdict = judge.verdict()
    for second in range(20):
        counts = {False: {"": [0, 0]}, True: {"": [0, 0]}}
        paired = [0, 0]
        for key in random.choice(keys, requests, p=popular).tolist():
            mine, alone = bool(moved[key]), bool(moved[key]) and random.random() < rate
            if mine:
                paired[0] += 1
                paired[1] += alone and not fails[key]
            turn = TURNS.get(turns.next(key.to_bytes(4, "big"))) if once else ""
            if turn is not None:
                found = counts[mine].setdefault(turn, [0, 0])
                found[0] += 1
                found[1] += bool(fails[key]) or alone
        both = [
            Observation(requests, tries={turn: (n, failed) for turn, (n, failed) in counts[mine].items()})
            for mine in (False, True)
        ]
        judge, verdict = judge.look(
            both[0], msgspec.structs.replace(both[1], paired=(paired[0], paired[1])), second
        )
        if verdict.decision is Decision.ROLL_BACK:
            break
    return verdict


def test_a_key_that_always_fails_in_both_versions_is_no_harm_however_often_it_is_asked_for() -> None:
    random = np.random.default_rng(4)
    once = [zipf_canary(random, once=True).decision for _ in range(20)]
    assert Decision.ROLL_BACK not in once
    # Were each request counted, a popular key would be enough.
    each = [zipf_canary(random, once=False).decision for _ in range(10)]
    assert each.count(Decision.ROLL_BACK) >= 2


def test_a_version_that_fails_everything_or_now_and_then_is_found_in_peaked_traffic() -> None:
    for rate, test in ((1.0, "rescued"), (0.2, "failures")):
        verdict = zipf_canary(np.random.default_rng(5), once=True, rate=rate)
        assert verdict.decision is Decision.ROLL_BACK
        assert verdict.evidence[0].test == test


def test_a_version_that_fails_the_only_key_that_the_champion_answers_is_found_soon() -> None:
    judge = Judge.start(Margins())
    verdict, needed = judge.verdict(), 0
    while verdict.decision is not Decision.ROLL_BACK and needed < 10:
        needed += 1
        judge, verdict = judge.look(empty(), Observation(1, 1, paired=(1, 1)), needed)
    assert verdict.decision is Decision.ROLL_BACK
    assert "fail and the champion answers the same" in verdict.reason
    # Half of the requests of a key that fails half of the time in both versions: a quarter.
    judge = Judge.start(Margins())
    random = np.random.default_rng(1)
    for second in range(200):
        saved = int(random.binomial(50, 0.25))
        judge, verdict = judge.look(empty(), Observation(50, 25, paired=(50, saved)), second)
        assert verdict.decision is not Decision.ROLL_BACK


def test_proof_waits_until_it_is_sure_and_says_how_long() -> None:
    wanted = Margins(requests=100, proof=True, failures=0.05, p50=0.5, p99=1.0)
    _, verdict = released(13, 20, wanted)
    assert verdict.decision is Decision.HOLD
    assert verdict.reason.startswith("not yet surely within the margin: p99 (about ")
    _, verdict = released(13, 900, wanted)
    assert verdict.decision is Decision.PROMOTE
    assert "surely to 1 %" in verdict.reason


def test_without_data_it_holds() -> None:
    judge = Judge.start(Margins(), BINS)
    assert judge.verdict().decision is Decision.HOLD
    same, verdict = judge.look(empty(), empty(), 1)
    assert verdict.reason == "the challenger has had no requests in this step"
    assert same.tests == judge.tests
    judge, verdict = judge.look(empty(), seen(np.random.default_rng(1), 5000, failures=0.0), 2)
    assert verdict.reason == "the champion has had no requests in this step"


def test_what_has_no_counterpart_yet_waits_for_it() -> None:
    """Half of a window at one look and half at the next is the same window; empty looks change nothing."""
    random = np.random.default_rng(1)
    base, own = seen(random, 500), seen(random, 20, failures=0.5)
    judge = Judge.start(Margins(), BINS)
    at_once, _ = judge.look(base, own, 9)
    apart, _ = judge.look(base, empty(), 1)
    for second in range(2, 9):
        apart, _ = apart.look(empty(), empty(), second)
    apart, _ = apart.look(empty(), own, 9)
    assert apart.tests == at_once.tests
    assert (apart.champion, apart.challenger) == (at_once.champion, at_once.challenger)


@pytest.mark.parametrize(
    "hostile",
    [
        Observation(-5),
        Observation(5, 6),
        Observation(5, 0, (-1, 6)),
        Observation(5, 0, (5,) * 1000),
        Observation(5, 0, (), {"": (1,) * 50}),
        Observation(5, 0, (), {}, {"": (5, math.nan, 1.0)}),
        Observation(5, 0, (), {}, {"": (5, 1.0, math.inf)}),
        Observation(5, 0, (), {}, {"": (5, 50.0, 500.0)}),
        Observation(5, 0, (), {}, {"": (5, -5.0, 5.0)}),
    ],
)
def test_counts_that_cannot_be_are_left_out_and_it_holds(hostile: Observation) -> None:
    judge, _ = released(1, 20)
    for pair in ((hostile, empty()), (empty(), hostile)):
        later, verdict = judge.look(*pair, 99)
        named = [test for test in judge.tests if test.name in ("outputs", "labels")]
        assert [test for test in later.tests if test.name in ("outputs", "labels")] == named
        assert verdict.decision is Decision.HOLD
        assert verdict.reason.startswith(
            "counts that cannot be: champion" if pair[0] is hostile else "counts that cannot be: challenger"
        )


def test_bad_labels_do_not_blind_it_for_failures_nor_undo_a_rollback() -> None:
    random = np.random.default_rng(1)
    judge = Judge.start(Margins(), BINS)
    verdict = judge.verdict()
    bad = Observation(labels={"": (5, math.nan, 1.0)})
    for second in range(200):
        judge, verdict = judge.look(seen(random, 90), seen(random, 10, failures=0.2).add(bad), second)
    assert verdict.decision is Decision.ROLL_BACK
    assert not [test for test in judge.tests if test.name == "labels" and any(test.logs)]
    assert judge.look(Observation(-1), empty(), 999)[1].decision is Decision.ROLL_BACK


WINDOWS = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 20), st.floats(0, 1), st.integers(0, 9)), max_size=8
)


@hypothesis_settings(max_examples=40)
@given(WINDOWS)
def test_whoever_dies_goes_on_where_it_was(windows: list[tuple[int, int, float, int]]) -> None:
    judge = revived = Judge.start(Margins(), BINS)
    for second, (n, m, rate, seed) in enumerate(windows):
        random = np.random.default_rng(seed)
        pair = seen(random, n, failures=rate), seen(random, m, failures=rate)
        judge, verdict = judge.look(*pair, second)
        revived = msgspec.json.decode(msgspec.json.encode(revived), type=Judge)
        revived, again = revived.look(*pair, second)
        assert again == verdict
        assert all(math.isfinite(log) for test in judge.tests for log in (*test.logs, *test.peaks))
    assert revived == judge
    assert msgspec.json.decode(msgspec.json.encode(judge.verdict()), type=Verdict) == judge.verdict()


def test_segments_that_appear_later_are_judged_and_very_many_do_not_fill_the_memory() -> None:
    judge, _ = released(1, 5)
    many: dict[str, tuple[int, ...]] = {f"s{number:04}": (90, 5, 5) for number in range(500)}
    judge, _ = judge.look(Observation(100, 0, (), many), Observation(100, 0, (), many), 9)
    assert sum(test.name == "outputs" for test in judge.tests) == MOST_SEGMENTS
    assert sum(test.alpha for test in judge.tests) < judge.margins.alpha


def test_the_points_of_the_picture_stay_few() -> None:
    judge = Judge.start(Margins())
    for second in range(3000):
        judge, _ = judge.look(Observation(9), Observation(1), second)
    assert 60 <= len(judge.points) <= 201
    assert judge.points[-1].seconds > 2900


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("failures", -0.1),
        ("failures", 1.0),
        ("p99", math.nan),
        ("alpha", 0.0),
        ("requests", 0),
        ("loss_bound", 0.0),
    ],
)
def test_margins_that_mean_nothing_are_refused(name: str, value: float) -> None:
    with pytest.raises(SettingsError, match=name) as caught:
        Margins(**{name: value})  # type: ignore[arg-type]
    assert caught.value.hint


@pytest.mark.needs("matplotlib")
@pytest.mark.parametrize("looks", [0, 200])
def test_a_verdict_can_be_drawn(tmp_path: Path, looks: int) -> None:
    judge, _ = released(7, looks, None, failures=0.06)
    for name in ("verdict.svg", "again.svg", "verdict.png"):
        write_verdict(judge, tmp_path / name)
    text = (tmp_path / "verdict.svg").read_text()
    assert text == (tmp_path / "again.svg").read_text()
    assert ("evidence of harm: roll back" if looks else "evidence of harm: hold") in text
    with pytest.raises(SettingsError, match=r"neither \.svg nor \.png"):
        write_verdict(judge, tmp_path / "verdict.pdf")
