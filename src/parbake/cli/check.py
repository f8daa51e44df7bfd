"""`parbake check`: whether this machine keeps what a bundle promises."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from parbake.cli.exits import Exit
from parbake.cli.options import BUNDLE, Command, json_option, pickle_option
from parbake.cli.output import emit, emit_json, emit_table, emit_title, say_error
from parbake.errors import BundleError

if TYPE_CHECKING:
    from parbake.app.check import CheckReport
    from parbake.contract.signatures import Signed

ABSENT: Final = "not installed"
"""What `parbake.contract.environment` says of a library that is not here."""


@click.command(cls=Command, short_help="Verify a bundle on this machine: digest, goldens, environment.")
@click.argument("bundle", type=BUNDLE)
@pickle_option
@click.option(
    "--trusted-keys",
    type=click.Path(path_type=Path),
    envvar="PARBAKE_TRUSTED_KEYS",
    metavar="PATH",
    help="Public keys, as a folder or a file: one of them must have signed the bundle.",
)
@json_option
@click.pass_context
def command(
    ctx: click.Context, /, bundle: Path, allow_pickle: bool, trusted_keys: Path | None, as_json: bool
) -> None:
    """Verify a bundle on this machine: digest, signatures, goldens, environment.

    Exits with 1 where the bundle would not be served here.
    """
    from parbake.app.check import check
    from parbake.tables.lmdb import is_table

    if is_table(bundle):
        raise BundleError(
            f"{bundle} is a prediction table, not a bundle",
            hint=f"parbake inspect {bundle} shows what it holds",
        )
    trusted = None
    if trusted_keys is not None:
        from parbake.contract.signatures import read_trusted

        trusted = read_trusted(trusted_keys)
    report = check(bundle, allow_pickle=allow_pickle, trusted=trusted)
    if as_json:
        emit_json({**asdict(report), "path": str(report.path), "ok": report.ok})
    else:
        show(report)
    ctx.exit(Exit.DONE if report.ok else Exit.REFUSED)


def show(report: CheckReport) -> None:
    """Print what was found, one line per check and a verdict last."""
    emit_table([(_mark(passed), name, words) for name, passed, words in checks(report)])
    shown = [item for item in report.differences if item.required or item.here != ABSENT]
    if shown:
        emit()
        emit_title("Differs from where it was packed")
        emit_table(
            [(item.name, item.packed, item.here, "yes" if item.required else "no") for item in shown],
            ("what", "packed", "here", "needed by the bundle's code"),
        )
    if absent := len(report.differences) - len(shown):
        emit()
        emit(f"not here and not needed: {absent} libraries of the machine that packed (--json lists them)")
    emit()
    emit(
        f"{report.name or report.path}: {'keeps its promises here' if report.ok else 'must not be served here'}"
    )
    if report.error:
        say_error(report.error, report.hint)


def checks(report: CheckReport) -> list[tuple[str, bool | None, str]]:
    """Name, verdict (None: not reached) and words of each check."""
    found: list[tuple[str, bool | None, str]] = [
        (
            "digest",
            report.digest_ok,
            report.digest if report.digest_ok else "the content is not what was packed",
        )
    ]
    if report.signatures or report.trusted is not None:
        found.append(("signature", report.trusted, "; ".join(map(_signed, report.signatures)) or "none"))
    if not report.digest_ok or report.trusted is False:
        return [*found, ("environment", None, "not reached"), ("goldens", None, "not reached")]
    required = sum(item.required for item in report.differences)
    other = len(report.differences) - required
    words = f"{required} needed and {other} other differences" if report.differences else "the same"
    found.append(("environment", report.environment_ok, words))
    if report.golden_rows is None:
        # An error stopped the check before or while the goldens were answered.
        return [*found, ("goldens", None if not report.error else False, "not answered")]
    if report.differing_rows:
        words = (
            f"{report.differing_rows} of {report.golden_rows} rows differ; first: {report.first_difference}"
        )
        return [*found, ("goldens", False, words)]
    words = f"{report.golden_rows} rows answered as they must be"
    if report.max_abs_diff:
        words += f", largest difference {report.max_abs_diff:g}"
    return [*found, ("goldens", True, words)]


def _signed(one: Signed) -> str:
    if one.valid is None:
        return f"by key {one.key_id}, not verified: pip install 'parbake[signing]'"
    if not one.valid:
        return f"key {one.key_id} has not signed this bundle"
    return (
        f"by {one.name} (key {one.key_id}), {one.signed}"
        if one.name
        else f"by key {one.key_id}, {one.signed}"
    )


def _mark(passed: bool | None) -> str:
    return "-" if passed is None else "ok" if passed else "BAD"
