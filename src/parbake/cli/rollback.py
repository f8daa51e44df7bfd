"""`parbake rollback`: back to the version before, at once."""

from __future__ import annotations

from typing import Any

import click

from parbake.cli.options import Command, json_option, server_options
from parbake.cli.output import emit_json, say


@click.command(cls=Command, short_help="Go back to the version before, at once.")
@click.argument("name")
@click.option(
    "--to", default="", metavar="VERSION", help="Version to go back to.  [default: the last good one]"
)
@click.option("--why", default="", metavar="TEXT", help="Why, for the history.")
@click.option("--who", default="", metavar="NAME", help="Who goes back.  [default: the user of this machine]")
@server_options
@json_option
def command(name: str, to: str, why: str, who: str, as_json: bool, **where: Any) -> None:
    """Go back to the version before, with its table, without a failed request.

    A release under way ends. The version before is still loaded, so this takes effect at once; an older one, named by
    --to, is loaded first.
    """
    from parbake.app.releases import Back
    from parbake.cli.gate import user
    from parbake.transports import client

    status = client.rollback(name, Back(to, who or user(), why), **where)
    if as_json:
        emit_json(status)
    else:
        if status.note:
            say(status.note)
        say(
            f"{name} is version {status.champion} again after {status.seconds:.2f} s; version {status.version} is out"
        )
        if status.image:
            say(f"the image with version {status.champion} in it is {status.image.partition(' ')[0]}")
