"""A front's state: a new plan is prepared beside the old one, and until it is committed nothing has changed."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest

from parbake.app.control import Abort, AllCounts, Commit, GetCounts, Load, Prepare, Prepared
from parbake.app.front import Front
from parbake.app.plan import Plan, PlanEntry
from parbake.contract.bundle import StoredBundle
from parbake.errors import (
    BundleAltered,
    BundleTorn,
    ModelNotFound,
    NotReady,
    ParbakeError,
    TableMissing,
    VersionNotFound,
)
from parbake.runtime.pool import RunnerPool
from parbake.serving.model import Answer
from tests.functions import write_function, write_scaled


def entry(bundle: StoredBundle, version: str = "1", /, **changed: Any) -> PlanEntry:
    given: dict[str, Any] = {
        "name": bundle.contract.name, "version": version, "bundle": str(bundle.path), "digest": bundle.digest,
        "mode": "dynamic", "placement": "inline", "deadline_ms": 10_000.0, "max_queue_rows": 100, "max_batch_rows": 0,
        "batch_delay_ms": 0.0,
    }  # fmt: skip
    return PlanEntry(**{**given, **changed})


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def front() -> Front:
    return Front(asyncio.get_running_loop(), lambda: None)


async def put(front: Front, *entries: PlanEntry, generation: int = 1, unloaded: tuple[str, ...] = ()) -> None:
    await front.handle(Prepare(Plan(generation, entries, unloaded)))
    await front.handle(Commit(generation))


async def ask(front: Front, name: str = "scaled", version: str = "") -> list[float]:
    """The answer to (1, 2)."""
    served = front.find(name, version)
    future: asyncio.Future[Answer | ParbakeError] = asyncio.get_running_loop().create_future()
    raw = np.array([1.0, 2.0], np.float32).tobytes()
    result = served.predict([raw], 1, None, perf_counter() + 10, future.set_result) or await future
    if isinstance(result, ParbakeError):
        raise result
    values: list[float] = np.frombuffer(result.raws[0], np.float32).tolist()
    return values


@pytest.fixture
def double(tmp_path: Path) -> StoredBundle:
    return write_scaled(tmp_path / "double.bundle", 2)


@pytest.fixture
def triple(tmp_path: Path) -> StoredBundle:
    return write_scaled(tmp_path / "triple.bundle", 3)


def test_before_the_first_plan_it_is_not_ready() -> None:
    async def test() -> None:
        here = front()
        assert not here.ready
        with pytest.raises(NotReady, match="still being loaded"):
            here.find("scaled")

    run(test)


def test_a_plan_takes_the_place_of_another(double: StoredBundle, triple: StoredBundle) -> None:
    async def test() -> None:
        here = front()
        await put(here, entry(double))
        assert here.ready
        assert await ask(here) == [2.0, 4.0]
        old = here.find("scaled")
        await here.handle(Prepare(Plan(2, (entry(triple),))))
        assert await ask(here) == [2.0, 4.0]
        await here.handle(Commit(2))
        assert await ask(here) == [3.0, 6.0]
        assert old.closed
        with pytest.raises(NotReady, match="was unloaded"):
            old.predict([b""], 1, None, 0, lambda result: None)

    run(test)


def test_of_several_versions_the_last_is_the_default(double: StoredBundle, triple: StoredBundle) -> None:
    async def test() -> None:
        here = front()
        await put(here, entry(double), entry(triple, "2"))
        assert await ask(here) == await ask(here, version="2") == [3.0, 6.0]
        assert await ask(here, version="1") == [2.0, 4.0]
        with pytest.raises(VersionNotFound, match="no version '3'") as version:
            here.find("scaled", "3")
        assert version.value.hint == "versions: 1, 2"
        with pytest.raises(ModelNotFound, match="no model 'other'") as model:
            here.find("other")
        assert model.value.hint == "models here: scaled"

    run(test)


def test_an_entry_that_stays_is_kept_running(double: StoredBundle, triple: StoredBundle) -> None:
    async def test() -> None:
        here = front()
        await put(here, entry(double))
        kept = here.find("scaled", "1")
        await put(here, entry(double), entry(triple, "2"), generation=2)
        assert here.find("scaled", "1") is kept
        assert not kept.closed

    run(test)


def test_a_plan_that_is_given_up_leaves_what_is_served(double: StoredBundle, triple: StoredBundle) -> None:
    # As when another front could not prepare it.
    async def test() -> None:
        here = front()
        await put(here, entry(double))
        await here.handle(Prepare(Plan(2, (entry(double), entry(triple, "2")))))
        await here.handle(Abort(2))
        assert here.ready
        assert await ask(here) == [2.0, 4.0]
        with pytest.raises(NotReady, match="plan 2 was not prepared"):
            await here.handle(Commit(2))
        await put(here, entry(double), entry(triple, "2"), generation=2)
        assert await ask(here) == [3.0, 6.0]

    run(test)


@pytest.mark.parametrize("changed", [{"table": "nowhere", "mode": "hybrid"}, {"bundle": "nowhere"}])
def test_a_plan_that_cannot_be_prepared_changes_nothing(
    double: StoredBundle, triple: StoredBundle, changed: dict[str, Any]
) -> None:
    async def test() -> None:
        here = front()
        await put(here, entry(double))
        with pytest.raises((TableMissing, BundleTorn)):
            await here.handle(
                Prepare(Plan(2, (entry(double), entry(triple, "2"), entry(triple, "3", **changed))))
            )
        assert await ask(here) == [2.0, 4.0]
        assert len(here.versions()) == 1

    run(test)


def test_a_bundle_that_was_replaced_since_is_not_served_under_the_old_name(
    tmp_path: Path, double: StoredBundle
) -> None:
    async def test() -> None:
        here = front()
        planned = entry(double)
        write_scaled(double.path, 5, replace=True)
        with pytest.raises(BundleAltered, match="now holds bundle") as caught:
            await put(here, planned)
        assert "parbake reload" in caught.value.hint
        with pytest.raises(BundleAltered):
            await here.handle(Prepare(Plan(1, (entry(double, placement="auto"),))))

    run(test)


def test_what_is_unloaded_says_so(double: StoredBundle) -> None:
    async def test() -> None:
        here = front()
        await put(here, unloaded=("scaled",))
        assert here.ready
        with pytest.raises(NotReady, match="'scaled' is not loaded") as caught:
            here.find("scaled")
        assert (
            caught.value.hint == "parbake reload scaled, or POST /v2/repository/models/scaled/load, loads it"
        )
        assert here.unloaded() == ("scaled",)

    run(test)


def test_a_small_model_is_measured_and_code_of_its_own_stays_outside(
    tmp_path: Path, double: StoredBundle
) -> None:
    function = write_function(tmp_path, "def predict(x):\n    return x * 2\n")

    async def test() -> None:
        here = front()
        reply = await here.handle(
            Prepare(Plan(1, (entry(double, placement="auto"), entry(function, placement="auto"))))
        )
        assert isinstance(reply, Prepared)
        small, own = reply.placed
        assert small.row_us > 0
        # Without a line to the supervisor a hop costs nothing.
        assert small.placement == "process"
        assert (own.name, own.placement, own.row_us) == ("function", "process", 0.0)
        assert not here.ready

    run(test)


def test_a_switch_waits_for_what_the_old_version_has_accepted(tmp_path: Path, triple: StoredBundle) -> None:
    slow = write_function(
        tmp_path, "import time\ndef predict(x):\n    time.sleep(0.3)\n    return x * 2\n", name="scaled"
    )

    async def test() -> None:
        pool = RunnerPool(tmp_path)
        runner = await pool.start(str(slow.path), digest=slow.digest, threads=1)
        try:
            here = front()
            await put(here, entry(slow, placement="process", sockets=(runner.socket,)))
            assert here.ready
            waiting = [asyncio.create_task(ask(here)) for _ in range(3)]
            await asyncio.sleep(0.05)
            await put(here, entry(triple), generation=2)
            # The commit is answered when the old version is done: its process may be ended now.
            assert all(task.done() for task in waiting)
            assert [task.result() for task in waiting] == [[2.0, 4.0]] * 3
            assert await ask(here) == [3.0, 6.0]
        finally:
            await pool.close()

    run(test)


def test_counts_outlive_the_version_that_was_counted(double: StoredBundle, triple: StoredBundle) -> None:
    async def test() -> None:
        here = front()
        await put(here, entry(double))
        here.find("scaled").stats.answered(0.1, 0.1, 0.1, 0.1, 1, 0)
        here.refuse(ModelNotFound("no"))
        await put(here, entry(triple), generation=2)
        here.find("scaled").stats.answered(0.1, 0.1, 0.1, 0.1, 1, 0)
        counts = await here.handle(GetCounts())
        assert isinstance(counts, AllCounts)
        assert [item.counts.outcomes for item in counts.versions] == [{"ok": 2}]
        assert counts.refused == {"model_not_found": 1}
        with pytest.raises(NotReady, match="a front does not answer Load"):
            await here.handle(Load("x"))

    run(test)


def test_a_front_that_drains_is_not_ready(double: StoredBundle) -> None:
    async def test() -> None:
        here = front()
        await put(here, entry(double))
        await here.drain()
        assert not here.ready
        assert await ask(here) == [2.0, 4.0]

    run(test)


def test_what_does_not_load_leaves_no_connection_behind(tmp_path: Path, double: StoredBundle) -> None:
    async def test() -> None:
        pool = RunnerPool(tmp_path)
        runner = await pool.start(str(double.path), digest=double.digest, threads=1)
        try:
            here = front()
            before = asyncio.all_tasks()
            shutil.rmtree(tmp_path / "none", ignore_errors=True)
            with pytest.raises(TableMissing):
                await here.handle(
                    Prepare(
                        Plan(
                            1,
                            (
                                entry(double, placement="process", sockets=(runner.socket,)),
                                entry(double, "2", mode="static", table=str(tmp_path / "none")),
                            ),
                        )
                    )
                )
            await asyncio.sleep(0.05)
            assert asyncio.all_tasks() == before
        finally:
            await pool.close()

    run(test)
