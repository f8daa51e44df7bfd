"""Where the model cannot, the fallback answers, says so, and is never asked without need."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import pytest

from parbake.contract.bundle import StoredBundle
from parbake.contract.model import Key
from parbake.contract.tensors import Shape
from parbake.errors import (
    DeadlineExceeded,
    ModelFailed,
    ModelNotFound,
    Overloaded,
    ParbakeError,
    RowRejected,
)
from parbake.runtime.backends import InlineBackend
from parbake.runtime.batcher import Batcher, Outcome
from parbake.runtime.session import Session
from parbake.serving.fallback import Fallback, LastAnswers
from parbake.serving.model import Answer
from parbake.serving.service import ServedVersion
from parbake.serving.stats import Stats
from tests.functions import write_function
from tests.turns import Turns

DOUBLE = "def predict(x):\n    return x * 2\n"
ERRORS = [Overloaded("much"), DeadlineExceeded("late"), ModelFailed("broken")]


class Weak:
    """A backend that runs the model until it is given an error to answer."""

    up = answers = True

    def __init__(self, session: Session) -> None:
        self.error: ParbakeError | None = None
        self._inline = InlineBackend(session)

    def run(
        self, raws: Sequence[bytes], rows: int, shapes: tuple[Shape, ...], done: Callable[[Outcome], None]
    ) -> None:
        if self.error is not None:
            done(Outcome(error=self.error))
        else:
            self._inline.run(raws, rows, shapes, done)


class Service:
    """A version whose model can be made to fail."""

    def __init__(self, bundle: StoredBundle, fallback: Fallback | None = None) -> None:
        self.loop = Turns()
        self.model = Weak(Session(bundle))
        self.served = ServedVersion(
            "eta", "1", bundle.contract, bundle.digest, mode="dynamic", table=None,
            batcher=Batcher(bundle.contract, [self.model], self.loop, longest_s=0.25),
            deadline_s=10.0, stats=Stats(),
        )  # fmt: skip
        self.served.fallback = fallback

    def ask(self, *values: float) -> Answer:
        raw = struct.pack(f"<{len(values)}f", *values)
        results: list[Answer | ParbakeError] = []
        answer = self.served.predict([raw], len(values) // 2, None, perf_counter() + 60, results.append)
        while answer is None and not results:
            self.loop.settle()
            if not results:
                self.loop.elapse()
        (result,) = [answer] if answer is not None else results
        if isinstance(result, ParbakeError):
            raise result
        return result

    @property
    def rescued(self) -> dict[str, int]:
        return self.served.stats.counts(0).rescued


def values(answer: Answer) -> list[float]:
    return list(struct.unpack(f"<{2 * answer.rows}f", answer.raws[0]))


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> StoredBundle:
    return write_function(tmp_path_factory.mktemp("double"), DOUBLE)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.code)
def test_the_default_answers_for_every_row_while_the_model_cannot(
    double: StoredBundle, error: ParbakeError
) -> None:
    service = Service(double, Fallback("default", default=struct.pack("<2f", -1, -2)))
    sound = service.ask(1, 2)
    assert (values(sound), sound.fallback) == ([2, 4], "")
    service.model.error = error
    answer = service.ask(1, 2, 3, 4)
    assert (values(answer), answer.fallback) == ([-1, -2, -1, -2], "default")
    assert service.rescued == {error.code: 1}
    service.model.error = None
    assert values(service.ask(5, 6)) == [10, 12]


def test_what_is_refused_at_once_is_answered_at_once(double: StoredBundle) -> None:
    service = Service(double, Fallback("default", default=struct.pack("<2f", -1, -2)))
    assert service.served.batcher is not None
    service.served.batcher.down = True
    assert service.ask(1, 2).fallback == "default"
    assert service.rescued == {"runner_down": 1}


def test_a_fault_of_the_request_is_not_covered_up(double: StoredBundle) -> None:
    service = Service(double, Fallback("default", default=struct.pack("<2f", -1, -2)))
    service.model.error = RowRejected("no such age")
    with pytest.raises(RowRejected):
        service.ask(1, 2)
    assert service.rescued == {}


def test_the_last_answer_is_that_of_the_same_key(tmp_path: Path) -> None:
    bundle = write_function(tmp_path, DOUBLE, key=Key(("left",)))
    service = Service(bundle, Fallback("last", last=LastAnswers()))
    service.ask(1, 2, 7, 7)
    service.ask(1, 3)
    service.model.error = ModelFailed("broken")
    # The entity is `left`: what was answered for it last, whatever else is asked now.
    answer = service.ask(7, 9, 1, 9)
    assert (values(answer), answer.fallback) == ([14, 14, 2, 6], "last")
    with pytest.raises(ModelFailed):
        service.ask(1, 2, 8, 8)


def test_rows_that_are_rounded_to_the_same_have_the_same_last_answer(tmp_path: Path) -> None:
    bundle = write_function(tmp_path, DOUBLE, key=Key(rounding={"left": 1, "right": 0}))
    service = Service(bundle, Fallback("last", last=LastAnswers()))
    service.ask(1.01, 2.2)
    service.model.error = ModelFailed("broken")
    assert values(service.ask(0.98, 1.9)) == [2, 4]
    with pytest.raises(ModelFailed):
        service.ask(1.2, 2.2)


def test_another_model_answers_and_says_its_name(double: StoredBundle, tmp_path: Path) -> None:
    small = Service(write_function(tmp_path, "def predict(x):\n    return x * 3\n"))
    service = Service(double, Fallback("small", other=lambda: small.served))
    service.model.error = Overloaded("much")
    raw = struct.pack("<2f", 1, 2)
    results: list[Answer | ParbakeError] = []
    assert service.served.predict([raw], 1, None, perf_counter() + 60, results.append) is None
    service.loop.settle()
    assert not results
    small.loop.settle()
    (answer,) = results
    assert isinstance(answer, Answer)
    assert (values(answer), answer.fallback) == ([3, 6], "small")
    # Where that one cannot either, the first error is the one that counts.
    small.model.error = ModelFailed("broken too")
    service.served.predict([raw], 1, None, perf_counter() + 60, results.append)
    service.loop.settle()
    small.loop.settle()
    assert isinstance(results[-1], Overloaded)


def test_another_model_that_is_not_there_leaves_the_error(double: StoredBundle) -> None:
    def nobody() -> ServedVersion:
        raise ModelNotFound("no model 'small'")

    service = Service(double, Fallback("small", other=nobody))
    service.model.error = ModelFailed("broken")
    with pytest.raises(ModelFailed):
        service.ask(1, 2)


def test_who_comes_late_still_has_time_for_the_other_model(double: StoredBundle, tmp_path: Path) -> None:
    small = Service(write_function(tmp_path, "def predict(x):\n    return x * 3\n"))
    service = Service(double, Fallback("small", other=lambda: small.served))
    service.model.error = DeadlineExceeded("late")
    results: list[Answer | ParbakeError] = []
    service.served.predict([struct.pack("<2f", 1, 2)], 1, None, perf_counter() + 0.05, results.append)
    service.loop.settle()
    until = perf_counter() + 0.1
    while perf_counter() < until:
        pass
    small.loop.settle()
    (answer,) = results
    assert isinstance(answer, Answer)
    assert answer.fallback == "small"


def test_last_answers_keep_within_their_budget() -> None:
    last = LastAnswers(most_rows=3, most_bytes=100)
    for number in range(10):
        last.keep(b"%d" % number, b"record")
    assert [last.get(b"%d" % n) for n in (6, 7, 8, 9)] == [None, b"record", b"record", b"record"]
    last.keep(b"7", b"newer")
    last.keep(b"x", b"record")
    assert (last.get(b"7"), last.get(b"8"), len(last)) == (b"newer", None, 3)
    last.keep(b"large", b"r" * 90)
    assert (len(last), last.bytes) == (1, 95)
