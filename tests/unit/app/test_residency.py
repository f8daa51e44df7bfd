"""Who stays in memory: the budget holds whatever happens, and what is used is what stays."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from parbake.app.residency import Residency

SIZE = 100


class Shop:
    """Loads what is asked for, and puts away who it is told to, as the supervisor does, but at once."""

    def __init__(self, budget: int, sizes: dict[str, int] | None = None) -> None:
        self.residency = Residency(budget)
        self.sizes = sizes or {}
        self.hits = self.asked = 0

    def ask(self, key: str) -> None:
        self.asked += 1
        if key in self.residency.residents:
            self.hits += 1
        else:
            size = self.sizes.get(key, SIZE)
            out = self.residency.admit(key, size)
            assert out is not None
            self.put_away(out)
            self.put_away(self.residency.settle(key, size, 0.01))
        self.residency.used({key: 1})

    def put_away(self, out: Iterable[str]) -> None:
        for key in out:
            self.residency.gone(key)

    def hit_rate(self, asked: Iterable[str], warm_up: int) -> float:
        for number, key in enumerate(asked):
            if number == warm_up:
                self.hits = self.asked = 0
            self.ask(key)
        return self.hits / self.asked


def uniform(models: int, count: int) -> Iterator[str]:
    rng = random.Random(1)
    return (str(rng.randrange(models)) for _ in range(count))


def zipf(models: int, count: int) -> list[str]:
    rng = random.Random(1)
    weights = [1 / (rank + 1) for rank in range(models)]
    return [str(key) for key in rng.choices(range(models), weights, k=count)]


def test_at_random_the_hit_rate_is_the_share_that_fits() -> None:
    shop = Shop(100 * SIZE)
    assert shop.hit_rate(uniform(120, 10_000), 3_000) == pytest.approx(100 / 120, abs=0.03)


def test_models_asked_for_in_turn_do_not_push_each_other_out_just_before_their_turn() -> None:
    shop = Shop(100 * SIZE)
    rate = shop.hit_rate((str(number % 120) for number in range(12_000)), 1_200)
    # The least recently used one is always the one that comes next: that policy would never hit.
    assert rate > 0.6


def test_when_other_models_are_asked_for_from_now_on_they_get_the_place() -> None:
    shop = Shop(100 * SIZE)
    for number in range(1_200):
        shop.ask(f"old-{number % 120}")
    assert shop.hit_rate((f"new-{number % 120}" for number in range(24_000)), 12_000) > 0.6


def test_bursts_in_turn_do_not_push_each_other_out_either() -> None:
    shop = Shop(100 * SIZE)
    rate = shop.hit_rate((str(number // 3 % 120) for number in range(18_000)), 3_600)
    assert rate > (2 + 0.6) / 3


def test_popular_models_stay() -> None:
    asked = zipf(500, 12_000)
    shop = Shop(100 * SIZE)
    rate = shop.hit_rate(asked, 4_000)
    recent: OrderedDict[str, None] = OrderedDict()
    hits = 0
    for number, key in enumerate(asked):
        hits += number >= 4_000 and key in recent
        recent[key] = None
        recent.move_to_end(key)
        if len(recent) > 100:
            recent.popitem(last=False)
    assert rate > hits / 8_000


def test_what_was_popular_long_ago_goes_in_the_end() -> None:
    shop = Shop(10 * SIZE)
    for _ in range(100):
        shop.ask("old")
    for number in range(4_000):
        shop.ask(f"new-{number % 12}")
    assert "old" not in shop.residency.residents


def test_of_two_that_are_asked_for_alike_the_one_that_loads_quickly_for_its_size_goes() -> None:
    residency = Residency(350)
    for key, size, cost_s in (("slow", 100, 1.0), ("quick", 100, 0.01), ("large", 100, 0.5)):
        assert residency.admit(key, size) == []
        assert residency.settle(key, size, cost_s) == []
        residency.used({key: 2})
    assert residency.admit("another", 100) == ["quick"]


def test_one_that_turns_out_larger_than_thought_makes_others_go_or_goes_itself() -> None:
    residency = Residency(300)
    for key in "ab":
        residency.admit(key, 100)
        residency.settle(key, 100, 0.01)
    assert residency.admit("c", 100) == []
    assert residency.settle("c", 150, 0.01) == ["a"]
    residency.gone("a")
    assert residency.admit("d", 50) == []
    assert residency.settle("d", 301, 0.01) == ["d"]


def test_what_is_on_its_way_in_is_never_named_and_who_finds_no_room_has_to_wait() -> None:
    residency = Residency(200)
    assert residency.admit("a", 100) == []
    assert residency.admit("b", 100) == []
    assert residency.fits(100)
    assert residency.admit("c", 100) is None
    assert residency.settle("a", 100, 0.01) == []
    assert residency.admit("c", 100) == ["a"]


def test_what_cannot_fit_beside_what_is_pinned_does_not_fit() -> None:
    residency = Residency(200)
    residency.admit("pinned", 150, pinned=True)
    residency.settle("pinned", 150, 0.01)
    assert residency.fits(50)
    assert not residency.fits(51)
    assert residency.admit("other", 51) is None


def test_without_a_budget_nobody_goes() -> None:
    shop = Shop(0)
    for number in range(500):
        shop.ask(str(number))
    assert len(shop.residency.residents) == 500


steps = st.lists(
    st.tuples(
        st.integers(0, 11),
        st.sampled_from(["load", "pin", "settle", "use", "lose"]),
        st.integers(1, 60),
    ),
    max_size=80,
)


@given(budget=st.integers(1, 200), steps=steps)
@example(budget=1, steps=[(1, "load", 1), (1, "settle", 1), (0, "pin", 2)])
def test_the_budget_holds_and_the_pinned_stay(budget: int, steps: list[tuple[int, str, int]]) -> None:
    residency = Residency(budget)
    residents = residency.residents

    def put_away(out: Iterable[str], mine: str) -> None:
        for key in out:
            assert not residents[key].pinned
            assert key == mine or residents[key].state == "leaving"
            residency.gone(key)

    for number, what, size in steps:
        key = str(number)
        if what in ("load", "pin") and key not in residents:
            out = residency.admit(key, size, pinned=what == "pin")
            if out is not None:
                put_away(out, "")
                assert residents[key].state == "loading"
            else:
                assert what == "load"
        elif what == "settle" and key in residents and residents[key].state == "loading":
            put_away(residency.settle(key, size, size / 1000), key)
        elif what == "use":
            residency.used({key: size})
        elif what == "lose" and key in residents and residents[key].state == "loaded":
            residency.gone(key)
        loaded = sum(r.bytes for r in residents.values() if r.state == "loaded" and not r.pinned)
        if loaded:
            # What is pinned, or being loaded for that, may have more than all; then nobody else has anything.
            assert residency.bytes <= budget
