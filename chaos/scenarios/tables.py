"""Prediction tables whose files are cut off, deleted, or baked again while servers read them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from chaos.bundles import BAKED, TAIL, asking, multiplier, table
from chaos.load import Calls, calling
from chaos.model import Observed, Scenario, Stage, at_least, at_most, no_failures, none
from chaos.servers import status
from parbake.app.supervisor import Change
from parbake.testing import Server, serving
from parbake.transports import client

_MANY: Final = tuple((float(i), 1.0) for i in range(20_000))
"""Rows of a table that has many pages."""
_BACK_MS: Final = 1000.0


@contextmanager
def _baked_beside_another(stage: Stage) -> Iterator[tuple[Server, Path, Calls]]:
    """A model with a table of many pages, another without, callers of both, and the folder of the table."""
    stage.say("baking")
    sound = multiplier(stage.folder / "sound.bundle", 2, name="sound")
    broken = multiplier(stage.folder / "broken.bundle", 3, name="broken")
    baked = table(broken, stage.folder / "broken.table", _MANY)
    arguments = ("--table", f"broken={baked}", "--head-rows", "0")
    with (
        serving(sound, broken, arguments=arguments, workers=1, placement="process") as server,
        calling(
            server.port,
            asking("other model", "sound", TAIL, 2),
            asking("rows of the table", "broken", _MANY[::40], 3),
            asking("its other rows", "broken", TAIL, 3),
        ) as calls,
    ):
        time.sleep(0.3)
        yield server, baked, calls


def _truncated(stage: Stage) -> Observed:
    with _baked_beside_another(stage) as (server, baked, calls):
        before = status(server)
        at = time.monotonic()
        stage.say("cutting it off")
        os.truncate(baked / "data.mdb", 8192)
        time.sleep(max(stage.seconds, 4.0))
        after = status(server)
    everybody = list(calls.heard.values())
    other, its = calls["other model"], calls["rows of the table"]
    checks = [
        no_failures("failed requests for the other model", other.failed),
        at_most("longest time without an answer for the other model", other.outage_ms(), _BACK_MS, "ms"),
        none("callers left without any reply", sum(n.status == -2 for h in everybody for n in h.noted)),
        none("fronts that ended over it", after.front_restarts - before.front_restarts),
        at_least("answers to its rows, from the model, afterwards", sum(n.began > at + 2 for n in its.good), 1),
    ]  # fmt: skip
    return Observed(everybody, checks, {})


def _deleted(stage: Stage) -> Observed:
    with _baked_beside_another(stage) as (_, baked, calls):
        stage.say("deleting it")
        shutil.rmtree(baked)
        time.sleep(stage.seconds)
    everybody = list(calls.heard.values())
    checks = [
        no_failures("failed requests", [n for h in everybody for n in h.failed]),
        at_least("answers to rows of the table", len(calls["rows of the table"].good), 100),
    ]
    return Observed(everybody, checks, {})


def _two_servers(stage: Stage) -> Observed:
    stage.say("baking")
    bundle = multiplier(stage.folder / "shared.bundle", 3, name="shared")
    newer = multiplier(stage.folder / "newer.bundle", 5, name="shared")
    shared = table(bundle, stage.folder / "shared.table")
    with (
        serving(bundle, table=shared, mode="hybrid", workers=1, head_rows=0) as first,
        serving(bundle, table=shared, mode="hybrid", workers=1, head_rows=0) as second,
    ):
        streams = (asking("baked rows", "shared", BAKED, 3, 5), asking("other rows", "shared", TAIL, 3, 5))
        with calling(first.port, *streams) as one, calling(second.port, *streams) as two:
            until = time.monotonic() + stage.seconds
            bakes = swaps = 0
            while time.monotonic() < until or not swaps:
                stage.say(f"bake {bakes + 1}")
                for chosen in (newer, bundle):
                    _bake(chosen, stage.folder / "rows.jsonl", shared)
                    bakes += 1
                    for server in (first, second):
                        client.reload([Change("shared", str(chosen), str(shared))], port=server.port)
                        swaps += 1
            settled = time.monotonic()
            time.sleep(0.5)
    everybody = [*one.heard.values(), *two.heard.values()]
    # The last bundle multiplies by the first of the factors.
    stale = sum(noted.began > settled and noted.answer > 0 for heard in everybody for noted in heard.noted)
    checks = [
        no_failures("failed requests", [n for h in everybody for n in h.failed]),
        none("stale answers after the last reload", stale),
        at_least("answers", sum(len(h.good) for h in everybody), 200),
    ]
    return Observed(everybody, checks, {"bakes": bakes, "reloads": swaps})


def _bake(bundle: Path, rows: Path, out: Path) -> None:
    """As a nightly job does: in a process of its own, in the place of the old one."""
    if not rows.exists():
        rows.write_text("".join(f'{{"left": {left}, "right": {right}}}\n' for left, right in BAKED))
    subprocess.run(
        [sys.executable, "-m", "parbake", "bake", str(bundle), "--input", str(rows), "--out", str(out), "--replace"],
        capture_output=True,
        check=True,
    )  # fmt: skip


SCENARIOS: Final = (
    Scenario(
        "table-truncated",
        "the data file of a served table is cut off after two pages",
        "a fault stays in its room: other models notice nothing, and the model answers what the table cannot",
        _truncated,
    ),
    Scenario(
        "table-deleted",
        "the folder of a served table is deleted",
        "whoever reads a table goes on undisturbed: no request fails",
        _deleted,
    ),
    Scenario(
        "two-servers",
        "a table that two servers read is baked again in its place, for one bundle and for another, and reloaded",
        "no request fails, and each answer is that of a bundle in force",
        _two_servers,
    ),
)
