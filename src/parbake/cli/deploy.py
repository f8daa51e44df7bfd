"""`parbake deploy`: release a version of a deployment on a running server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from parbake.cli.exits import Exit
from parbake.cli.options import BUNDLE, Command, json_option, name_and_version, server_options
from parbake.cli.output import emit_json, say
from parbake.cli.release import show
from parbake.errors import GateRefused, SettingsError
from parbake.names import did_you_mean
from parbake.serving.route import Loss
from parbake.settings import REGISTERED

if TYPE_CHECKING:
    from parbake.app.releases import ReleaseStatus
    from parbake.release.model import Kind

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_POLL_S = 1.0
_CANARY = "1%,5%,25%,100%"


@click.command(cls=Command, short_help="Release a version: gate, canary or shadow, judge.")
@click.argument("version", metavar="NAME@VERSION")
@click.argument("bundle", type=BUNDLE, required=False)
@click.option(
    "--canary",
    default="",
    metavar="SHARE,...",
    help=f"Shares of the traffic, step by step, as in {_CANARY}; the judge promotes and rolls back. After the last "
    "step it gets all of it.",
)
@click.option(
    "--shadow", is_flag=True, help="First, or only, have it answer copies whose answers nobody gets."
)
@click.option("--ab", default="", metavar="A/B", help="Shares of the old and the new version, as in 50/50.")
@click.option("--bandit", is_flag=True, help="Shares by what labels say each version is worth.")
@click.option("--every", default="0s", metavar="TIME", help="Least time on each step, as in 10m.")
@click.option(
    "--table", type=click.Path(path_type=Path), metavar="TABLE", help="Prediction table of the version."
)
@click.option(
    "--output", default="", metavar="NAME", help="Output whose values are compared.  [default: the first]"
)
@click.option(
    "--segment", default="", metavar="COLUMN", help="Column by whose values they are compared apart."
)
@click.option(
    "--loss",
    default="",
    type=click.Choice(get_args(Loss)),
    help="How predictions are held against labels that arrive later.",
)
@click.option(
    "--margin",
    "margins",
    multiple=True,
    metavar="NAME=NUMBER",
    help="How much worse it may be: failures, p50, p99, outputs, loss; alpha and requests say how sure, and how "
    "many requests a step needs.  [repeatable]",
)
@click.option(
    "--waive", multiple=True, metavar="CHECK", help="Let a check of the gate not pass.  [repeatable]"
)
@click.option("--why", default="", metavar="TEXT", help="Why; a waiver needs it.")
@click.option(
    "--who", default="", metavar="NAME", help="Who releases it.  [default: the user of this machine]"
)
@click.option(
    "--breaking",
    is_flag=True,
    help="Let changes pass that break the callers of the version before; --why stands in the history.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Let a bundle without purpose or owner pass; --why stands in the history.",
)
@click.option(
    "--wait", is_flag=True, help="Return when the release has ended; exits with 1 if it was rolled back."
)
@server_options
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    version: str,
    bundle: Path | None,
    canary: str,
    ab: str,
    every: str,
    table: Path | None,
    margins: tuple[str, ...],
    who: str,
    why: str,
    waive: tuple[str, ...],
    port: int | None,
    admin_url: str,
    token: str,
    *,
    shadow: bool,
    bandit: bool,
    output: str,
    segment: str,
    loss: Loss,
    breaking: bool,
    force: bool,
    wait: bool,
    as_json: bool,
) -> None:
    """Release a version of a deployment on a running server, without a failed request.

    Without BUNDLE it is the version, or alias, of the registry. The gate comes first. Then the version is loaded
    beside the one that answers, and gets its share of the keys;
    the judge compares the two, promotes it step by step, or rolls it back. Without --canary, --shadow, --ab and
    --bandit it gets all of the traffic at once. parbake release shows how it stands, parbake rollback ends it.
    """
    import msgspec

    from parbake.app.releases import Wanted
    from parbake.cli.gate import user
    from parbake.release.judge import Margins
    from parbake.serving.route import Watch
    from parbake.transports import client

    # An alias is the registry's; whoever brings a bundle says which number it gets.
    name, number = name_and_version(version, aliases=bundle is None)
    kind, steps = _kind_and_steps(canary, ab, shadow=shadow, bandit=bandit)
    judged = {
        "--every": every != "0s",
        "--margin": margins,
        "--segment": segment,
        "--output": output,
        "--loss": loss,
    }
    if kind == "plain" and any(judged.values()):
        given = next(option for option, value in judged.items() if value)
        raise click.UsageError(
            f"{given} says how to judge a version beside another one; without --canary, --shadow, --ab or --bandit "
            "it would get all of the traffic at once"
        )
    try:
        wanted = Wanted(
            number,
            str(bundle.resolve()) if bundle is not None else f"{REGISTERED}{name}@{number}",
            str(table.resolve()) if table is not None else "",
            kind,
            steps,
            _seconds(every),
            msgspec.convert(dict(map(_margin, margins)), Margins),
            Watch(output=output, segment=segment, loss=loss),
            who or user(),
            why,
            tuple(dict.fromkeys((*waive, *(("metadata",) if force else ())))),
            breaking,
        )
    except (ValueError, msgspec.ValidationError) as error:
        raise SettingsError(str(error), hint="parbake deploy --help") from error
    where: dict[str, Any] = {"port": port, "admin_url": admin_url, "token": token}
    try:
        status = client.release(name, wanted, **where)
    except GateRefused as error:
        _show_refusal(name, number, error, as_json=as_json)
        raise
    if wait:
        status = _wait(name, status, where, quiet=as_json)
    if as_json:
        emit_json(status)
    else:
        show(status)
    ctx.exit(Exit.REFUSED if status.state in ("rolled_back", "refused", "aborted") else Exit.DONE)


def _show_refusal(name: str, version: str, error: GateRefused, *, as_json: bool) -> None:
    """Print what the gate found, as `parbake gate` does."""
    from parbake.cli.gate import show as show_gate
    from parbake.release.gate import GateReport

    if not isinstance(error.report, GateReport):
        return
    if as_json:
        emit_json({"deployment": name, "version": version, "state": "refused", "gate": error.report})
    else:
        show_gate(error.report)


def _wait(name: str, status: ReleaseStatus, where: dict[str, Any], *, quiet: bool) -> ReleaseStatus:
    from parbake.transports import client

    said = ""
    while status.state in ("pending", "running"):
        line = f"{100 * status.share:g} % of {name} is version {status.version}"
        if status.verdict is not None:
            line += f": {status.verdict.decision.value.replace('_', ' ')}, {status.verdict.reason}"
        if line != said and not quiet:
            say(line)
            said = line
        time.sleep(_POLL_S)
        status = client.release_status(name, **where)
    return status


def _kind_and_steps(canary: str, ab: str, *, shadow: bool, bandit: bool) -> tuple[Kind, tuple[float, ...]]:
    if (bool(canary) or shadow) + bool(ab) + bandit > 1:
        raise click.UsageError("--canary and --shadow, --ab, and --bandit are different things: give one")
    if ab:
        one, separator, other = ab.partition("/")
        shares = _share(one), _share(other)
        if not separator or abs(sum(shares) - 1) > 1e-6:
            raise click.UsageError(f"--ab {ab!r}: expected two shares that add up to 100, as in 50/50")
        return "ab", (shares[1],)
    if bandit:
        return "bandit", (0.5,)
    steps = tuple(_share(step) for step in canary.split(",")) if canary else ()
    if shadow:
        return ("canary" if steps else "shadow"), (0.0, *steps)
    return ("canary", steps) if steps else ("plain", (1.0,))


def _share(text: str) -> float:
    text = text.strip()
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError as error:
        raise click.UsageError(f"{text!r} is no share: write 5%") from error
    if not 0 <= share <= 1:
        raise click.UsageError(f"{text!r} is no share: from 0% to 100%")
    return share


def _seconds(text: str) -> float:
    try:
        return float(text[:-1]) * _UNITS[text[-1:]]
    except (KeyError, ValueError) as error:
        raise click.UsageError(f"--every {text!r}: expected a number and s, m, h or d, as in 10m") from error


def _margin(text: str) -> tuple[str, float]:
    from parbake.release.judge import Margins

    name, separator, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        separator = ""
        number = 0.0
    if not separator:
        raise click.UsageError(f"--margin {text!r}: expected NAME=NUMBER, as in p99=0.2")
    if name not in Margins.__struct_fields__:
        meant = did_you_mean(name, Margins.__struct_fields__)
        there_are = f"; there are {', '.join(Margins.__struct_fields__)}"
        raise click.UsageError(f"--margin {text!r}: no margin {name!r}{meant or there_are}")
    return name, int(number) if name == "requests" else number
