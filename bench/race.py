"""The race: parbake and its peers in turn, with the same models, rows, load and machine; every answer is checked.

Machines are noisy, so every measurement stands in a round with those of all others and between two of a yardstick
(the bare loop and parser; for the large network the model itself), and what is reported is the median over the
rounds of the ratios within one round. All servers are up; one that is not quiet meanwhile is frozen (SIGSTOP).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeAlias

import numpy as np

from bench import models, samples
from bench.clients import Client, Own, Speed
from bench.contenders import (
    ALL_DYNAMIC,
    ALL_TABLE,
    BARE,
    BARE_GRPC,
    CHECKED,
    INLINE,
    OWN_PYTHON,
    PROCESS,
    ROSTER,
    TABLE_HIT,
    Entrant,
    Running,
    memory_mib,
    parbake,
    pids,
    port_of,
    start,
)
from bench.machine import this_machine
from bench.models import Packed
from bench.payloads import Protocol, bodies, calls, check, headers
from bench.peers.model import Model
from bench.processes import cpu_seconds
from bench.report import Section, Table, Target, at_least, at_most
from bench.samples import Sample
from bench.venvs import NotInstalled, python_of, version_of
from parbake.errors import ParbakeError

_MANY_ROWS: Final = 20_000
_ROWS: Final = 2000
_CALLS: Final = 4000
"""Rows asked for over gRPC: what is read and compared before a measurement takes time too."""
_ROWS_OF_LARGE: Final = 32
_TIMES_LONGER: Final = 2.0
"""The large network is measured longer: it answers a hundred rows in a second."""
_FIRST_ROWS: Final = 4
"""Asked for before each measurement, so that what was frozen is awake."""
_SETTLE_S: Final = 0.05
_SHOWN: Final[dict[Protocol, str]] = {
    "json": "JSON",
    "binary": "binary data of the Open Inference Protocol",
    "bytes": "binary data of the Open Inference Protocol",
    "grpc": "gRPC",
}
_RAW: Final = "onnxruntime in this process, one thread"
_NAN: Final = float("nan")
Say: TypeAlias = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Leg:
    """One load: all that can take it are measured beside each other."""

    protocols: tuple[Protocol, ...]
    connections: int
    seconds: float
    everybody: bool = True
    """Whether peers that are never the fastest take part."""
    configured_for: int = 0
    """Peers run as is best for so many connections; 0: for those of this leg."""

    def protocol_of(self, entrant: Entrant) -> Protocol | None:
        """The protocol in which a server runs this leg, or None where it does not."""
        known = entrant.ours or entrant.bare or entrant.fast or self.everybody
        if (self.configured_for or self.connections) not in entrant.connections or not known:
            return None
        return next((protocol for protocol in self.protocols if protocol in entrant.speaks), None)


@dataclass(slots=True)
class Series:
    """All measurements of one server in one leg, each with the yardstick's just before and after it."""

    entrant: Entrant
    leg: Leg
    samples: list[Sample] = field(default_factory=list)
    around: list[tuple[Sample, Sample]] = field(default_factory=list)
    complaint: str = ""

    def middle(self, of: Callable[[Sample], float]) -> float:
        """The median of a figure."""
        return median(map(of, self.samples))

    def to_yardstick(self, of: Callable[[Sample], float]) -> float:
        """The median of a figure's ratios to the yardstick."""
        return median(
            _ratio(of(sample), (of(before) + of(after)) / 2)
            for sample, (before, after) in zip(self.samples, self.around, strict=True)
        )

    def to(self, other: Series, of: Callable[[Sample], float]) -> float:
        """The median of a figure's ratios to that of another server in the same round."""
        return median(_ratio(of(a), of(b)) for a, b in zip(self.samples, other.samples, strict=True))

    @property
    def failed(self) -> int:
        """Requests that got no right answer."""
        return sum(sample.speed.failed for sample in self.samples)


@dataclass(slots=True)
class Field:
    """Who takes part with one model, and what was found of each."""

    packed: Packed
    legs: tuple[Leg, ...]
    servers: list[Running] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Why something was not measured, by its name."""
    cold_s: dict[str, float] = field(default_factory=dict)
    memory_mib: dict[str, float] = field(default_factory=dict)

    def of(self, what: str, protocol: Protocol, connections: int) -> Series | None:
        """One of the series."""
        return next(
            (
                item
                for item in self.series
                if item.entrant.what == what
                and protocol in item.leg.protocols
                and item.leg.connections == connections
            ),
            None,
        )

    def best_peer(
        self,
        protocol: Protocol,
        connections: int,
        of: Callable[[Sample], float],
        *,
        most: bool = True,
    ) -> Series | None:
        """The peer with the largest (or smallest) median of a figure, where there is one."""
        found = [
            item
            for item in self.series
            if not item.entrant.ours
            and not item.entrant.bare
            and protocol in item.leg.protocols
            and item.leg.connections == connections
            and not math.isnan(item.middle(of))
        ]
        return (max if most else min)(found, key=lambda item: item.middle(of), default=None)


def _ratio(a: float, b: float) -> float:
    return a / b if b else _NAN


def run(
    client: Client,
    folder: Path,
    *,
    rounds: int,
    seconds: float,
    quick: bool,
    peers: Collection[str] | None,
    say: Say,
) -> Section:
    """Measure everything. ``peers`` are folders of bench/peers, all without it; ``quick`` installs nothing."""
    pythons, missing = _pythons(peers, install=not quick, say=say)
    fields: list[Field] = []
    for field_ in _fields(folder, seconds, quick, say):
        field_.missing |= missing
        _race(client, field_, folder, pythons, rounds, alone=not quick and not fields, say=say)
        fields.append(field_)
    return _section(client, fields, rounds)


def _pythons(
    peers: Collection[str] | None, *, install: bool, say: Say
) -> tuple[dict[str, Path], dict[str, str]]:
    """The interpreter of each peer that can be had, and why the others cannot."""
    pythons: dict[str, Path] = {"bare": OWN_PYTHON, "bare_grpc": OWN_PYTHON, "": OWN_PYTHON}
    missing: dict[str, str] = {}
    for peer in ROSTER:
        if peers is not None and peer.folder not in peers:
            missing[peer.name] = "left out"
            continue
        try:
            pythons[peer.folder] = python_of(peer.folder, install=install, say=say)
        except NotInstalled as error:
            missing[peer.name] = str(error)
    return pythons, missing


def _fields(folder: Path, seconds: float, quick: bool, say: Say) -> list[Field]:
    say("packing the models")
    micro = models.logistic_regression(folder / "logistic", 1000 if quick else _MANY_ROWS)
    protocols: tuple[tuple[Protocol, ...], ...] = (("json",), ("binary", "bytes"), ("grpc",))
    if quick:
        loads: list[tuple[tuple[Protocol, ...], int]] = [(kind, 64) for kind in protocols]
        loads.append((("json",), 1))
        return [Field(micro, tuple(Leg(kind, count, seconds, False) for kind, count in loads))]
    counts = (64, 8, 1)
    large = Leg(("json",), 8, _TIMES_LONGER * seconds, configured_for=64)
    return [
        Field(micro, tuple(Leg(kind, count, seconds, count != 8) for kind in protocols for count in counts)),
        *(
            Field(packed, tuple(Leg(("json",), count, seconds, count == 64) for count in (64, 1)))
            for packed in (
                models.forest(folder / "forest", _ROWS),
                models.network(folder / "network", _ROWS),
            )
        ),
        Field(models.resnet(folder / "resnet", _ROWS_OF_LARGE), (large,)),
    ]


def _race(
    client: Client,
    field_: Field,
    folder: Path,
    pythons: dict[str, Path],
    rounds: int,
    *,
    alone: bool,
    say: Say,
) -> None:
    """All rounds with one model. ``alone``: servers start one by one, and their cold start is kept."""
    packed = field_.packed
    large = packed.row_us > 2000
    with ExitStack() as stack:
        _start(stack, field_, folder / f"run-{packed.onnx.parts[-3]}", pythons, alone, say)
        own = Own(warm_up_s=0.5) if large else client
        model = Model(str(packed.onnx)) if large else None
        for number in range(rounds):
            for leg in field_.legs:
                say(
                    f"{packed.what}, {_SHOWN[leg.protocols[0]]}, {leg.connections} connections, "
                    f"round {number + 1} of {rounds}"
                )
                _round(own, field_, leg, model)
        field_.memory_mib |= {server.entrant.what: memory_mib(server) for server in field_.servers}
        # All at once: some take a second to end.
        for server in field_.servers:
            server.terminate()


def _start(
    stack: ExitStack, field_: Field, folder: Path, pythons: dict[str, Path], alone: bool, say: Say
) -> None:
    """Start everybody, and keep those that answer rightly."""
    packed = field_.packed
    spoken = {protocol for leg in field_.legs for protocol in leg.protocols}
    everybody = [
        BARE,
        *([BARE_GRPC] if "grpc" in spoken else []),
        *parbake(packed, folder, all_ways="grpc" in spoken),
        *(entrant for peer in ROSTER if peer.folder in pythons for entrant in peer.entrants),
    ]
    waiting: list[Running] = []
    for entrant in everybody:
        if not any(leg.protocol_of(entrant) for leg in field_.legs):
            continue
        say(f"{packed.what}: starting {entrant.what}")
        try:
            server = start(
                entrant,
                packed,
                pythons[entrant.peer],
                folder / entrant.what.replace(" ", "-").replace(",", ""),
            )
        except (ParbakeError, OSError) as error:
            field_.missing[entrant.what] = _line(error)
            continue
        stack.callback(server.close)
        if alone or entrant.ours:
            _admit(field_, server, alone)
        else:
            waiting.append(server)
    for server in waiting:
        _admit(field_, server, alone)


def _admit(field_: Field, server: Running, alone: bool) -> None:
    packed, entrant = field_.packed, server.entrant
    try:
        server.wait(packed)
        count = min(CHECKED, len(packed.rows))
        for protocol in {leg.protocol_of(entrant) for leg in field_.legs}:
            if protocol is None:
                continue
            check(packed, protocol, port_of(server, protocol), server.path, range(count), entrant.tolerance)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        field_.missing[entrant.what] = _line(error)
        return
    finally:
        server.freeze()
    if alone:
        field_.cold_s[entrant.what] = server.cold_start_s
    field_.servers.append(server)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _round(client: Client, field_: Field, leg: Leg, model: Model | None) -> None:
    """Everybody once: the yardstick, parbake, the yardstick, the peers."""
    taking = [server for server in field_.servers if leg.protocol_of(server.entrant)]
    yardstick = next((server for server in taking if server.entrant.bare), None)

    def measure_yardstick() -> Sample:
        if model is not None:
            return _in_process(model, field_.packed, leg.seconds / 2)
        if yardstick is None:
            return Sample(Speed(0, leg.seconds, _NAN, _NAN, 0))
        return _sample(client, field_, leg, yardstick, _series(field_, leg, yardstick.entrant))

    def measure(*, ours: bool) -> list[Series]:
        found = []
        for server in taking:
            if server.entrant.ours is ours and not server.entrant.bare:
                series = _series(field_, leg, server.entrant)
                series.samples.append(_sample(client, field_, leg, server, series))
                found.append(series)
        return found

    before = measure_yardstick()
    found = measure(ours=True)
    after = measure_yardstick()
    found += measure(ours=False)
    for series in found:
        series.around.append((before, after))


def _series(field_: Field, leg: Leg, entrant: Entrant) -> Series:
    for item in field_.series:
        if item.entrant is entrant and item.leg is leg:
            return item
    field_.series.append(Series(entrant, leg))
    return field_.series[-1]


def _sample(client: Client, field_: Field, leg: Leg, server: Running, series: Series) -> Sample:
    """Wake a server, measure it, freeze it again; one that fails has a rate of 0."""
    packed = field_.packed
    protocol = leg.protocol_of(server.entrant)
    assert protocol is not None
    requests = bodies(packed, protocol)
    tolerance = server.entrant.tolerance
    server.thaw()
    try:
        if protocol != "grpc":
            check(packed, protocol, server.port, server.path, range(_FIRST_ROWS), tolerance)
        time.sleep(_SETTLE_S)
        everybody = pids(server)
        cpu = cpu_seconds(everybody)
        if protocol == "grpc":
            found = calls(
                packed, requests[:_CALLS], server.grpc_port, leg.connections, leg.seconds, tolerance
            )
            series.complaint = series.complaint or found.complaint
            failed = found.wrong + found.failed
            speed = Speed(found.requests, found.seconds, found.p50_ms, found.p99_ms, found.right, failed)
        else:
            speed = client.measure(
                server.port,
                server.path,
                requests,
                leg.connections,
                leg.seconds,
                headers(packed, protocol),
            )
        return Sample(speed, _ratio((cpu_seconds(everybody) - cpu) * 1e6, speed.replies))
    except (RuntimeError, OSError) as error:
        series.complaint = series.complaint or _line(error)
        return Sample(Speed(0, leg.seconds, _NAN, _NAN, 0, 1))
    finally:
        server.freeze()


def _in_process(model: Model, packed: Packed, seconds: float) -> Sample:
    """Rows per second of the model alone, one row a call or eight, whichever is more."""
    best = 0.0
    for size in (1, 8):
        rows = np.asarray(packed.rows[:size], np.float32)
        done, started = 0, time.perf_counter()
        while (passed := time.perf_counter() - started) < seconds / 2 or not done:
            model.answers(rows)
            done += size
        best = max(best, done / passed)
    return Sample(Speed(round(best * 1000), 1000.0, 1e3 / best, _NAN, 1, 0))


# The section ----------------------------------------------------------------------------------------------------------


def _section(client: Client, fields: Sequence[Field], rounds: int) -> Section:
    micro = fields[0]
    missing: dict[str, str] = {}
    for item in fields:
        for what, why in item.missing.items():
            missing.setdefault(what, why)
        for series in item.series:
            if series.complaint:
                missing.setdefault(f"{series.entrant.what} in part", series.complaint)
    seconds = micro.legs[0].seconds
    left_out = [f"{what} ({why})" for what, why in missing.items() if why != "left out"]
    return Section(
        key="race",
        title="The race",
        how=(
            "The same model, rows and load for everybody, in turn in the same run; one row per request; the graph in "
            "onnxruntime with one thread and without spinning; each peer in the configuration that was the fastest of "
            f"it for the load. Load from {client.name} on the same CPUs, for gRPC from bench/rpc.py, for the large "
            f"network from bench/load.py. Medians of {rounds} rounds of {seconds:g} s (the large network "
            f"{_TIMES_LONGER * seconds:g} s), and the range. Every server's answers are compared with the model's "
            "before it is timed, alone and many at a time. / bare: in ratio to the bare loop and parser in the same "
            "round. Everything on: validation, limits, admission, metrics, and the prediction log with outputs and "
            f"hashed inputs. Not measured: {'; '.join(left_out) if left_out else 'nobody'}."
        ),
        tables=(*(table for item in fields for table in _tables(item)), _costs(micro)),
        targets=tuple(target for item in fields for target in _targets(item)),
        machine=this_machine(),
        figures={item.packed.what: {"row_us": item.packed.row_us, "series": _raw(item)} for item in fields},
    )


def _tables(field_: Field) -> list[Table]:
    found = []
    for leg in field_.legs:
        series = [item for item in field_.series if item.leg is leg and not item.entrant.bare]
        if not series:
            continue
        best = field_.best_peer(leg.protocols[0], leg.connections, samples.rate)
        series.sort(
            key=lambda item: (not item.entrant.ours, -item.middle(samples.rate) if item.entrant.peer else 0)
        )
        rows = [_yardstick_row(field_, leg, series, best)]
        rows += [_row(item, best) for item in series]
        load = "1 connection" if leg.connections == 1 else f"{leg.connections} connections"
        yardstick = "/ alone" if field_.packed.row_us > 2000 else "/ bare"
        found.append(
            Table(
                f"{field_.packed.what} ({field_.packed.row_us:,.0f} us for a row on its own), "
                f"{_SHOWN[leg.protocols[0]]}, {load}",
                (
                    "server", "requests/s", "range", "p50 ms", "p99 ms", "CPU us/request", yardstick,
                    "/ fastest peer", "failed",
                ),
                tuple(rows),
            )
        )  # fmt: skip
    return found


def _yardstick_row(field_: Field, leg: Leg, series: Sequence[Series], best: Series | None) -> tuple[str, ...]:
    around = [sample for item in series for pair in item.around for sample in pair]
    rates = [samples.rate(sample) for sample in around]
    what = _RAW if field_.packed.row_us > 2000 else (BARE_GRPC if "grpc" in leg.protocols else BARE).what
    return (
        what,
        f"{median(rates):,.0f}",
        _range(rates),
        f"{median(map(samples.p50, around)):.3f}",
        _number(median(map(samples.p99, around)), 3),
        _number(median(map(samples.cpu, around)), 1),
        "1",
        _number(_ratio(median(rates), best.middle(samples.rate)), 2) if best else "",
        str(sum(sample.speed.failed for sample in around)),
    )


def _row(item: Series, best: Series | None) -> tuple[str, ...]:
    return (
        item.entrant.what,
        f"{item.middle(samples.rate):,.0f}",
        _range([samples.rate(sample) for sample in item.samples]),
        _number(item.middle(samples.p50), 3),
        _number(item.middle(samples.p99), 3),
        _number(item.middle(samples.cpu), 1),
        _number(item.to_yardstick(samples.rate), 3),
        _number(item.to(best, samples.rate), 2) if best else "",
        f"{item.failed:,}",
    )


def _range(rates: Sequence[float]) -> str:
    return f"{min(rates):,.0f} to {max(rates):,.0f}"


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:,.{digits}f}"


def _costs(field_: Field) -> Table:
    """Version, cold start and memory of everybody."""
    versions = {
        entrant.peer: _version(peer.folder, peer.distribution) for peer in ROSTER for entrant in peer.entrants
    }
    return Table(
        f"Cold start to the first right answer, and memory (PSS) after the load; {field_.packed.what}",
        ("server", "version", "cold start s", "memory MiB"),
        tuple(
            (
                what,
                versions.get(server.entrant.peer, metadata.version("parbake") if server.entrant.ours else ""),
                _number(field_.cold_s.get(what, _NAN), 2),
                _number(field_.memory_mib.get(what, _NAN), 0),
            )
            for server in field_.servers
            for what in (server.entrant.what,)
        ),
    )


def _version(folder: str, distribution: str) -> str:
    try:
        return version_of(folder, distribution)
    except metadata.PackageNotFoundError:
        return ""


def _targets(field_: Field) -> list[Target]:
    """What is promised for one model; in ratio to peers only where one was measured."""
    packed, found = field_.packed, []
    if packed.row_us > 2000:
        if series := field_.of(PROCESS, "json", 8):
            what = f"{packed.what}: rows/s / the model alone"
            found.append(at_least(what, series.to_yardstick(samples.rate), 0.95))
        return found
    if "logistic" not in packed.what:
        best = field_.best_peer("json", 64, samples.rate)
        inline = field_.of(INLINE, "json", 64)
        if best and inline:
            found.append(
                at_least(f"{packed.what}: requests/s / fastest peer", inline.to(best, samples.rate), 1.75)
            )
        return found
    crowd = field_.best_peer("json", 64, samples.rate)
    inline, table = field_.of(INLINE, "json", 64), field_.of(TABLE_HIT, "json", 64)
    if crowd and inline and table:
        found += [
            at_least("dynamic: requests/s / fastest peer", inline.to(crowd, samples.rate), 2),
            at_most("dynamic: p99 / fastest peer's", inline.to(crowd, samples.p99), 1),
            at_least("table hit: requests/s / fastest peer", table.to(crowd, samples.rate), 2.5),
        ]
    for what, least in ((ALL_DYNAMIC, 0.45), (ALL_TABLE, 0.6)):
        if series := field_.of(what, "json", 64):
            found.append(
                at_least(
                    f"{what.removeprefix('parbake, ')}: requests/s / bare",
                    series.to_yardstick(samples.rate),
                    least,
                )
            )
    for protocol in ("binary", "grpc"):
        best, inline = field_.best_peer(protocol, 64, samples.rate), field_.of(INLINE, protocol, 64)
        if best and inline:
            shown = "gRPC" if protocol == "grpc" else "binary"
            found.append(at_least(f"{shown}: requests/s / fastest peer", inline.to(best, samples.rate), 1))
    quiet = field_.best_peer("json", 1, samples.p50, most=False)
    if lone := field_.of(INLINE, "json", 1):
        if quiet:
            found.append(at_most("1 connection: p50 / best peer's", lone.to(quiet, samples.p50), 0.75))
        own_ms = packed.row_us / 1e3
        ratios = [
            samples.p50(sample) / ((samples.p50(before) + samples.p50(after)) / 2 + own_ms)
            for sample, (before, after) in zip(lone.samples, lone.around, strict=True)
        ]
        found.append(at_most("1 connection: p50 / bare loop and model", median(ratios), 1.5))
    return found


def _raw(field_: Field) -> list[dict[str, Any]]:
    return [
        {
            "server": item.entrant.what,
            "protocol": item.leg.protocol_of(item.entrant),
            "connections": item.leg.connections,
            "requests_per_s": [samples.rate(sample) for sample in item.samples],
            "p50_ms": _plain(item, samples.p50),
            "p99_ms": _plain(item, samples.p99),
            "cpu_us": _plain(item, samples.cpu),
            "failed": item.failed,
            "requests_per_s_to_bare": item.to_yardstick(samples.rate),
            "cold_start_s": field_.cold_s.get(item.entrant.what),
            "memory_mib": field_.memory_mib.get(item.entrant.what),
        }
        for item in field_.series
        if item.samples
    ]


def _plain(item: Series, of: Callable[[Sample], float]) -> list[float | None]:
    """A figure in each round; JSON has no NaN."""
    return [None if math.isnan(value) else value for value in map(of, item.samples)]
