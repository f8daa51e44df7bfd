"""`parbake mode`: change how a deployment answers, while it answers."""

from __future__ import annotations

from typing import get_args

import click

from parbake.cli.options import Command, json_option, server_options
from parbake.cli.output import emit_json, say
from parbake.settings import WantedMode


@click.command(cls=Command, short_help="Change how a deployment answers, while it serves.")
@click.argument("name")
@click.argument("mode", type=click.Choice(get_args(WantedMode)))
@click.option("--table", metavar="DIR", help="Prediction table to answer from.  [default: the one it has]")
@server_options
@json_option
def command(
    name: str,
    mode: WantedMode,
    table: str | None,
    port: int | None,
    admin_url: str,
    token: str,
    as_json: bool,
) -> None:
    """Change how a deployment answers, while it serves, without a failed request.

    static answers from the prediction table only, dynamic asks the model, hybrid learns which predictions to keep;
    auto follows the advisor, and says in the log why it changed.
    """
    from parbake.app.supervisor import Change
    from parbake.transports import client

    done = client.reload([Change(name, "", table, mode)], port=port, admin_url=admin_url, token=token)
    if as_json:
        emit_json(done)
    elif mode == "auto":
        say(f"{name} follows the advisor from now on; parbake status shows how it answers, and why")
    elif done.changed:
        say(f"{name} is {mode} after {done.seconds:.2f} s")
    else:
        say(f"{name} was {mode} already")
