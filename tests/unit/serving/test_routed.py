"""A deployment under a route in one front: who answers, who is asked for comparison, and what is counted of whom."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.contract.model import Contract, TensorSpec
from parbake.contract.tensors import Shape
from parbake.errors import InvalidInput, ModelFailed, ParbakeError, SettingsError
from parbake.runtime.backends import InlineBackend
from parbake.runtime.batcher import Batcher, Outcome
from parbake.runtime.observation import LATENCY_EDGES_MS, Bins, latency_bucket
from parbake.runtime.session import Session
from parbake.serving.fallback import Asked
from parbake.serving.model import Answer
from parbake.serving.observer import Foretold, KeyTurns, Observer, default_bins, places_of
from parbake.serving.route import Arm, Route, Shadow, Watch
from parbake.serving.routed import Routed, Told
from parbake.serving.service import ServedVersion
from parbake.serving.shadow import ShadowCounts, Shadows, compare
from parbake.serving.stats import Stats
from tests.functions import write_scaled
from tests.turns import Turns


class Held:
    """A backend that answers when it is told to, or fails, or never does."""

    up = answers = True

    def __init__(self, session: Session) -> None:
        self.error: ParbakeError | None = None
        self.hold = False
        self.held: list[Callable[[], None]] = []
        self._inline = InlineBackend(session)

    def run(
        self, raws: Sequence[bytes], rows: int, shapes: tuple[Shape, ...], done: Callable[[Outcome], None]
    ) -> None:
        def go() -> None:
            if self.error is not None:
                done(Outcome(error=self.error))
            else:
                self._inline.run(raws, rows, shapes, done)

        if self.hold:
            self.held.append(go)
        else:
            go()


class Deployment:
    """Version 1 doubles, version 2 trebles."""

    def __init__(self, folder: Path, **more: object) -> None:
        self.loop = Turns()
        self.models: dict[str, Held] = {}
        self.versions: dict[str, ServedVersion] = {}
        for version, factor in (("1", 2), ("2", 3)):
            bundle = write_scaled(folder / f"{version}.bundle", factor)
            self.models[version] = Held(Session(bundle))
            self.versions[version] = ServedVersion(
                "scaled", version, bundle.contract, bundle.digest, mode="dynamic", table=None,
                batcher=Batcher(bundle.contract, [self.models[version]], self.loop, longest_s=0.25),
                deadline_s=10.0, stats=Stats(),
            )  # fmt: skip
        self.told = Told()
        self.shadows = Shadows(self.loop)
        self.routed = Routed(self.route(**more), self.versions, self.told, self.shadows, self.loop)
        self.replies: list[tuple[str, Answer | ParbakeError]] = []

    def route(self, *shares: float, **more: object) -> Route:
        shares = shares or (1.0, 0.0)
        return Route("scaled", "1", tuple(Arm(v, s) for v, s in zip("12", shares, strict=True)), **more)  # type: ignore[arg-type]  # each test gives what fits

    def use(self, *shares: float, **more: object) -> None:
        self.routed.use(self.route(*shares, **more), self.versions)

    def ask(self, *values: float, request_id: str = "") -> None:
        raw = struct.pack(f"<{len(values)}f", *values)
        now = perf_counter()
        asked = Asked([raw], len(values) // 2, ((2,),), now + 60, None, now, 2, "")
        self.routed.predict(
            asked, lambda served, result: self.replies.append((served.version, result)), request_id=request_id
        )
        self.loop.settle()

    def factor(self, *values: float) -> float:
        """What the first value is multiplied by."""
        before = len(self.replies)
        self.ask(*values)
        (reply,) = self.replies[before:]
        assert isinstance(reply[1], Answer)
        return float(np.frombuffer(reply[1].raws[0], np.float32)[0] / values[0])

    def rest(self) -> None:
        """Let the shadows do what they can."""
        for _ in range(300):
            self.loop.elapse()
            self.loop.settle()


def test_a_shadow_is_asked_after_the_caller_was_answered(tmp_path: Path) -> None:
    there = Deployment(tmp_path, shadows=(Shadow("2"),), watch=Watch(bins=Bins((5.0,))))
    assert there.factor(1, 2) == 2
    assert there.told.shadows["2"].asked == 0
    there.rest()
    counts = there.told.shadows["2"]
    assert (counts.asked, counts.answered, counts.rows, counts.same_rows) == (1, 1, 1, 0)
    assert (counts.values, counts.difference, counts.largest) == (2, 3.0, 2.0)
    assert there.told.observers["2", "shadow"].observation().requests == 1
    assert len(there.replies) == 1


def test_a_shadow_that_hangs_costs_a_short_queue_and_no_answer(tmp_path: Path) -> None:
    there = Deployment(tmp_path, shadows=(Shadow("2"),))
    there.models["2"].hold = True
    for n in range(600):
        assert there.factor(1 + n, 2) == 2
    there.rest()
    counts = there.told.shadows["2"]
    # Eight are with it, 256 wait, the others are dropped.
    assert counts.asked == 8
    assert counts.dropped == 600 - 256
    assert len(there.replies) == 600


def test_a_shadow_that_fails_is_counted_and_not_seen(tmp_path: Path) -> None:
    there = Deployment(tmp_path, shadows=(Shadow("2"),))
    there.models["2"].error = ModelFailed("no")
    assert [there.factor(n, 1) for n in (1, 2, 3)] == [2, 2, 2]
    there.rest()
    assert (there.told.shadows["2"].failed, there.told.shadows["2"].rows) == (3, 0)


def test_shadows_wait_while_a_caller_does(tmp_path: Path) -> None:
    there = Deployment(tmp_path, shadows=(Shadow("2"),))
    assert there.factor(1, 2) == 2
    there.models["1"].hold = True
    there.ask(3, 4)
    # The first is with the model, this one waits in front of it.
    there.ask(5, 6)
    there.rest()
    assert there.told.shadows["2"].asked == 0
    there.models["1"].hold = False
    for go in there.models["1"].held:
        go()
    there.loop.settle()
    there.rest()
    assert there.told.shadows["2"].asked == 3


def test_a_closed_queue_takes_nothing_and_lets_go_of_what_waits(tmp_path: Path) -> None:
    there = Deployment(tmp_path, shadows=(Shadow("2"),))
    there.ask(1, 2)
    there.shadows.close()
    there.ask(1, 2)
    there.rest()
    assert (there.told.shadows["2"].asked, there.told.shadows["2"].dropped) == (0, 2)


def test_the_champion_answers_where_another_fails_or_takes_too_long(tmp_path: Path) -> None:
    there = Deployment(tmp_path, watch=Watch(bins=Bins((5.0,))))
    there.use(0, 1, watch=Watch(bins=Bins((5.0,))), timeout_ms=50)
    assert there.factor(1, 2) == 3
    there.models["2"].error = ModelFailed("no")
    assert there.factor(1, 2) == 2
    there.models["2"].hold = True
    there.ask(1, 2)
    assert len(there.replies) == 2
    there.loop.elapse()
    there.loop.settle()
    version, result = there.replies[-1]
    assert isinstance(result, Answer)
    assert (version, result.fallback) == ("1", "champion")
    # The answer that comes at last is nobody's any more.
    for go in there.models["2"].held:
        go()
    there.loop.settle()
    assert len(there.replies) == 3
    observation = there.told.observers["2", "answers"].observation()
    assert (observation.requests, observation.failures) == (3, 2)
    assert there.told.counts == Counter({("2", "weights"): 3, ("2", "rescued"): 2})


def test_who_is_not_to_be_rescued_fails(tmp_path: Path) -> None:
    there = Deployment(tmp_path)
    there.use(0, 1, rescue=False)
    there.models["2"].error = ModelFailed("no")
    there.ask(1, 2)
    ((version, result),) = there.replies
    assert version == "2"
    assert isinstance(result, ModelFailed)


def test_what_is_under_way_when_the_route_changes_is_answered_by_whom_it_was_given(tmp_path: Path) -> None:
    there = Deployment(tmp_path)
    there.use(0, 1)
    there.models["2"].hold = True
    there.ask(1, 2)
    there.use(1, 0)
    assert there.factor(1, 2) == 2
    there.models["2"].held[0]()
    there.loop.settle()
    assert [version for version, _ in there.replies] == ["1", "2"]


def test_a_version_that_is_gone_is_answered_for_by_the_champion(tmp_path: Path) -> None:
    there = Deployment(tmp_path)
    there.use(0, 1)
    there.versions["2"].closed = True
    assert there.factor(1, 2) == 2
    assert there.told.counts["1", "absent"] == 1


def test_a_route_that_watches_something_else_counts_anew_and_one_that_does_not_counts_on(
    tmp_path: Path,
) -> None:
    watch = Watch(bins=Bins((5.0,)))
    there = Deployment(tmp_path, watch=watch)
    there.ask(1, 2)
    there.use(0.5, 0.5, watch=watch, revision=2)
    assert there.told.observers["1", "answers"].observation().requests == 1
    there.use(0.5, 0.5, watch=Watch(bins=Bins((7.0,))), since=3)
    assert there.told.observers == {}
    assert there.told.since == 3


@given(
    st.lists(
        st.tuples(st.floats(0, 100, width=32), st.sampled_from([1.0, 2.0, 3.0])), min_size=1, max_size=40
    )
)
def test_what_an_observer_counts_is_what_was_answered(rows: list[tuple[float, float]]) -> None:
    contract = Contract(
        "eta",
        (TensorSpec("x", "FP32", (2,), columns=("v", "kind")),),
        (TensorSpec("y", "FP32", (1,)),),
        (),
        "p",
        "o",
    )
    served = ServedVersion(
        "eta", "1", contract, "", mode="dynamic", table=None, batcher=None, deadline_s=1.0, stats=Stats()
    )
    bins = Bins((10.0, 50.0))
    observer = Observer(served, Watch(segment="kind", loss="squared"), bins, turns=KeyTurns())
    for n, row in enumerate(rows):
        answer = Answer([struct.pack("<f", row[0])], [(1,)], 1)
        raws = [struct.pack("<2f", *row)]
        observer.answered(0.001, raws, 1, [(2,)], answer, f"r{n}", served.first_key(raws, ((2,),)))
    # One request of all rows, and one that failed.
    everything = struct.pack(f"<{2 * len(rows)}f", *(value for row in rows for value in row))
    answers = Answer([struct.pack(f"<{len(rows)}f", *(row[0] for row in rows))], [(1,)], len(rows))
    key = served.first_key([struct.pack("<2f", *rows[0])], ((2,),))
    observer.answered(10.0, [everything], len(rows), [(2,)], answers, "all", key)
    observer.failed(b"another")
    seen = observer.observation()
    assert (seen.requests, seen.failures) == (len(rows) + 2, 1)
    # Once a key: the request with all rows has the key of its first, which was here before.
    new = {served.first_key([struct.pack("<2f", *row)], ((2,),)): row for row in reversed(rows)}
    assert sum(seen.latency) == len(new)
    assert seen.tries[""] == (len(new) + 1, 1)
    assert len(seen.latency) == len(LATENCY_EDGES_MS)
    assert seen.latency[latency_bucket(1)] == len(new)
    assert seen.fault() is None
    for segment in ("", *{str(int(kind)) for _, kind in rows}):
        values = [v for v, kind in new.values() if segment in ("", str(int(kind)))]
        counted = Counter(map(bins.place, values))
        assert seen.outputs[segment] == tuple(counted[place] for place in range(bins.count))
    told = list(observer.foretold)
    assert [(t.id, t.row) for t in told[len(rows) :]] == [("all", n) for n in range(len(rows))]
    # The same row has the same key, whichever request it came in.
    assert [t.key for t in told[: len(rows)]] == [t.key for t in told[len(rows) :]]


def test_of_several_fronts_each_counts_its_part_of_the_keys(tmp_path: Path) -> None:
    served = Deployment(tmp_path).versions["1"]
    fronts = [
        Observer(served, Watch(), Bins((10.0, 50.0)), turns=KeyTurns((number, fronts)))
        for number, fronts in ((0, 1), (0, 3), (1, 3), (2, 3))
    ]
    for n in range(100):
        answer = Answer([struct.pack("<2f", n, n)], [(2,)], 1)
        for observer in fronts:
            raws = [struct.pack("<2f", n % 60, 1)]
            observer.answered(0.001, raws, 1, [(2,)], answer, "", served.first_key(raws, ((2,),)))
            if n % 60 < 20:
                observer.failed(served.first_key(raws, ((2,),)))
    whole, *parts = [observer.observation() for observer in fronts]
    assert sum(whole.outputs[""]) == 60
    assert all(0 < sum(part.outputs[""]) < 60 for part in parts)
    assert tuple(map(sum, zip(*(part.outputs[""] for part in parts), strict=True))) == whole.outputs[""]
    assert whole.tries == {"": (60, 0)}
    assert sum(part.tries[""][0] for part in parts) == 60


def test_a_key_that_is_asked_for_again_counts_again_at_its_tenth_and_hundredth_request(
    tmp_path: Path,
) -> None:
    observer = Observer(Deployment(tmp_path).versions["1"], Watch(), Bins((10.0, 50.0)), turns=KeyTurns())
    for n in range(250):
        # One fails always, one from its fifth request on, and one only with its first.
        observer.failed(b"always")
        for key, failed in ((b"later", n >= 5), (b"first", n == 0)):
            if failed:
                observer.failed(key)
            else:
                answer = Answer([bytes(8)], [(2,)], 1)
                observer.answered(0.001, [bytes(8)], 1, [(2,)], answer, "", key)
    seen = observer.observation()
    assert seen.requests == 750
    assert seen.tries == {"": (3, 2), "10th": (3, 2), "100th": (3, 2)}
    assert sum(seen.latency) == sum(seen.outputs[""]) == 1


def test_of_more_keys_than_can_be_kept_a_part_counts_and_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parbake.serving.observer._MOST_KEYS", 100)
    turns = KeyTurns()
    keys = [n.to_bytes(4, "big") for n in range(2000)]
    first = [key for key in keys if turns.next(key) == 1]
    assert 100 <= len(first) < 1000
    # Whoever comes again is known, or left out for good.
    assert [key for key in keys if turns.next(key) == 1] == []


def test_a_key_counts_for_the_version_that_it_came_to_first_and_anew_in_each_step(tmp_path: Path) -> None:
    there = Deployment(tmp_path, watch=Watch(bins=Bins((5.0,))))
    for n in range(40):
        there.ask(n, 1)
    for step in (0, 1):
        there.use(0.5, 0.5, watch=Watch(bins=Bins((5.0,)), step=step), revision=step, since=step)
        for n in range(40):
            there.ask(n, 1)
        counted = [
            observer.observation().tries.get("", (0, 0))[0] for observer in there.told.observers.values()
        ]
        # In step 0 it is watched as before, so what has moved is known from version 1.
        assert sum(counted) == 40
        assert (len(counted) == 2 and min(counted) > 0) == bool(step)


def test_what_a_version_fails_and_the_champion_answers_counts_whatever_the_key(tmp_path: Path) -> None:
    there = Deployment(tmp_path, watch=Watch(bins=Bins((5.0,))))
    there.use(0.0, 1.0, watch=Watch(bins=Bins((5.0,))))
    there.ask(1, 2)
    there.models["2"].error = ModelFailed("no")
    for _ in range(9):
        assert there.factor(1, 2) == 2
    there.models["1"].error = ModelFailed("no")
    there.ask(1, 2)
    seen = there.told.observers["2", "answers"].observation()
    assert seen.paired == (11, 9)
    assert (seen.requests, seen.failures) == (11, 10)
    # The 10th request of this key has failed; its first has not.
    assert seen.tries == {"": (1, 0), "10th": (1, 1)}


def test_a_shadow_is_not_held_against_what_the_champion_fails_too(tmp_path: Path) -> None:
    there = Deployment(tmp_path, shadows=(Shadow("2"),), watch=Watch(bins=Bins((5.0,))))
    there.models["2"].error = ModelFailed("no")
    there.ask(1, 2)
    there.rest()
    there.models["1"].error = ModelFailed("no")
    for _ in range(3):
        there.ask(1, 2)
    there.rest()
    assert there.told.observers["2", "shadow"].observation().paired == (4, 1)


def test_what_is_told_on_can_be_written_as_json(tmp_path: Path) -> None:
    there = Deployment(tmp_path, watch=Watch(bins=Bins((5.0,)), loss="absolute"), shadows=(Shadow("2"),))
    for value in (float("nan"), float("inf"), 3e38):
        there.ask(value, value, request_id="x" * 300)
    there.rest()
    observer = there.told.observers["1", "answers"]
    observer.fold()
    told = msgspec.json.decode(msgspec.json.encode(tuple(observer.foretold)), type=tuple[Foretold, ...])
    assert [t.value for t in told] == ["nan", "inf", "inf"]
    assert {t.id for t in told} == {""}
    counts = there.told.shadows["2"]
    assert msgspec.json.decode(msgspec.json.encode(counts), type=ShadowCounts) == counts


def test_segments_are_bounded_whatever_callers_send(tmp_path: Path) -> None:
    there = Deployment(tmp_path, watch=Watch(segment="right", bins=Bins((5.0,))))
    for n in range(500):
        there.ask(1, n)
    seen = there.told.observers["1", "answers"].observation()
    assert len(seen.outputs) <= 33
    assert sum(seen.outputs[""]) == 500


def test_bins_follow_what_an_output_is() -> None:
    number, word = TensorSpec("y", "FP64", (1,)), TensorSpec("y", "BYTES", (1,))
    assert default_bins(number, [1.0, 2.0, float("nan")]) == default_bins(number, [1.0, 2.0])
    assert default_bins(TensorSpec("y", "INT64", ()), [3, 3, 1]) == Bins.of_classes(["3", "1"])
    assert default_bins(word, ["a", "b", "a"]) == Bins.of_classes(["a", "b"])
    shares = TensorSpec("p", "FP32", (3,), labels=("no", "yes", "maybe"))
    assert default_bins(shares, [0.1]) == Bins.of_classes(["no", "yes", "maybe"])


@given(st.lists(st.floats(), min_size=1), st.lists(st.floats(allow_nan=False), max_size=5, unique=True))
def test_many_values_are_placed_as_each_of_them_is(values: list[float], edges: list[float]) -> None:
    bins = Bins(tuple(sorted(edges)))
    assert places_of(bins, values).tolist() == [bins.place(value) for value in values]
    words = [str(value) for value in values]
    classes = Bins.of_classes(words[::2])
    assert places_of(classes, words).tolist() == [classes.place(word) for word in words]


def test_a_watch_for_what_is_not_there_is_refused(tmp_path: Path) -> None:
    there = Deployment(tmp_path)
    with pytest.raises(InvalidInput, match="no output 'z'"):
        Observer(there.versions["1"], Watch(output="z"), Bins((1.0,)), turns=KeyTurns())
    with pytest.raises(SettingsError, match="no column 'age'"):
        Observer(there.versions["1"], Watch(segment="age"), Bins((1.0,)), turns=KeyTurns())


def test_answers_are_compared_within_the_tolerance_of_the_contract() -> None:
    outputs = (TensorSpec("y", "FP64", (1,)), TensorSpec("word", "BYTES", (1,)), TensorSpec("n", "INT32", ()))
    contract = Contract("eta", (TensorSpec("x", "FP32", (1,)),), outputs, (), "p", "o")

    def answer(values: list[float], words: list[str], numbers: list[int]) -> Answer:
        texts = b"".join(len(w).to_bytes(4, "little") + w.encode() for w in words)
        raws = [np.array(values).tobytes(), texts, np.array(numbers, np.int32).tobytes()]
        return Answer(raws, [(1,), (1,), ()], len(values))

    counts = ShadowCounts()
    ours = answer([1, 2, 3, float("nan")], ["a", "b", "c", "d"], [1, 1, 1, 1])
    theirs = answer([1, 2.5, 3, float("nan")], ["a", "b", "x", "d"], [1, 1, 1, 1])
    compare(contract, ours, theirs, counts)
    assert (counts.rows, counts.same_rows, counts.difference, counts.largest) == (4, 2, 0.5, 0.5)
    counts.add(counts)
    assert (counts.rows, counts.agreement) == (8, 0.5)


class Patient:
    """Whoever asked for a job."""

    closed = False
    patience_s = 60.0


def test_what_a_job_waits_says_nothing_about_the_version(tmp_path: Path) -> None:
    watch = Watch(bins=Bins((5.0,)))
    there = Deployment(tmp_path)
    there.use(0, 1, watch=watch, timeout_ms=50)
    there.models["2"].hold = True

    def ask(caller: Patient | None, rows: int = 1) -> None:
        now = perf_counter()
        raw = struct.pack(f"<{2 * rows}f", *range(2 * rows))
        asked = Asked([raw], rows, ((2,),), now + 60, caller, now, 2, "")
        there.routed.predict(asked, lambda served, result: there.replies.append((served.version, result)))
        there.loop.settle()

    ask(Patient())
    there.loop.elapse()
    there.loop.settle()
    assert there.replies == []
    for go in there.models["2"].held:
        go()
    there.loop.settle()
    assert [version for version, _ in there.replies] == ["2"]
    observed = there.told.observers["2", "answers"].observation()
    assert (observed.requests, observed.failures) == (1, 0)
    # What its own rows take is another matter: nobody behind them is to wait that long.
    batcher = there.versions["2"].batcher
    assert batcher is not None
    for rows in (1, 2, 4, 8):
        batcher.cost.observe(rows, 5.0 * rows)
    batcher._learned = perf_counter()
    ask(Patient(), 8)
    assert [version for version, _ in there.replies] == ["2", "1"]
    observed = there.told.observers["2", "answers"].observation()
    assert (observed.requests, observed.failures) == (1, 0)
