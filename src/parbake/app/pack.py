"""Pack a trained model into a bundle: convert, prove, measure, and only then write."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace as altered
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np

from parbake.app.local import Bundle
from parbake.contract import invariance, parity
from parbake.contract.bundle import MANIFEST, Goldens, StoredBundle, read_bundle, write_bundle
from parbake.contract.datatypes import FLOATS, NUMPY
from parbake.contract.environment import capture
from parbake.contract.key import Keys
from parbake.contract.model import (
    Batch,
    Contract,
    Environment,
    Key,
    Parity,
    TensorSpec,
    Tolerance,
)
from parbake.contract.rounding import round_inputs
from parbake.contract.rows import column_names, gappy_texts, holds_gaps
from parbake.contract.sources.detect import framework_of, source_of
from parbake.contract.sources.model import Source
from parbake.contract.tensors import Tensor, Tensors
from parbake.errors import PackRefused, ParbakeError, ParityRefused
from parbake.names import NAME_PATTERN
from parbake.runtime.session import Session

Dimension = Literal["any", "one", "none"]
Progress = Callable[[str], None]
"""Called with a few words at the start of each stage."""

MAX_ROWS: Final = 4096
_SHOWN: Final = 5
_MOST_SEARCHED: Final = 1024
_GOLDEN_BYTES: Final = 16 * 1024**2
_SLOW_S: Final = 0.05
_FAST_S: Final = 0.0002
_SMALL_ROW_BYTES: Final = 16 * 1024
_SMALL_MODEL_BYTES: Final = 8 * 1024**2
_ALONE_TIMEOUT_S: Final = 600
_ALONE: Final = "PARBAKE_PACKED_SOURCE_RUNS_ALONE"

# Runs where nothing but the bundle and the installed libraries can be imported.
_ALONE_CODE: Final = """
import sys
sys.path.append(sys.argv[2])
from parbake.contract.bundle import read_bundle
from parbake.errors import ParbakeError
from parbake.runtime.session import Session
try:
    bundle = read_bundle(sys.argv[1])
    session = Session(bundle, allow_pickle=sys.argv[3] == "1")
    session.run({name: array[:1] for name, array in bundle.goldens().inputs.items()})
except ParbakeError as error:
    print(str(error).splitlines()[0], file=sys.stderr)
    raise SystemExit(1)
"""


def pack(
    model: Any,
    *,
    name: str,
    example: object,
    key: str | Sequence[str] | None = None,
    purpose: str = "",
    owner: str = "",
    units: Mapping[str, str] | None = None,
    tolerance: float | Tolerance | tuple[float, float] | None = None,
    out: str | os.PathLike[str] | None = None,
    pre: str | Callable[..., Any] | None = None,
    post: str | Callable[..., Any] | None = None,
    default: Mapping[str, Any] | None = None,
    deadline_ms: float | None = None,
    freshness_s: float | None = None,
    training_data: str = "",
    run: str = "",
    batch: Dimension | None = None,
    rounding: Mapping[str, int] | None = None,
    allow_nan: bool | Collection[str] | None = None,
    allow_pickle: bool = False,
    replace: bool = False,
    max_goldens: int = 64,
    progress: Progress | None = None,
) -> Bundle:
    """Pack a model and prove that the bundle answers as the model does.

    Args:
        model: a fitted scikit-learn, LightGBM or XGBoost model, a PyTorch module, the path of a model
            file, a function at the top of a module, or ``"module:function"``.
        name: what the model is called; letters, digits, ``.``, ``_`` and ``-``.
        example: typical rows as the model takes them: array, DataFrame, pyarrow Table, or dict of arrays.
            Parity is checked on them, and up to ``max_goldens`` become goldens.
        key: columns that identify a row (an entity key); None or ``"row"``: the row itself.
        purpose: what the model is for.
        owner: who answers for it.
        units: unit by column or output.
        tolerance: largest difference of floating-point outputs: absolute and relative, a pair
            ``(rtol, atol)``, or None for what the conversion promises.
        out: where to write; ``<name>.bundle`` in the current folder by default.
        pre: function from the caller's columns to the model's inputs.
        post: function from the model's outputs to the answer.
        default: answer of static mode for an unknown key, by output.
        deadline_ms: time within which callers need the answer, in milliseconds, where a deployment sets no other.
        freshness_s: age at which a baked prediction is no longer used, in seconds.
        training_data: what the model was trained on, in words.
        run: which run trained it.
        batch: overrules the batch dimension that was found.
        rounding: decimals by column, applied before the key and before the model.
        allow_nan: whether missing values are accepted: all inputs, those named, or (None) those in
            whose example there are some.
        allow_pickle: pack what has no exact conversion as a pickle; loading it can run any code.
        replace: overwrite a bundle that is there.
        max_goldens: most goldens.
        progress: called with a few words at each stage.

    Returns:
        The bundle that was written.

    Raises:
        ParityRefused: source and bundle disagree; the message shows up to five rows.
        PackRefused: anything else that makes a bundle wrong. Nothing is written in either case.
        NotAllowed: only a pickle would do, and ``allow_pickle`` is false.
        MissingExtra: the framework is not installed.
    """
    if os.environ.get(_ALONE):
        raise PackRefused(
            "pack() was called while the packed source was being imported",
            hint="put the call under: if __name__ == '__main__':",
        )
    say = progress or _silent
    _check_words(name, purpose, owner, deadline_ms, freshness_s, max_goldens)
    target = Path(out) if out is not None else Path(f"{name}.bundle")
    _check_target(target, replace)
    asked = _asked_tolerance(tolerance)

    def attempt(convert: bool) -> tuple[Source, Contract, Environment, Goldens]:
        source = source_of(
            model, example, allow_pickle=allow_pickle, pre=pre, post=post, batch=batch, convert=convert
        )
        source = _with_gaps(source, allow_nan, example)
        specs = (*source.inputs, *source.outputs)
        contract = Contract(
            name=name,
            inputs=_with_units(source.inputs, units, specs),
            outputs=_with_units(source.outputs, units, specs),
            steps=source.steps,
            purpose=purpose.strip(),
            owner=owner.strip(),
            key=_key(key, rounding, source),
            tolerance=parity.tolerance_for(source, asked),
            batch=Batch(dimension=source.batch_dimension, max_rows=MAX_ROWS),  # type: ignore[arg-type]  # one of the three
            default=_default(default, source.outputs),
            deadline_ms=deadline_ms,
            freshness_s=freshness_s,
            training_data=training_data.strip(),
            run=run.strip(),
        )
        Keys(contract)
        source = _rounded(source, contract)
        environment = capture(source.required)
        with tempfile.TemporaryDirectory(prefix="parbake-pack-") as temporary:
            contract, goldens = _prove(
                source,
                contract,
                environment,
                Path(temporary),
                allow_pickle,
                max_goldens,
                asked is not None,
                say,
            )
        return source, contract, environment, goldens

    say("converting the model")
    try:
        source, contract, environment, goldens = attempt(convert=True)
    except ParityRefused:
        if not allow_pickle or not _is_sklearn(model):
            raise
        say("pickling the model, as its conversion answers differently")
        source, contract, environment, goldens = attempt(convert=False)
    say(f"writing {target}")
    write_bundle(target, contract, source.files, goldens, environment, replace=replace)
    return Bundle(read_bundle(target), allow_pickle=allow_pickle)


def _prove(
    source: Source,
    contract: Contract,
    environment: Environment,
    folder: Path,
    allow_pickle: bool,
    max_goldens: int,
    asked: bool,
    say: Progress,
) -> tuple[Contract, Goldens]:
    """The contract with what was proven and measured, and the goldens. Raises `PackRefused`."""
    few = _goldens(source, source.example, 4)
    staged = write_bundle(folder / "staged", contract, source.files, few, environment)
    if contract.own_code:
        say("running the copied source on its own")
        _run_alone(staged, allow_pickle)
    session = _open(staged, allow_pickle, 1, contract.batch)
    say("comparing with the source")
    report = parity.prove(source, session.run, contract.tolerance)
    _refuse_difference(report, source)
    contract = msgspec.structs.replace(
        contract,
        parity=Parity(
            source.framework,
            source.framework_version,
            report.example_rows,
            report.threshold_rows,
            report.exact,
            report.max_abs_diff,
            report.ties,
            report.left_out,
        ),
    )
    say("measuring batches")
    contract = _measured(source, contract, staged, session, allow_pickle, asked)
    goldens = _goldens(source, source.example, max_goldens)
    outputs = tuple(
        msgspec.structs.replace(spec, allow_nan=spec.allow_nan or holds_gaps(goldens.outputs[spec.name]))
        for spec in contract.outputs
    )
    return msgspec.structs.replace(contract, outputs=outputs), goldens


def _measured(
    source: Source,
    contract: Contract,
    staged: StoredBundle,
    session: Session,
    allow_pickle: bool,
    asked: bool,
) -> Contract:
    """The contract with its batch policy, and with a tolerance that covers the spread between batches."""
    effort = _effort(source, contract, session, staged.goldens().inputs)
    pool = _accepted(session, invariance.company(source.example, source.inputs, effort.rows))
    dimension = contract.batch.dimension
    outputs = contract.outputs
    findings = invariance.Findings(1)
    if dimension == "any":
        findings = invariance.measure(session.run, pool, outputs, effort=effort)
    if findings.labels_differ:
        raise PackRefused(
            "an answer that is not a floating-point number depends on the other rows of the batch",
            hint="batch='one' runs each row by itself",
        )
    chosen = invariance.policy(findings, dimension, False, contract.batch.max_rows)
    # A row that is always run by itself has no company.
    if (
        dimension == "any"
        and chosen.invariant_from is not None
        and not invariance.holds(session.with_batch(chosen).run, pool, outputs, effort=effort)
    ):
        wide = invariance.measure(session.run, pool, outputs, effort=effort, seed=11)
        findings = invariance.Findings(None, spread=max(findings.spread, wide.spread))
        chosen = invariance.policy(findings, dimension, False, contract.batch.max_rows)
    if any(step.kind == "onnx" for step in contract.steps):
        one = session.with_batch(chosen).run
        several = [_open(staged, allow_pickle, threads, chosen).run for threads in (2, 4)]
        if invariance.threads_matter(one, several, pool, outputs, effort=effort):
            chosen = msgspec.structs.replace(chosen, one_thread=True)
    tolerance = contract.tolerance
    if chosen.invariant_from is None and chosen.spread > tolerance.atol:
        if asked:
            raise PackRefused(
                f"answers to the same row differ by {chosen.spread} between batches, more than the tolerance",
                hint=f"tolerance={chosen.spread}, or batch='one' runs each row by itself",
            )
        tolerance = Tolerance(tolerance.rtol, chosen.spread)
    return msgspec.structs.replace(contract, batch=chosen, tolerance=tolerance)


def _effort(source: Source, contract: Contract, session: Session, rows: Tensors) -> invariance.Effort:
    """How much to try. By size where that tells the cost, so that packing is repeatable; else by time."""
    row = {name: array[:1] for name, array in rows.items()}
    times = []
    for _ in range(3):
        started = time.perf_counter()
        session.run(row)
        times.append(time.perf_counter() - started)
    if min(times) > _SLOW_S:
        return invariance.SCANT
    if contract.own_code:
        return invariance.THOROUGH if min(times) < _FAST_S else invariance.MODERATE
    row_bytes = sum(array.nbytes for array in row.values())
    small = row_bytes <= _SMALL_ROW_BYTES and sum(map(len, source.files.values())) <= _SMALL_MODEL_BYTES
    return invariance.THOROUGH if small else invariance.MODERATE


def _open(staged: StoredBundle, allow_pickle: bool, threads: int, batch: Batch) -> Session:
    try:
        return Session(staged, threads=threads, allow_pickle=allow_pickle, batch=batch)
    except ParbakeError as error:
        raise PackRefused(f"the bundle cannot be loaded: {error.message}", hint=error.hint) from error


def _accepted(session: Session, pool: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows that the model answers: variations of the example may be refused."""
    rows = len(next(iter(pool.values())))
    kept = []
    for row in range(rows):
        try:
            session.run({name: array[row : row + 1] for name, array in pool.items()})
        except ParbakeError:
            continue
        kept.append(row)
    if not kept:
        raise PackRefused(
            "the model answers no row by itself, only several at once", hint="a caller may ask for one row"
        )
    return {name: array[kept] for name, array in pool.items()}


def _goldens(source: Source, example: Tensors, most: int) -> Goldens:
    """Up to ``most`` rows of the example (evenly spread, at most 16 MiB) with the source's own answers."""
    per_row = sum(array.nbytes / len(array) for array in example.values())
    rows = parity.spread_rows(example, max(1, min(most, int(_GOLDEN_BYTES // max(per_row, 1.0)))))
    answers, answered, said = parity.answers_of(source.predict, rows, source.outputs)
    if not answered.any():
        # Perhaps only these are refused.
        rows = parity.spread_rows(example, _MOST_SEARCHED)
        answers, answered, said = parity.answers_of(source.predict, rows, source.outputs)
        answered &= np.cumsum(answered) <= most
    if not answered.any():
        raise PackRefused(
            f"the model refuses every row of the example: {said}", hint="give rows that it was made for"
        )
    return Goldens(
        {name: array[answered] for name, array in rows.items()},
        {name: array[answered] for name, array in answers.items()},
    )


def _refuse_difference(report: parity.ParityReport, source: Source) -> None:
    if report.example_rows == 0:
        raise PackRefused(
            f"the model refuses every row of the example: {report.refusal}",
            hint="give rows that it was made for",
        )
    if not report.differing:
        return
    lines = [f"  {row}" for row in report.rows[:_SHOWN]]
    more = report.differing - len(lines)
    if more:
        lines.append(f"  and {more} more")
    raise ParityRefused(
        f"{report.differing} of {report.tested} rows differ between {source.framework} {source.framework_version} "
        f"and the bundle, by up to {report.max_abs_diff:g}:\n" + "\n".join(lines),
        hint="no bundle was written; tolerance= widens what counts as equal, "
        "and a function that calls the model (module:function) is packed as it is",
    )


def _run_alone(staged: StoredBundle, allow_pickle: bool) -> None:
    """Run the bundle's own code in a fresh process that can import nothing else of the user's.

    What the copy lacks shows here, and not in production. Raises `PackRefused`.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment[_ALONE] = "1"
    package = str(Path(__file__).resolve().parents[2])
    with tempfile.TemporaryDirectory(prefix="parbake-alone-") as elsewhere:
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", _ALONE_CODE, str(staged.path), package, "1" if allow_pickle else "0"],
                cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=_ALONE_TIMEOUT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise PackRefused(
                f"the copied source did not answer one row within {_ALONE_TIMEOUT_S} s on its own",
                hint="does importing it train a model? put that under: if __name__ == '__main__':",
            ) from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        said = said.replace(f"{staged.path}{os.sep}", "")
        hint = "it can import what it names in import statements, and read files beside it that it names"
        if "pack() was called" in done.stderr:
            hint = "put what should not run on import under: if __name__ == '__main__':"
        raise PackRefused(f"the copied source does not run on its own: {said}", hint=hint)


def _check_words(
    name: str,
    purpose: str,
    owner: str,
    deadline_ms: float | None,
    freshness_s: float | None,
    max_goldens: int,
) -> None:
    if not NAME_PATTERN.match(name):
        raise PackRefused(
            f"{name!r} cannot name a model", hint="letters, digits, '.', '_' and '-', up to 128, no '.' first"
        )
    if not purpose.strip():
        raise PackRefused(
            "the model has no purpose", hint="purpose='what it is for', for whoever finds it in a year"
        )
    if not owner.strip():
        raise PackRefused("the model has no owner", hint="owner='team or person who answers for it'")
    for word, value in (("deadline_ms", deadline_ms), ("freshness_s", freshness_s)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise PackRefused(f"{word} is {value}, it must be a positive number")
    if max_goldens < 1:
        raise PackRefused(f"max_goldens is {max_goldens}", hint="a bundle without goldens cannot be checked")


def _check_target(target: Path, replacing: bool) -> None:
    """Refuse before the work what `write_bundle` would refuse after it."""
    if (target / MANIFEST).is_file():
        if not replacing:
            raise PackRefused(f"{target} exists", hint="replace=True (--replace) overwrites it")
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PackRefused(f"{target} exists and is not a bundle", hint="name another out (--out)")


def _asked_tolerance(tolerance: float | Tolerance | tuple[float, float] | None) -> Tolerance | None:
    if tolerance is None or isinstance(tolerance, Tolerance):
        return tolerance
    rtol, atol = tolerance if isinstance(tolerance, tuple) else (tolerance, tolerance)
    if not (rtol >= 0 and atol >= 0 and math.isfinite(rtol) and math.isfinite(atol)):
        raise PackRefused(f"tolerance is {tolerance}, it must not be negative")
    return Tolerance(float(rtol), float(atol))


def _with_gaps(source: Source, allow_nan: bool | Collection[str] | None, example: object) -> Source:
    """The source with `TensorSpec.allow_nan` as asked for, or as the example has it."""
    if isinstance(allow_nan, str):
        allow_nan = (allow_nan,)
    if not isinstance(allow_nan, bool) and allow_nan is not None:
        known = {spec.name for spec in source.inputs} | set(column_names(source.inputs))
        for name in allow_nan:
            if name not in known:
                raise PackRefused(
                    f"allow_nan names {name!r}, which is not an input", hint=_words(source.inputs)
                )
    texts = gappy_texts(example)
    specs = []
    for spec in source.inputs:
        if isinstance(allow_nan, bool):
            allowed = allow_nan
        elif allow_nan is None:
            allowed = spec.allow_nan or spec.name in texts
        else:
            allowed = spec.name in allow_nan or any(column in allow_nan for column in spec.columns)
        if not allowed and spec.datatype in FLOATS and not np.isfinite(source.example[spec.name]).all():
            raise PackRefused(f"the example has missing values in {spec.name!r}, which allow_nan forbids")
        specs.append(msgspec.structs.replace(spec, allow_nan=allowed and spec.datatype in (*FLOATS, "BYTES")))
    return altered(source, inputs=tuple(specs))


def _with_units(
    specs: tuple[TensorSpec, ...], units: Mapping[str, str] | None, everything: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    if not units:
        return specs
    known = set(column_names(everything)) | {spec.name for spec in everything}
    for name in units:
        if name not in known:
            raise PackRefused(f"units name {name!r}, which is no input or output", hint=_words(everything))
    found = []
    for spec in specs:
        unit = units.get(spec.name, "")
        named = {column: units[column] for column in spec.columns if column in units}
        if named and len(set(named.values())) == 1 and len(named) == len(spec.columns):
            unit = next(iter(named.values()))
        elif named:
            unit = "; ".join(f"{column}: {word}" for column, word in named.items())
        found.append(msgspec.structs.replace(spec, unit=unit))
    return tuple(found)


def _key(key: str | Sequence[str] | None, rounding: Mapping[str, int] | None, source: Source) -> Key:
    names = {spec.name for spec in source.inputs} | set(column_names(source.inputs))
    columns: tuple[str, ...] = ()
    if key is not None and key != "row":
        columns = (key,) if isinstance(key, str) else tuple(key)
        if not columns or len(set(columns)) != len(columns):
            raise PackRefused(f"key is {key!r}", hint="'row', or the different columns that identify a row")
    for name, decimals in (rounding or {}).items():
        spec = next((s for s in source.inputs if name == s.name or name in s.columns), None)
        if spec is None or name not in names:
            raise PackRefused(f"rounding names {name!r}, which is not an input", hint=_words(source.inputs))
        if spec.datatype not in FLOATS:
            raise PackRefused(
                f"rounding names {name!r}, which is {spec.datatype}", hint="only fractions are rounded"
            )
        if type(decimals) is not int or not -30 <= decimals <= 30:
            raise PackRefused(f"rounding of {name!r} is {decimals!r}", hint="a number of decimals")
    return Key(columns, dict(rounding or {}))


def _default(default: Mapping[str, Any] | None, outputs: tuple[TensorSpec, ...]) -> dict[str, Any] | None:
    """The declared default answer as JSON values. Raises `PackRefused` where it is not a row of the outputs."""
    if default is None:
        return None
    names = [spec.name for spec in outputs]
    if set(default) != set(names):
        given = ", ".join(map(str, default)) or "nothing"
        raise PackRefused(f"the default answer has {given}", hint=f"outputs are {', '.join(names)}")
    found: dict[str, Any] = {}
    for spec in outputs:
        value = default[spec.name]
        try:
            array = np.asarray(value, dtype=object if spec.datatype == "BYTES" else None)
            fits = len(array.shape) == len(spec.shape) and all(
                want in (-1, have) for want, have in zip(spec.shape, array.shape, strict=True)
            )
            if spec.shape == (1,) and array.shape == ():
                array, fits = array.reshape(1), True
            if spec.datatype == "BYTES":
                fits = fits and all(isinstance(x, str) for x in array.reshape(-1).tolist())
            else:
                fits = fits and np.can_cast(array.dtype, NUMPY[spec.datatype], "same_kind")
                if fits:
                    array = array.astype(NUMPY[spec.datatype])
            if not fits:
                raise ValueError
            found[spec.name] = json.loads(json.dumps(array.tolist(), allow_nan=False))
        except (ValueError, TypeError, OverflowError) as error:
            raise PackRefused(
                f"the default {value!r} of output {spec.name!r} is not {spec.datatype} of shape {list(spec.shape)}"
            ) from error
    return found


def _rounded(source: Source, contract: Contract) -> Source:
    """The source with its example rounded: the model never sees other numbers."""
    if not contract.key.rounding:
        return source
    return altered(source, example=round_inputs(contract, source.example))


def _words(specs: Sequence[TensorSpec]) -> str:
    names = column_names(tuple(specs))
    return "there are " + ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _is_sklearn(model: Any) -> bool:
    """Whether a model is scikit-learn's own, or a pickle, which then was one."""
    return framework_of(model) == "sklearn" or str(model).endswith((".joblib", ".pkl", ".pickle"))


def _silent(words: str) -> None:
    del words
