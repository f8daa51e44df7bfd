"""`parbake inventory`: what there is, where it runs, on what, and whose it is."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from parbake.cli.exits import Exit
from parbake.cli.options import Command, json_option, state_options, state_settings
from parbake.cli.output import age, emit, emit_json, emit_table, emit_title, plain, say, say_error
from parbake.errors import NotFound, ParbakeError, VersionNotFound

if TYPE_CHECKING:
    from parbake.app.inventory import BundleDiff, Delta, ServerInventory
    from parbake.contract.bundle import StoredBundle
    from parbake.contract.model import TensorSpec
    from parbake.release.inventory import Inventory, Item
    from parbake.release.state import State

_TITLES = (
    "model",
    "version",
    "state",
    "owner",
    "digest",
    "made by",
    "python",
    "runtime",
    "vulnerable",
    "asked",
)
_DIGEST = 12

CSV_COLUMNS: Final = (
    "name", "version", "state", "where", "bundle", "digest", "format", "made_by", "bytes", "purpose", "owner",
    "training_data", "run", "packed", "inputs", "outputs", "key", "os", "kernel", "arch", "cpu", "gpus", "python",
    "runtime", "libraries", "vulnerable", "not_judged", "python_ends", "os_ends", "mode", "table", "table_rows",
    "requests", "last_request", "release", "aliases", "released_by", "released_at", "image", "waivers", "problem",
)  # fmt: skip
"""Columns of ``--csv``. Lists are joined by "; "; an empty cell is not known."""


@click.command(cls=Command, short_help="Show every model: where it runs, on what, whose it is.")
@click.argument("paths", type=click.Path(path_type=Path), nargs=-1, metavar="[PATH]...")
@click.option(
    "--diff", "pair", nargs=2, metavar="A B", help="Show how two bundles or versions (NAME@1) differ."
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.option(
    "--advisories",
    default="https://api.osv.dev",
    envvar="PARBAKE_ADVISORIES",
    metavar="SOURCE",
    show_default=True,
    help="Known vulnerabilities: URL of OSV's API, or a zip or folder in its format.",
)
@click.option("--offline", is_flag=True, help="Ask no service about vulnerabilities.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    envvar="PARBAKE_PORT",
    metavar="PORT",
    help="Only the server on this HTTP port.  [default: all of yours on this machine]",
)
@click.option(
    "--admin-url",
    default="",
    envvar="PARBAKE_ADMIN_URL",
    metavar="URL",
    help="Only the server with this admin API.",
)
@click.option(
    "--token", default="", envvar="PARBAKE_ADMIN_TOKEN", metavar="TOKEN", help="Token of the admin API."
)
@state_options
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    paths: tuple[Path, ...],
    pair: tuple[str, str] | None,
    as_csv: bool,
    advisories: str,
    offline: bool,
    port: int | None,
    admin_url: str,
    token: str,
    config: Path | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Show every model: where it runs, on what, whose it is, and what is known to be wrong with its libraries.

    PATH is a bundle, or a folder with bundles somewhere in it. What runs on this machine is shown without being named.
    What is not known is said to be unknown: a service that does not answer has found nothing out.
    """
    from parbake.app.inventory import StoredFacts, gather
    from parbake.app.registry import cache_root

    if as_csv and as_json:
        raise click.UsageError("--csv or --json, not both")
    if pair is not None and as_csv:
        raise click.UsageError("--diff prints no CSV: --json")
    servers, silent = _servers(port, admin_url, token)
    source = "" if offline and advisories.startswith(("http://", "https://")) else advisories
    state, why = _state(config, values)
    with closing(state) if state is not None else nullcontext():
        facts = StoredFacts(state) if state is not None else None
        source = "" if pair is not None else source
        # What was released may have been fetched from a registry.
        fetched = cache_root(state_settings(config, values))
        if facts is not None and fetched.is_dir():
            paths = (*paths, fetched)
        found = gather(servers, paths, facts=facts, why_no_facts=why, advisories=source)
    if pair is not None:
        _show_diff(pair, found, as_json)
        return
    if as_json:
        emit_json(found)
    elif as_csv:
        write_csv(found)
    else:
        show(found, time.time())
    for error in silent:
        say_error(error.message, error.hint)
    if silent:
        ctx.exit(Exit.UNAVAILABLE)


def show(found: Inventory, now: float) -> None:
    """Print an inventory for a person. ``now`` is Unix time."""
    if found.items:
        emit_table([_row(item, now) for item in found.items], _TITLES)
    for title, lines in (
        ("Not as it should be", _problems(found)),
        ("Known vulnerabilities", _risks(found)),
        ("Waived", _waivers(found)),
    ):
        if lines:
            emit()
            emit_title(title)
            emit_table(lines)
    if found.items:
        emit()
    count = len(found.items)
    running = sum(item.state == "running" for item in found.items)
    owners = len({item.owner for item in found.items if item.owner})
    emit(
        f"{count} version{'' if count == 1 else 's'}, {running} running, {owners} owner{'' if owners == 1 else 's'}"
    )
    if not found.advisories.known:
        say(f"vulnerabilities are unknown: {found.advisories.words}")
    if found.releases:
        say(f"releases and waivers are unknown: {found.releases}")
    if not count:
        say("parbake inventory FOLDER looks for bundles there")


def write_csv(found: Inventory) -> None:
    """Print an inventory as CSV, one line per version."""
    writer = csv.DictWriter(sys.stdout, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for item in found.items:
        writer.writerow({name: _safe(cell) for name, cell in _cells(item).items()})


def _state(config: Path | None, values: dict[str, Any]) -> tuple[State | None, str]:
    """The store of releases, or why nothing is known of releases; "" where there is no store yet."""
    from parbake.app.state import open_state

    settings = state_settings(config, values)
    try:
        return open_state(settings, create=False), ""
    except NotFound:
        return None, ""
    except ParbakeError as error:
        return None, error.message


def _servers(
    port: int | None, admin_url: str, token: str
) -> tuple[dict[str, ServerInventory], list[ParbakeError]]:
    """What each server says of itself, by its address, and why some said nothing."""
    from parbake.transports import client, statefile

    if admin_url:
        return {admin_url: client.inventory(admin_url=admin_url, token=token)}, []
    if port is not None:
        return {statefile.find(port).url: client.inventory(port=port, token=token)}, []
    found: dict[str, ServerInventory] = {}
    silent: list[ParbakeError] = []
    for running in statefile.every():
        try:
            found[running.url] = client.inventory(admin_url=running.admin_url, token=running.token)
        except ParbakeError as error:
            silent.append(error)
    return found, silent


def _row(item: Item, now: float) -> tuple[str, ...]:
    return tuple(
        map(
            plain,
            (
                item.name,
                item.version or "-",
                item.state,
                item.owner or "-",
                item.digest.removeprefix("sha256:")[:_DIGEST] or "-",
                item.made_by or "-",
                item.machine.python.rpartition(" ")[2] or "-",
                item.machine.runtime.rpartition(" ")[2] or "-",
                _vulnerable(item),
                _asked(item, now),
            ),
        )
    )


def _vulnerable(item: Item) -> str:
    if item.vulnerable is None:
        return "unknown"
    words = f"{len(item.vulnerable)} of {len(item.machine.libraries)}"
    return f"{words}, {len(item.not_judged)} unknown" if item.not_judged else words


def _asked(item: Item, now: float) -> str:
    if item.last_request is None:
        return "-"
    return age(now - item.last_request) if item.last_request else "never"


def _problems(found: Inventory) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for item in found.items:
        if item.problem:
            lines.append((plain(_title(item)), plain(item.problem)))
            continue
        missing = [
            what for what, said in (("purpose", item.purpose), ("owner", item.owner)) if not said.strip()
        ]
        if missing:
            lines.append((plain(_title(item)), f"no {' and no '.join(missing)}"))
        lines += [
            (plain(_title(item)), f"{plain(one.what)} gets no more fixes since {one.ends}")
            for one in item.lifetimes
            if one.ended
        ]
    return lines


def _risks(found: Inventory) -> list[tuple[str, str, str]]:
    """Each vulnerable library once, with the versions that run on it."""
    users: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for item in found.items:
        for risk in item.vulnerable or ():
            users.setdefault((risk.library, risk.version, risk.advisories), []).append(_title(item))
    return [
        (
            plain(f"{library} {version}"),
            ", ".join(map(plain, dict.fromkeys(titles))),
            plain(", ".join(ids)),
        )
        for (library, version, ids), titles in sorted(users.items())
    ]


def _waivers(found: Inventory) -> list[tuple[str, str, str]]:
    return [
        (plain(_title(item)), waiver.check, plain(f"{waiver.who}, {waiver.at}: {waiver.why}"))
        for item in found.items
        for waiver in item.waivers
    ]


def _title(item: Item) -> str:
    return f"{item.name}@{item.version}" if item.version else item.name


def _cells(item: Item) -> dict[str, str]:
    """An item as cells of text; "" is not known."""
    machine = item.machine
    return {
        **{
            name: str(getattr(item, name))
            for name in (
                "name", "version", "state", "where", "bundle", "digest", "format", "made_by", "bytes", "purpose",
                "owner", "training_data", "run", "packed", "mode", "table", "table_rows", "released_by", "released_at",
                "image", "problem",
            )
        },
        **{name: getattr(machine, name) for name in ("os", "kernel", "arch", "cpu", "python", "runtime")},
        "gpus": _list(machine.gpus),
        "inputs": _list(_tensors(item.inputs)),
        "outputs": _list(_tensors(item.outputs)),
        "key": _list(item.key),
        "libraries": _list(f"{library.name} {library.version}" for library in machine.libraries),
        "vulnerable": "unknown"
        if item.vulnerable is None
        else _list(f"{risk.library} {risk.version}: {', '.join(risk.advisories)}" for risk in item.vulnerable),
        "not_judged": _list(item.not_judged),
        "python_ends": item.lifetimes[0].ends if item.lifetimes else "",
        "os_ends": item.lifetimes[1].ends if item.lifetimes else "",
        "requests": "" if item.requests is None else str(item.requests),
        "last_request": "" if item.last_request is None else f"{item.last_request:.0f}",
        "aliases": _list(item.aliases),
        "waivers": _list(f"{w.check}: {w.why} ({w.who}, {w.at})" for w in item.waivers),
    }  # fmt: skip


def _tensors(specs: Iterable[TensorSpec]) -> Iterator[str]:
    from parbake.release.callers import words_of

    return (f"{spec.name} {words_of(spec)}" for spec in specs)


def _show_diff(pair: tuple[str, str], there: Inventory, as_json: bool) -> None:
    from parbake.app.inventory import diff

    before, after = (_bundle(word, there) for word in pair)
    found = diff(before, after)
    if as_json:
        emit_json(found)
    else:
        show_diff(found)


def show_diff(found: BundleDiff) -> None:
    """Print how two bundles differ, part by part."""
    if found.same:
        emit(f"the same bundle, {found.before}")
        return
    emit_table([("before", found.before), ("after", found.after)])
    if found.schema:
        emit()
        emit_title("For callers")
        emit_table(
            [
                tuple(map(plain, (c.where, c.before, c.after, "breaks" if c.breaking else "fits", c.why)))
                for c in found.schema
            ],
            ("what", "before", "after", "", "why"),
        )
    for title, deltas in (
        ("Contract", found.contract),
        ("Environment", found.libraries),
        ("Goldens", found.goldens),
        ("Files", found.size),
    ):
        if deltas:
            emit()
            emit_title(title)
            emit_table([_delta(delta) for delta in deltas], ("what", "before", "after", ""))


def _delta(delta: Delta) -> tuple[str, ...]:
    return tuple(plain(text) for text in (delta.what, delta.before, delta.after, delta.note))


def _bundle(word: str, there: Inventory) -> StoredBundle:
    """The bundle at a path, or of a version that is served or was released from a path."""
    from parbake.contract.bundle import read_bundle

    name, separator, version = word.rpartition("@")
    if Path(word).exists() or not separator:
        return read_bundle(word)
    mine = [item for item in there.items if item.name == name and item.bundle]
    for item in mine:
        if version == item.version or version in item.aliases:
            return read_bundle(item.bundle)
    known = ", ".join(_title(item) for item in mine) or "none of that name"
    raise VersionNotFound(f"there is no version {word!r} here", hint=f"known: {known}; or name a bundle")


def _list(words: Iterable[str]) -> str:
    return "; ".join(words)


def _safe(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell
