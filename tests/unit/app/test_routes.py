"""Routes as the supervisor keeps them, labels that find their predictions, and what the command's words mean."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from parbake.app.labels import Labelled, LabelStore
from parbake.app.routes import (
    Observed,
    RouteBook,
    RouteChange,
    RouteCounts,
    add_counts,
    default_watch,
    rebalanced,
    rule_of,
    shadow_of,
    share_of,
    weights_of,
)
from parbake.contract.model import Contract, TensorSpec
from parbake.errors import Conflict, InvalidInput, SettingsError
from parbake.runtime.observation import Bins, Observation
from parbake.serving.observer import Foretold
from parbake.serving.route import Arm, Loss, Route, Rule, Shadow, Watch
from parbake.serving.shadow import ShadowCounts
from tests.functions import write_function, write_scaled

CONTRACT = Contract("eta", (TensorSpec("x", "FP32", (1,)),), (TensorSpec("y", "FP32", (1,)),), (), "p", "o")
SERVED = {"1": CONTRACT, "2": CONTRACT}


def route(first: float = 1.0, **more: object) -> Route:
    return Route("eta", "1", (Arm("1", first), Arm("2", 1 - first)), **more)  # type: ignore[arg-type]  # each test gives what fits


def put(book: RouteBook, change: RouteChange) -> int:
    revision = book.plan("eta", change, SERVED)
    book.enter("eta", revision)
    return revision.revision


def test_each_change_is_a_revision_and_the_last_hundred_are_remembered() -> None:
    book = RouteBook()
    assert book.get("eta") is None
    for n in range(1, 131):
        assert put(book, RouteChange(route(0.5))) == n
    assert [r.revision for r in book.revisions("eta")] == list(range(31, 131))
    assert put(book, RouteChange(killed=True)) == 131
    now = book.get("eta")
    assert now is not None
    assert (now.killed, now.revision) == (True, 131)
    assert put(book, RouteChange(remove=True)) == 132
    assert book.in_force == ()
    assert put(book, RouteChange(route(), revision=132)) == 133


def test_a_change_of_what_is_no_longer_so_is_refused() -> None:
    book = RouteBook()
    with pytest.raises(Conflict, match="has no route"):
        put(book, RouteChange(killed=True))
    put(book, RouteChange(route(), revision=0))
    with pytest.raises(Conflict, match="at revision 1, not 0"):
        put(book, RouteChange(route(), revision=0))
    with pytest.raises(InvalidInput, match="one of route, killed and remove"):
        put(book, RouteChange(route(), killed=True))
    with pytest.raises(InvalidInput, match="for 'eta', not 'other'"):
        book.plan("other", RouteChange(route()), SERVED)
    assert book.number("eta") == 1


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("2: share=10%", Rule("2", share=0.1)),
        ("2: header.x-group=beta|staff", Rule("2", headers={"x-group": ("beta", "staff")})),
        (
            "2: parameter.try, column.left=1|2 , share=0.5",
            Rule("2", {}, {"try": ()}, {"left": ("1", "2")}, 0.5),
        ),
        ("2: after=1970-01-01T00:01:00+00:00", Rule("2", after=60.0)),
    ],
)
def test_rules_are_read_as_they_are_written(text: str, rule: Rule) -> None:
    assert rule_of(text) == rule


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("share=10%", "no version"),
        ("2: colour=red", "no condition 'colour=red'"),
        ("2: share=much", "no share in 'share=much'"),
        ("2: after=tomorrow", "is no time"),
        ("2:", "no condition"),
        ("2: share=200%", "at most 1"),
    ],
)
def test_rules_that_say_nothing_are_refused(text: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        rule_of(text)
    assert caught.value.hint


def test_weights_and_shadows_are_read_as_they_are_written() -> None:
    assert weights_of("3=90%,4=0.1") == (Arm("3", 0.9), Arm("4", 0.1))
    assert (shadow_of("4"), shadow_of("4=25%")) == (Shadow("4"), Shadow("4", 0.25))
    with pytest.raises(SettingsError, match="no share"):
        weights_of("3")


def test_what_is_watched_has_begun_when_it_was_last_changed() -> None:
    book = RouteBook()
    for watch, since in ((None, 1), (Watch(), 2), (Watch(), 2), (Watch(segment="x"), 4), (None, 5)):
        put(book, RouteChange(route(0.5, watch=watch)))
        now = book.get("eta")
        assert now is not None
        assert now.since == since


def test_bins_come_from_the_champions_goldens_and_need_none(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    assert default_watch(Watch(place=1), bundle).bins == Bins.of_numbers([4.0, 9.0])
    given = Watch(bins=Bins((1.0,)))
    assert default_watch(given, bundle) == given
    bare = write_function(tmp_path, "def predict(x):\n    return x\n")
    assert default_watch(Watch(), bare).bins == Bins()
    with pytest.raises(InvalidInput, match="no output 'z'"):
        default_watch(Watch(output="z"), bundle)


def observed(count: int, since: int = 1, version: str = "1") -> Observed:
    seen = Observation(count, 0, (count, 0), {"": (count,)}, {})
    return Observed("eta", version, "answers", since, seen)


def test_counts_of_fronts_add_up_and_what_was_watched_before_is_left_out() -> None:
    one = RouteCounts(
        {"eta": {"1": {"weights": 3}}}, {"eta": {"2": ShadowCounts(asked=2)}}, (observed(3, 2),)
    )
    other = RouteCounts(
        {"eta": {"1": {"weights": 4, "rule": 1}}}, {"eta": {"2": ShadowCounts(asked=5)}}, (observed(4, 2),)
    )
    old = RouteCounts(observed=(observed(100, 1), observed(50, 1, "2")))
    total = add_counts([one, old, other])
    assert total.requests == {"eta": {"1": {"weights": 7, "rule": 1}}}
    assert total.shadows["eta"]["2"].asked == 7
    (item,) = total.observed
    assert (item.observation.requests, item.observation.latency) == (7, (7, 0))
    # What the fronts said is as it was.
    assert one.shadows["eta"]["2"].asked == 2


def store(loss: Loss, **more: object) -> LabelStore:
    labels = LabelStore()
    labels.watch([route(watch=Watch(loss=loss, **more))])  # type: ignore[arg-type]  # each test gives what fits
    return labels


def foretold(number: int, value: float | str = 1.0, version: str = "1", **more: object) -> Foretold:
    key = number.to_bytes(16, "big")
    return replace(Foretold(version, f"r{number}", 0, key, "s", value, time.time()), **more)


def label(number: int, value: float | str | bool) -> Labelled:
    return Labelled(value, f"r{number}")


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=50), st.randoms())
def test_labels_in_any_order_find_their_predictions_once(
    pairs: Sequence[tuple[float, float]], random: object
) -> None:
    labels = store("absolute")
    labels.foretold({"eta": [foretold(n, guess) for n, (guess, _) in enumerate(pairs)]}, 0)
    sent = [label(n, truth) for n, (_, truth) in enumerate(pairs)]
    random.shuffle(sent)  # type: ignore[attr-defined]  # a random.Random
    assert labels.take("eta", sent) == (len(pairs), 0)
    assert labels.take("eta", sent) == (0, len(pairs))
    number, total, _ = labels.sums("eta", "1", False)[""]
    assert number == len(pairs)
    assert total == pytest.approx(sum(abs(a - b) for a, b in pairs))
    assert labels.sums("eta", "1", False)["s"] == labels.sums("eta", "1", False)[""]


@pytest.mark.parametrize(
    ("loss", "predicted", "truth", "expected"),
    [
        ("squared", 3.0, 1.0, 4.0),
        ("absolute", 3.0, 1.0, 2.0),
        ("zero_one", "cat", "cat", 0.0),
        ("zero_one", "cat", "dog", 1.0),
        ("zero_one", 3.0, 3, 0.0),
        ("zero_one", "true", True, 0.0),
        ("reward", 17.0, 0.25, 0.75),
        ("absolute", "nan", 2.0, 2.0),
    ],
)
def test_losses(loss: Loss, predicted: float | str, truth: float | str | bool, expected: float) -> None:
    labels = store(loss)
    labels.foretold({"eta": [foretold(1, predicted)]}, 0)
    assert labels.take("eta", [label(1, truth)]) == (1, 0)
    assert labels.sums("eta", "1", False)[""] == (1, expected, expected * expected)


def test_a_label_that_cannot_be_one_is_refused() -> None:
    labels = store("reward")
    labels.foretold({"eta": [foretold(1)]}, 0)
    for value, says in (
        ("high", "expected a number"),
        (2.0, "a reward from 0 to 1"),
        (float("nan"), "a reward"),
    ):
        with pytest.raises(InvalidInput, match=says) as caught:
            labels.take("eta", [label(1, value)])
        assert caught.value.path == "$.labels[0].label"
    # Nor is anything lost by it.
    assert labels.take("eta", [label(1, 1.0)]) == (1, 0)
    with pytest.raises(Conflict, match="expects no labels"):
        labels.take("other", [label(1, 1.0)])


def test_a_label_counts_for_the_shadow_that_was_asked_the_same() -> None:
    labels = store("absolute")
    labels.foretold({"eta": [foretold(1, 3.0), foretold(1, 5.0, "2", id="", shadow=True)]}, 0)
    assert labels.take("eta", [Labelled(4.0, key=(1).to_bytes(16, "big"))]) == (1, 0)
    assert labels.sums("eta", "1", False)[""] == (1, 1.0, 1.0)
    assert labels.sums("eta", "2", True)[""] == (1, 1.0, 1.0)


def test_predictions_are_forgotten_when_they_are_old_or_too_many() -> None:
    labels = store("absolute", labels_s=60.0)
    labels.foretold({"eta": [foretold(1, at=time.time() - 100), foretold(2)]}, 3)
    assert labels.take("eta", [label(1, 1.0), label(2, 1.0)]) == (1, 1)
    assert (labels.accepted, labels.unknown, labels.untold) == (1, 1, 3)
    labels.foretold({"eta": [foretold(n) for n in range(100_050)]}, 0)
    assert labels.take("eta", [label(49, 1.0), label(50, 1.0)]) == (1, 1)


def test_a_bandit_moves_to_whoever_earns_more_and_stays_where_nothing_changes() -> None:
    bandit = route(0.5, kind="bandit", watch=Watch(loss="reward"))
    assert rebalanced(bandit, {}) is None
    labels = store("reward")
    labels.foretold({"eta": [foretold(n, 0.0, "2" if n % 2 else "1") for n in range(200)]}, 0)
    labels.take("eta", [label(n, 0.9 if n % 2 else 0.1) for n in range(200)])
    changed = rebalanced(bandit, labels.rewards("eta"))
    assert changed is not None
    assert changed.arms[1].weight > 0.99
    # Whatever the weights are, servers that have learned the same share keys out alike.
    rewards = {"1": (40.0, 60.0), "2": (46.0, 54.0)}
    learned = {
        rebalanced(route(weight, kind="bandit", watch=bandit.watch), rewards) for weight in (0.5, 0.205, 0.9)
    }
    assert len(arms := {one and one.arms for one in learned}) == 1, arms
    assert rebalanced(msgspec.structs.replace(bandit, arms=arms.pop()), rewards) is None
    # Many of them, each as good as the others, add up all the same.
    many = msgspec.structs.replace(bandit, arms=tuple(Arm(str(n), 1 / 16) for n in range(16)))
    shared = rebalanced(many, {})
    assert shared is not None
    assert all(abs(arm.weight - 1 / 16) < 0.02 for arm in shared.arms)
    with pytest.raises(ValueError, match="a bandit needs labels"):
        route(0.5, kind="bandit")


def test_a_share_is_what_the_route_gives_and_without_one_the_last_version_has_all() -> None:
    route = Route("eta", "1", (Arm("1", 0.75), Arm("3", 0.25)), shadows=(Shadow("2"),))
    shares = [
        [share_of(one, version, "3") for version in "123"]
        for one in (None, route, replace(route, killed=True))
    ]
    assert shares == [[0, 0, 1], [0.75, 0, 0.25], [1, 0, 0]]
