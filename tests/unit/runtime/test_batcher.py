"""The batcher: whoever waits goes together, and everybody gets his own rows back, whatever happens to the others."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from types import NoneType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.contract.model import Contract, Step, TensorSpec
from parbake.contract.tensors import Shape
from parbake.errors import (
    DeadlineExceeded,
    ModelFailed,
    NotReady,
    Overloaded,
    ParbakeError,
    RowQuarantined,
    RowRejected,
    RunnerDown,
)
from parbake.runtime.batcher import Batcher, Job, Outcome, runner_down
from tests.turns import Turns

BAD = 666.0
FAR = 1e9


def contract_of(*specs: TensorSpec) -> Contract:
    """A contract whose outputs are its inputs."""
    return Contract(
        name="echo",
        inputs=specs,
        outputs=specs,
        steps=(Step("onnx", "model.onnx"),),
        purpose="test",
        owner="test",
    )


MATRIX = contract_of(TensorSpec("x", "FP32", (1,)))
MANY = contract_of(
    TensorSpec("x", "FP32", (1,)), TensorSpec("text", "BYTES", (2,)), TensorSpec("open", "INT64", (-1,))
)


@dataclass(eq=False)
class Desk:
    """A backend that answers what it was asked, when the test says so; a row that is `BAD` fails its batch."""

    error: type[ParbakeError] = RowRejected
    up: bool = True
    answers: bool = True
    batches: list[int] = field(default_factory=list)
    waiting: tuple[Sequence[bytes], int, tuple[Shape, ...], Callable[[Outcome], None]] | None = None

    def run(
        self, raws: Sequence[bytes], rows: int, shapes: tuple[Shape, ...], done: Callable[[Outcome], None]
    ) -> None:
        assert self.up, "a batch was given to a backend that is down"
        assert self.waiting is None, "a backend was given a second batch"
        self.batches.append(rows)
        self.waiting = (raws, rows, shapes, done)

    def finish(self) -> None:
        """Answer."""
        assert self.waiting is not None
        (raws, rows, shapes, done), self.waiting = self.waiting, None
        if BAD in struct.unpack(f"<{rows}f", raws[0]):
            done(Outcome(error=self.error("no such row"), seconds=0.001))
        else:
            done(Outcome(list(raws), shapes, 0.001))

    @property
    def has_bad(self) -> bool:
        """Whether a row that is `BAD` is in the batch in flight."""
        return self.waiting is not None and BAD in struct.unpack(f"<{self.waiting[1]}f", self.waiting[0][0])

    def crash(self, batcher: Batcher) -> None:
        """Go down, with the batch in flight."""
        self.up = False
        if self.waiting is not None:
            done, self.waiting = self.waiting[3], None
            done(Outcome(error=runner_down("echo")))
        batcher.backend_down()

    def put_away(self, batcher: Batcher) -> None:
        """Go down without having read the batch in flight."""
        self.up = False
        if self.waiting is not None:
            done, self.waiting = self.waiting[3], None
            done(Outcome(error=runner_down("echo"), unread=True))
        batcher.backend_down()

    def come_back(self, batcher: Batcher) -> None:
        self.up = True
        batcher.backend_up()


@dataclass(eq=False)
class Call:
    """One caller: what was sent, and what came back."""

    raws: list[bytes]
    rows: int
    shapes: tuple[Shape, ...]
    bad: bool = False
    deadline: float = FAR
    closed: bool = False
    results: list[Job] = field(default_factory=list)
    refused: ParbakeError | None = None

    def submit(self, batcher: Batcher) -> Call:
        job = Job(self.raws, self.rows, self.shapes, self.deadline, self.results.append, self)
        try:
            batcher.submit(job)
        except ParbakeError as error:
            self.refused = error
        return self

    def at_once(self, batcher: Batcher) -> Call:
        """As `submit`, not at the end of the turn."""
        if self.rows > 1:
            return self.submit(batcher)
        try:
            batcher.submit_at_once(Job(self.raws, 1, self.shapes, self.deadline, self.results.append, self))
        except ParbakeError as error:
            self.refused = error
        return self

    def arrive(self, batcher: Batcher) -> Call:
        """As `submit`, with the others of the turn where that is for such a job."""
        if self.rows > 1:
            return self.submit(batcher)
        job = Job(self.raws, 1, self.shapes, self.deadline, self.results.append, self)
        job.queued = perf_counter()
        if not batcher.arriving:
            batcher.expect()
        batcher.arriving.append(job)
        return self

    @property
    def result(self) -> Job:
        (job,) = self.results
        return job

    def check(self, *, may_fail: tuple[type[ParbakeError], ...] = ()) -> None:
        """Exactly one answer: his own rows, or the error that is his."""
        job = self.result
        if job.error is not None:
            assert isinstance(job.error, may_fail) or (
                self.bad and isinstance(job.error, (RowRejected, ModelFailed))
            )
            return
        assert not self.bad
        assert list(job.out_raws) == self.raws
        assert tuple(job.out_shapes) == self.shapes


def row(value: float = 1.0, *, deadline: float = FAR) -> Call:
    return Call([struct.pack("<f", value)], 1, ((1,),), value == BAD, deadline)


def batcher_of(loop: Turns, desks: Sequence[Desk], contract: Contract = MATRIX, **options: Any) -> Batcher:
    return Batcher(contract, desks, loop, **{"longest_s": 0.25, **options})


texts = st.binary(max_size=6)


@st.composite
def calls(draw: st.DrawFn, contract: Contract) -> Call:
    rows = draw(st.integers(1, 5))
    bad = draw(st.integers(0, 7)) == 0
    values = draw(st.lists(st.floats(-9, 9, width=32), min_size=rows, max_size=rows))
    if bad:
        values[draw(st.integers(0, rows - 1))] = BAD
    raws, shapes = [struct.pack(f"<{rows}f", *values)], [(1,)]
    if len(contract.inputs) > 1:
        words = draw(st.lists(texts, min_size=2 * rows, max_size=2 * rows))
        raws.append(b"".join(struct.pack("<I", len(word)) + word for word in words))
        width = draw(st.sampled_from([0, 1, 3]))
        numbers = draw(st.lists(st.integers(-9, 9), min_size=width * rows, max_size=width * rows))
        raws.append(struct.pack(f"<{width * rows}q", *numbers))
        shapes += [(2,), (width,)]
    return Call(raws, rows, tuple(shapes), bad)


@pytest.mark.parametrize("contract", [MATRIX, MANY], ids=["one matrix", "text and open shapes"])
@given(data=st.data())
def test_everybody_gets_exactly_his_own_rows_and_only_the_bad_one_fails(
    contract: Contract, data: st.DataObject
) -> None:
    loop = Turns()
    error = data.draw(st.sampled_from([RowRejected, ModelFailed]))
    desks = [Desk(error) for _ in range(data.draw(st.integers(1, 3)))]
    batcher = batcher_of(loop, desks, contract, max_batch_rows=data.draw(st.sampled_from([0, 1, 4])))
    everybody = data.draw(st.lists(calls(contract), min_size=1, max_size=12))
    coming = list(everybody)
    while coming or not batcher.idle:
        busy = [desk for desk in desks if desk.waiting]
        actions = (
            ["submit", "arrive", "at once"] * bool(coming)
            + ["turn"] * bool(loop.soon)
            + ["finish"] * bool(busy)
        )
        assert actions, "somebody waits, and nothing will ever happen"
        match data.draw(st.sampled_from(actions)):
            case "submit":
                coming.pop().submit(batcher)
            case "arrive":
                coming.pop().arrive(batcher)
            case "at once":
                coming.pop().at_once(batcher)
            case "turn":
                loop.turn()
            case "finish":
                data.draw(st.sampled_from(busy)).finish()
        if not loop.soon:
            # Work-conserving: between two turns nobody waits while a backend is free.
            assert not batcher.queued_rows or all(desk.waiting for desk in desks)
    for call in everybody:
        assert call.refused is None
        call.check()
        assert (call.result.error is not None) == call.bad
    assert (batcher.queued_rows, batcher.running_rows) == (0, 0)


@given(data=st.data())
def test_with_backends_that_come_and_go_everybody_is_answered_once(data: st.DataObject) -> None:
    loop = Turns()
    desks = [Desk() for _ in range(data.draw(st.integers(1, 3)))]
    batcher = batcher_of(loop, desks, MANY)
    coming = data.draw(st.lists(calls(MANY), min_size=1, max_size=10))
    sent: list[Call] = []
    for _ in range(60):
        busy = [desk for desk in desks if desk.waiting]
        up = [desk for desk in desks if desk.up]
        down = [desk for desk in desks if not desk.up]
        actions = ["turn"] + ["submit", "arrive", "at once"] * bool(coming) + ["finish"] * bool(busy)
        match data.draw(st.sampled_from([*actions, *(["crash"] * bool(up)), *(["return"] * bool(down))])):
            case "submit":
                sent.append(coming.pop().submit(batcher))
            case "arrive":
                sent.append(coming.pop().arrive(batcher))
            case "at once":
                sent.append(coming.pop().at_once(batcher))
            case "turn":
                loop.turn()
            case "finish":
                data.draw(st.sampled_from(busy)).finish()
            case "crash":
                data.draw(st.sampled_from(up)).crash(batcher)
            case "return":
                data.draw(st.sampled_from(down)).come_back(batcher)
        assert batcher.down == (not any(desk.up for desk in desks))
    for desk in desks:
        if not desk.up:
            desk.come_back(batcher)
    while not batcher.idle:
        loop.settle()
        for desk in desks:
            if desk.waiting:
                desk.finish()
    for call in sent:
        if call.refused is not None:
            assert isinstance(call.refused, RunnerDown)
            assert not call.results
        else:
            # It may be that somebody was alone both times: nobody can tell him from a row that ends processes.
            call.check(may_fail=(RunnerDown, RowQuarantined))


@given(data=st.data())
def test_rows_that_end_the_process_fail_alone(data: st.DataObject) -> None:
    loop = Turns()
    desks = [Desk() for _ in range(data.draw(st.integers(1, 2)))]
    batcher = batcher_of(loop, desks)
    everybody = data.draw(st.lists(calls(MATRIX), min_size=1, max_size=40))
    for call in everybody:
        call.submit(batcher)
    crashes = 0
    while not batcher.idle:
        loop.settle()
        for desk in desks:
            if not desk.up:
                desk.come_back(batcher)
            elif desk.waiting and desk.has_bad:
                desk.crash(batcher)
                crashes += 1
            elif desk.waiting:
                desk.finish()
    bad = [call for call in everybody if call.bad]
    for call in everybody:
        call.check()
        assert isinstance(call.result.error, RowQuarantined if call.bad else NoneType)
    # The whole, a part, and the row alone (of parts with several bad ones, no more than that for each).
    assert crashes <= 3 * len(bad)
    # And from now on it is known.
    for call in bad:
        again = Call(call.raws, call.rows, call.shapes).submit(batcher)
        assert isinstance(again.refused, RowQuarantined)
    assert batcher.quarantine.rows == len({bytes(call.raws[0]) for call in bad})


def test_a_batch_whose_process_was_killed_from_outside_goes_again_when_it_is_back() -> None:
    loop, desk = Turns(), Desk()
    batcher = batcher_of(loop, [desk])
    calls_ = [row(float(i)).submit(batcher) for i in range(20)]
    loop.turn()
    desk.crash(batcher)
    assert not any(call.results for call in calls_)
    desk.come_back(batcher)
    while not batcher.idle:
        loop.settle()
        desk.finish()
    for call in calls_:
        call.check()
    assert not batcher.quarantine.found


def test_a_row_over_which_the_process_hangs_goes_alone_the_next_time() -> None:
    loop, desk = Turns(), Desk(DeadlineExceeded)
    batcher = batcher_of(loop, [desk])
    stuck, neighbour = row(BAD).submit(batcher), row(1.0).submit(batcher)
    loop.turn()
    desk.finish()
    for call in (stuck, neighbour):
        assert isinstance(call.result.error, DeadlineExceeded)
    for _ in range(2):
        again, sound, other = (row(value).submit(batcher) for value in (BAD, 1.0, 2.0))
        while not batcher.idle:
            loop.settle()
            desk.finish()
        assert isinstance(again.result.error, DeadlineExceeded)
        sound.check()
        other.check()
    assert desk.batches[1:] == [1, 1, 1, 1, 2]
    assert isinstance(row(BAD).submit(batcher).refused, RowQuarantined)
    assert batcher.quarantine.rows == 1


def test_requests_of_one_turn_go_together_and_the_first_does_not_wait() -> None:
    loop, desk = Turns(), Desk()
    batcher = batcher_of(loop, [desk])
    together = [row(i).submit(batcher) for i in range(3)]
    loop.turn()
    assert desk.batches == [3]
    late = [row(i).submit(batcher) for i in range(4)]
    desk.finish()
    loop.turn()
    assert desk.batches == [3, 4]
    desk.finish()
    for call in together + late:
        call.check()


def test_what_arrives_in_one_turn_goes_together_with_what_was_submitted() -> None:
    loop, desk = Turns(), Desk()
    batcher = batcher_of(loop, [desk])
    together = [row(0).arrive(batcher), row(1).submit(batcher), row(2).arrive(batcher)]
    assert (batcher.queued_rows, batcher.idle) == (3, False)
    loop.settle()
    assert desk.batches == [3]
    late = [row(i).arrive(batcher) for i in range(4)]
    loop.turn()
    desk.finish()
    loop.turn()
    assert desk.batches == [3, 4]
    desk.finish()
    for call in together + late:
        call.check()


def test_who_is_alone_does_not_wait_for_the_end_of_the_turn() -> None:
    loop, desk = Turns(), Desk()
    batcher = batcher_of(loop, [desk])
    first = row(1.0).at_once(batcher)
    assert desk.batches == [1]
    late = row(deadline=perf_counter() - 1).at_once(batcher)
    second = row(2.0).at_once(batcher)
    desk.finish()
    loop.settle()
    desk.finish()
    first.check()
    second.check()
    assert isinstance(late.refused, Overloaded)
    desk.crash(batcher)
    assert isinstance(row().at_once(batcher).refused, RunnerDown)


def test_what_arrives_is_refused_for_the_same_reasons() -> None:
    loop, desk = Turns(), Desk()
    batcher = batcher_of(loop, [desk], max_queue_rows=2)
    batcher.cost.observe(1, 1.0)
    running = row().submit(batcher)
    loop.turn()
    hopeless = row(deadline=perf_counter() + 0.5).arrive(batcher)
    rest = [row().arrive(batcher) for _ in range(3)]
    loop.turn()
    assert isinstance(hopeless.result.error, Overloaded)
    assert "the answer would take about" in hopeless.result.error.message
    assert batcher.queued_rows == 2
    assert isinstance(rest[2].result.error, Overloaded)
    assert "2 rows wait for model 'echo', the limit is 2" in rest[2].result.error.message
    desk.crash(batcher)
    down = row().arrive(batcher)
    loop.turn()
    assert isinstance(down.result.error, RunnerDown)
    desk.come_back(batcher)
    while not batcher.idle:
        loop.settle()
        desk.finish()
    for call in (running, *rest[:2]):
        call.check()


def test_what_arrived_before_the_last_backend_went_waits_for_it_to_come_back() -> None:
    loop, desk = Turns(), Desk()
    batcher = batcher_of(loop, [desk])
    call = row().arrive(batcher)
    desk.crash(batcher)
    loop.settle()
    assert not call.results
    desk.come_back(batcher)
    loop.settle()
    desk.finish()
    call.check()


def test_with_a_delay_what_arrives_waits_for_company() -> None:
    loop, desk = Turns(), Desk()
    batcher = batcher_of(loop, [desk], delay_s=0.01)
    callers = [row(i).arrive(batcher) for i in range(2)]
    loop.settle()
    assert desk.batches == []
    loop.elapse()
    assert desk.batches == [2]
    desk.finish()
    for call in callers:
        call.check()


def test_a_request_that_cannot_be_answered_in_time_is_refused_before_any_work() -> None:
    loop, desk = Turns(), Desk()
    batcher = batcher_of(loop, [desk])
    batcher.cost.observe(1, 1.0)
    first = row().submit(batcher)
    loop.turn()
    hopeless = row(deadline=perf_counter() + 0.5).submit(batcher)
    assert isinstance(hopeless.refused, Overloaded)
    assert 1.0 < hopeless.refused.retry_after_s < 3.0
    assert "the answer would take about" in hopeless.refused.message
    patient = row(deadline=perf_counter() + 60).submit(batcher)
    desk.finish()
    loop.turn()
    desk.finish()
    first.check()
    patient.check()
    assert desk.batches == [1, 1]


def test_a_free_backend_takes_what_a_busy_one_would_keep_waiting() -> None:
    loop, busy, free = Turns(), Desk(), Desk()
    batcher = batcher_of(loop, [busy, free])
    batcher.cost.observe(1, 1.0)
    batcher.cost.observe(1000, 60.0)
    big = Call([struct.pack("<f", 1.0) * 1000], 1000, ((1,),)).submit(batcher)
    loop.turn()
    quick = row(deadline=perf_counter() + 2).submit(batcher)
    assert quick.refused is None
    loop.turn()
    free.finish()
    quick.check()
    busy.finish()
    big.check()


def test_with_nothing_ahead_a_request_is_always_tried() -> None:
    # However wrong the estimate is: it could not get better otherwise.
    loop, desk = Turns(), Desk()
    batcher = batcher_of(loop, [desk])
    batcher.cost.observe(1, 3600.0)
    call = row(deadline=perf_counter() + 1).submit(batcher)
    loop.turn()
    desk.finish()
    call.check()
    assert batcher.cost.seconds(1) < 3600


def test_the_queue_has_a_bound_and_one_large_request_still_fits() -> None:
    loop, desk = Turns(), Desk()
    batcher = batcher_of(loop, [desk], max_queue_rows=3)
    running = row().submit(batcher)
    loop.turn()
    large = Call([struct.pack("<f", 1.0) * 5], 5, ((1,),)).submit(batcher)
    assert large.refused is None
    one_too_many = row().submit(batcher)
    assert isinstance(one_too_many.refused, Overloaded)
    assert "5 rows wait for model 'echo', the limit is 3" in one_too_many.refused.message
    desk.finish()
    loop.turn()
    desk.finish()
    running.check()
    large.check()


def test_no_work_is_spent_on_expired_and_departed_callers() -> None:
    loop, desk = Turns(), Desk()
    batcher = batcher_of(loop, [desk])
    expired = row(deadline=perf_counter() - 1).submit(batcher)
    departed = row()
    departed.submit(batcher).closed = True
    alive = row(3.0).submit(batcher)
    loop.turn()
    assert desk.batches == [1]
    desk.finish()
    alive.check()
    assert isinstance(expired.result.error, DeadlineExceeded)
    assert "past the deadline" in expired.result.error.message
    assert isinstance(departed.result.error, DeadlineExceeded)
    assert batcher.idle


def test_a_queue_of_departed_callers_leaves_the_backend_free() -> None:
    loop, desk = Turns(), Desk()
    batcher = batcher_of(loop, [desk])
    departed = row().submit(batcher)
    departed.closed = True
    loop.turn()
    assert not desk.batches
    call = row().submit(batcher)
    loop.turn()
    desk.finish()
    call.check()


def test_who_waits_behind_a_batch_that_does_not_end_is_told_when_his_deadline_has_passed() -> None:
    loop, desk = Turns(), Desk()
    batcher = batcher_of(loop, [desk])
    stuck = row().submit(batcher)
    loop.turn()
    waiting = row(deadline=perf_counter() + 0.05).submit(batcher)
    patient = row().submit(batcher)
    while perf_counter() < waiting.deadline:
        pass
    loop.elapse()
    assert isinstance(waiting.result.error, DeadlineExceeded)
    assert not patient.results
    assert batcher.queued_rows == 1
    desk.finish()
    loop.turn()
    desk.finish()
    stuck.check()
    patient.check()


@pytest.mark.parametrize("end", ["patience", "close"])
def test_when_the_last_backend_goes_who_comes_is_told_at_once_and_who_waits_after_a_while(end: str) -> None:
    loop, desk = Turns(), Desk()
    batcher = batcher_of(loop, [desk])
    in_flight = row().submit(batcher)
    loop.turn()
    waiting = row().submit(batcher)
    desk.crash(batcher)
    refused = row().submit(batcher).refused
    assert isinstance(refused, RunnerDown)
    assert refused.retry_after_s == 1.0
    loop.settle()
    assert not in_flight.results
    assert not waiting.results
    if end == "patience":
        loop.elapse()
    else:
        batcher.close()
    for call in (in_flight, waiting):
        assert isinstance(call.result.error, RunnerDown)
    assert batcher.idle
    desk.come_back(batcher)
    again = row().submit(batcher)
    loop.turn()
    desk.finish()
    again.check()


def test_with_one_backend_down_the_other_goes_on() -> None:
    loop, broken, sound = Turns(), Desk(), Desk()
    batcher = batcher_of(loop, [broken, sound])
    broken.crash(batcher)
    first = row(1.0).submit(batcher)
    loop.turn()
    second = row(2.0).submit(batcher)
    # Only the broken one is free now: the second has to wait, and the loop must not.
    loop.settle()
    sound.finish()
    loop.settle()
    sound.finish()
    first.check()
    second.check()
    assert not broken.batches


def test_with_a_delay_rows_wait_for_company_until_the_batch_is_full() -> None:
    loop, desk = Turns(), Desk()
    batcher = batcher_of(loop, [desk], delay_s=0.5, max_batch_rows=3)
    callers = [row(i).submit(batcher) for i in range(2)]
    loop.settle()
    assert not desk.batches
    callers.append(row(2).submit(batcher))
    loop.settle()
    assert desk.batches == [3]
    desk.finish()
    lonely = row(9).submit(batcher)
    loop.settle()
    assert desk.batches == [3]
    loop.elapse()
    assert desk.batches == [3, 1]
    desk.finish()
    for call in [*callers, lonely]:
        call.check()


def test_a_delay_never_takes_a_row_past_its_deadline() -> None:
    loop, desk = Turns(), Desk()
    batcher = batcher_of(loop, [desk], delay_s=60.0)
    row(deadline=perf_counter() + 1).submit(batcher)
    assert loop.later[0].delay <= 0.5


def test_the_largest_batch_is_learned_from_measured_time() -> None:
    loop, desk = Turns(), Desk()
    batcher = batcher_of(loop, [desk], longest_s=0.1)
    batcher.cost.observe(1, 0.011)
    batcher.cost.observe(100, 1.01)
    callers = [row(i).submit(batcher) for i in range(25)]
    loop.turn()
    assert desk.batches[0] in (8, 9, 10)
    while not batcher.idle:
        desk.finish()
        loop.settle()
    for call in callers:
        call.check()


@dataclass
class Immediate:
    """A backend in this process: done before `run` returns."""

    up: bool = True
    answers: bool = True

    def run(
        self, raws: Sequence[bytes], rows: int, shapes: tuple[Shape, ...], done: Callable[[Outcome], None]
    ) -> None:
        done(Outcome(list(raws), shapes, 0.001))


def test_a_backend_in_this_process_lets_the_loop_turn_between_two_batches() -> None:
    loop = Turns()
    batcher = Batcher(MATRIX, [Immediate()], loop, longest_s=0.25, max_batch_rows=1)
    callers = [row(i).submit(batcher) for i in range(3)]
    for answered in (1, 2, 3):
        loop.turn()
        assert sum(len(call.results) for call in callers) == answered
    for call in callers:
        call.check()


def test_a_caller_that_cannot_take_his_answer_does_no_harm_to_the_others() -> None:
    loop, desk = Turns(), Desk()
    batcher = batcher_of(loop, [desk])

    def broken(job: Job) -> None:
        raise OSError("no more room")

    before = row(1.0).submit(batcher)
    batcher.submit(Job([struct.pack("<f", 5.0)], 1, ((1,),), FAR, broken))
    after = row(2.0).submit(batcher)
    loop.turn()
    desk.finish()
    later = row(3.0).submit(batcher)
    loop.turn()
    desk.finish()
    for call in (before, after, later):
        call.check()
    assert batcher.idle


def test_a_batch_of_single_rows_may_be_taken_as_a_whole() -> None:
    loop, desk = Turns(), Desk()
    batcher = batcher_of(loop, [desk])
    taken: list[tuple[list[Job], Outcome]] = []

    def together(jobs: Sequence[Job], outcome: Outcome) -> None:
        taken.append((list(jobs), outcome))

    callers = [row(i) for i in range(3)]
    jobs = [Job(c.raws, 1, c.shapes, FAR, c.results.append) for c in callers]
    for job in jobs:
        job.together = together
        batcher.submit(job)
    loop.turn()
    desk.finish()
    assert [job for job, _ in taken] == [jobs]
    assert list(taken[0][1].raws) == [struct.pack("<3f", 0, 1, 2)]
    # With somebody of another kind in the batch each is answered on his own.
    taken.clear()
    other = row(7.0)
    jobs[0].queued = 0.0
    batcher.submit(jobs[0])
    other.submit(batcher)
    loop.turn()
    desk.finish()
    assert not taken
    other.check()
    assert callers[0].results == [jobs[0]]


def test_a_batch_that_cannot_be_taken_as_a_whole_fails_each_of_its_callers() -> None:
    loop, desk = Turns(), Desk()
    batcher = batcher_of(loop, [desk])

    def together(jobs: Sequence[Job], outcome: Outcome) -> None:
        raise ValueError("these bytes are not what the contract says")

    callers = [row(i) for i in range(2)]
    for call in callers:
        job = Job(call.raws, 1, call.shapes, FAR, call.results.append)
        job.together = together
        batcher.submit(job)
    loop.turn()
    desk.finish()
    for call in callers:
        assert isinstance(call.result.error, ModelFailed)
    assert batcher.idle


def test_the_queue_time_and_the_model_time_are_measured() -> None:
    loop, desk = Turns(), Desk()
    seen: list[tuple[int, float]] = []
    batcher = batcher_of(loop, [desk], observe=lambda rows, seconds: seen.append((rows, seconds)))
    call = row().submit(batcher)
    loop.turn()
    desk.finish()
    assert call.result.queue_s > 0
    assert call.result.model_s == 0.001
    assert seen == [(1, 0.001)]
    assert batcher.cost.known


def test_a_model_that_sleeps_is_woken_and_whoever_asks_meanwhile_waits() -> None:
    loop, desk, woken = Turns(), Desk(up=False), [0]
    batcher = batcher_of(loop, [desk])

    def wake() -> None:
        woken[0] += 1

    batcher.wake = wake
    calls = [row(1.0).submit(batcher), row(2.0).submit(batcher)]
    loop.settle()
    assert woken[0] == 2
    assert not desk.batches
    desk.come_back(batcher)
    loop.settle()
    desk.finish()
    for call in calls:
        assert call.refused is None
        call.check()


def test_a_model_that_cannot_be_woken_says_so_to_whoever_waits_and_to_whoever_comes() -> None:
    loop, desk = Turns(), Desk(up=False)
    batcher = batcher_of(loop, [desk])
    batcher.wake = lambda: None
    waiting = row(1.0).submit(batcher)
    why = NotReady("no memory")
    batcher.refuse(why)
    assert waiting.result.error is why

    def wake() -> None:
        raise why

    batcher.wake = wake
    assert row(1.0).submit(batcher).refused is why
    assert batcher.idle


def test_a_batch_that_was_not_read_goes_again_and_nobody_is_to_blame() -> None:
    loop, desk, woken = Turns(), Desk(), [0]
    batcher = batcher_of(loop, [desk])

    def wake() -> None:
        woken[0] += 1

    batcher.wake = wake
    calls = [row(float(i)).submit(batcher) for i in range(3)]
    loop.settle()
    for times in range(1, 6):
        desk.put_away(batcher)
        assert woken[0] == times
        desk.come_back(batcher)
        loop.settle()
    desk.finish()
    for call in calls:
        call.check()
    # All together each time: nobody is suspected.
    assert desk.batches == [3] * 6
    assert not batcher.quarantine.found


def test_what_waits_past_its_deadline_while_a_model_is_loaded_is_told() -> None:
    loop, desk = Turns(), Desk(up=False)
    batcher = batcher_of(loop, [desk])
    batcher.wake = lambda: None
    late = row(1.0, deadline=perf_counter() - 1).submit(batcher)
    loop.settle()
    loop.elapse()
    assert isinstance(late.result.error, DeadlineExceeded)
