"""`parbake history`: who released what when, why, and what the judge said."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from parbake.cli.options import Command, json_option, state_options, state_settings
from parbake.cli.output import emit_json, emit_table, say

if TYPE_CHECKING:
    from parbake.release.model import Event

_TITLES: Final = ("when (UTC)", "deployment", "digest", "what", "by", "why")
_SCHEME: Final = "sha256:"
_DIGEST: Final = 12
_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


class _Since(click.ParamType[float]):
    """A moment: how long ago, or a date of ISO 8601 (without a zone: UTC)."""

    name = "since"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds since 1970."""
        if isinstance(value, float):
            return value
        if found := re.fullmatch(r"(\d{1,9})([smhdw])", value):
            return time.time() - int(found[1]) * _UNITS[found[2]]
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is neither 90m, 2h, 7d nor a date such as 2026-01-31T08:00", param, ctx)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


@click.command(cls=Command, short_help="Show who released what when, and why.")
@click.argument("name", required=False, default="")
@click.option(
    "--since",
    type=_Since(),
    default=0.0,
    metavar="WHEN",
    help="Only what happened since then: 90m, 2h, 7d ago, or a date.  [default: everything]",
)
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=1000,
    metavar="N",
    help="Most events, the newest.  [default: 1000]",
)
@state_options
@json_option
def command(name: str, since: float, limit: int, config: Path | None, as_json: bool, **values: Any) -> None:
    """Show what happened to the deployment NAME, or to all.

    These are releases, verdicts, waivers, changed parameters, routes by hand and moved aliases. It is read from the
    store of releases, whether a server runs or not.
    """
    from contextlib import closing

    from parbake.app.state import open_state

    with closing(open_state(state_settings(config, values), create=False)) as state:
        events = state.history(name, since=since, limit=limit)
    if as_json:
        emit_json(events)
        return
    if not events:
        say(f"nothing happened to {name or 'any deployment'}" + (" since then" if since else ""))
        return
    emit_table([_line(event) for event in events], _TITLES)


def _line(event: Event) -> tuple[str, ...]:
    when = datetime.fromtimestamp(event.at, UTC).strftime("%Y-%m-%d %H:%M:%S")
    name = f"{event.deployment}@{event.version}" if event.version else event.deployment or "-"
    digest = event.digest.removeprefix(_SCHEME)[:_DIGEST]
    return when, name, digest or "-", _what(event), event.by or "-", " ".join(event.why.split())


def _what(event: Event) -> str:
    details = event.details
    match event.what:
        case "release.refused" if details.get("checks"):
            return f"refused: {', '.join(details['checks'])}"
        case "release.begun":
            return f"begun ({details['kind']})"
        case "release.advanced":
            return f"step {details['step'] + 1}: {details['share'] * 100:.4g} % of the traffic"
        case "waiver":
            return f"waived {details['check']}"
        case "parameters":
            return f"parameters, version {details['version']}{_changed(details)}"
        case "route":
            return _routed(details)
        case "alias":
            before = f", not at {details['before']} any more" if details["before"] else ""
            return f"alias {details['alias']} points at it{before}"
        case "release.live" if details.get("image"):
            return f"live, in {details['image'].partition(' ')[0]}"
        case "image.built" | "image.removed":
            return f"{event.what.replace('.', ' ')}: {details['tag']}"
        case "settings":
            return f"settings, revision {details['revision']}"
        case "lease.taken" | "lease.given_up":
            return f"{event.what.replace('.', ' ').replace('_', ' ')}: {details['lease']}"
        case "verdict.roll_back" | "verdict.promote" | "verdict.hold":
            return f"verdict: {event.what.partition('.')[2].replace('_', ' ')}"
        case _:
            return event.what.removeprefix("release.").replace("_", " ")


def _routed(details: dict[str, Any]) -> str:
    """A route by hand in few words; `parbake route` shows all of it."""
    route = details["route"]
    if route is None:
        return "route removed"
    if route.get("killed"):
        return f"route, revision {details['revision']}: killed, {route['champion']} answers everything"
    words = [f"{arm['version']}={arm['weight'] * 100:.4g}%" for arm in route["arms"]]
    words += [f"shadow {shadow['version']}" for shadow in route.get("shadows", ())]
    if rules := len(route.get("rules", ())):
        words.append(f"{rules} rule{'s' if rules > 1 else ''}")
    return f"route, revision {details['revision']}: {', '.join(words)}"


def _changed(details: dict[str, Any]) -> str:
    """What is other than in the version before."""
    before, now = details.get("before", {}), details.get("values", {})
    changed = {
        name: now.get(name)
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name) and name != "release"
    }
    words = (
        f"{name}={'as it began' if value is None else json.dumps(value)}" for name, value in changed.items()
    )
    return f": {', '.join(words)}" if changed else ""
