"""`parbake status`: what a running server serves, from what, and how it fares."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from parbake.cli.options import Command, json_option, server_options
from parbake.cli.output import age, emit, emit_json, emit_table, emit_title

if TYPE_CHECKING:
    from parbake.app.follow import Following
    from parbake.app.supervisor import Status, VersionStatus

_SHARE = "traffic"
_TITLES = (
    "model",
    "version",
    _SHARE,
    "mode",
    "digest",
    "table rows",
    "learned",
    "requests",
    "baked",
    "errors",
    "runs in",
    "restarts",
    "owner",
)
_NUMBERS = (_SHARE, "table rows", "learned", "requests", "baked", "errors", "restarts")
_DIGEST = len("sha256:") + 12


@click.command(cls=Command, short_help="Show what a running server serves.")
@server_options
@json_option
def command(port: int | None, admin_url: str, token: str, as_json: bool) -> None:
    """Show what a running server serves, since when, in which processes, and what it was asked.

    Requests, errors and restarts are counted since the start of the server; "learned" is what hybrid mode keeps by
    itself now, "baked" the share of rows that were answered without the model. "traffic" is what a version gets of the
    requests that name none, where there are several; parbake release and parbake route say more.
    """
    from parbake.transports import client

    found = client.status(port=port, admin_url=admin_url, token=token)
    if as_json:
        emit_json(found)
    else:
        show(found, time.time())


def show(status: Status, now: float) -> None:
    """Print a server for a person. ``now`` is Unix time."""
    fronts, restarts = len(status.front_pids), status.front_restarts
    emit_title(f"process {status.pid}, started {age(now - status.started)}")
    emit(
        f"{fronts} front{'' if fronts == 1 else 's'}, started again {restarts} time{'' if restarts == 1 else 's'}; "
        f"what is served was changed {max(status.generation - 1, 0)} time{'' if status.generation == 2 else 's'}"
    )
    on_demand = [version for version in status.versions if version.state]
    if on_demand:
        there = [version for version in on_demand if version.memory_bytes]
        taken = sum(version.memory_bytes for version in there)
        budget = f" of {status.memory_bytes / 1e6:,.1f}" if status.memory_bytes else ""
        emit(
            f"of {len(on_demand):,} models on demand {len(there):,} are loaded, with {taken / 1e6:,.1f}{budget} MB, "
            f"in {len(status.room_pids)} process{'' if len(status.room_pids) == 1 else 'es'}"
        )
    if status.versions:
        emit()
        # Where no deployment has several versions there is nothing to share out.
        several = any(version.share < 1 for version in status.versions)
        left_out = None if several else _TITLES.index(_SHARE)
        rows = [_row(version, now) for version in status.versions]
        table = [[cell for at, cell in enumerate(row) if at != left_out] for row in (_TITLES, *rows)]
        emit_table(table[1:], table[0], numbers=_NUMBERS)
    if status.following:
        emit()
        for following in status.following:
            emit(_follows(following, now))
    if status.unloaded:
        emit()
        emit(f"not loaded: {', '.join(status.unloaded)}")


def _follows(following: Following, now: float) -> str:
    """What a reference is served as, and what is in the way."""
    line = f"{following.reference} is version {following.version}"
    if following.problem:
        line += f"; version {following.wanted} is not served: {following.problem}"
    if following.away_since:
        since = f"the registry went away {age(now - following.away_since)}"
        line += f"; {since}" + ("" if following.answered else ", and this is from the cache")
    return line


def _row(version: VersionStatus, now: float) -> tuple[str, ...]:
    table = f"{version.table_rows:,}" if version.table else "-"
    if version.table_expires and now > version.table_expires:
        table += " expired"
    return (
        version.name,
        version.version,
        f"{100 * version.share:.3g} %",
        f"{version.mode} (auto)" if version.auto else version.mode,
        version.digest[:_DIGEST],
        table,
        f"{version.head_rows:,}" if version.mode == "hybrid" else "-",
        f"{version.requests:,}",
        f"{100 * version.baked_rows / version.rows:.0f} %" if version.rows else "-",
        f"{version.errors:,}",
        _place(version, now),
        str(version.runner_restarts),
        version.owner,
    )


def _room(version: VersionStatus, now: float) -> str:
    """Of a model that is loaded on demand: where it is, what it takes, and when it ran last."""
    words = [version.state]
    if version.memory_bytes:
        words.append(f"{version.memory_bytes / 1e6:.1f} MB")
    if version.last_used:
        words.append(f"used {age(now - version.last_used)}")
    return ", ".join(words)


def _place(version: VersionStatus, now: float) -> str:
    if version.mode == "static":
        return "-"
    if version.state:
        return _room(version, now)
    if version.placement != "process":
        return "fronts"
    count = len(version.runner_pids)
    return f"{count} runner{'' if count == 1 else 's'}"
