"""Put a bundle through the gate: run it in a confined process, measure, and hold what came of it against the rules."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from parbake.app.wiring import baked_table
from parbake.contract.bundle import Goldens, StoredBundle, read_bundle
from parbake.contract.datatypes import FLOATS
from parbake.contract.environment import capture
from parbake.contract.signatures import PublicKey, look_at
from parbake.contract.tensors import Tensor, Tensors, from_raw, to_raw
from parbake.errors import BundleTorn, ModelFailed, ParbakeError
from parbake.release import gate
from parbake.release.gate import Check, Finding, GateReport, Measured, Replayed, Waiver
from parbake.release.rules import Rule
from parbake.runtime import memory, wire
from parbake.runtime.pool import Runner, RunnerPool
from parbake.runtime.session import differing_rows

_CALLS: Final = 300
_MEASURE_S: Final = 3.0
_ANSWER_S: Final = 60.0
_LOAD_S: Final = 120.0
_ROWS_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Asked:
    """What to put through the gate, and against what."""

    bundle: Path
    against: Path | None = None
    """Bundle of the version that it would replace."""
    table: Path | None = None
    needs_table: bool = False
    """Whether the deployment answers from a table."""
    deadline_ms: float | None = None
    """None: that of the contract."""
    max_bytes: int | None = None
    rules: Mapping[str, Rule] = field(default_factory=dict)
    breaking: bool = False
    waivers: tuple[Waiver, ...] = ()
    trusted: Sequence[PublicKey] | None = None
    allow_pickle: bool = False


def run_gate(asked: Asked) -> GateReport:
    """The gate on this machine, in processes of its own. Never raises for a bad bundle."""

    async def run() -> GateReport:
        with tempfile.TemporaryDirectory(prefix="parbake-gate-") as folder:
            pool = RunnerPool(Path(folder))
            try:
                return await judge(asked, pool)
            finally:
                await pool.close()

    return asyncio.run(run())


async def judge(asked: Asked, pool: RunnerPool) -> GateReport:
    """The gate with the runners of a pool, as a server has one. Never raises for a bad bundle.

    Raises what reading ``asked.against`` raises: that one is served already.
    """
    old = None if asked.against is None else await asyncio.to_thread(read_bundle, asked.against, verify=False)
    against = old.digest if old is not None else ""
    try:
        stored = await asyncio.to_thread(read_bundle, asked.bundle)
    except (ParbakeError, OSError) as error:
        return _not_read(asked, against, error)
    checks = [Check("digest", "passed", stored.digest)]
    contract = stored.contract
    checks.append(gate.metadata_check(contract))
    checks.append(
        gate.schema_check(contract, old.contract if old is not None else None, allowed=asked.breaking)
    )
    here = await asyncio.to_thread(capture)
    checks.append(gate.environment_check(contract, stored.environment, here, dict(asked.rules)))
    baked = None if asked.table is None else await asyncio.to_thread(baked_table, asked.table)
    checks.append(gate.table_check(stored.digest, baked, needed=asked.needs_table))
    trusted = True
    if asked.trusted is not None:
        signature = _signature(stored, asked.trusted)
        checks.append(signature)
        waived = any(waiver.check == "signature" for waiver in asked.waivers)
        trusted = signature.verdict == "passed" or waived
    checks += (
        await _ran(asked, stored, pool) if trusted else _not_run("not run, as nobody trusted has signed it")
    )
    return gate.report(str(asked.bundle), contract, stored.digest, against, checks, asked.waivers)


async def _ran(asked: Asked, stored: StoredBundle, pool: RunnerPool) -> list[Check]:
    """The checks for which the model runs."""
    try:
        goldens = await asyncio.to_thread(stored.goldens)
        _check_form(stored, goldens)
    except Exception as error:
        # Whoever wrote the bundle may have written anything; it is the bundle that fails, not the gate.
        return _not_run(_words(error))
    try:
        started = pool.start(
            str(stored.path),
            digest=stored.digest,
            threads=1,
            allow_pickle=asked.allow_pickle,
            # Environment and goldens have checks of their own.
            allow_mismatch=True,
            prove=False,
            verify=asked.trusted is not None,
        )
        runner = await asyncio.wait_for(started, _LOAD_S)
    except TimeoutError:
        return _not_run(f"the model was not loaded within {_LOAD_S:g} s")
    except Exception as error:
        return _not_run(_words(error), error.hint if isinstance(error, ParbakeError) else "")
    try:
        return await _questioned(asked, stored, goldens, runner)
    finally:
        await pool.stop(runner)


async def _questioned(asked: Asked, stored: StoredBundle, goldens: Goldens, runner: Runner) -> list[Check]:
    contract = stored.contract
    measured: Measured | None = None
    try:
        line = await _Line.open(runner.socket, stored)
        try:
            if not goldens.rows:
                return [
                    gate.golden_check(Replayed(0, 0, 0.0, 0.0, 0.0)),
                    *_unmeasured("there are no goldens to ask"),
                ]
            answers = await asyncio.wait_for(line.ask(goldens.inputs, goldens.rows), _ANSWER_S)
            golden = gate.golden_check(await asyncio.to_thread(_replayed, stored, goldens, answers))
            p50, p99, calls = await asyncio.wait_for(line.time(goldens), _ANSWER_S)
            taken = max(memory.peak(runner.pid or 0), memory.resident(runner.pid or 0))
            measured = Measured(calls, p50, p99, taken)
        finally:
            line.close()
    except TimeoutError:
        return _not_run(f"the model did not answer its goldens within {_ANSWER_S:g} s")
    except Exception as error:
        # What the runner says is as the model wants it; it is the bundle that fails, not the gate.
        return _not_run(_words(error))
    deadline_ms = asked.deadline_ms if asked.deadline_ms is not None else contract.deadline_ms
    return [golden, gate.latency_check(measured, deadline_ms), gate.memory_check(measured, asked.max_bytes)]


class _Line:
    """A connection to a runner, as a front has one."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stored: StoredBundle
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._contract = stored.contract
        self._id = 0

    @classmethod
    async def open(cls, path: str, stored: StoredBundle) -> _Line:
        reader, writer = await asyncio.open_unix_connection(path)
        return cls(reader, writer, stored)

    def close(self) -> None:
        self._writer.close()

    async def ask(self, inputs: Tensors, rows: int) -> dict[str, Tensor]:
        """The outputs for these inputs. Raises `ModelFailed`, EOFError where the runner ended, ValueError."""
        self._id += 1
        specs = self._contract.inputs
        raws = [to_raw(inputs[spec.name], spec.datatype) for spec in specs]
        shapes = [tuple(inputs[spec.name].shape[1:]) for spec in specs]
        self._writer.writelines(wire.request_frame(self._id, rows, raws, shapes))
        await self._writer.drain()
        head = await self._reader.readexactly(8)
        length = wire.frame_length(head)
        frame = head + await self._reader.readexactly((length or 8) - 8)
        _, status, _, out_raws, out_shapes = wire.read_reply(frame)
        if status != wire.OK:
            raise ModelFailed(
                f"the model failed on its goldens: {out_raws[0][:500].decode(errors='replace')}"
            )
        return {
            spec.name: from_raw(raw, spec.datatype, (rows, *shape))
            for spec, raw, shape in zip(self._contract.outputs, out_raws, out_shapes, strict=True)
        }

    async def time(self, goldens: Goldens) -> tuple[float, float, int]:
        """p50 and p99 in milliseconds of one row at a time, and the number of calls."""
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < _CALLS and (time.perf_counter() - began < _MEASURE_S or len(times) < 3):
            at = len(times) % goldens.rows
            row = {name: array[at : at + 1] for name, array in goldens.inputs.items()}
            started = time.perf_counter()
            await self.ask(row, 1)
            times.append(time.perf_counter() - started)
        times.sort()
        return (
            times[len(times) // 2] * 1e3,
            times[min(int(len(times) * 0.99), len(times) - 1)] * 1e3,
            len(times),
        )


def _replayed(stored: StoredBundle, goldens: Goldens, answers: Mapping[str, Tensor]) -> Replayed:
    """Answers held against the goldens."""
    tolerance = stored.contract.tolerance
    bad: set[int] = set()
    largest = 0.0
    evidence: list[Finding] = []
    for spec in stored.contract.outputs:
        got, expected = answers[spec.name], goldens.outputs[spec.name]
        rows = differing_rows(got, expected, spec, tolerance.rtol, tolerance.atol)
        bad.update(rows.tolist())
        for row in rows[: _ROWS_SHOWN - len(evidence)].tolist():
            left, right = (
                np.array2string(np.asarray(array[row]), threshold=8) if row < len(array) else "no row"
                for array in (expected, got)
            )
            evidence.append(Finding(f"row {row}, output {spec.name}", left[:500], right[:500], False))
        if spec.datatype in FLOATS and got.shape == expected.shape:
            with np.errstate(all="ignore"):
                apart = np.abs(got.astype(np.float64) - expected.astype(np.float64))
            apart = apart[np.isfinite(apart)]
            largest = max(largest, float(apart.max()) if apart.size else 0.0)
    return Replayed(goldens.rows, len(bad), largest, tolerance.rtol, tolerance.atol, tuple(evidence))


def _check_form(stored: StoredBundle, goldens: Goldens) -> None:
    """Raise `BundleTorn` unless the goldens have the tensors of the contract, each with as many rows."""
    for specs, tensors in (
        (stored.contract.inputs, goldens.inputs),
        (stored.contract.outputs, goldens.outputs),
    ):
        for spec in specs:
            if spec.name not in tensors or len(tensors[spec.name].shape) != len(spec.shape) + 1:
                raise BundleTorn(f"the goldens have no {spec.name!r} as the contract says it")
            if len(tensors[spec.name]) != goldens.rows:
                raise BundleTorn(
                    f"the goldens have {len(tensors[spec.name])} rows of {spec.name!r}, not {goldens.rows}"
                )


def _signature(stored: StoredBundle, trusted: Sequence[PublicKey]) -> Check:
    try:
        found = look_at(stored, trusted)
    except ParbakeError as error:
        return Check("signature", "failed", _words(error), hint=error.hint)
    evidence = tuple(
        Finding(
            one.signed, "a trusted key", one.name or one.key_id, None if one.valid is None else bool(one.name)
        )
        for one in found
    )
    names = [one.name for one in found if one.valid and one.name]
    if names:
        return Check("signature", "passed", f"by {', '.join(names)}", evidence)
    words = "signed by nobody who is trusted here" if found else "not signed"
    return Check("signature", "failed", words, evidence, f"parbake sign {stored.path} --key FILE")


def _not_read(asked: Asked, against: str, error: ParbakeError | OSError) -> GateReport:
    words = _words(error)
    hint = error.hint if isinstance(error, ParbakeError) else ""
    checks = [Check("digest", "failed", words, hint=hint)]
    names = ["metadata", "environment", "schema", "goldens", "latency", "memory", "table"]
    if asked.trusted is not None:
        names.append("signature")
    checks += [Check(name, "unknown", "not reached") for name in names]
    return gate.report(str(asked.bundle), None, "", against, checks, asked.waivers)


def _not_run(why: str, hint: str = "") -> list[Check]:
    return [gate.golden_check(None, why, hint), *_unmeasured("not measured, as the model did not run")]


def _unmeasured(why: str) -> list[Check]:
    return [Check("latency", "unknown", why), Check("memory", "unknown", why)]


def _words(error: BaseException) -> str:
    if isinstance(error, ParbakeError):
        return f"{error.message} at {error.path}" if error.path else error.message
    if isinstance(error, EOFError):
        return "the process ended while the model answered its goldens"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the bundle'}: {os.strerror(error.errno or 0)}"
    return f"{type(error).__name__}: {str(error)[:500]}".splitlines()[0]
