"""How long it takes from typing ``parbake serve`` to the first prediction."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Final

from bench import models
from bench.machine import this_machine
from bench.models import Packed
from bench.processes import free_port
from bench.report import Section, Table, at_most

_LIMIT_S: Final = 60.0


def run(folder: Path, *, starts: int, say: Callable[[str], None]) -> Section:
    """Start the command some times in each way of serving."""
    say("packing a model")
    packed = models.logistic_regression(folder / "logistic", 2000)
    ways: dict[str, Sequence[str]] = {
        "dynamic, model in the front": (),
        "dynamic, model in a runner process": ("--placement", "process"),
        "hybrid": ("--table", str(packed.table)),
        "static": ("--table", str(packed.table), "--mode", "static"),
    }
    times: dict[str, list[float]] = {what: [] for what in ways}
    for number in range(starts):
        for what, arguments in ways.items():
            say(f"{what}, start {number + 1} of {starts}")
            times[what].append(_first_answer_s(packed, arguments))
    rows = tuple(
        (what, f"{median(found):.2f}", f"{max(found):.2f}", str(len(found))) for what, found in times.items()
    )
    return Section(
        key="cold-start",
        title="Cold start",
        how=(
            "Seconds from starting the command `parbake serve BUNDLE` to the first prediction with status 200. "
            "The files have been read before."
        ),
        tables=(
            Table("Seconds to the first prediction", ("way to serve", "median", "worst", "starts"), rows),
        ),
        targets=tuple(at_most(f"{what}: median", median(found), 1.5, "s") for what, found in times.items()),
        machine=this_machine(),
        figures={what: {"seconds": found} for what, found in times.items()},
    )


def _first_answer_s(packed: Packed, arguments: Sequence[str]) -> float:
    command = [str(Path(sys.executable).with_name("parbake")), "serve", str(packed.bundle), *arguments]
    port = free_port()
    # No colours, no settings of whoever measures.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PARBAKE_")}
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not _answers(port, packed.bodies[0]):
            if process.poll() is not None:
                raise RuntimeError(f"{command} ended with {process.returncode}")
            if time.perf_counter() - started > _LIMIT_S:
                raise RuntimeError(f"{command} gave no prediction within {_LIMIT_S:g} s")
            time.sleep(0.005)
        return time.perf_counter() - started
    finally:
        process.terminate()
        process.wait(30)


def _answers(port: int, body: bytes) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_LIMIT_S)
    try:
        connection.request("POST", "/v2/models/eta/infer", body, {"content-type": "application/json"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
