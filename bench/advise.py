"""Hold the advisor to its word: what it predicts for three models and two traces, and what the server then does.

Each model is measured as ``parbake advise`` does it. Then for each trace and way of serving a real server is put under
load from a cold start, and the advisor's model of it is followed for as long with as many connections; what the load
generator itself costs, on the same CPUs, is measured beforehand against a server that does nothing, and the advisor is
told. Machines are not equally quick all the time, so the pace of this one is looked at meanwhile
(`parbake.runtime.pace`) and the advisor is told that too. All of it is done some times over; what counts is how far off
the predictions are in the median.
"""

from __future__ import annotations

import lzma
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from bench.load import Load as Requests
from bench.load import put
from bench.machine import this_machine
from bench.network import convolutions_of, packed_network, row_body, rows_of
from bench.processes import cpu_seconds, peer, with_descendants
from bench.quiet import LOOKS, MOST_STOLEN, Quiet, Stolen, busy_s
from bench.report import Section, Table, at_most
from bench.samples import rows_and_hits
from parbake.advisor.model import Costs, Load
from parbake.advisor.queueing import Answers, simulate
from parbake.advisor.traffic import Keys, numbered
from parbake.app.advise import LearnedHead
from parbake.app.measure import examples_of, measure, quick_table
from parbake.contract.bundle import StoredBundle
from parbake.contract.key import Keys as RowKeys
from parbake.monitoring.trace import shifting_keys, zipf_keys
from parbake.runtime.pace import Pace
from parbake.testing import serving

TRACES: Final = Path(__file__).parents[2] / "shared" / "traces"
_CONSTANT: Final = Path(__file__).parent / "peers" / "bare" / "server.py"
_CONNECTIONS: Final = 32

WAYS: Final = ("dynamic", "static", "hybrid")
_FIGURES: Final = {"requests_per_s": ",.0f", "p50_ms": ".3f", "p99_ms": ".3f", "coverage": ".3f"}
_HEADINGS: Final = ("req/s predicted", "p50 ms predicted", "p99 ms predicted", "coverage predicted")
_PROMISED: Final = ("requests_per_s", "p50_ms", "coverage")
_SEED: Final = 7
_BUDGET: Final = 0.05
_WARM_UP_S: Final = 2.0
"""A server that was just started takes longer for a request in its first two seconds."""
_CLIENT_S: Final = 1.0
"""How long is looked at what the load generator takes."""
_PACE_S: Final = 0.1
_CLIENT_START_S: Final = 0.3
"""About what the load generator takes to start: Python and its imports."""
_NEVER: Final = 1 << 60


@dataclass(frozen=True, slots=True)
class _Model:
    what: str
    row_s: float
    """What a row takes, about, in batches of ``batch`` rows; 0: as little as can be."""
    batch: int = 32
    """With 1 it is exported for one row at a time."""
    longer: int = 1
    """How much longer it is looked at: few requests tell little."""


_MODELS: Final = (
    _Model("microseconds", 0),
    _Model("about 1 ms", 1e-3),
    _Model("about 20 ms", 20e-3, batch=1, longer=3),
)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a server did, or what it was predicted to do."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    coverage: float
    """Share of all requests that were answered without the model, those of the warm-up too."""


@dataclass(frozen=True, slots=True)
class Case:
    """One way of serving one model under one trace: a prediction and what came, as often as it was done."""

    model: str
    trace: str
    way: str
    predicted: tuple[Seen, ...]
    observed: tuple[Seen, ...]
    quickness: tuple[float, ...]
    """Of the machine when it was observed, in ratio to when the model was measured; it is in the predictions."""

    def ratio(self, figure: str) -> float | None:
        """Predicted in ratio to observed, in the median; None where there is nothing to compare."""
        pairs = zip(_column(self.predicted, figure), _column(self.observed, figure), strict=True)
        found = [predicted / observed for predicted, observed in pairs if observed]
        return median(found) if found else None


def _column(seen: Sequence[Seen], figure: str) -> list[float]:
    return [getattr(one, figure) for one in seen]


def run(folder: Path, *, seconds: float, rounds: int, quick: bool, say: Callable[[str], None]) -> Section:
    """Predict, run and compare. ``quick`` takes the first model and trace only."""
    with peer(_CONSTANT) as (_, port), Pace() as pace:
        return _run(folder, port, pace, seconds, rounds, quick, say)


def _run(
    folder: Path,
    constant: int,
    pace: Pace,
    seconds: float,
    rounds: int,
    quick: bool,
    say: Callable[[str], None],
) -> Section:
    traces, generated = _traces()
    cases: list[Case] = []
    sizes: dict[str, tuple[float, float]] = {}
    models: tuple[_Model, ...] = _MODELS
    if quick:
        models, traces = models[:1], traces[:1]
    measured: dict[str, list[Costs]] = {}
    clients_s: list[float] = []
    quiet = Quiet()
    for model in models:
        what, longer = model.what, model.longer
        say(f"{what}: packing")
        rows = rows_of(max(int(keys.max()) + 1 for _, keys in traces))
        single = model.batch == 1
        to = folder / what.replace(" ", "-")
        layers = convolutions_of(to / "tried", model.row_s, model.batch) if model.row_s else 0
        bundle = packed_network(to / "network", layers, rows[: 8 if single else 64], single=single)
        bodies = tuple(row_body(row) for row in rows)
        keys_of = RowKeys(bundle.contract)
        hashes = [keys_of.of([row.tobytes()], 1)[0] for row in rows]
        # A lookup takes as long whatever it finds: one record for all keys.
        every = cycle(examples_of(bundle).records)
        tables: dict[str, Path] = {}
        for trace, keys in traces:
            distinct = int(keys.max()) + 1
            tables[trace] = bundle.path.parent / f"{trace}.table"
            records = [next(every) for _ in range(distinct)]
            sizes[f"{what}, {trace}"] = (
                0.0,
                float(quick_table(bundle, hashes[:distinct], records, tables[trace])),
            )
        found: dict[tuple[str, str], list[tuple[Seen, Seen, float]]] = {}
        for number in range(rounds):
            costs = measure(
                bundle,
                connections=_CONNECTIONS,
                deadline_s=10.0,
                pace=pace,
                stage=lambda words, what=what: say(f"{what}: {words}"),  # type: ignore[misc]
            )
            measured.setdefault(what, []).append(costs)
            client_s = _client_s(constant, bodies[0], costs.pace, pace)
            clients_s.append(client_s)
            for trace, keys in traces:
                order, distinct = tuple(keys.tolist()), int(keys.max()) + 1
                sizes[f"{what}, {trace}"] = distinct * costs.table_row_bytes, sizes[f"{what}, {trace}"][1]
                for way in WAYS:
                    say(f"{what}, {trace}: {way}, {number + 1} of {rounds}")
                    head_rows = max(int(distinct * _BUDGET), 1)
                    words = ["--mode", way, "--workers", "1"]
                    words += ["--table", str(tables[trace])] if way == "static" else []
                    words += ["--head-rows", str(head_rows)] if way == "hybrid" else []
                    load = Requests(
                        0,
                        f"/v2/models/{bundle.contract.name}/infer",
                        bodies[:distinct],
                        order,
                        _CONNECTIONS,
                        longer * seconds,
                        warm_up_s=_WARM_UP_S,
                    )
                    look = quiet.look(partial(_observe, bundle, words, load, pace))
                    quickness = float(np.mean(look.paces)) / costs.pace
                    predicted = _predict(
                        costs, look, _Ways(way, order, head_rows), longer * seconds, client_s
                    )
                    found.setdefault((trace, way), []).append((predicted, look.seen, quickness))
        for (trace, way), looks in found.items():
            foretold, seen, quick_then = zip(*looks, strict=True)
            cases.append(Case(what, trace, way, foretold, seen, quick_then))
    return _section(cases, sizes, measured, median(clients_s), seconds, rounds, generated, quiet.again)


def _client_s(port: int, body: bytes, usual: float, pace: Pace) -> float:
    """CPU time of the load generator per request at the ``usual`` pace, as a server shows it that does nothing else."""
    since = time.monotonic()
    looked = put(Requests(port, "/", (body,), (0,), _CONNECTIONS, _CLIENT_S, warm_up_s=0.2))
    return looked.busy * looked.seconds / looked.requests * pace.between(since) / usual


@dataclass(frozen=True, slots=True)
class _Look:
    """What a server did, and what the machine was doing meanwhile."""

    seen: Seen
    others: float
    """CPUs that other programs took."""
    paces: npt.NDArray[np.float64]
    """Of the machine, in parts of `_PACE_S`."""


def _observe(bundle: StoredBundle, words: list[str], load: Requests, pace: Pace) -> tuple[_Look, float]:
    """Put a server under load, from its start; gives the share of CPU time that was stolen too."""
    with serving(bundle.path, arguments=words) as server:
        pids = with_descendants(server.process.pid)
        (busy, stolen), own = busy_s(), cpu_seconds(pids)
        started, theft = time.monotonic(), Stolen()
        seen = put(msgspec.structs.replace(load, port=server.port))
        passed = time.monotonic() - started
        paces = pace.parts(started + passed - load.seconds - load.warm_up_s, started + passed, _PACE_S)
        busy, stolen = (now - before for now, before in zip(busy_s(), (busy, stolen), strict=True))
        share = theft.share()
        ours = cpu_seconds(pids) - own + seen.busy * (seen.seconds + _WARM_UP_S) + _CLIENT_START_S
        if seen.failed or seen.unknown:
            raise RuntimeError(f"{' '.join(words)}: {seen.failed} failures; first: {seen.complaint}")
        rows, hits = rows_and_hits(server.url)
        look = _Look(
            Seen(seen.requests_per_s, seen.p50_ms, seen.p99_ms, hits / rows if rows else 0.0),
            max(busy + stolen - ours, 0.0) / passed,
            paces,
        )
        return look, share


def _predict(costs: Costs, look: _Look, ways: _Ways, seconds: float, client_s: float) -> Seen:
    """What the advisor says of a machine that is as quick from moment to moment as this one was seen to be."""
    mean = float(np.mean(look.paces))
    slower = costs.pace / mean
    simulated = simulate(
        replace(costs.times(slower), cores=max(costs.cores - look.others, 0.5)),
        Load(_CONNECTIONS),
        ways.answers,
        requests=_NEVER,
        most_s=_WARM_UP_S + seconds,
        warm_up_s=_WARM_UP_S,
        client_s=client_s * slower,
        paces=(look.paces / mean).tolist(),
        pace_s=_PACE_S,
    )
    return Seen(simulated.per_s, simulated.p50_s * 1e3, simulated.p99_s * 1e3, ways.coverage)


class _Ways:
    """What is kept in each way of serving, and how much of it all requests found."""

    def __init__(self, way: str, order: tuple[int, ...], head_rows: int) -> None:
        self._way = way
        self._order = order
        self._head = LearnedHead(head_rows, None)
        self.asked = self.found = 0
        self.answers = Answers(self._hit, self._computed)
        if way == "hybrid":
            self.answers = Answers(self._hit, self._computed, self._key, self._joined)

    @property
    def coverage(self) -> float:
        """Of all requests, the warm-up too."""
        return self.found / self.asked if self.asked else 0.0

    def _key(self, number: int) -> int:
        return self._order[number % len(self._order)]

    def _hit(self, number: int) -> bool:
        hit = self._way == "static" or (self._way == "hybrid" and self._head.hit(self._key(number)))
        self.asked += 1
        self.found += hit
        return hit

    def _computed(self, number: int) -> None:
        if self._way == "hybrid":
            self._head.computed(self._key(number))

    def _joined(self, number: int) -> None:
        self._head.joined(self._key(number))


def _traces() -> tuple[list[tuple[str, Keys]], bool]:
    """Two traces; made with a fixed seed where the real ones are not there."""
    paths = [TRACES / f"{name}.trace.xz" for name in ("web12", "web07")]
    if all(path.exists() for path in paths):
        return [
            (path.name.partition(".")[0], numbered(np.frombuffer(lzma.decompress(path.read_bytes()), ">u4")))
            for path in paths
        ], False
    return [
        ("zipf", numbered(zipf_keys(1.0, 15_000, 80_000, seed=_SEED))),
        ("shifting head", numbered(shifting_keys(1.0, 10_000, 80_000, every=4_000, share=0.1, seed=_SEED))),
    ], True


def _section(
    cases: list[Case],
    sizes: dict[str, tuple[float, float]],
    measured: dict[str, list[Costs]],
    client_s: float,
    seconds: float,
    rounds: int,
    generated: bool,
    again: int,
) -> Section:
    lines: list[tuple[str, ...]] = []
    off: dict[str, list[tuple[float, str]]] = {figure: [] for figure in _FIGURES}
    for case in cases:
        name = f"{case.model}, {case.trace}, {case.way}"
        line = [name]
        for figure, form in _FIGURES.items():
            ratio = case.ratio(figure)
            line += [format(median(_column(seen, figure)), form) for seen in (case.predicted, case.observed)]
            line.append("" if ratio is None else f"{ratio:.2f}")
            if ratio is not None:
                off[figure].append((abs(ratio - 1), name))
        lines.append(tuple(line))
    targets = []
    for figure in _PROMISED:
        worst, where = max(off[figure])
        words = f"{figure.partition('_')[0]}: predicted against observed, off by (worst: {where})"
        targets.append(at_most(words, worst, 0.15))
    off_size = max(abs(predicted / real - 1) for predicted, real in sizes.values())
    targets.append(at_most("table size: predicted against real, off by", off_size, 0.05))
    took = ", ".join(f"{1e3 * median(one.model.row_s for one in costs):.2g}" for costs in measured.values())
    quick = [one for case in cases for one in case.quickness]
    quickness, least, most = median(quick), min(quick), max(quick)
    source = (
        "generated with a fixed seed (the traces of a shop are not here)"
        if generated
        else "of a shop's pages"
    )
    return Section(
        key="advise",
        title="The advisor's word",
        how=(
            f"Predicted by the advisor from what it measured on this machine, and observed: {_CONNECTIONS} connections "
            f"that never rest for {seconds:g} s after {_WARM_UP_S:g} s (three times as long for the slowest model), "
            f"from a cold start, hybrid with a learned head of {100 * _BUDGET:g} % of the keys; {rounds} times over, "
            "each figure and ratio the median. No machine is equally quick all the time: what is measured and what is "
            "predicted is for the pace that `parbake.runtime.pace` sees at the same time (in ratio to when the model "
            f"was measured: median {quickness:.2f}, from {least:.2f} to {most:.2f}); looks during which "
            f"more than {MOST_STOLEN:.0%} of the CPU time was taken from the machine were done again, up to "
            f"{LOOKS - 1} times each ({again} in all). "
            f"A row takes {took} ms of the models, in large batches and as the advisor measured it. "
            "Load from bench/load.py on the same CPUs, which takes "
            f"{client_s * 1e6:.1f} us of CPU time for a request; the prediction counts that in, and the CPUs that "
            f"other programs took meanwhile. Traces {source}."
        ),
        tables=(
            Table(
                "Predicted and observed",
                (
                    "model, trace, way",
                    *(words for figure in _HEADINGS for words in (figure, "observed", "ratio")),
                ),
                tuple(lines),
            ),
            Table(
                "Bytes of the table of all keys",
                ("model, trace", "predicted", "real", "ratio"),
                tuple(
                    (name, f"{predicted:,.0f}", f"{real:,.0f}", f"{predicted / real:.3f}")
                    for name, (predicted, real) in sizes.items()
                ),
            ),
        ),
        targets=tuple(targets),
        machine=this_machine(),
        figures={
            "cases": [
                {
                    "model": case.model,
                    "trace": case.trace,
                    "way": case.way,
                    "predicted": [asdict(one) for one in case.predicted],
                    "observed": [asdict(one) for one in case.observed],
                    "quickness": case.quickness,
                }
                for case in cases
            ],
            "costs": {what: msgspec.to_builtins(costs) for what, costs in measured.items()},
            "client_s": client_s,
        },
    )
