"""`parbake jobs`: what waits in a running server's queue, what was given up and why; begin it again, or remove it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from parbake.cli.options import Command, F, Group, json_option, server_options
from parbake.cli.output import age, emit, emit_json, emit_table, plain, say, size
from parbake.errors import NotFound, QueueAway

if TYPE_CHECKING:
    from parbake.app.jobs import JobRemoved, JobsReport
    from parbake.queue.model import State

_STATES: Final[tuple[State, ...]] = ("queued", "running", "done", "failed", "cancelled", "dead")
_TITLES: Final = ("deployment", *_STATES, "waiting since")
_DEAD_TITLES: Final = ("job", "deployment", "asked by", "attempts", "given up", "why")
_MORE: Final = "the same command takes more of them in"
_LOOK: Final = "parbake jobs shows which deployments have any"


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the options in front of a subcommand say: which server, and how it is told."""

    where: dict[str, Any]
    as_json: bool


@click.group(
    cls=Group,
    invoke_without_command=True,
    short_help="Show the jobs of a running server; begin those again that were given up.",
)
@server_options
@json_option
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, **server: Any) -> None:
    """Show the jobs of a running server: how many are in which state, and those that were given up, with the reason.

    "waiting since" is when the oldest job was taken that has no answer yet. Of the jobs that were given up (dead) the
    last hundred are shown, the latest first. Servers that share a state directory share their jobs.
    """
    from parbake.transports import client

    ctx.obj = _Asked(_where(ctx, server, server), as_json)
    if ctx.invoked_subcommand is not None:
        return
    report = client.jobs(**ctx.obj.where)
    if as_json:
        emit_json(report)
    else:
        show(report)


def _which_jobs(function: F) -> F:
    """Ids, or ``--all-dead``, which ``--deployment`` may narrow: see `_check_which`."""
    for option in (
        click.option(
            "--deployment", default=None, metavar="NAME", help="With --all-dead: of this deployment only."
        ),
        click.option("--all-dead", is_flag=True, help="All that were given up."),
        click.argument("job_ids", nargs=-1, metavar="[ID]..."),
    ):
        function = option(function)
    return function


@command.command(cls=Command, short_help="Have jobs begun again that were given up.")
@_which_jobs
@server_options
@json_option
@click.pass_context
def retry(
    ctx: click.Context,
    /,
    job_ids: tuple[str, ...],
    all_dead: bool,
    deployment: str | None,
    as_json: bool,
    **server: Any,
) -> None:
    """Have jobs begun again that were given up (dead), under their ids and with all their attempts.

    Ids are those that parbake jobs shows. With --all-dead it is every job that is dead now and has its request still,
    as far as its deployment has room for more that wait. A job's idempotency key is free since it was given up:
    whoever has sent the request again under it meanwhile has another job.
    """
    from parbake.app.jobs import JobsRetried
    from parbake.transports import client

    _check_which(job_ids, all_dead, deployment)
    where, as_json = _where(ctx, server, ctx.obj.where), as_json or ctx.obj.as_json
    if all_dead:
        came = client.retry_dead(deployment or "", **where)
        if as_json:
            emit_json(came)
        elif came.retried or not deployment:
            say(f"{_jobs(len(came.retried))} to be begun again")
        if came.stopped:
            raise QueueAway(f"{_jobs(came.left)} left dead: {came.stopped}", hint=_MORE)
        if came.left and not as_json:
            say(f"{_jobs(came.left)} left dead for want of room: {_MORE} when some are answered")
        if deployment and not came.retried and not came.left:
            raise NotFound(f"{deployment!r} has no dead job that can be begun again", hint=_LOOK)
        return
    retried: tuple[str, ...] = ()
    try:
        for job_id in job_ids:
            retried += client.retry_job(job_id, **where).retried
            if not as_json:
                say(f"{job_id} is to be begun again")
    finally:
        # What was done is told, whatever comes of the next one.
        if as_json:
            emit_json(JobsRetried(retried))


@command.command(cls=Command, short_help="Take back jobs that wait, or remove those that have an end.")
@_which_jobs
@server_options
@json_option
@click.pass_context
def remove(
    ctx: click.Context,
    /,
    job_ids: tuple[str, ...],
    all_dead: bool,
    deployment: str | None,
    as_json: bool,
    **server: Any,
) -> None:
    """Take back jobs that wait, and remove those that have come to their end, with their answers.

    Who asked for one that was taken back is told so (job_cancelled); one that is removed is not there any more, and one
    that was taken back before is removed too. A job that is being answered is left alone. With --all-dead it is every
    job that was given up.
    """
    from parbake.transports import client

    _check_which(job_ids, all_dead, deployment)
    where, as_json = _where(ctx, server, ctx.obj.where), as_json or ctx.obj.as_json
    if all_dead:
        came = client.remove_dead(deployment or "", **where)
        if as_json:
            emit_json(came)
        elif came.removed or not deployment:
            say(f"{_jobs(came.removed)} removed")
        if came.more and not as_json:
            say("there are more: the same command removes them")
        if deployment and not came.removed:
            raise NotFound(f"{deployment!r} has no dead job", hint=_LOOK)
        return
    removed: list[JobRemoved] = []
    try:
        for job_id in job_ids:
            removed.append(client.remove_job(job_id, **where))
            if not as_json:
                words = f"({removed[-1].state}) is removed" if removed[-1].gone else "is cancelled"
                say(f"{job_id} {words}")
    finally:
        if as_json:
            emit_json(removed)


def _where(ctx: click.Context, given: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Which server is meant: flags go before what was said before, and that before what the environment says."""
    flags = {
        name: value
        for name, value in given.items()
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    if "port" in flags:
        # It means another server than a URL that does not stand beside it.
        flags.setdefault("admin_url", "")
    return {**before, **flags}


def _check_which(job_ids: Sequence[str], all_dead: bool, deployment: str | None) -> None:
    if bool(job_ids) == all_dead or (deployment is not None and not all_dead):
        raise click.UsageError("give the ids of jobs, or --all-dead, which --deployment may narrow")
    if deployment == "":
        # As of a variable that is not set: it must not mean the jobs of all.
        raise click.UsageError("--deployment is empty: give a name, or leave it out to mean all deployments")


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
