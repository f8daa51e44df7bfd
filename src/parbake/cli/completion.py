"""`parbake completion`: the shell script that completes commands, options and paths."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from parbake.cli.options import Command


@click.command(cls=Command, short_help="Print the script that completes parbake's commands in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the script that completes parbake's commands in a shell.

    \b
    bash:  parbake completion bash >> ~/.bashrc
    zsh:   parbake completion zsh >> ~/.zshrc
    fish:  parbake completion fish > ~/.config/fish/completions/parbake.fish
    """  # noqa: D301  the sign that click keeps lines by
    from parbake.cli.main import group

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(group, {}, "parbake", "_PARBAKE_COMPLETE").source())
