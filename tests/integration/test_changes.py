"""Nothing is lost in a change: models, tables, modes are swapped under load, and each answer is the old or the new."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from parbake.app.supervisor import Change
from parbake.contract.bundle import Goldens, read_bundle
from parbake.errors import (
    BundleAltered,
    BundleTorn,
    Conflict,
    GoldensDiffer,
    ModelNotFound,
    ParbakeError,
    ServerNotFound,
    TableForeign,
    TableTorn,
)
from parbake.testing import Server, serving
from parbake.transports import client
from tests.functions import large_bundle, write_function, write_scaled
from tests.traffic import Call, Caller, answer, bake_rows, calling, infer, memory_mb, rows, wait_for

ROWS = [(1.0, 2.0), (3.0, 4.0), (5.0, 6.0), (7.0, 8.0)]
ASKED = [rows("scaled", ROWS[0], ROWS[2]), rows("scaled", ROWS[1]), rows("scaled", ROWS[3], ROWS[0])]


def factors(caller: Caller) -> list[float]:
    """The numbers that each answer was multiplied by; fails for a request that was not answered."""
    asked: list[float] = []
    for noted in caller.noted:
        left, right = answer(noted)
        factor = next(f for f in (2, 3, 4, 5) if (left / f, right / f) in ROWS)
        asked.append(factor)
    return asked


def one_after_the_other(callers: Sequence[Caller], *models: float) -> None:
    """Every answer is one of the models', and no old one comes after a new one on the same connection."""
    for caller in callers:
        got = factors(caller)
        assert sorted(got, key=models.index) == got
        assert set(got) == set(models)


def reload(server: Server, **change: Any) -> None:
    client.reload([Change(**change)] if change else [], port=server.port)


@pytest.mark.parametrize(("placement", "workers"), [("inline", 1), ("process", 1), ("process", 2)])
def test_a_new_bundle_takes_over_without_a_failed_request(
    tmp_path: Path, placement: str, workers: int
) -> None:
    path = tmp_path / "scaled.bundle"
    write_scaled(path, 2)
    with (
        serving(path, placement=placement, workers=workers) as server,
        calling(server.url, *ASKED) as callers,
    ):
        # The same folder, and a signal.
        write_scaled(path, 3, replace=True)
        server.process.send_signal(signal.SIGHUP)
        call = Call(server.url)
        wait_for(lambda: answer(call("/v2/models/scaled/infer", infer(ROWS[0]))) == [3.0, 6.0])
        call.close()
        wait_for(lambda: "reloaded" in server.log())
        for caller in callers:
            caller.wait(10)
        # Another folder, and the command's way.
        other = write_scaled(tmp_path / "other.bundle", 4)
        reload(server, bundle=str(other.path))
        for caller in callers:
            caller.wait(10)
        # Once the reload is answered, nobody gets the old one.
        assert {tuple(answer(noted)) for noted in callers[1].noted[-5:]} == {(12.0, 16.0)}
        assert client.status(port=server.port).generation == 3
    one_after_the_other(callers, 2, 3, 4)


def test_a_new_table_and_another_mode_take_over_without_a_failed_request(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    with (
        serving(bundle.path, placement="process", workers=2) as server,
        calling(server.url, *ASKED) as callers,
    ):
        (pid,) = client.status(port=server.port).versions[0].runner_pids
        for change, mode, keys in [
            ({"table": str(bake_rows(bundle, ROWS[:1], tmp_path / "one.table"))}, "hybrid", 1),
            ({"table": str(bake_rows(bundle, ROWS, tmp_path / "all.table"))}, "hybrid", 4),
            ({"table": ""}, "dynamic", 0),
        ]:
            reload(server, name="scaled", **change)
            (version,) = client.status(port=server.port).versions
            assert (version.mode, version.table_rows) == (mode, keys)
            # The process that has the model is the same: only the table is another.
            assert version.runner_pids == (pid,)
            for caller in callers:
                caller.wait(10)
        # A table that is replaced in its place.
        table = bake_rows(bundle, ROWS[:2], tmp_path / "one.table", replace=True)
        reload(server, name="scaled", table=str(table))
        bake_rows(bundle, ROWS[:3], tmp_path / "one.table", replace=True)
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: client.status(port=server.port).versions[0].table_rows == 3)
        for caller in callers:
            caller.wait(10)
    for caller in callers:
        assert set(factors(caller)) == {2}


def test_who_changes_the_mode_changes_nothing_else(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    with serving(bundle.path) as server, calling(server.url, *ASKED) as callers:
        write_scaled(tmp_path / "scaled.bundle", 3, replace=True)
        with pytest.raises(Conflict) as caught:
            reload(server, name="scaled", mode="hybrid")
        assert "parbake reload" in caught.value.hint
        callers[0].wait(5)
        assert set(factors(callers[0])) == {2}
        reload(server)
        reload(server, name="scaled", mode="hybrid")
        assert client.status(port=server.port).versions[0].mode == "hybrid"


def test_bundle_and_table_change_together(tmp_path: Path) -> None:
    old = write_scaled(tmp_path / "old.bundle", 2)
    new = write_scaled(tmp_path / "new.bundle", 5)
    old_table = bake_rows(old, ROWS[:2], tmp_path / "old.table")
    new_table = bake_rows(new, ROWS[:3], tmp_path / "new.table")
    with (
        serving(old.path, table=old_table, workers=1) as server,
        calling(server.url, *ASKED) as callers,
    ):
        with pytest.raises(TableForeign):
            reload(server, bundle=str(new.path))
        reload(server, bundle=str(new.path), table=str(new_table))
        for caller in callers:
            caller.wait(10)
    one_after_the_other(callers, 2, 5)


def altered(folder: Path) -> Change:
    bundle = write_scaled(folder / "altered.bundle", 3)
    file = bundle.path / "model.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    return Change(bundle=str(bundle.path))


def torn(folder: Path) -> Change:
    bundle = write_scaled(folder / "torn.bundle", 3)
    (bundle.path / "goldens.bin").unlink()
    return Change(bundle=str(bundle.path))


def wrong_goldens(folder: Path) -> Change:
    x = np.array([[1.0, 2.0]], np.float32)
    source = "def predict(x):\n    return x * 3\n"
    bundle = write_function(
        folder / "goldens", source, name="scaled", goldens=Goldens({"x": x}, {"y": x * 4})
    )
    return Change(bundle=str(bundle.path))


def broken_code(folder: Path) -> Change:
    return Change(
        bundle=str(
            write_function(
                folder / "code", "import nowhere\ndef predict(x):\n    return x\n", name="scaled"
            ).path
        )
    )


def another_model(folder: Path) -> Change:
    return Change(name="scaled", bundle=str(write_scaled(folder / "x.bundle", 3, name="other").path))


def foreign_table(folder: Path) -> Change:
    stranger = write_scaled(folder / "stranger.bundle", 3)
    return Change(name="scaled", table=str(bake_rows(stranger, ROWS, folder / "foreign.table")))


def torn_table(folder: Path) -> Change:
    table = bake_rows(read_bundle(folder / "scaled.bundle"), ROWS, folder / "torn.table")
    file = table / "data.mdb"
    file.write_bytes(file.read_bytes()[:-100])
    return Change(name="scaled", table=str(table))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("placement", ["inline", "process"])
def test_a_refused_change_leaves_everything_as_it_was(tmp_path: Path, placement: str, workers: int) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    refusals: list[tuple[Callable[[Path], Change], type[ParbakeError], str]] = [
        (altered, BundleAltered, "SHA-256"),
        (wrong_goldens, GoldensDiffer, "1 of 1 goldens differ"),
        (broken_code, ParbakeError, "nowhere"),
        (torn, BundleTorn, "goldens.bin is missing"),
        (foreign_table, TableForeign, "was baked by bundle"),
        (torn_table, TableTorn, "the lineage says"),
        (another_model, Conflict, "holds model 'other', the deployment is 'scaled'"),
        (lambda folder: Change(name="nobody", table="x"), ModelNotFound, "no deployment 'nobody'"),
        (lambda folder: Change(bundle=str(folder / "nowhere")), BundleTorn, "no bundle at"),
    ]
    with (
        serving(bundle.path, placement=placement, workers=workers) as server,
        calling(server.url, *ASKED[:2]) as callers,
    ):
        before = client.status(port=server.port)
        for make, kind, message in refusals:
            with pytest.raises(kind, match=message):
                client.reload([make(tmp_path)], port=server.port)
        after = client.status(port=server.port)
        # All but what callers did meanwhile.
        nothing = {"requests": 0, "errors": 0, "rows": 0, "last_request": 0.0}
        assert [replace(v, **nothing) for v in after.versions] == [
            replace(v, **nothing) for v in before.versions
        ]
        assert after.generation == before.generation
        for caller in callers:
            caller.wait(5)
        # And the next one that is right is taken.
        reload(server, bundle=str(write_scaled(tmp_path / "right.bundle", 3).path))
        for caller in callers:
            caller.wait(5)
    one_after_the_other(callers, 2, 3)


def test_a_table_that_goes_bad_does_not_keep_another_model_from_being_unloaded(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    table = bake_rows(bundle, ROWS, tmp_path / "scaled.table")
    other = write_scaled(tmp_path / "other.bundle", 3, name="other")
    with serving(bundle.path, other.path, "--table", f"scaled={table}", workers=1) as server:
        call = Call(server.url)
        (table / "lineage.json").write_text("{")
        assert call("/v2/repository/models/other/unload", b"").status == 200
        assert call("/v2/models/other/infer", infer(ROWS[0])).status == 503
        assert call("/v2/repository/models/other/load", b"").status == 200
        assert answer(call("/v2/models/other/infer", infer(ROWS[0]))) == [3.0, 6.0]
        assert answer(call("/v2/models/scaled/infer", infer(ROWS[0]))) == [2.0, 4.0]
        refused = call("/v2/repository/models/scaled/load", b"")
        assert (refused.status, refused.json()["code"]) == (422, "table_torn")
        assert answer(call("/v2/models/scaled/infer", infer(ROWS[0]))) == [2.0, 4.0]
        call.close()


@pytest.mark.parametrize("placement", ["inline", "process"])
def test_memory_comes_back_when_a_model_is_unloaded(tmp_path: Path, placement: str) -> None:
    small = write_scaled(tmp_path / "small.bundle", 2, name="small")
    large = large_bundle(tmp_path, 40)
    with serving(small.path, large.path, placement=placement, workers=1) as server:
        call = Call(server.url)
        loaded = memory_mb(server)
        assert call("/v2/models/large/infer", infer((1, 2))).status == 200
        assert call("/v2/repository/models/large/unload", b"").status == 200
        wait_for(lambda: memory_mb(server) < loaded - 30, "for the memory of the model")
        unloaded = memory_mb(server)
        for _ in range(3):
            assert call("/v2/repository/models/large/load", b"").status == 200
            assert call("/v2/models/large/infer", infer((1, 2))).status == 200
            assert call("/v2/repository/models/large/unload", b"").status == 200
        wait_for(lambda: memory_mb(server) < unloaded + 25, "for the memory of three loads")
        assert answer(call("/v2/models/small/infer", infer((1, 2)))) == [2.0, 4.0]
        call.close()


def test_two_versions_of_a_name_are_served_side_by_side(tmp_path: Path) -> None:
    first = write_scaled(tmp_path / "first.bundle", 2)
    second = write_scaled(tmp_path / "second.bundle", 3)
    with serving(first.path, second.path, workers=1) as server:
        call = Call(server.url)

        def ask(path: str) -> list[float]:
            return answer(call(f"/v2/models/scaled{path}/infer", infer((1, 2))))

        assert (ask(""), ask("/versions/1"), ask("/versions/2")) == ([3.0, 6.0], [2.0, 4.0], [3.0, 6.0])
        assert call("/v2/models/scaled").json()["versions"] == ["1", "2"]
        wrong = call("/v2/models/scaled/versions/7/infer", infer((1, 2)))
        assert (wrong.status, wrong.json()["code"]) == (404, "version_not_found")
        assert wrong.json()["hint"] == "versions: 1, 2"
        third = write_scaled(tmp_path / "third.bundle", 4)
        reload(server, bundle=str(third.path))
        assert (ask(""), ask("/versions/1")) == ([4.0, 8.0], [2.0, 4.0])
        index = call("/v2/repository/index", b"").json()
        assert [(item["version"], item["state"]) for item in index] == [("1", "READY"), ("2", "READY")]
        call.close()


def test_a_signal_while_starting_is_no_second_start(tmp_path: Path) -> None:
    path = tmp_path / "scaled.bundle"
    write_scaled(path, 2)
    with serving(path, placement="process", workers=1) as server:
        for _ in range(5):
            server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: server.log().count("reloaded") >= 1)
        call = Call(server.url)
        assert answer(call("/v2/models/scaled/infer", infer((1, 2)))) == [2.0, 4.0]
        call.close()


def test_settings_that_do_not_fit_are_refused_at_the_start(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    with (
        pytest.raises(ServerNotFound, match="mode hybrid of 'scaled' needs a prediction table"),
        serving(bundle.path, mode="hybrid", head_rows=0),
    ):
        pass
