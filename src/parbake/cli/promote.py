"""`parbake promote`: the next step of a release, by hand."""

from __future__ import annotations

from typing import Any

import click

from parbake.cli.options import Command, json_option, server_options
from parbake.cli.output import emit_json
from parbake.cli.release import show


@click.command(cls=Command, short_help="Take the next step of a release by hand.")
@click.argument("name")
@click.option("--why", default="", metavar="TEXT", help="Why, for the history.")
@click.option(
    "--who", default="", metavar="NAME", help="Who promotes it.  [default: the user of this machine]"
)
@server_options
@json_option
def command(name: str, why: str, who: str, as_json: bool, **where: Any) -> None:
    """Take the next step of a release, whatever the judge says; behind the last one the version is live."""
    from parbake.app.releases import Back
    from parbake.cli.gate import user
    from parbake.transports import client

    status = client.promote(name, Back("", who or user(), why), **where)
    if as_json:
        emit_json(status)
    else:
        show(status)
