"""Keys stay with their version: raising a weight moves no others than it must, and shares come out as they were set."""

from __future__ import annotations

import math
from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from parbake.contract.model import Contract, Key, Step, TensorSpec
from parbake.errors import InvalidInput, SettingsError
from parbake.serving.route import (
    Arm,
    Chooser,
    Column,
    Hints,
    Route,
    Row,
    Rule,
    Shadow,
    bandit_weights,
    check_served,
    first_row,
)

KEYS = [blake2b(str(n).encode(), digest_size=16).digest() for n in range(400)]
CONTRACT = Contract(
    "m",
    (TensorSpec("x", "FP32", (2,), columns=("left", "right")), TensorSpec("who", "BYTES", (1,))),
    (TensorSpec("y", "FP32", (2,)),),
    (Step("onnx", "model.onnx"),),
    purpose="p",
    owner="o",
    key=Key(("left",)),
)

weights = st.lists(st.floats(0.001, 1), min_size=2, max_size=5)


def route(*shares: float, **more: object) -> Route:
    total = sum(shares)
    arms = tuple(Arm(str(i + 1), share / total) for i, share in enumerate(shares))
    return Route("m", "1", arms, **more)  # type: ignore[arg-type]  # each test gives what fits


def chooser(route: Route, now: float = 0.0) -> Chooser:
    return Chooser(route, CONTRACT, lambda: now)


def row(key: bytes = KEYS[0], left: float = 1.0, right: float = 2.0, who: str = "ann") -> Row:
    data = who.encode()
    raws = [np.array([left, right], np.float32).tobytes(), len(data).to_bytes(4, "little") + data]
    return Row(raws, ((2,), (1,)), key)


def versions_of(route: Route) -> list[str]:
    ready = chooser(route)
    return [ready.choose(row(key))[0] for key in KEYS]


@given(weights, st.data())
def test_raising_a_weight_moves_keys_to_that_version_and_no_others(
    shares: list[float], data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(shares) - 1))
    more = data.draw(st.floats(1, 20))
    raised = [share * more if i == at else share for i, share in enumerate(shares)]
    before, after = versions_of(route(*shares)), versions_of(route(*raised))
    moved = {new for old, new in zip(before, after, strict=True) if old != new}
    assert moved <= {str(at + 1)}


@given(weights, st.data())
def test_a_version_that_joins_takes_keys_and_moves_none_between_the_others(
    shares: list[float], data: st.DataObject
) -> None:
    joining = data.draw(st.floats(0.001, 2))
    before, after = versions_of(route(*shares)), versions_of(route(*shares, joining))
    new = str(len(shares) + 1)
    assert all(a in (b, new) for b, a in zip(before, after, strict=True))


@given(st.lists(st.integers(0, 10), min_size=2, max_size=4).filter(any), st.integers(0, 2**64))
def test_each_version_gets_the_share_of_its_weight(shares: list[int], seed: int) -> None:
    ready = chooser(route(*shares))
    count = 3000
    keys = [blake2b(f"{seed}/{n}".encode(), digest_size=16).digest() for n in range(count)]
    got = [ready.choose(row(key))[0] for key in keys]
    for i, share in enumerate(shares):
        expected = share / sum(shares)
        # Six standard deviations: one example in some hundred million would miss.
        within = 6 * math.sqrt(count * expected * (1 - expected))
        assert abs(got.count(str(i + 1)) - count * expected) <= within


def test_two_deployments_share_their_keys_out_independently() -> None:
    ones = [v == "1" for v in versions_of(route(1, 1))]
    others = [v == "1" for v in versions_of(replace(route(1, 1), deployment="other"))]
    same = sum(a == b for a, b in zip(ones, others, strict=True))
    assert 0.35 * len(KEYS) < same < 0.65 * len(KEYS)


def test_the_first_rule_that_holds_decides_before_the_weights() -> None:
    ready = chooser(
        route(
            1,
            rules=(
                Rule("2", headers={"X-Group": ("beta", "inner")}),
                Rule("3", parameters={"try": ()}),
                Rule("4", columns={"left": ("17", "18.5")}),
                Rule("5", columns={"who": ("bob",), "right": ("2",)}),
                Rule("6", columns={"left": ("17",)}),
            ),
        )
    )
    assert ready.needs_hints
    assert ready.choose(row()) == ("1", "weights")
    assert ready.choose(row(), Hints({"x-group": "beta"})) == ("2", "rule")
    assert ready.choose(row(), Hints({"x-group": "gamma"}))[0] == "1"
    assert ready.choose(row(), Hints({}, {"try": False}))[0] == "3"
    assert ready.choose(row(left=17))[0] == "4"
    assert ready.choose(row(left=18.5))[0] == "4"
    assert ready.choose(row(who="bob"))[0] == "5"
    assert ready.choose(row(who="bob", right=3))[0] == "1"


def test_a_rule_holds_in_its_time_only() -> None:
    timed = route(1, rules=(Rule("2", after=100, before=200),))
    assert [chooser(timed, now).choose(row())[0] for now in (99, 100, 199, 200)] == ["1", "2", "2", "1"]


def test_a_rule_for_a_share_takes_the_same_keys_every_time_and_its_share_of_them() -> None:
    ruled = route(1, rules=(Rule("2", share=0.25),))
    first = versions_of(ruled)
    assert versions_of(ruled) == first
    assert 60 < first.count("2") < 140
    more = versions_of(route(1, rules=(Rule("2", share=0.5),)))
    assert all(b == "2" for a, b in zip(first, more, strict=True) if a == "2")


def test_the_kill_switch_sends_everything_to_the_champion_and_shadows_nothing() -> None:
    killed = chooser(route(0.001, 1, killed=True, rules=(Rule("2", share=1),), shadows=(Shadow("2"),)))
    assert {killed.choose(row(key)) for key in KEYS} == {("1", "kill")}
    assert killed.shadows(row(), "1") == []


def test_what_is_sticky_by_header_does_not_look_at_the_key() -> None:
    ready = chooser(route(1, 1, sticky="header:X-User"))
    by_user = {
        user: {ready.choose(row(key), Hints({"x-user": user}))[0] for key in KEYS[:50]}
        for user in map(str, range(40))
    }
    assert all(len(versions) == 1 for versions in by_user.values())
    assert {v for versions in by_user.values() for v in versions} == {"1", "2"}
    # Who has no such header is kept by the key.
    assert len({ready.choose(row(key))[0] for key in KEYS}) == 2


def test_shadows_get_their_share_of_the_keys_and_never_what_they_answer_themselves() -> None:
    ready = chooser(route(1, shadows=(Shadow("2", 0.5), Shadow("3"))))
    asked = [ready.shadows(row(key), "1") for key in KEYS]
    assert all("3" in shadows for shadows in asked)
    assert 0.35 * len(KEYS) < sum("2" in shadows for shadows in asked) < 0.65 * len(KEYS)
    assert "3" not in ready.shadows(row(), "3")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Route("m", "1", ()), "1 to 16 versions"),
        (lambda: Route("m", "1", (Arm("1", 0.5), Arm("2", 0.4))), "add up to 1, got 0.9"),
        (lambda: Route("m", "1", (Arm("1", 0.5), Arm("1", 0.5))), "named twice"),
        (lambda: Route("m", "1", (Arm("1", 1.5), Arm("2", -0.5))), "expected 0 or more"),
        (lambda: Route("m", "1", (Arm("1", float("nan")),)), "expected 0 or more"),
        (lambda: Route("m", "1", (Arm("1", 1),), sticky="cookie:x"), "header:NAME"),
        (lambda: Route("m", "1", (Arm("1", 1),), timeout_ms=0), "more than 0"),
        (lambda: Rule("1"), "no condition"),
        (lambda: Rule("1", share=1.5), "at most 1"),
        (lambda: Rule("1", after=2, before=1), "ends before it begins"),
        (lambda: Shadow("1", 0), "more than 0"),
    ],
)
def test_a_route_that_makes_no_sense_is_refused(make: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()  # type: ignore[operator]  # a function


def test_a_rule_about_a_column_that_is_none_or_cannot_have_the_value_is_refused() -> None:
    with pytest.raises(SettingsError, match="no column 'age'") as caught:
        chooser(route(1, rules=(Rule("2", columns={"age": ("1",)}),)))
    assert "left, right, who" in caught.value.hint
    with pytest.raises(SettingsError, match="'old' is no FP32"):
        chooser(route(1, rules=(Rule("2", columns={"left": ("old",)}),)))


def test_a_route_between_versions_that_take_other_things_is_refused() -> None:
    same = {"1": CONTRACT, "2": CONTRACT}
    check_served(route(1, 1), same)
    with pytest.raises(InvalidInput, match="no version '3'") as caught:
        check_served(route(1, 1, rules=(Rule("3", share=1),)), same)
    assert caught.value.hint == "versions: 1, 2"
    other = replace(CONTRACT, outputs=(TensorSpec("z", "FP32", (2,)),))
    with pytest.raises(InvalidInput, match="the outputs of version 2"):
        check_served(route(1, 1), {"1": CONTRACT, "2": other})


def test_the_first_row_and_its_columns_are_read_from_raw_bytes() -> None:
    one, two = row(left=17, who="ann"), row(left=18, who="bo")
    both = [a + b for a, b in zip(one.raws, two.raws, strict=True)]
    assert first_row(CONTRACT, both, 2, one.shapes) == list(one.raws)
    who, left = Column(CONTRACT, "who"), Column(CONTRACT, "left")
    assert who.text(who.first(two.raws)) == "bo"
    assert left.text(left.first(two.raws)) == "18"


def test_the_bandit_gives_more_to_whoever_earns_more_and_nothing_for_nothing() -> None:
    even = bandit_weights({"1": (0, 0), "2": (0, 0)})
    assert abs(even["1"] - 0.5) < 0.03
    sure = bandit_weights({"1": (10, 90), "2": (60, 40)})
    assert sure["2"] > 0.99
    assert math.isclose(sum(sure.values()), 1)
