"""A disk that is full: under the prediction log, and under a bake."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from chaos.bundles import BAKED, TAIL, asking, multiplier, table
from chaos.load import calling
from chaos.model import NotTested, Observed, Scenario, Stage, at_least, held, no_failures, none
from chaos.servers import wait_for
from parbake.testing import Server, serving
from parbake.transports import client

_ROWS: Final = 60_000
"""Rows of a bake that needs more than the small disk has."""


@contextmanager
def _small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of its own. Raises `NotTested` where none may be mounted."""
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        raise NotTested(
            f"a small file system needs root, in a container that may mount ({made.stderr.strip()})"
        )
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _rows_of_log(server: Server, what: str) -> float:
    """Rows of the prediction log that were written, or dropped for want of space."""
    found = re.findall(
        rf"^parbake_log_rows_total\{{[^}}]*{what}[^}}]*\}} (\S+)", client.metrics(port=server.port), re.M
    )
    return sum(map(float, found))


def _log(stage: Stage) -> Observed:
    with _small_disk(stage.folder / "disk", "2m") as disk:
        stage.say("starting a server")
        bundle = multiplier(stage.folder / "sound.bundle", 2, name="sound")
        with (
            serving(bundle, workers=1, prediction_log=disk / "log", log_inputs="plain", log_outputs=True) as server,
            calling(server.port, asking("callers", "sound", TAIL, 2, connections=4)) as calls,
        ):  # fmt: skip
            time.sleep(0.5)
            stage.say("filling the disk")
            full = disk / "ballast"
            with full.open("wb", buffering=0) as ballast:
                try:
                    while ballast.write(bytes(4096)):
                        pass
                except OSError:
                    pass
            dropped_s = wait_for(lambda: _rows_of_log(server, "disk") > 0, 15)
            time.sleep(stage.seconds / 2)
            dropped = _rows_of_log(server, "disk")
            stage.say("making room")
            full.unlink()
            before = _rows_of_log(server, "written")
            again_s = wait_for(lambda: _rows_of_log(server, "written") > before, 15)
    checks = [
        no_failures("failed requests", calls["callers"].failed),
        at_least("rows that were dropped, and counted as such", dropped, 1, measured=False),
        at_least("written again when there was room", again_s < 15, 1),
    ]
    return Observed(list(calls.heard.values()), checks, {"first row dropped after, s": dropped_s})


def _bake(stage: Stage) -> Observed:
    stage.say("starting a server")
    bundle = multiplier(stage.folder / "broken.bundle", 3, name="broken")
    rows = stage.folder / "rows.jsonl"
    rows.write_text("".join(f'{{"left": {i}, "right": 0.5}}\n' for i in range(_ROWS)))
    with _small_disk(stage.folder / "disk", "2m") as disk:
        served = table(bundle, disk / "served.table")
        command = [sys.executable, "-m", "parbake", "bake", str(bundle), "--input", str(rows)]
        command += ["--out", str(served), "--replace", "--workers", "1"]
        with (
            serving(bundle, table=served, workers=1, placement="process", head_rows=0) as server,
            calling(
                server.port, asking("baked rows", "broken", BAKED, 3), asking("other rows", "broken", TAIL, 3)
            ) as calls,
        ):  # fmt: skip
            stage.say("baking")
            full = subprocess.run(command, capture_output=True, text=True, check=False)
            # What was there before is there still, and whole.
            client.reload(port=server.port)
            stage.say("making room")
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            again = subprocess.run(command, capture_output=True, text=True, check=False)
            client.reload(port=server.port)
            rows_served = client.status(port=server.port).versions[0].table_rows
            time.sleep(0.3)
    checks = [
        no_failures("failed requests", [n for h in calls.heard.values() for n in h.failed]),
        held("the bake failed, and said why", "the disk is full" in full.stderr and full.returncode != 0),
        none("exit status of the same command when there was room", again.returncode),
        at_least("rows of the table then", rows_served, _ROWS, measured=False),
    ]  # fmt: skip
    return Observed(list(calls.heard.values()), checks, {})


SCENARIOS: Final = (
    Scenario(
        "disk-full-log",
        "the disk of the prediction log is full, then has room again",
        "no request fails; rows that cannot be logged are dropped and counted, and the log goes on by itself",
        _log,
    ),
    Scenario(
        "disk-full-bake",
        "the disk is full while a served table is baked again in its place",
        "the bake says so and publishes nothing, the old table is served on, and the same command goes on later",
        _bake,
    ),
)
