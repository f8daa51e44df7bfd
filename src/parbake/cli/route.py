"""`parbake route`: show or change which version of a deployment answers what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import click

from parbake.cli.options import Command, json_option, server_options, who_option
from parbake.cli.output import emit, emit_json, emit_table, emit_title, say
from parbake.errors import SettingsError
from parbake.serving.route import Kind, Loss

if TYPE_CHECKING:
    from parbake.app.routes import Observed, RouteStatus
    from parbake.serving.route import Route, Rule

_TITLES = ("version", "weight", "role", "requests", "by rule", "rescued")
_SHADOWS = ("shadow", "asked", "dropped", "failed", "same rows", "mean difference")
_OBSERVED = ("version", "role", "watched", "failures", "labels", "mean loss")
_NUMBERS = ("weight", "requests", "by rule", "rescued")


@click.command(cls=Command, short_help="Show or change which version of a deployment answers what.")
@click.argument("name")
@click.option(
    "--set",
    "weights",
    default="",
    metavar="VERSION=SHARE,...",
    help="Share of the keys for each version, as 0.1 or 10%; they add up to 1.",
)
@click.option(
    "--champion",
    default="",
    metavar="VERSION",
    help="Version that answers where another cannot.  [default: the one it was, or the first of --set]",
)
@click.option(
    "--rule",
    "rules",
    multiple=True,
    metavar="'VERSION: CONDITION, ...'",
    help="Requests that go to a version in any case: header.NAME=VALUE|VALUE, parameter.NAME=VALUE, "
    "column.NAME=VALUE, share=SHARE, after=TIME, before=TIME. The first that holds decides; they replace those "
    "that were there.  [repeatable]",
)
@click.option("--no-rules", is_flag=True, help="Have no rules.")
@click.option(
    "--shadow",
    "shadows",
    multiple=True,
    metavar="VERSION[=SHARE]",
    help="Version that gets a copy of what others answer; they replace those that were there.  [repeatable]",
)
@click.option("--no-shadows", is_flag=True, help="Have no shadows.")
@click.option("--kind", type=click.Choice(get_args(Kind)), help="What the weights are for.")
@click.option(
    "--sticky",
    metavar="WHAT",
    help="What stays with one version: key (of the first row), header:NAME or parameter:NAME.",
)
@click.option(
    "--timeout-ms",
    type=click.FloatRange(0),
    metavar="MS",
    help="Time after which the champion is asked in place of another version; 0 for none.",
)
@click.option(
    "--rescue/--no-rescue", default=None, help="Whether the champion answers where another version fails."
)
@click.option(
    "--watch",
    metavar="OUTPUT",
    help="Output whose values are counted for each version, or first for the first one.",
)
@click.option("--no-watch", is_flag=True, help="Count requests only.")
@click.option("--segment", metavar="COLUMN", help="Column by whose values rows are counted apart.")
@click.option(
    "--loss",
    type=click.Choice([loss for loss in get_args(Loss) if loss]),
    help="How predictions are held against labels that arrive later.",
)
@click.option("--kill/--no-kill", default=None, help="Send everything to the champion, or no longer.")
@click.option("--remove", is_flag=True, help="Have no route: the last version answers.")
@click.option(
    "--revision",
    type=click.IntRange(0),
    metavar="N",
    help="Change it only if this is the revision in force (0: no route).",
)
@click.option("--why", default="", metavar="TEXT", help="Why, for the history.")
@who_option("Who changes it.")
@server_options
@json_option
def command(
    name: str,
    port: int | None,
    admin_url: str,
    token: str,
    as_json: bool,
    revision: int | None,
    why: str,
    who: str,
    **wanted: Any,
) -> None:
    """Show or change which version of a deployment answers requests that name none.

    A change is in force in all fronts when the command returns, and no request fails over it. Without an option that
    changes something the route is shown, with what each version was asked since the start of the server. Who changed
    what, and why, stands in the history.
    """
    from msgspec.structs import replace

    from parbake.app.routes import RouteChange
    from parbake.cli.gate import user
    from parbake.transports import client

    where: dict[str, Any] = {"port": port, "admin_url": admin_url, "token": token}
    kill, remove = wanted.pop("kill"), wanted.pop("remove")
    changes = {option: value for option, value in wanted.items() if value not in (None, "", (), False)}
    # What is said by "no", or by 0, is said as well.
    changes |= {option: wanted[option] for option in ("rescue", "timeout_ms") if wanted[option] is not None}
    if bool(changes) + (kill is not None) + remove > 1:
        raise SettingsError("--kill, --no-kill and --remove go with no other change", hint="call it twice")
    status = client.route(name, **where)
    change = None
    if kill is not None:
        change = RouteChange(killed=kill, revision=revision)
    elif remove:
        change = RouteChange(remove=True, revision=revision)
    elif changes:
        change = RouteChange(changed(name, status.route, changes), revision=revision)
    if change is not None:
        status = client.set_route(name, replace(change, by=who or user(), why=why), **where)
        if status.note:
            say(status.note)
    if as_json:
        emit_json(status)
    elif status.route is None:
        say(f"{name} has no route: its last version answers")
    else:
        show(status, status.route)


def changed(name: str, now: Route | None, changes: dict[str, Any]) -> Route:
    """A route with options of the command in force. Raises `SettingsError`."""
    from msgspec.structs import asdict, replace

    from parbake.app.routes import rule_of, shadow_of, weights_of
    from parbake.serving.route import Route, Watch

    fields: dict[str, Any] = asdict(now) if now is not None else {"deployment": name}
    if "weights" in changes:
        fields["arms"] = weights_of(changes["weights"])
        fields.setdefault("champion", fields["arms"][0].version)
    if "champion" in changes:
        fields["champion"] = changes["champion"]
    if "arms" not in fields:
        raise SettingsError(
            f"{name!r} has no route yet", hint=f"parbake route {name} --set VERSION=SHARE,..."
        )
    if "rules" in changes or "no_rules" in changes:
        fields["rules"] = tuple(map(rule_of, changes.get("rules", ())))
    if "shadows" in changes or "no_shadows" in changes:
        fields["shadows"] = tuple(map(shadow_of, changes.get("shadows", ())))
    if "sticky" in changes:
        fields["sticky"] = "" if changes["sticky"] == "key" else changes["sticky"]
    if "timeout_ms" in changes:
        fields["timeout_ms"] = changes["timeout_ms"] or None
    for field in ("kind", "rescue"):
        if field in changes:
            fields[field] = changes[field]
    watch = fields.get("watch")
    if {"watch", "segment", "loss"} & changes.keys():
        watch = watch or Watch()
        if "watch" in changes:
            output = "" if changes["watch"] == "first" else changes["watch"]
            # What the values of another output are counted by is for the server to find out.
            watch = replace(watch, output=output, bins=None if output != watch.output else watch.bins)
        watch = replace(watch, **{field: changes[field] for field in ("segment", "loss") if field in changes})
    fields["watch"] = None if "no_watch" in changes else watch
    try:
        return Route(**fields)
    except ValueError as error:
        raise SettingsError(str(error), hint="for example --set 3=90%,4=10%") from error


def show(status: RouteStatus, route: Route) -> None:
    """Print a route for a person."""
    words = [f"route of {route.deployment}, revision {route.revision}", route.kind]
    if route.killed:
        words.append(f"killed: version {route.champion} answers everything")
    emit_title(", ".join(words))
    weights = {arm.version: arm.weight for arm in route.arms}
    shadows = {shadow.version: shadow.share for shadow in route.shadows}
    emit()
    rows: list[tuple[str, ...]] = []
    for version in dict.fromkeys((*route.versions, *status.requests)):
        asked = status.requests.get(version, {})
        roles = ["champion"] if version == route.champion else []
        if version in shadows:
            roles.append("shadow" if shadows[version] == 1 else f"shadow of {shadows[version]:.2%}")
        rows.append(
            (
                version,
                f"{weights.get(version, 0):.2%}",
                ", ".join(roles) or "-",
                f"{sum(n for why, n in asked.items() if why != 'rescued'):,}",
                f"{asked.get('rule', 0):,}",
                f"{asked.get('rescued', 0):,}",
            )
        )
    emit_table(rows, _TITLES, numbers=_NUMBERS)
    if status.shadows:
        emit()
        emit_table(
            [
                (
                    version,
                    f"{counts.asked:,}",
                    f"{counts.dropped:,}",
                    f"{counts.failed:,}",
                    "-" if counts.agreement is None else f"{counts.agreement:.2%}",
                    f"{counts.difference / counts.values:.4g}" if counts.values else "-",
                )
                for version, counts in sorted(status.shadows.items())
            ],
            _SHADOWS,
            numbers=_SHADOWS[1:],
        )
    if status.observed:
        emit()
        emit_table([_observed(item) for item in status.observed], _OBSERVED, numbers=_OBSERVED[2:])
    if route.rules:
        emit()
        for rule in route.rules:
            emit(f"version {rule.version} where {words_of(rule)}")


def _observed(item: Observed) -> tuple[str, ...]:
    seen = item.observation
    number, loss, _ = seen.labels.get("", (0, 0.0, 0.0))
    return (
        item.version,
        item.role,
        f"{seen.requests:,}",
        f"{seen.failures:,}",
        f"{number:,}",
        f"{loss / number:.4g}" if number else "-",
    )


def words_of(rule: Rule) -> str:
    """The conditions of a rule in words."""
    from datetime import UTC, datetime

    words: list[str] = []
    for what, named in (("header", rule.headers), ("parameter", rule.parameters), ("column", rule.columns)):
        for name, values in named.items():
            words.append(f"{what} {name} is {' or '.join(values)}" if values else f"{what} {name} is there")
    if rule.share is not None:
        words.append(f"the key is among {rule.share:.2%}")
    for word, moment in (("from", rule.after), ("until", rule.before)):
        if moment is not None:
            words.append(f"{word} {datetime.fromtimestamp(moment, UTC).isoformat(timespec='seconds')}")
    return ", and ".join(words)
