"""When mode auto follows the advisor, and when it waits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from parbake.app.auto import Advised, Pilot, gain_over
from parbake.settings import Mode

_COSTS = cast("Any", None)  # the pilot does not look at them


def said(mode: Mode, gain: float = 0.5) -> Advised:
    return Advised(mode, gain, "because", _COSTS)


def test_advice_is_followed_when_it_is_given_twice_in_a_row() -> None:
    pilot = Pilot()
    assert not pilot.hear("hybrid", said("dynamic"))
    assert pilot.hear("hybrid", said("dynamic"))
    # And then it takes twice again to go back.
    assert not pilot.hear("dynamic", said("hybrid"))
    assert pilot.hear("dynamic", said("hybrid"))


def test_advice_that_changes_is_not_followed() -> None:
    pilot = Pilot()
    for _ in range(3):
        assert not pilot.hear("hybrid", said("dynamic"))
        assert not pilot.hear("hybrid", said("static"))
    for _ in range(3):
        assert not pilot.hear("hybrid", said("dynamic"))
        assert not pilot.hear("hybrid", said("hybrid"))


def test_a_small_gain_is_not_worth_a_change() -> None:
    pilot = Pilot()
    for _ in range(5):
        assert not pilot.hear("dynamic", said("hybrid", 0.05))


def test_the_simplest_way_needs_no_gain_but_must_not_lose() -> None:
    pilot = Pilot()
    assert not pilot.hear("hybrid", said("dynamic", 0.0))
    assert pilot.hear("hybrid", said("dynamic", -0.02))
    for _ in range(5):
        assert not pilot.hear("hybrid", said("dynamic", -0.05))


def test_a_mode_that_breaks_its_promises_is_left_whatever_the_gain() -> None:
    def option(mode: Mode, mean_s: float, refused: tuple[str, ...] = ()) -> Any:
        return SimpleNamespace(mode=mode, hour_cost=1.0, mean_s=mean_s, refused=refused)

    hybrid, static = option("hybrid", 0.01), option("static", 0.0001, ("a third has no answer",))
    assert gain_over("static", hybrid, [hybrid, static]) == 1
    # Or one that may not be any more.
    assert gain_over("static", hybrid, [hybrid]) == 1
    assert gain_over("hybrid", hybrid, [hybrid, static]) == 0
    assert gain_over("dynamic", hybrid, [hybrid, option("dynamic", 0.04)]) == 0.5


def test_a_table_may_take_over_only_when_it_was_seen_to_answer_all() -> None:
    pilot = Pilot()
    assert pilot.table_share(2000, 2000) == 1
    # Too few since then to tell.
    assert pilot.table_share(2100, 2100) == 0
    assert pilot.table_share(6100, 4100) == 0.5
    # A front was started again, and counts anew.
    assert pilot.table_share(10_000, 0) <= 0
