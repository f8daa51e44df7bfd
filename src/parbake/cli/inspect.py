"""`parbake inspect`: a bundle's contract, or a table's lineage, as a person wants to read it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from parbake.cli.options import Command, ExistingPath, json_option
from parbake.cli.output import age, emit, emit_json, emit_table, emit_title, size

if TYPE_CHECKING:
    from parbake.contract.bundle import StoredBundle
    from parbake.contract.model import Batch, Contract, TensorSpec
    from parbake.tables.model import Lineage


@click.command(cls=Command, short_help="Show what a bundle or a prediction table promises.")
@click.argument("path", type=ExistingPath("bundle or table", "parbake pack MODEL --out DIR writes a bundle"))
@json_option
def command(path: Path, as_json: bool) -> None:
    """Show what a bundle or a prediction table promises."""
    from parbake.contract.bundle import read_bundle
    from parbake.tables.lmdb import is_table, read_lineage

    if is_table(path):
        lineage = read_lineage(path)
        if as_json:
            emit_json({"kind": "table", "path": str(path), "lineage": lineage})
        else:
            show_table(path, lineage)
        return
    bundle = read_bundle(path, verify=False)
    if as_json:
        emit_json(describe(bundle))
    else:
        show(bundle)


def describe(bundle: StoredBundle) -> dict[str, Any]:
    """Everything about a bundle, as JSON values."""
    import msgspec

    return {
        "kind": "bundle",
        "path": str(bundle.path),
        "digest": bundle.digest,
        "created": bundle.manifest.created,
        "goldens": bundle.goldens().rows,
        # Default values included: whoever reads the JSON need not know them.
        "contract": {
            name: msgspec.to_builtins(getattr(bundle.contract, name))
            for name in bundle.contract.__struct_fields__
        },
        "environment": msgspec.to_builtins(bundle.environment),
        "files": msgspec.to_builtins(bundle.manifest.files),
    }


def show(bundle: StoredBundle) -> None:
    """Print a bundle for a person."""
    contract = bundle.contract
    emit_title(f"{contract.name}: {contract.purpose}")
    emit()
    emit_table(_facts(bundle))
    for title, specs in (("Inputs", contract.inputs), ("Outputs", contract.outputs)):
        emit()
        emit_title(title)
        _show_tensors(specs)
    emit()
    emit_title("Files")
    emit_table(
        [(entry.path, f"{entry.bytes:,}", entry.sha256[:16]) for entry in bundle.manifest.files],
        ("file", "bytes", "sha256"),
        numbers=("bytes",),
    )


def show_table(path: Path, lineage: Lineage) -> None:
    """Print the lineage of a prediction table for a person."""
    record = lineage.record
    width = f"{record.bytes:,} bytes each" if record.bytes is not None else "of different sizes"
    outputs = ", ".join(f"{output.name} {output.datatype}" for output in record.outputs)
    emit_title(f"prediction table {path}")
    emit()
    emit_table(
        [
            ("baked by", f"{lineage.contract}, {lineage.bundle_digest}"),
            ("baked", _moment(lineage.created)),
            ("from", f"{lineage.input} ({lineage.input_format}, {size(lineage.input_bytes)})"),
            ("input digest", lineage.input_digest),
            ("rows", f"{lineage.rows:,} baked, {lineage.skipped:,} left out as unfit"),
            ("keys", f"{lineage.keys:,}, {lineage.duplicates:,} rows were duplicates"),
            ("records", f"{outputs}; {width}"),
            ("size", size(lineage.data_bytes)),
        ]
    )


def _moment(created: str) -> str:
    """A time as written in manifest and lineage, and how long ago it was."""
    moment = datetime.fromisoformat(created).astimezone(UTC)
    return f"{moment:%Y-%m-%d %H:%M} UTC, {age((datetime.now(UTC) - moment).total_seconds())}"


def _facts(bundle: StoredBundle) -> list[tuple[str, str]]:
    contract, environment = bundle.contract, bundle.environment
    versions = {library.name: library.version for library in environment.libraries}
    total = sum(entry.bytes for entry in bundle.manifest.files)
    facts = [
        ("owner", contract.owner),
        ("packed", _moment(bundle.manifest.created)),
        ("digest", bundle.digest),
        ("size", f"{size(total)} in {len(bundle.manifest.files)} files"),
        ("goldens", f"{bundle.goldens().rows} rows"),
        ("steps", ", then ".join(f"{step.kind} {step.entry or step.path}" for step in contract.steps)),
        ("key", _key(contract)),
        ("tolerance", _tolerance(contract)),
        ("batches", batch_words(contract.batch)),
        ("parity", parity_words(contract)),
    ]
    if contract.default is not None:
        facts.append(("default", ", ".join(f"{name}={value!r}" for name, value in contract.default.items())))
    if contract.deadline_ms is not None:
        facts.append(("deadline", f"{contract.deadline_ms:g} ms"))
    if contract.freshness_s is not None:
        facts.append(("freshness", f"a baked prediction holds for {contract.freshness_s:g} s"))
    facts += [
        (what, said) for what, said in (("trained on", contract.training_data), ("run", contract.run)) if said
    ]
    python = f"{environment.implementation} {environment.python}"
    facts.append(("environment", f"{python}, {environment.system}, {environment.machine}"))
    needs = ", ".join(f"{name} {versions.get(name, '?')}" for name in environment.required)
    facts.append(("needs", needs or "nothing but parbake"))
    return facts


def _key(contract: Contract) -> str:
    rounding = ", ".join(f"{name} to {digits} decimals" for name, digits in contract.key.rounding.items())
    what = ", ".join(contract.key.columns) if contract.key.columns else "the whole row"
    return f"{what}; rounded: {rounding}" if rounding else what


def _tolerance(contract: Contract) -> str:
    rtol, atol = contract.tolerance.rtol, contract.tolerance.atol
    return "exact" if rtol == atol == 0 else f"{atol:g} + {rtol:g} x |expected|"


def batch_words(batch: Batch) -> str:
    """What the contract promises of rows in company."""
    if batch.dimension != "any":
        return (
            f"one row at a time (batch dimension: {batch.dimension}); up to {batch.max_rows:,} rows a request"
        )
    if batch.invariant_from is None:
        promise = f"a row's answer moves by up to {batch.spread:g} with its company"
    elif batch.invariant_from == 1:
        promise = "a row's bits do not depend on its company"
    elif batch.multiple_of > 1:
        promise = (
            f"a row's bits do not depend on its company (padded to a multiple of {batch.multiple_of} rows)"
        )
    else:
        promise = f"a row's bits do not depend on its company (padded to {batch.invariant_from} rows)"
    threads = ", on one thread" if batch.one_thread else ""
    return f"{promise}{threads}; up to {batch.max_rows:,} rows a request"


def parity_words(contract: Contract) -> str:
    """How the bundle was held against its source."""
    parity = contract.parity
    if parity is None:
        return "not recorded"
    rows = f"{parity.example_rows:,} examples and {parity.threshold_rows:,} rows at thresholds"
    result = "bit-equal" if parity.exact else f"largest difference {parity.max_abs_diff:g}"
    words = f"{result} to {parity.framework} {parity.framework_version} on {rows}"
    if parity.ties:
        words += f"; {parity.ties:,} labels differ where rounding decides them"
    if parity.left_out:
        words += f"; {parity.left_out:,} rows left out, which the source refuses"
    return words


def _show_tensors(specs: tuple[TensorSpec, ...]) -> None:
    emit_table(
        [
            (
                spec.name,
                spec.datatype,
                "x".join("any" if n == -1 else str(n) for n in spec.shape) or "scalar",
                spec.unit or "-",
                "yes" if spec.allow_nan else "no",
                ", ".join(spec.columns or spec.labels) or "-",
            )
            for spec in specs
        ],
        ("name", "datatype", "shape", "unit", "NaN", "columns"),
    )
