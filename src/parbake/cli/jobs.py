"""`parbake jobs`: what waits in a running server's queue, what was given up and why; begin it again, or remove it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from parbake.cli.options import Command, debug_option, json_option, server_options
from parbake.cli.output import age, emit, emit_json, emit_table, plain, say, size

if TYPE_CHECKING:
    from parbake.app.jobs import JobsReport
    from parbake.queue.model import State

_STATES: Final[tuple[State, ...]] = ("queued", "running", "done", "failed", "cancelled", "dead")
_TITLES: Final = ("deployment", *_STATES, "waiting since")
_DEAD_TITLES: Final = ("job", "deployment", "asked by", "attempts", "given up", "why")


@dataclass(frozen=True, slots=True)
class _Server:
    """Which one is meant, as the options in front of a subcommand say."""

    port: int | None
    admin_url: str
    token: str

    def where(self, port: int | None, admin_url: str, token: str) -> dict[str, Any]:
        """The same with the options behind it, which go first."""
        return {
            "port": port or self.port,
            "admin_url": admin_url or self.admin_url,
            "token": token or self.token,
        }


class _Group(click.Group):
    """Subcommands; takes ``--debug`` in front of them too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(debug_option())


@click.group(
    cls=_Group,
    invoke_without_command=True,
    short_help="Show the jobs of a running server; begin those again that were given up.",
)
@server_options
@json_option
@click.pass_context
def command(ctx: click.Context, port: int | None, admin_url: str, token: str, as_json: bool) -> None:
    """Show the jobs of a running server: how many are in which state, and those that were given up, with the reason.

    "waiting since" is when the oldest job was taken that has no answer yet. Of the jobs that were given up (dead) the
    last hundred are shown, the latest first. Servers that share a state directory share their jobs.
    """
    from parbake.transports import client

    ctx.obj = _Server(port, admin_url, token)
    if ctx.invoked_subcommand is not None:
        return
    report = client.jobs(port=port, admin_url=admin_url, token=token)
    if as_json:
        emit_json(report)
    else:
        show(report)


@command.command(cls=Command, short_help="Have jobs begun again that were given up.")
@click.argument("job_ids", nargs=-1, metavar="[ID]...")
@click.option("--all-dead", is_flag=True, help="All that were given up.")
@click.option("--deployment", default="", metavar="NAME", help="With --all-dead: of this deployment only.")
@server_options
@json_option
@click.pass_obj
def retry(
    server: _Server,
    job_ids: tuple[str, ...],
    all_dead: bool,
    deployment: str,
    port: int | None,
    admin_url: str,
    token: str,
    as_json: bool,
) -> None:
    """Have jobs begun again that were given up (dead), under their ids and with all their attempts.

    Ids are those that parbake jobs shows. With --all-dead it is every job that is dead now, as far as its deployment
    has room for more that wait. A job's idempotency key is free since it was given up: whoever has sent the request
    again under it meanwhile has another job.
    """
    from parbake.transports import client

    if bool(job_ids) == all_dead or (deployment and not all_dead):
        raise click.UsageError("give the ids of jobs, or --all-dead, which --deployment may narrow")
    where = server.where(port, admin_url, token)
    left = 0
    retried: list[str] = []
    if all_dead:
        came = client.retry_dead(deployment, **where)
        retried, left = list(came.retried), came.left
    for job_id in job_ids:
        retried += client.retry_job(job_id, **where).retried
        if not as_json:
            say(f"{job_id} is to be begun again")
    if as_json:
        emit_json({"retried": retried, "left": left})
        return
    if all_dead:
        say(f"{_jobs(len(retried))} to be begun again")
    if left:
        say(
            f"{_jobs(left)} left dead for want of room: the same command takes more of them in when some are answered"
        )


@command.command(cls=Command, short_help="Take back a job that waits, or remove one that has an end.")
@click.argument("job_ids", nargs=-1, required=True, metavar="ID...")
@server_options
@json_option
@click.pass_obj
def remove(
    server: _Server, job_ids: tuple[str, ...], port: int | None, admin_url: str, token: str, as_json: bool
) -> None:
    """Take back jobs that wait, and remove those that have come to their end, with their answers.

    Who asked for one that was taken back is told so (job_cancelled); one that is removed is not there any more. A job
    that is being answered is left alone.
    """
    from parbake.transports import client

    where = server.where(port, admin_url, token)
    removed = []
    for job_id in job_ids:
        removed.append(client.remove_job(job_id, **where))
        if not as_json:
            words = (
                "is cancelled" if removed[-1].state == "cancelled" else f"({removed[-1].state}) is removed"
            )
            say(f"{job_id} {words}")
    if as_json:
        emit_json(removed)


def show(report: JobsReport) -> None:
    """Print the jobs for a person."""
    if not report.tallies:
        say("there are no jobs")
        return
    names = dict.fromkeys(tally.deployment for tally in report.tallies)
    emit_table([_row(report, name) for name in names], _TITLES, numbers=_STATES)
    emit(f"{size(report.bytes)} on disk")
    if not report.dead:
        return
    emit()
    rows = [
        (
            item.id,
            item.deployment,
            item.client or "-",
            str(item.attempts),
            age(item.dead_s),
            plain(item.error) + ("" if item.kept else " (its request is not there any more)"),
        )
        for item in report.dead
    ]
    emit_table(rows, _DEAD_TITLES, numbers=("attempts",))
    more = sum(tally.count for tally in report.tallies if tally.state == "dead") - len(report.dead)
    if more > 0:
        emit(f"and {more:,} that were given up before")


def _row(report: JobsReport, name: str) -> Sequence[str]:
    mine = {tally.state: tally for tally in report.tallies if tally.deployment == name}
    waiting = [mine[state].oldest_s for state in ("queued", "running") if state in mine]
    counts = (f"{mine[state].count:,}" if state in mine else "0" for state in _STATES)
    return (name, *counts, age(max(waiting)) if waiting else "-")


def _jobs(count: int) -> str:
    return f"{count:,} job{' is' if count == 1 else 's are'}"
