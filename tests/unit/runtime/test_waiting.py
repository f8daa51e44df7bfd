"""Who goes when: by priority, in turns between clients, in order of arrival for each; and nobody gets lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.runtime.batcher import Job
from parbake.runtime.waiting import HIGH, LOW, NORMAL, Waiting


def job(rows: int = 1, client: str = "", priority: int = NORMAL) -> Job:
    made = Job((), rows, (), 0.0, lambda _: None)
    made.belongs(client, priority)
    return made


def waiting_of(jobs: Sequence[Job]) -> Waiting:
    waiting = Waiting()
    for one in jobs:
        waiting.add(one)
    return waiting


def popped(waiting: Waiting) -> list[Job]:
    """Everybody, in order."""
    gone: list[Job] = []
    while len(waiting):
        first = waiting.peek()
        gone.append(waiting.pop())
        assert gone[-1] is first, "who was seen is who comes"
    return gone


jobs = st.builds(job, st.integers(1, 40), st.sampled_from(["", "a", "b", "c"]), st.sampled_from([1, 2, 3]))


@given(st.data())
def test_everybody_leaves_once_and_the_rows_are_counted(data: st.DataObject) -> None:
    waiting = Waiting()
    inside: list[Job] = []
    for _ in range(data.draw(st.integers(0, 30))):
        match data.draw(st.sampled_from(["add", "again", "pop", "keep", "room", "all"])):
            case "add":
                inside.append(data.draw(jobs))
                waiting.add(inside[-1])
            case "again":
                inside.append(data.draw(jobs))
                waiting.add_first(inside[-1])
                assert waiting.peek() is inside[-1]
            case "pop" if inside:
                inside.remove(waiting.pop())
            case "keep":
                rows = data.draw(st.integers(1, 40))
                gone = waiting.keep_if(lambda one, rows=rows: one.rows < rows)  # type: ignore[misc]
                assert all(one.rows >= rows for one in gone)
                inside = [one for one in inside if one not in gone]
                assert all(one.rows < rows for one in inside)
            case "room":
                out = waiting.make_room(data.draw(jobs))
                if out is not None:
                    inside.remove(out)
            case "all":
                assert set(waiting.take_all()) == set(inside)
                inside = []
        assert len(waiting) == len(inside)
        assert waiting.rows == sum(one.rows for one in inside)
        assert set(waiting) == set(inside)
    assert set(popped(waiting)) == set(inside)
    assert (len(waiting), waiting.rows, waiting.others) == (0, 0, 0)
    with pytest.raises(IndexError):
        waiting.peek()


@given(st.lists(jobs, max_size=30))
def test_the_higher_priority_goes_first_and_each_client_in_order(arrived: list[Job]) -> None:
    gone = popped(waiting_of(arrived))
    assert [one.priority for one in gone] == sorted(one.priority for one in arrived)
    for kind in {(one.priority, one.client) for one in arrived}:
        mine = [one for one in arrived if (one.priority, one.client) == kind]
        assert [one for one in gone if (one.priority, one.client) == kind] == mine


@given(
    st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=40), min_size=2, max_size=4),
)
def test_while_several_clients_wait_none_gets_ahead_of_another_by_more_than_a_job(
    sizes: list[list[int]],
) -> None:
    waiting = Waiting()
    left: Counter[str] = Counter()
    for name, rows in zip(["", "a", "b", "c"], sizes, strict=False):
        for count in rows:
            waiting.add(job(count, name))
        left[name] = len(rows)
    had: Counter[str] = Counter(dict.fromkeys(left, 0))
    while all(left.values()):
        one = waiting.pop()
        had[one.client] += one.rows
        left[one.client] -= 1
        # The bound of start-time fair queueing: the largest job of either.
        assert max(had.values()) - min(had.values()) <= 2 * 60


@given(st.lists(jobs, max_size=25), jobs)
def test_what_is_said_to_be_ahead_is_about_what_goes_first(arrived: list[Job], late: Job) -> None:
    waiting = waiting_of(arrived)
    said = waiting.ahead(late)
    waiting.add(late)
    before = 0
    while (one := waiting.pop()) is not late:
        before += one.rows
    same = {other.client for other in arrived if other.priority == late.priority} - {late.client}
    assert abs(before - said) <= len(same) * 2 * 40
    if not same:
        assert before == said


def test_one_who_asks_for_much_does_not_keep_another_waiting() -> None:
    waiting = waiting_of([job(1, "greedy") for _ in range(1000)])
    modest = job(1, "modest")
    assert waiting.ahead(modest) <= 1
    waiting.add(modest)
    position = popped(waiting).index(modest)
    assert position <= 1


def test_where_there_is_no_room_the_last_of_whoever_has_most_makes_it() -> None:
    greedy = [job(1, "greedy") for _ in range(10)]
    waiting = waiting_of([*greedy, job(1, "modest")])
    assert waiting.make_room(job(1, "modest")) is greedy[-1]
    # Who has most himself gets no place from those who have less.
    assert waiting.make_room(job(1, "greedy")) is None
    low = job(5, "other", LOW)
    waiting.add(low)
    assert waiting.make_room(job(1, "greedy")) is low
    assert waiting.make_room(job(1, "greedy", LOW)) is None
    assert waiting.make_room(job(1, "greedy", HIGH)) is greedy[-2]
    plain = waiting_of([job() for _ in range(3)])
    assert plain.make_room(job()) is None
    assert plain.make_room(job(1, "named")) is not None


def test_a_large_job_is_paid_for_in_later_turns() -> None:
    waiting = waiting_of(
        [job(320, "a"), *(job(1, "a") for _ in range(5)), *(job(1, "b") for _ in range(400))]
    )
    order = popped(waiting)
    again = next(i for i, one in enumerate(order) if i and one.client == "a")
    assert sum(one.rows for one in order[1:again]) in (319, 320)


def test_nobody_gets_ahead_by_going_away() -> None:
    wide = 100
    waiting = waiting_of([job(1, "steady") for _ in range(500)])
    had = 0
    for _ in range(3):
        # One at a time, and a large one each time.
        waiting.add(job(wide, "comes and goes"))
        while (one := waiting.pop()).client == "steady":
            had += 1
        assert one.rows == wide
    assert had >= 2 * wide - 2
