"""`parbake release`: how the release of a deployment stands, what the judge says, and what is changed while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from parbake.cli.options import Command, json_option, server_options
from parbake.cli.output import emit, emit_json, emit_table, plain, say

if TYPE_CHECKING:
    from parbake.app.releases import ReleaseStatus
    from parbake.release.judge import Evidence

_STATES = {
    "running": "is being released",
    "pending": "is being loaded",
    "live": "is live",
    "rolled_back": "was rolled back",
    "superseded": "was followed by another",
    "refused": "was refused",
    "aborted": "could not begin",
}


_BY_THE_JUDGE: Final = (("roll_back", "rolled_back"), ("promote", "live"))
"""What the judge said, and the state in which a release ends by it."""

_SWITCHES: Final = {"on": True, "off": False}
_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@click.command(
    cls=Command, short_help="Show how the release of a deployment stands, or change it as it runs."
)
@click.argument("name")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change a parameter from now on: hold=on (promote nothing), kill=on (everything to the champion), every=10m, "
    "timeout_ms=50, or a margin, as in p99=0.2; an empty value is the one that the release began with.  [repeatable]",
)
@click.option("--why", default="", metavar="TEXT", help="Why it is changed, for the history.")
@click.option(
    "--who", default="", metavar="NAME", help="Who changes it.  [default: the user of this machine]"
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw what the verdict rests on, as .svg or .png.",
)
@server_options
@json_option
def command(
    name: str, changes: tuple[str, ...], why: str, who: str, plot: Path | None, as_json: bool, **where: Any
) -> None:
    """Show how the release of a deployment stands: its share of the traffic, and what the judge says of it.

    With --set it is changed while it runs, without a failed request. The judge goes by the new values from its next
    look on; who changed what, and why, stands in the history.
    """
    from parbake.transports import client

    if (why or who) and not changes:
        given = "--why" if why else "--who"
        raise click.UsageError(f"{given} is about a change: --set NAME=VALUE says which, as in --set hold=on")
    if changes:
        from parbake.app.releases import TuningChange
        from parbake.cli.gate import user

        status = client.tune(name, TuningChange(dict(map(_change, changes)), who or user(), why), **where)
    else:
        status = client.release_status(name, **where)
    if plot is not None:
        from parbake.cli.pictures import write_verdict

        write_verdict(client.judge(name, **where), plot)
        say(f"drawn in {plot}")
    if as_json:
        emit_json(status)
    else:
        show(status)


def show(status: ReleaseStatus) -> None:
    """Print where a release is, then the judge's verdict with its evidence."""
    line = f"{status.deployment}: version {status.version} {_STATES.get(status.state, status.state)}"
    if status.state == "running":
        line += f", step {status.step + 1} of {len(status.steps)}: {100 * status.share:g} % of the traffic"
        if status.kind == "canary" and status.step + 1 == len(status.steps) and status.share < 1:
            line += ", then all of it"
    emit(line)
    if status.champion != status.version:
        emit(f"version {status.champion} answers{' the rest' if status.state == 'running' else ''}")
    if changed := _tuning(status):
        emit(f"changed since it began: {changed}")
    if status.note:
        emit(status.note)
    verdict = status.verdict
    if verdict is None:
        return
    under_way = status.state in ("running", "pending")
    told = under_way or (verdict.decision.value, status.state) in _BY_THE_JUDGE
    judge = "judge" if told else "before it ended, the judge said"
    emit(f"{judge}: {verdict.decision.value.replace('_', ' ')}: {plain(verdict.reason)}")
    # Where people ended it, what was compared until then has decided nothing.
    if told and verdict.evidence and any(status.requests):
        champion, challenger = status.requests
        beside = f"version {status.against}" if status.against else "the version before"
        emit(
            f"{'' if under_way else 'when it ended: '}of {challenger:,} requests, beside {champion:,} of {beside}"
        )
        emit_table([_evidence(one) for one in verdict.evidence], _TITLES)


_TITLES: Final = ("compared", "for", "evidence of harm", "in words")


def _evidence(one: Evidence) -> tuple[str, ...]:
    from parbake.cli.pictures import evidence_bar

    share = one.odds_log10 / one.needed_log10 if one.needed_log10 > 0 else 0.0
    return one.test, plain(one.segment) or "all", evidence_bar(share), plain(one.words)


def _tuning(status: ReleaseStatus) -> str:
    """What was changed, as it is written behind --set."""
    import msgspec

    words = {True: "on", False: "off"}
    return ", ".join(
        f"{name}={words[value] if isinstance(value, bool) else format(value, 'g')}"
        for name, value in msgspec.to_builtins(status.tuning).items()
    )


def _change(text: str) -> tuple[str, int | float | bool | None]:
    """``every=10m`` as the name and value of a parameter."""
    from parbake.app.trial import Tuning
    from parbake.names import did_you_mean

    name, separator, value = text.partition("=")
    if not separator:
        raise click.UsageError(f"--set {text!r}: expected NAME=VALUE, as in p99=0.2")
    known = ["every" if field == "every_s" else field for field in Tuning.__struct_fields__]
    if name not in (*known, "every_s"):
        meant = did_you_mean(name, known) or f"; there are {', '.join(known)}"
        raise click.UsageError(f"--set {text!r}: no parameter {name!r}{meant}")
    if name == "every":
        name = "every_s"
        if value[-1:] in _UNITS:
            value, unit = value[:-1], _UNITS[value[-1]]
            return name, _number(value, text) * unit
    if not value:
        return name, None
    if value in _SWITCHES:
        return name, _SWITCHES[value]
    number = _number(value, text)
    return name, int(number) if number.is_integer() and name == "requests" else number


def _number(value: str, text: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise click.UsageError(
            f"--set {text!r}: expected a number, or on or off, as in p99=0.2 or hold=on"
        ) from error
