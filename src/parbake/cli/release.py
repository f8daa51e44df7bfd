"""`parbake release`: how the release of a deployment stands, and what the judge says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from parbake.cli.options import Command, json_option, server_options
from parbake.cli.output import emit, emit_json, emit_table, plain

if TYPE_CHECKING:
    from parbake.app.releases import ReleaseStatus

_STATES = {
    "running": "is being released",
    "pending": "is being loaded",
    "live": "is live",
    "rolled_back": "was rolled back",
    "superseded": "was followed by another",
    "refused": "was refused",
    "aborted": "could not begin",
}


@click.command(cls=Command, short_help="Show how the release of a deployment stands.")
@click.argument("name")
@server_options
@json_option
def command(name: str, as_json: bool, **where: Any) -> None:
    """Show how the release of a deployment stands: its share of the traffic, and what the judge says of it."""
    from parbake.transports import client

    status = client.release_status(name, **where)
    if as_json:
        emit_json(status)
    else:
        show(status)


def show(status: ReleaseStatus) -> None:
    """Print where a release is, then the judge's verdict with its evidence."""
    line = f"{status.deployment}: version {status.version} {_STATES.get(status.state, status.state)}"
    if status.state == "running":
        line += f", step {status.step + 1} of {len(status.steps)}: {100 * status.share:g} % of the traffic"
    emit(line)
    if status.champion != status.version:
        emit(f"version {status.champion} answers{' the rest' if status.state == 'running' else ''}")
    verdict = status.verdict
    if verdict is None:
        return
    emit(f"judge: {verdict.decision.value.replace('_', ' ')}: {plain(verdict.reason)}")
    if verdict.evidence:
        champion, challenger = status.requests
        emit(f"of {challenger:,} requests, beside {champion:,} of version {status.champion}")
        emit_table([(one.test, one.segment or "all", plain(one.words)) for one in verdict.evidence])
