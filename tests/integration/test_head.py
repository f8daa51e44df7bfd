"""Hybrid mode learns its head while it serves; a release takes the head over; the mode changes under load."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.app.control import HeadCounts
from parbake.app.supervisor import Change
from parbake.contract.bundle import read_bundle
from parbake.contract.model import Key
from parbake.errors import SettingsError
from parbake.testing import Server, serving
from parbake.transports import client
from tests.functions import write_function, write_scaled
from tests.traffic import Call, answer, bake_rows, calling, infer, once, rows, wait_for

INFER = "/v2/models/scaled/infer"
SLOW = """
import time

def predict(x):
    time.sleep(0.3)
    return {"y": x * 2}
"""


def metric(server: Server, name: str, **labels: str) -> float:
    """A number on the page of metrics, summed up over the labels that are not given."""
    page = once(server.url, "/metrics").body.decode()
    lines = [line for line in page.splitlines() if line.startswith((name + "{", name + " "))]
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(float(line.rpartition(" ")[2]) for line in lines if all(word in line for word in wanted))


def ask(server: Server, *pairs: Sequence[float], path: str = INFER) -> list[float]:
    return answer(once(server.url, path, infer([value for pair in pairs for value in pair])))


@pytest.mark.parametrize("placement", ["inline", "process"])
def test_the_second_time_the_head_answers(tmp_path: Path, placement: str) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    with serving(bundle.path, mode="hybrid", placement=placement) as server:
        assert ask(server, (1, 2)) == [2, 4]
        assert metric(server, "parbake_table_hits_total") == 0
        assert ask(server, (1, 2)) == [2, 4]
        assert metric(server, "parbake_table_hits_total") == 1
        # Of several rows each is looked up on its own; what was computed is kept too.
        assert ask(server, (5, 6), (1, 2), (7, 8)) == [10, 12, 2, 4, 14, 16]
        assert metric(server, "parbake_table_hits_total") == 2
        assert ask(server, (7, 8), (5, 6)) == [14, 16, 10, 12]
        assert metric(server, "parbake_table_hits_total") == 4
        assert metric(server, "parbake_head_rows") == 3
        assert metric(server, "parbake_head_changes_total", change="stored") == 3


def test_table_and_head_answer_together(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    table = bake_rows(bundle, [(1, 2)], tmp_path / "table")
    with serving(bundle.path, table=str(table)) as server:
        assert ask(server, (1, 2), (3, 4)) == [2, 4, 6, 8]
        assert ask(server, (3, 4), (1, 2)) == [6, 8, 2, 4]
        assert metric(server, "parbake_table_hits_total") == 3
        # What the table has is not kept twice.
        assert metric(server, "parbake_head_rows") == 1


def test_a_head_of_no_rows_learns_nothing(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    table = bake_rows(bundle, [(1, 2)], tmp_path / "table")
    with serving(bundle.path, mode="hybrid", table=str(table), head_rows=0) as server:
        for _ in range(3):
            assert ask(server, (3, 4)) == [6, 8]
        assert metric(server, "parbake_table_hits_total") == 0
        with pytest.raises(SettingsError, match="needs a prediction table or a head"):
            client.reload([Change("scaled", table="")], port=server.port)


def test_identical_requests_are_computed_once(tmp_path: Path) -> None:
    bundle = write_function(tmp_path, SLOW, name="scaled")
    with serving(bundle.path, mode="hybrid") as server:
        answers: list[list[float]] = []
        threads = [threading.Thread(target=lambda: answers.append(ask(server, (1, 2)))) for _ in range(8)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [[2, 4]] * 8
        assert time.monotonic() - began < 8 * 0.3
        joined = metric(server, "parbake_joined_rows_total")
        assert joined + metric(server, "parbake_table_hits_total") == 7
        assert joined >= 1
        assert metric(server, "parbake_batch_rows_sum") == 1


def test_who_joined_is_answered_when_the_first_one_leaves(tmp_path: Path) -> None:
    bundle = write_function(tmp_path, SLOW, name="scaled")
    with serving(bundle.path, mode="hybrid") as server:
        blocker = threading.Thread(target=lambda: ask(server, (9, 9)))
        blocker.start()
        time.sleep(0.1)
        leaver = Call(server.url, timeout_s=0.05)
        assert leaver(INFER, infer((1, 2))).status == 0
        assert ask(server, (1, 2)) == [2, 4]
        blocker.join()


@pytest.mark.parametrize("placement", ["inline", "process"])
def test_a_release_never_starts_cold(tmp_path: Path, placement: str) -> None:
    weights = 1 / np.arange(1, 301)
    drawn = np.random.default_rng(0).choice(300, 1200, p=weights / weights.sum())
    pairs = [(float(n), float(-n)) for n in drawn]
    path = tmp_path / "scaled.bundle"
    write_scaled(path, 2)
    with serving(path, mode="hybrid", placement=placement, head_rows=100) as server:
        for pair in pairs[:600]:
            ask(server, pair)
        begun = metric(server, "parbake_table_hits_total")
        for pair in pairs[600:900]:
            assert ask(server, pair) == [2 * pair[0], 2 * pair[1]]
        before = metric(server, "parbake_table_hits_total") - begun
        held = metric(server, "parbake_head_rows")
        assert held == 100
        write_scaled(path, 3, replace=True)
        client.reload(port=server.port)
        assert metric(server, "parbake_head_rows") == held
        assert metric(server, "parbake_head_changes_total", change="warmed") == held
        begun = metric(server, "parbake_table_hits_total")
        for pair in pairs[900:]:
            assert ask(server, pair) == [3 * pair[0], 3 * pair[1]]
        after = metric(server, "parbake_table_hits_total") - begun
        assert before > 100
        assert after >= 0.9 * before
        # Another way to answer, the same bundle: records go over as they are, and nothing is computed.
        table = bake_rows(read_bundle(path), [(1000, 1000)], tmp_path / "table")
        client.reload([Change("scaled", table=str(table))], port=server.port)
        assert metric(server, "parbake_head_rows") == held
        assert metric(server, "parbake_head_changes_total", change="warmed") == 0


def test_freshness_ends_in_the_head_too(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2, freshness_s=2.0)
    with serving(bundle.path, mode="hybrid") as server:
        for number in range(20):
            ask(server, (number, number))
        assert metric(server, "parbake_head_rows") == 20
        # The hot part is baked again before its time is up, the rest goes.
        changes = "parbake_head_changes_total"
        wait_for(lambda: metric(server, changes, change="expired") >= 1)
        wait_for(
            lambda: metric(server, changes, change="warmed") + metric(server, changes, change="expired") >= 20
        )


def test_the_mode_changes_under_load(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    pairs = [(float(n), float(n + 1)) for n in range(50)]
    table = bake_rows(bundle, pairs, tmp_path / "table")
    asked = [
        rows("scaled", *pairs),
        rows("scaled", *(left + right for left, right in itertools.pairwise(pairs))),
    ]
    with (
        serving(bundle.path, table=str(table), placement="process") as server,
        calling(server.url, *asked) as callers,
    ):
        for mode in ("dynamic", "static", "hybrid", "static", "dynamic", "hybrid"):
            done = client.reload([Change("scaled", mode=mode)], port=server.port)
            assert done.changed == ("scaled:1",)
            assert client.status(port=server.port).versions[0].mode == mode
            for caller in callers:
                caller.wait(20)
        for caller in callers:
            for number, noted in enumerate(caller.noted):
                _, body = asked[callers.index(caller)](number)
                values = json.loads(body)["inputs"][0]["data"]
                assert answer(noted) == [2 * value for value in values]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Dynamic mode, and hybrid mode with heads that are too small, by row key, entity key and rounded key."""
    folder = tmp_path_factory.mktemp("mixed")
    rounded = Key(rounding={"left": 0, "right": 0})
    bundles = {
        "row": write_scaled(folder / "row.bundle", 3, name="row"),
        "entity": write_scaled(folder / "entity.bundle", 3, name="entity", key=Key(columns=("left",))),
        "rounded": write_scaled(folder / "rounded.bundle", 3, name="rounded", key=rounded),
    }
    config = ""
    for name, bundle in bundles.items():
        for mode in ("dynamic", "hybrid"):
            config += f'[[deployments]]\nname = "{name}-{mode}"\nbundle = "{bundle.path}"\n'
            config += f'mode = "{mode}"\nhead_rows = 4\n'
    (folder / "parbake.toml").write_text(config)
    with serving(config=folder / "parbake.toml", workers=1) as server:
        yield server


@given(
    requests=st.lists(
        st.lists(
            st.tuples(st.sampled_from([0.0, 1.25, 2.5, 3.5]), st.integers(0, 3)), min_size=1, max_size=6
        ),
        min_size=1,
        max_size=6,
    )
)
@pytest.mark.parametrize("kind", ["row", "entity", "rounded"])
def test_any_mixture_has_the_answers_of_the_model(
    mixed: Server, kind: str, requests: list[list[tuple[float, int]]]
) -> None:
    with Call(mixed.url) as call:
        for pairs in requests:
            body = infer([float(value) for pair in pairs for value in pair])
            wanted = call(f"/v2/models/{kind}-dynamic/infer", body)
            got = call(f"/v2/models/{kind}-hybrid/infer", body)
            assert answer(got) == answer(wanted)


def test_counts_of_heads_add_up() -> None:
    some = HeadCounts(rows=3, bytes=10, stored=4, joined=1)
    assert some.plus(some) == HeadCounts(rows=6, bytes=20, stored=8, joined=2)
    assert some.without_process() == HeadCounts(stored=4, joined=1)


def test_auto_follows_the_advisor_and_says_why(tmp_path: Path) -> None:
    # Cheap to compute, and no key comes twice: nothing is worth keeping.
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    with serving(bundle.path, mode="auto", auto_s=0.5, workers=1) as server:
        status = client.status(port=server.port).versions[0]
        assert (status.mode, status.auto) == ("hybrid", True)
        number = 0
        with Call(server.url) as call:

            def dynamic() -> bool:
                nonlocal number
                for _ in range(200):
                    number += 1
                    assert answer(call(INFER, infer((number, 1)))) == [2 * number, 2]
                # The advisor measures with what the requests leave of the machine.
                time.sleep(0.2)
                return client.status(port=server.port).versions[0].mode == "dynamic"

            wait_for(dynamic)
        status = client.status(port=server.port).versions[0]
        assert status.auto
        assert status.why
        assert "mode.changed" in server.log()
        # A word from a person ends it.
        client.reload([Change("scaled", mode="hybrid")], port=server.port)
        status = client.status(port=server.port).versions[0]
        assert (status.mode, status.auto) == ("hybrid", False)
