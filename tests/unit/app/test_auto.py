"""When mode auto follows the advisor, and when it waits."""

from __future__ import annotations

from typing import Any, cast

from parbake.app.auto import Advised, Pilot
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
