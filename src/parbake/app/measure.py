"""Measure on this machine what the advisor needs to know of a bundle: the model, the front, a row of a table."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import IO, Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import uvloop

from parbake.advisor.model import BatchTime, Costs, FrontCost, ModelCost
from parbake.advisor.queueing import largest_batch
from parbake.contract.bundle import StoredBundle
from parbake.contract.key import KEY_BYTES, Keys
from parbake.contract.model import Contract, TensorSpec
from parbake.contract.record import Records
from parbake.contract.rounding import round_inputs
from parbake.contract.tensors import Tensor, Tensors, as_text, to_raw
from parbake.errors import NotReady, PackRefused
from parbake.runtime import cpu
from parbake.runtime.costs import BatchCost
from parbake.runtime.pace import Pace
from parbake.runtime.session import Session
from parbake.serving.head import ENTRY_BYTES
from parbake.settings import Placement
from parbake.tables.model import Lineage, layout_of
from parbake.tables.service import build, publish

ROWS: Final = (1, 2, 4, 8, 16, 32, 64)
_PASSES: Final = 5
"""How often each thing is looked at, a moment each, with all others in between: what disturbs does not last so long."""
_FEWEST_PASSES: Final = 3
_LONG_S: Final = 20.0
"""After this time there are no more passes than that: a model is slow."""
_ENOUGH_S: Final = 0.1
_CALLS: Final = 80
_FEWEST_CALLS: Final = 2
_LONGEST_CALL_S: Final = 0.4
_TABLE_ROWS: Final = 20_000
_BODIES: Final = 256
_MANY: Final = 8192
"""Rows of the table that hits are measured with: as in real traffic, most are not what was asked for just now."""
_HELD_OF: Final = 4
"""Rows that are asked for, for each that the learned head holds."""
_RUN_S: Final = 0.2
_FAR_OUT: Final = 0.01
"""Share of the latencies that are taken for the one below them: a machine that stands still for a moment, which all
connections feel, is no scatter. More of them where there are few latencies for each connection."""
_MOST_FAR_OUT: Final = 0.1
_MOST_SCATTER: Final = 1.0
_STEADY_S: Final = 0.5
"""How long the parts are whose paces are compared to tell how steady the machine is."""
_START_S: Final = 60.0
_INLINE_BATCH_S: Final = 0.002
_LONGEST_BATCH_S: Final = 0.25
_LARGEST_BATCH: Final = 1024
_COUNTED: Final = (
    "parbake_batch_rows_count",
    "parbake_batch_rows_sum",
    "parbake_rows_total",
    "parbake_table_hits_total",
)
_READY: Final = re.compile(r"serving .* on (?P<url>http://\S+)")

Stage = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Examples:
    """Rows of the bundle's goldens, ready to be run, kept and asked for."""

    raws: tuple[tuple[bytes, ...], ...]
    """Per row, per input."""
    shapes: tuple[tuple[int, ...], ...]
    keys: tuple[bytes, ...]
    records: tuple[bytes, ...]
    bodies: tuple[bytes, ...]
    """The same rows as requests of the Open Inference Protocol."""


def examples_of(bundle: StoredBundle) -> Examples:
    """Rows to measure with. Raises `PackRefused` where the bundle has no goldens."""
    goldens = bundle.goldens()
    if not goldens.rows:
        raise PackRefused(f"{bundle.path} has no goldens to measure with", hint="pack it with an example")
    count = min(goldens.rows, _BODIES)
    inputs = {name: array[:count] for name, array in goldens.inputs.items()}
    outs, out_shapes = _columns(bundle.contract.outputs, goldens.outputs, count)
    join = Records(bundle.contract).join
    return _examples(bundle.contract, inputs, [join(list(raws), out_shapes) for raws in outs])


def _varied(bundle: StoredBundle, examples: Examples) -> Examples:
    """Rows like the goldens, but more of them: numbers are changed a little, and the records are those of others.

    They are for lookups only, never for the model, which may not know them.
    """
    goldens = bundle.goldens()
    count = min(goldens.rows, _BODIES)
    copies = max(_MANY // count, 1)
    inputs: dict[str, Tensor] = {}
    for name, array in goldens.inputs.items():
        values = np.concatenate([array[:count]] * copies)
        step = np.repeat(np.arange(copies), count).reshape(-1, *[1] * (values.ndim - 1))
        if values.dtype.kind == "f":
            values = (values + step / 1024).astype(values.dtype)
        elif values.dtype.kind in "iu":
            # Small enough for any integer type, and never out of its range.
            values = np.where(values > 0, values - step % 100 % np.maximum(values, 1), values).astype(
                values.dtype
            )
        inputs[name] = values
    every = cycle(examples.records)
    return _examples(bundle.contract, inputs, [next(every) for _ in range(count * copies)])


def _examples(contract: Contract, inputs: Tensors, records: Sequence[bytes]) -> Examples:
    rounded = round_inputs(contract, inputs)
    raws, shapes = _columns(contract.inputs, rounded, len(records))
    keys = Keys(contract)
    found: dict[bytes, int] = {}
    for i, row in enumerate(raws):
        found.setdefault(keys.of(list(row), 1, shapes)[0], i)
    picked = list(found.values())
    bodies = [body for i in picked if (body := _body(contract, rounded, i)) is not None]
    return Examples(
        tuple(raws[i] for i in picked),
        shapes,
        tuple(found),
        tuple(records[i] for i in picked),
        tuple(bodies),
    )


class _ModelTimes:
    """Times of batches of `ROWS` rows at a pace of 1, looked at as often as one likes."""

    def __init__(self, session: Session, examples: Examples, pace: Pace) -> None:
        self._session = session
        self._examples = examples
        self._pace = pace
        self._times: dict[int, list[float]] = {}
        self._wall_s = self._cpu_s = 0.0

    @property
    def threads(self) -> int:
        """How many threads the model keeps busy."""
        return max(1, round(self._cpu_s / self._wall_s)) if self._wall_s else 1

    def look(self, stage: Stage) -> None:
        """Run batches of each size for a moment, up to those that take too long."""
        shapes = self._examples.shapes
        row_s = 0.0
        for rows in ROWS:
            if row_s * rows > _LONGEST_CALL_S:
                break
            stage(f"the model, {rows} rows at a time")
            raws = batch_of(self._examples, rows)
            times: list[float] = []
            spans: list[tuple[float, float]] = []
            self._session.run_raw(raws, rows, shapes)
            started, started_cpu = time.perf_counter(), time.process_time()
            while len(times) < _CALLS and (len(times) < _FEWEST_CALLS or sum(times) < _ENOUGH_S):
                since, before = time.monotonic(), time.perf_counter()
                self._session.run_raw(raws, rows, shapes)
                times.append(time.perf_counter() - before)
                spans.append((since, since + times[-1]))
            self._wall_s += time.perf_counter() - started
            self._cpu_s += time.process_time() - started_cpu
            row_s = float(np.median(times)) / rows
            self._times.setdefault(rows, []).extend((self._pace.of(spans) * times).tolist())

    @property
    def cost(self) -> ModelCost:
        """What came of all looks."""
        found = [
            BatchTime(rows, *(float(np.quantile(times, share)) for share in (0.5, 0.99)))
            for rows, times in self._times.items()
        ]
        for at in reversed(range(len(found) - 1)):
            # A batch that took longer than a larger one was held up by something else.
            quicker = min(found[at].p50_s, found[at + 1].p50_s)
            found[at] = BatchTime(found[at].rows, quicker, max(found[at].p99_s, quicker))
        fitted = BatchCost()
        for batch in found:
            fitted.observe(batch.rows, batch.p50_s)
        return ModelCost(fitted.fixed_s, fitted.row_s, tuple(found))


def table_row_bytes(contract: Contract, examples: Examples, folder: Path) -> float:
    """Bytes that a row takes in a prediction table: those of a table that is built in ``folder`` for that."""
    random = np.random.default_rng(0)
    keys = random.integers(0, 256, (_TABLE_ROWS, KEY_BYTES), dtype=np.uint8)
    keys = np.unique(keys, axis=0)
    every = cycle(examples.records)
    records = [next(every) for _ in range(len(keys))]
    built = build(
        folder / "size",
        layout_of(contract),
        [(keys, records)],
        most_keys=len(keys),
        most_bytes=sum(map(len, records)),
    )
    return built.data_bytes / built.keys


def head_row_bytes(examples: Examples) -> float:
    """Bytes that a row takes in a learned head."""
    inputs = sum(sum(map(len, raws)) for raws in examples.raws) / len(examples.raws)
    records = sum(map(len, examples.records)) / len(examples.records)
    return ENTRY_BYTES + KEY_BYTES + inputs + records


def measure(
    bundle: StoredBundle,
    *,
    connections: int,
    deadline_s: float,
    placement: Placement = "auto",
    fronts: int = 0,
    allow_pickle: bool = False,
    stage: Stage = lambda words: None,
    pace: Pace | None = None,
) -> Costs:
    """Everything that `Costs` says: of the model in this process, of the front in a server for that.

    It takes a quarter to half a minute, and longer for a slow model.

    Each time is corrected by how quick the machine was just then, in ratio to its mean pace. Who looks at its
    ``pace`` already says so: to look twice as often is to slow down what is measured.

    Raises `NotReady` where no server can be started or a process ends meanwhile, `BundleError` where the bundle
    cannot be loaded, `NotAllowed` where it has a pickle that may not be, and `PackRefused` where it has no goldens to
    measure with.
    """
    examples = examples_of(bundle)
    cores = cpu.quota()
    wanted = max(1, cores)
    with tempfile.TemporaryDirectory(prefix="parbake-advise-") as name, _looking(pace) as pace:
        folder = Path(name)
        row_bytes = table_row_bytes(bundle.contract, examples, folder)
        stage("the model")
        session = Session(bundle, threads=wanted, allow_pickle=allow_pickle)
        stage("a server of its own")
        table = folder / "examples.table"
        many = _varied(bundle, examples)
        quick_table(bundle, many.keys, many.records, table)
        # Most requests are misses and are learned from; and as under real traffic, room is made for many at once.
        head_rows = max(len(examples.bodies) // _HELD_OF, 1)
        with _server(bundle, table, folder, placement, wanted, head_rows, allow_pickle) as server:
            inline = server.inline
            if inline:
                # A front lends a model one thread.
                session = Session(bundle, allow_pickle=allow_pickle)
            times = _ModelTimes(session, examples, pace)
            since = time.monotonic()
            front, scatter = _front_cost(
                server, times, many.bodies, examples.bodies, connections, pace, stage
            )
        paces = pace.parts(since, time.monotonic(), _STEADY_S)
        if not pace.whole:
            raise NotReady("a process that looked at the machine's pace ended", retry_after_s=1.0)
        seen = pace.seen
    model = times.cost
    mean, unsteady = float(np.mean(paces)), float(np.std(paces) / np.mean(paces))
    usual = model.times(1 / mean)
    longest_s = _INLINE_BATCH_S if inline else min(deadline_s / 2, _LONGEST_BATCH_S)
    return Costs(
        model=usual,
        front=front.times(1 / mean),
        inline=inline,
        threads=times.threads,
        fronts=fronts or max(1, cores // 2),
        cores=float(cores),
        table_row_bytes=row_bytes,
        head_row_bytes=head_row_bytes(examples),
        most_batch_rows=largest_batch(usual.fixed_s, usual.row_s, longest_s, _LARGEST_BATCH),
        scatter=min(scatter, _MOST_SCATTER),
        pace=mean if seen else 0.0,
        unsteady=unsteady,
    )


def _looking(pace: Pace | None) -> AbstractContextManager[Pace]:
    return Pace() if pace is None else nullcontext(pace)


def _columns(
    specs: Sequence[TensorSpec], tensors: Tensors, count: int
) -> tuple[list[tuple[bytes, ...]], tuple[tuple[int, ...], ...]]:
    """Raw bytes per row and tensor, and the row shape of each tensor."""
    raws = [
        tuple(to_raw(np.asarray(tensors[spec.name][i : i + 1]), spec.datatype) for spec in specs)
        for i in range(count)
    ]
    return raws, tuple(tuple(np.asarray(tensors[spec.name]).shape[1:]) for spec in specs)


def batch_of(examples: Examples, rows: int) -> list[bytes]:
    """The raw bytes of each input of so many rows: the examples, again and again."""
    count = len(examples.raws)
    return [
        b"".join(examples.raws[i % count][column] for i in range(rows))
        for column in range(len(examples.shapes))
    ]


def _body(contract: Contract, inputs: Tensors, row: int) -> bytes | None:
    """One row as JSON; None where JSON has no word for a value (NaN)."""
    tensors: list[dict[str, Any]] = []
    for spec in contract.inputs:
        array = np.asarray(inputs[spec.name][row : row + 1])
        if spec.datatype == "BYTES":
            data = [str(value) for value in as_text(array.astype(object)).reshape(-1)]
            values: list[Any] = data
        else:
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                return None
            # The shortest decimals of a float32, as callers send them.
            flat = array.reshape(-1)
            values = [float(str(v)) for v in flat] if array.dtype.kind == "f" else flat.tolist()
        shape = list(array.shape[1:] if contract.batch.dimension == "none" else array.shape)
        tensors.append({"name": spec.name, "shape": shape, "datatype": spec.datatype, "data": values})
    return msgspec.json.encode({"inputs": tensors})


def quick_table(bundle: StoredBundle, keys: Sequence[bytes], records: Sequence[bytes], out: Path) -> int:
    """A table of distinct keys with their records, published at ``out`` as `parbake bake` would; gives its bytes."""
    order = sorted(range(len(keys)), key=keys.__getitem__)
    sorted_keys = np.frombuffer(b"".join(keys[i] for i in order), np.uint8).reshape(-1, KEY_BYTES)
    layout = layout_of(bundle.contract)
    building = out.with_name(f".{out.name}.building")
    built = build(
        building,
        layout,
        [(sorted_keys, [records[i] for i in order])],
        most_keys=len(keys),
        most_bytes=sum(map(len, records)),
    )
    lineage = Lineage(
        bundle_digest=bundle.digest,
        contract=bundle.contract.name,
        input="keys",
        input_format="none",
        input_digest=bundle.digest,
        input_bytes=0,
        rows=built.keys,
        keys=built.keys,
        duplicates=0,
        skipped=0,
        # Ahead of time: a contract may let predictions hold for less than it takes to measure.
        created=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() + 86_400)),
        record=layout,
        data_bytes=built.data_bytes,
        data_digest=built.data_digest,
    )
    publish(building, out, lineage, replace=False)
    return built.data_bytes


@dataclass(frozen=True, slots=True)
class _Server:
    port: int
    admin_port: int
    token: str
    front_pids: tuple[int, ...]
    inline: bool

    def counts(self, name: str) -> npt.NDArray[np.float64]:
        """Of a deployment, what `_COUNTED` names."""
        text = _get(self.admin_port, "/metrics", self.token).decode()
        found = np.zeros(len(_COUNTED))
        for line in text.splitlines():
            for at, what in enumerate(_COUNTED):
                if line.startswith(f"{what}{{") and f'deployment="{name}"' in line:
                    found[at] += float(line.rpartition(" ")[2])
        return found


@contextmanager
def _server(
    bundle: StoredBundle,
    table: Path,
    folder: Path,
    placement: Placement,
    threads: int,
    head_rows: int,
    allow_pickle: bool,
) -> Iterator[_Server]:
    """A server: ``hit`` answers from the table, ``miss`` by the model, ``learn`` too, and it keeps a head."""
    admin_port, token = _free_port(), secrets.token_urlsafe(16)
    lines: list[str] = []
    for name, mode in (("hit", "static"), ("miss", "dynamic"), ("learn", "hybrid")):
        lines += [
            "[[deployments]]",
            f'name = "{name}"',
            f"bundle = {json.dumps(str(bundle.path.resolve()))}",
            f'mode = "{mode}"',
            f'placement = "{placement}"',
            f"threads = {threads}",
            f"table = {json.dumps(str(table))}" if mode == "static" else "",
            f"head_rows = {head_rows}" if mode == "hybrid" else "",
        ]
    config = folder / "parbake.toml"
    config.write_text("\n".join(lines))
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)
    command = [
        sys.executable,
        "-m",
        "parbake",
        "serve",
        "--config",
        str(config),
        "--port",
        "0",
        "--workers",
        "1",
    ]
    command += ["--admin-port", str(admin_port), *(["--allow-pickle"] if allow_pickle else [])]
    # Its file is nobody else's business: commands must not take it for the server that they look for.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PARBAKE_")}
    environment |= {"PARBAKE_ADMIN_TOKEN": token, "XDG_RUNTIME_DIR": str(runtime)}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=environment,
            cwd=folder,
        )
        watchdog = threading.Timer(_START_S, process.kill)
        watchdog.start()
        try:
            port = _port_of(process, said)
            watchdog.cancel()
            status = msgspec.json.decode(_get(admin_port, "/admin/status", token))
            placed = {version["name"]: version["placement"] for version in status["versions"]}
            yield _Server(
                port, admin_port, token, tuple(status["front_pids"]), placed.get("miss") == "inline"
            )
        finally:
            watchdog.cancel()
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _port_of(process: subprocess.Popen[str], said: IO[str]) -> int:
    while line := process.stdout.readline() if process.stdout is not None else "":
        if found := _READY.search(line):
            return int(found["url"].rpartition(":")[2])
    process.wait()
    said.seek(0)
    words = said.read().strip().splitlines()
    raise NotReady(
        f"the server to measure with did not start: {words[-1] if words else 'it said nothing'}",
        hint="does parbake serve start with this bundle?",
        retry_after_s=1.0,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _get(port: int, path: str, token: str) -> bytes:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", headers={"authorization": f"Bearer {token}"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10) as reply:
        content: bytes = reply.read()
        return content


@dataclass(frozen=True, slots=True)
class _Run:
    """All times are those at a pace of 1."""

    p50_s: float
    cpu_s: float
    """CPU time of the fronts per request."""
    batch_rows: float
    kept: float
    """Share of the requests that were answered without the model."""
    scatter: float
    """Of the latencies; as `_scatter` has it."""


def _front_cost(
    server: _Server,
    times: _ModelTimes,
    baked: Sequence[bytes],
    bodies: Sequence[bytes],
    connections: int,
    pace: Pace,
    stage: Stage,
) -> tuple[FrontCost, float]:
    """What the front's part of a hit and of a miss is, alone and among ``connections``, at a pace of 1.

    Also gives how much latencies scatter where each request costs the same. The model is looked at in turn with all
    that.
    """

    def drive(name: str, count: int) -> _Run:
        stage(f"the front, {name} at {count} connections")
        return _drive(server, name, baked if name == "hit" else bodies, count, pace)

    many = max(connections, 2)
    # More callers than there are rows would be answered together.
    few = max(min(many, len(bodies) // 2), 1)
    kinds = (("hit", many), ("hit", 1), ("miss", many), ("miss", 1), ("learn", few))
    # A server that was just started is slower.
    for name, count in (("hit", many), ("miss", 1), ("learn", few)):
        drive(name, count)
    runs: list[list[_Run]] = [[] for _ in kinds]
    began = time.monotonic()
    for number in range(_PASSES):
        if number >= _FEWEST_PASSES and time.monotonic() - began > _LONG_S:
            break
        times.look(stage)
        # The model has filled the caches with its own.
        drive("hit", many)
        for (name, count), found in zip(kinds, runs, strict=True):
            found.append(drive(name, count))
    hits, hit, misses, miss, learned = map(_median, runs)
    model = times.cost
    hit_s = min(hits.cpu_s, hit.cpu_s)
    turn_s = hit.cpu_s - hit_s
    rows = max(misses.batch_rows, 1.0)
    inside_many, inside_learned = (
        model.seconds(round(max(found.batch_rows, 1.0))) / max(found.batch_rows, 1.0)
        if server.inline
        else 0.0
        for found in (misses, learned)
    )
    inside_one = model.one_s if server.inline else 0.0
    among = max(misses.cpu_s - inside_many, hit_s)
    alone = max(miss.cpu_s - inside_one - turn_s, among)
    batch_s = (alone - among) / (1 - 1 / rows) if rows > 1 else 0.0
    miss_s = max(among - batch_s / rows, 0.0)
    wire_s = max(hit.p50_s - hit.cpu_s, 0.0)
    hop_s = 0.0 if server.inline else max(miss.p50_s - model.one_s - wire_s - turn_s - miss_s - batch_s, 0.0)
    computed = max(1 - learned.kept, 0.1)
    computed_s = (learned.cpu_s - learned.kept * hit_s) / computed
    learn_s = max(computed_s - inside_learned - miss_s - batch_s / max(learned.batch_rows, 1.0), 0.0)
    return FrontCost(hit_s, miss_s, learn_s, batch_s, turn_s, wire_s, hop_s), hits.scatter


def _drive(server: _Server, name: str, bodies: Sequence[bytes], connections: int, pace: Pace) -> _Run:
    """Put a closed loop of requests on the server for a moment."""
    if not bodies:
        raise PackRefused("no golden can be written as JSON to ask for it", hint="pack with other examples")
    path = f"/v2/models/{name}/infer"
    before, before_cpu = server.counts(name), _cpu_s(server.front_pids)
    since = time.monotonic()
    # asyncio's own loop takes so long for a request that the front would wait for it, and handle each alone.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        latencies = runner.run(_ask(server.port, path, bodies, connections, _RUN_S))
    after_cpu, quick = _cpu_s(server.front_pids), pace.between(since)
    batches, batch_rows, rows, kept = server.counts(name) - before
    if not latencies:
        raise NotReady(f"no request to {path} was answered", retry_after_s=1.0)
    cpu_s = after_cpu - before_cpu
    return _Run(
        quick * float(np.median(latencies)),
        quick * (float(np.median(latencies)) / connections if math.isnan(cpu_s) else cpu_s / len(latencies)),
        float(batch_rows / batches) if batches else 0.0,
        float(kept / rows) if rows else 0.0,
        _scatter(latencies, connections),
    )


def _median(runs: Sequence[_Run]) -> _Run:
    """Of each figure the median."""
    return _Run(**{field.name: median(getattr(run, field.name) for run in runs) for field in fields(_Run)})


def _scatter(latencies: Sequence[float], connections: int) -> float:
    """The standard deviation of the logarithm of a lognormal latency whose mean is so far above its median."""
    usual = float(np.median(latencies))
    far_out = min(max(_FAR_OUT, 2 * connections / len(latencies)), _MOST_FAR_OUT)
    mean = float(np.mean(np.minimum(latencies, np.quantile(latencies, 1 - far_out))))
    return math.sqrt(2 * math.log(max(mean / usual, 1.0)))


class _Connection(asyncio.Protocol):
    """Sends its next request when the reply to the last one is here, until it is told to stop."""

    def __init__(self, requests: Iterator[bytes], latencies: list[float], limit: float) -> None:
        self._requests = requests
        self._latencies = latencies
        self._limit = limit
        self._buffer = b""
        self._sent = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # a stream transport
        self._next()

    def _next(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        self._buffer = data = self._buffer + data if self._buffer else data
        head = data.find(b"\r\n\r\n")
        if head < 0:
            return
        at = data.lower().find(b"content-length:", 0, head)
        length = int(data[at + 15 : data.index(b"\r", at)]) if at >= 0 else 0
        if len(data) < head + 4 + length:
            return
        now = time.perf_counter()
        self._buffer = b""
        if data.startswith(b"HTTP/1.1 200"):
            self._latencies.append(now - self._sent)
        if now >= self._limit:
            self._transport.close()
        else:
            self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def _ask(
    port: int, path: str, bodies: Sequence[bytes], connections: int, seconds: float
) -> list[float]:
    loop = asyncio.get_running_loop()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
    requests = cycle(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body for body in bodies)
    latencies: list[float] = []
    limit = time.perf_counter() + seconds
    protocols: list[_Connection] = []
    for _ in range(connections):
        _, protocol = await loop.create_connection(
            lambda: _Connection(requests, latencies, limit), "127.0.0.1", port
        )
        protocols.append(protocol)
    async with asyncio.timeout(seconds + _START_S):
        await asyncio.gather(*(protocol.ended for protocol in protocols))
    return latencies


def _cpu_s(pids: Sequence[int]) -> float:
    """CPU time of processes, in nanoseconds' steps; NaN where the system does not say."""
    total = 0
    try:
        for pid in pids:
            for task in Path(f"/proc/{pid}/task").iterdir():
                total += int((task / "schedstat").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return math.nan
    return total / 1e9
