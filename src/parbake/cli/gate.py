"""`parbake gate`: whether a bundle may take traffic on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from parbake.cli.exits import Exit
from parbake.cli.options import (
    VERSION_OR_BUNDLE,
    Command,
    json_option,
    name_and_version,
    pickle_option,
    state_options,
    state_settings,
)
from parbake.cli.output import emit, emit_json, emit_table, emit_title, plain, say
from parbake.cli.pack import Pair

if TYPE_CHECKING:
    from parbake.release.gate import Check, GateReport
    from parbake.settings import Settings

_MARKS = {True: "ok", False: "BAD", None: "-"}


@click.command(
    cls=Command, short_help="Say whether a bundle may take traffic here, and what speaks against it."
)
@click.argument("bundle", type=VERSION_OR_BUNDLE, metavar="BUNDLE|VERSION")
@click.option(
    "--against",
    type=VERSION_OR_BUNDLE,
    metavar="BUNDLE|VERSION",
    help="The version that it would replace.",
)
@click.option("--breaking", is_flag=True, help="Let changes pass that break the callers of that version.")
@click.option(
    "--table", type=click.Path(path_type=Path), metavar="TABLE", help="Prediction table to be served with it."
)
@click.option(
    "--deadline-ms",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MS",
    help="Most that 99 of 100 rows may take.  [default: as the contract says]",
)
@click.option(
    "--max-bytes", type=click.IntRange(min=1), metavar="BYTES", help="Most memory that a runner may take."
)
@click.option(
    "--rule",
    "rules",
    multiple=True,
    type=Pair(),
    metavar="LIBRARY=RULE",
    help="Versions of a library that will do: exact, compatible or any.  [repeatable]",
)
@click.option(
    "--waive", multiple=True, metavar="CHECK", help="Let a check not pass, for --why.  [repeatable]"
)
@click.option("--why", default="", metavar="TEXT", help="Why what is waived is right this once.")
@click.option(
    "--for",
    "version",
    default="",
    metavar="NAME@VERSION",
    help="Write what is waived into the history of this version.  [default: the one that is named]",
)
@click.option("--who", default="", metavar="NAME", help="Who waives.  [default: the user of this machine]")
@click.option(
    "--trusted-keys",
    type=click.Path(path_type=Path),
    envvar="PARBAKE_TRUSTED_KEYS",
    metavar="PATH",
    help="Public keys, as a folder or a file: one of them must have signed the bundle.",
)
@pickle_option
@state_options
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    bundle: Path | str,
    against: Path | str | None,
    breaking: bool,
    table: Path | None,
    deadline_ms: float | None,
    max_bytes: int | None,
    rules: tuple[tuple[str, str], ...],
    waive: tuple[str, ...],
    why: str,
    who: str,
    version: str,
    trusted_keys: Path | None,
    allow_pickle: bool,
    config: Path | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Say whether a bundle may take traffic on this machine, and what speaks against it.

    It is a path, models:/NAME@champion in the registry, or NAME@3, registered or released. The model runs in a
    process without network and privileges, as in a server. Exits with 1 where a check neither passed nor was waived by
    name.
    """
    from parbake.app.gate import Asked, run_gate
    from parbake.release.gate import make_waiver
    from parbake.release.rules import read_rules

    if why and not waive:
        raise click.UsageError("--why says why something is waived: --waive CHECK names it")
    waivers = tuple(make_waiver(check, who or user(), why) for check in dict.fromkeys(waive))
    trusted = None
    if trusted_keys is not None:
        from parbake.contract.signatures import read_trusted

        trusted = read_trusted(trusted_keys)
    name, number = name_and_version(version) if version else ("", "")
    settings = state_settings(config, values)
    at, found = _at(settings, bundle)
    if found and not version:
        version = found
        name, _, number = found.partition("@")
    asked = Asked(
        at, _at(settings, against)[0] if against is not None else None, table, table is not None, deadline_ms,
        max_bytes, read_rules(dict(rules)), breaking, waivers, trusted, allow_pickle,
    )  # fmt: skip
    report = run_gate(asked)
    if version and report.waivers:
        from contextlib import closing

        from parbake.app.inventory import keep_waivers
        from parbake.app.state import open_state

        with closing(open_state(settings)) as state:
            keep_waivers(state, name, number, report)
    if as_json:
        emit_json(report)
    else:
        show(report)
    ctx.exit(Exit.DONE if report.ok else Exit.REFUSED)


def _at(settings: Settings, what: Path | str) -> tuple[Path, str]:
    """Where a bundle lies on this machine, and its ``NAME@3`` where it was named by that or by an alias."""
    if isinstance(what, Path):
        return what, ""
    from parbake.app.image import resolver
    from parbake.release.registry import SCHEME, parse_reference

    source = resolver(settings)(what)
    reference = parse_reference(what if what.startswith(SCHEME) else f"{SCHEME}{what}")
    return source.path, f"{reference.name}@{source.version or reference.which}"


def show(report: GateReport) -> None:
    """Print the checks, one line each, then the evidence of those that did not pass, and the verdict last."""
    emit_table([(check.name, check.verdict, plain(check.words)) for check in report.checks])
    for check in report.checks:
        if check.verdict != "passed":
            _show_evidence(check)
    emit()
    emit(
        f"{report.name or report.bundle}: {'may take traffic here' if report.ok else 'must not take traffic here'}"
    )
    for check in report.refused:
        # What is not what was packed cannot be let pass, and then nothing else was reached.
        waive = "" if report.never_waived else f"--waive {check.name} --why TEXT"
        if check.hint or waive:
            say(f"{check.name}: {plain('; or '.join(filter(None, (check.hint, waive))))}")


def _show_evidence(check: Check) -> None:
    rows = [one for one in check.evidence if one.ok is not True]
    if rows:
        emit()
        emit_title(check.name)
        emit_table(
            [
                tuple(map(plain, (one.what, one.expected, one.found, _MARKS[one.ok], one.note)))
                for one in rows
            ],
            ("what", "expected", "found", "", "note"),
        )
    if check.waiver is not None:
        emit()
        emit(plain(f"{check.name} waived by {check.waiver.who}, {check.waiver.at}: {check.waiver.why}"))


def user() -> str:
    """Who is at this terminal."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
