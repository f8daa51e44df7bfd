"""Requests per second and latency over HTTP, as ratios to a bare loop and parser and to the obvious FastAPI handler.

Machines are noisy, so nothing is compared across time: every measurement of a server stands between two of the bare
loop, and its ratio is to their mean. What is reported is the median of these ratios over all rounds.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench import models, samples
from bench.clients import Client
from bench.machine import this_machine
from bench.models import Packed
from bench.processes import cpu_seconds, peer, with_descendants
from bench.report import Section, Table, at_least, at_most
from bench.samples import Sample
from bench.venvs import PEERS
from parbake.testing import serving

_PATH: Final = "/v2/models/eta/infer"
_BARE: Final = "bare loop and parser, constant answer"
_FASTAPI: Final = "FastAPI + onnxruntime, obvious"
_MANY_ROWS: Final = 20_000
_CONNECTIONS: Final = (64, 1)
_ROUNDS_OF_OTHERS: Final = 3


@dataclass(frozen=True, slots=True)
class Server:
    """Something that answers on a port. ``pids`` are the processes whose CPU time counts."""

    what: str
    port: int
    path: str
    pids: tuple[int, ...]


@dataclass(slots=True)
class Series:
    """All measurements of one server under one load, each with what the bare loop did just before and after."""

    what: str
    connections: int
    samples: list[Sample] = field(default_factory=list)
    bare: list[tuple[Sample, Sample]] = field(default_factory=list)

    def ratios(self, of: Callable[[Sample], float]) -> list[float]:
        """A figure in ratio to that of the bare loop, round by round."""
        return [
            of(sample) / ((of(before) + of(after)) / 2)
            for sample, (before, after) in zip(self.samples, self.bare, strict=True)
        ]

    def middle(self, of: Callable[[Sample], float]) -> float:
        """The median of a figure."""
        return median(map(of, self.samples))


def run(
    client: Client, folder: Path, *, rounds: int, seconds: float, quick: bool, say: Callable[[str], None]
) -> Section:
    """Measure everything. ``folder`` is for models and tables; ``quick`` leaves the larger models out."""
    say("packing the models")
    micro = models.logistic_regression(folder / "logistic", 1000 if quick else _MANY_ROWS)
    others = (
        [] if quick else [models.network(folder / "network", 2000), models.forest(folder / "forest", 2000)]
    )
    groups: list[tuple[Packed, list[Series]]] = []
    with ExitStack() as stack:
        process, port = stack.enter_context(peer(PEERS / "bare" / "server.py"))
        bare = Server(_BARE, port, "/", (process.pid,))
        for packed in (micro, *others):
            servers = _servers(stack, packed, all_modes=packed is micro)
            turns = rounds if packed is micro else min(rounds, _ROUNDS_OF_OTHERS)
            found = _measure(client, bare, servers, packed, packed.bodies, turns, seconds, say)
            groups.append((packed, found))
            if packed is micro:
                baked = [server for server in servers if "table" in server.what]
                one = _measure(client, bare, baked, packed, packed.bodies[:1], rounds, seconds, say)
                for item in one:
                    item.what += ", one body again and again"
                found += one
    return _section(client, groups, rounds, seconds)


def _servers(stack: ExitStack, packed: Packed, *, all_modes: bool) -> list[Server]:
    """Start what is compared on one model: one parbake with a deployment for each way, and the FastAPI handler."""
    ways = {
        "table hit, static mode": ("static", "auto"),
        "table hit, hybrid mode": ("hybrid", "auto"),
        "dynamic, inline": ("dynamic", "inline"),
        "dynamic, in a runner process": ("dynamic", "process"),
    }
    if not all_modes:
        ways = {what: way for what, way in ways.items() if way[0] == "dynamic"}
    deployments: list[str] = []
    for i, (mode, placement) in enumerate(ways.values()):
        deployments += [
            "[[deployments]]",
            f'name = "way{i}"',
            f'bundle = "{packed.bundle}"',
            f'mode = "{mode}"',
            f'placement = "{placement}"',
            f'table = "{packed.table}"' if mode != "dynamic" else "",
        ]
    config = packed.bundle.parent / "parbake.toml"
    config.write_text("\n".join(deployments))
    # One front, as there is one process of every peer.
    server = stack.enter_context(serving(arguments=["--config", str(config)], workers=1))
    pids = with_descendants(server.process.pid)
    servers = [Server(what, server.port, f"/v2/models/way{i}/infer", pids) for i, what in enumerate(ways)]
    if find_spec("fastapi") and find_spec("uvicorn"):
        process, port = stack.enter_context(peer(PEERS / "fastapi" / "server.py", str(packed.onnx)))
        servers.append(Server(_FASTAPI, port, _PATH, (process.pid,)))
    for item in servers:
        _check(item, packed)
    return servers


def _check(server: Server, packed: Packed) -> None:
    """A server must answer as the model does before its speed means anything."""
    for i in (0, len(packed.bodies) // 2, len(packed.bodies) - 1):
        url = f"http://127.0.0.1:{server.port}{server.path}"
        request = urllib.request.Request(url, packed.bodies[i], {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            got = json.load(reply)["outputs"][0]["data"]
        # Another way through the graph may change last bits.
        allowed = 1e-6 if server.what == _FASTAPI else 0.0
        if any(abs(a - b) > allowed * abs(b) for a, b in zip(got, packed.answers[i], strict=True)):
            raise RuntimeError(f"{server.what} answers {got}, the model {packed.answers[i]}")


def _measure(
    client: Client,
    bare: Server,
    servers: Sequence[Server],
    packed: Packed,
    bodies: Sequence[bytes],
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
) -> list[Series]:
    found: list[Series] = []
    for connections in _CONNECTIONS:
        series = [Series(server.what, connections) for server in servers]
        for number in range(rounds):
            say(f"{packed.what}, {connections} connections, round {number + 1} of {rounds}")
            before = _sample(client, bare, bodies, connections, seconds)
            for server, item in zip(servers, series, strict=True):
                item.samples.append(_sample(client, server, bodies, connections, seconds))
                after = _sample(client, bare, bodies, connections, seconds)
                item.bare.append((before, after))
                before = after
        found += series
    return found


def _sample(
    client: Client, server: Server, bodies: Sequence[bytes], connections: int, seconds: float
) -> Sample:
    cpu = cpu_seconds(server.pids)
    speed = client.put(server.port, server.path, bodies, connections, seconds)
    return Sample(speed, (cpu_seconds(server.pids) - cpu) / speed.replies * 1e6)


def _section(
    client: Client, groups: Sequence[tuple[Packed, list[Series]]], rounds: int, seconds: float
) -> Section:
    micro = groups[0][1]
    targets = []
    for item in micro:
        if "table hit" not in item.what:
            continue
        if item.connections == 1:
            targets.append(
                at_most(f"{item.what}: p50 at 1 connection / bare", median(item.ratios(samples.p50)), 1.5)
            )
        else:
            targets.append(
                at_least(f"{item.what}: requests/s / bare", median(item.ratios(samples.rate)), 0.5)
            )
    crowd = {item.what: item for item in micro if item.connections != 1}
    dynamic = crowd["dynamic, inline"]
    targets.append(at_least("dynamic, inline: requests/s / bare", median(dynamic.ratios(samples.rate)), 0.4))
    if fastapi := crowd.get(_FASTAPI):
        times = [
            a / b for a, b in zip(dynamic.ratios(samples.rate), fastapi.ratios(samples.rate), strict=True)
        ]
        targets.append(at_least("dynamic, inline: requests/s / FastAPI", median(times), 15))
    targets.sort(key=lambda target: "p50" in target.what)
    missing = "" if fastapi else " FastAPI is not installed here."
    return Section(
        key="http",
        title="Requests over HTTP",
        how=(
            "One row per request as JSON, the Open Inference Protocol, over loopback; parbake with one front process "
            "and validation, routing, limits, timeouts and metrics on. The table holds every row asked for; unless "
            f"said otherwise the rows are sent in turn, {len(groups[0][0].rows):,} of them for {groups[0][0].what}. "
            f"Load from {client.name} on the same CPUs. Medians of {rounds} rounds (at most "
            f"{_ROUNDS_OF_OTHERS} for the other models) of {seconds:g} s. A ratio is to the "
            "mean of the bare loop just before and just after; CPU is the server's user and system time per "
            f"request, over all of its processes.{missing}"
        ),
        tables=tuple(
            _table(packed, [item for item in found if item.connections == connections], connections)
            for packed, found in groups
            for connections in _CONNECTIONS
        ),
        targets=tuple(targets),
        machine=this_machine(),
        figures={packed.what: {"row_us": packed.row_us, "series": _raw(found)} for packed, found in groups},
    )


def _table(packed: Packed, found: Sequence[Series], connections: int) -> Table:
    every_bare = [sample for item in found for pair in item.bare for sample in pair]
    rows = [
        (
            _BARE,
            f"{median(map(samples.rate, every_bare)):,.0f}",
            f"{median(map(samples.p50, every_bare)):.3f}",
            f"{median(map(samples.p99, every_bare)):.3f}",
            f"{median(map(samples.cpu, every_bare)):.1f}",
            "1",
            "1",
            "1",
        )
    ]
    rows += [
        (
            item.what,
            f"{item.middle(samples.rate):,.0f}",
            f"{item.middle(samples.p50):.3f}",
            f"{item.middle(samples.p99):.3f}",
            f"{item.middle(samples.cpu):.1f}",
            f"{median(item.ratios(samples.rate)):.2f}",
            f"{median(item.ratios(samples.p50)):.2f}",
            f"{median(item.ratios(samples.cpu)):.2f}",
        )
        for item in found
    ]
    loaded = "1 connection" if connections == 1 else f"{connections} connections"
    title = f"{packed.what} ({packed.row_us:.0f} us for a row on its own), {loaded}"
    columns = (
        "server", "requests/s", "p50 ms", "p99 ms", "CPU us/request", "requests/s / bare", "p50 / bare", "CPU / bare",
    )  # fmt: skip
    return Table(title, columns, tuple(rows))


def _raw(found: Sequence[Series]) -> list[dict[str, Any]]:
    return [
        {
            "server": item.what,
            "connections": item.connections,
            "requests_per_s": [samples.rate(sample) for sample in item.samples],
            "p50_ms": [samples.p50(sample) for sample in item.samples],
            "p99_ms": [samples.p99(sample) for sample in item.samples],
            "cpu_us": [samples.cpu(sample) for sample in item.samples],
            "requests_per_s_to_bare": item.ratios(samples.rate),
            "p50_to_bare": item.ratios(samples.p50),
            "cpu_to_bare": item.ratios(samples.cpu),
        }
        for item in found
    ]
