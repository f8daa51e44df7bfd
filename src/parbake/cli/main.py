"""The `parbake` command: finds the subcommand, runs it, and turns errors into words and exit codes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

import click

from parbake.cli.exits import Exit, exit_of
from parbake.cli.options import DEBUG_KEY, debug_option
from parbake.cli.output import say_error
from parbake.errors import ParbakeError
from parbake.names import near

# Module and first line of each subcommand: `parbake --help` must not import what they import.
COMMANDS: Final = {
    "pack": ("parbake.cli.pack", "Pack a trained model into a bundle, proven equal to its source."),
    "inspect": ("parbake.cli.inspect", "Show what a bundle or a prediction table promises."),
    "check": ("parbake.cli.check", "Verify a bundle on this machine: digest, goldens, environment."),
    "gate": ("parbake.cli.gate", "Say whether a bundle may take traffic here, and what speaks against it."),
    "sign": ("parbake.cli.sign", "Sign a bundle, or make a key to sign with."),
    "register": ("parbake.cli.register", "Register a bundle as the next version of its model."),
    "versions": ("parbake.cli.versions", "Show the registered versions of a model."),
    "alias": ("parbake.cli.alias", "Let an alias point at a version, or show where aliases point."),
    "bake": ("parbake.cli.bake", "Compute the predictions of many rows into a prediction table."),
    "serve": ("parbake.cli.serve", "Serve bundles over HTTP and gRPC."),
    "deploy": ("parbake.cli.deploy", "Release a version: gate, canary or shadow, judge."),
    "release": (
        "parbake.cli.release",
        "Show how the release of a deployment stands, or change it as it runs.",
    ),
    "promote": ("parbake.cli.promote", "Take the next step of a release by hand."),
    "rollback": ("parbake.cli.rollback", "Go back to the version before, at once."),
    "reload": ("parbake.cli.reload", "Put a new bundle or table under a running server."),
    "status": ("parbake.cli.status", "Show what a running server serves."),
    "jobs": ("parbake.cli.jobs", "Show the jobs of a running server; begin those again that were given up."),
    "inventory": ("parbake.cli.inventory", "Show every model: where it runs, on what, whose it is."),
    "matrix": ("parbake.cli.matrix", "Say which environments can run which bundles."),
    "mode": ("parbake.cli.mode", "Change how a deployment answers, while it serves."),
    "route": ("parbake.cli.route", "Show or change which version of a deployment answers what."),
    "labels": ("parbake.cli.labels", "Send what turned out to be true, for versions that are compared."),
    "advise": ("parbake.cli.advise", "Say which way of serving is right, and what each would cost."),
    "history": ("parbake.cli.history", "Show who released what when, and why."),
    "keys": ("parbake.cli.keys", "Make, list and remove the API keys of a server's clients."),
    "image": ("parbake.cli.image", "Build OCI images with a bundle in them, list them, remove old ones."),
    "k8s": ("parbake.cli.k8s", "Write the Kubernetes manifests of a deployment."),
    "completion": (
        "parbake.cli.completion",
        "Print the script that completes parbake's commands in a shell.",
    ),
}


class _Lazy(click.Group):
    """A group that imports a subcommand when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            # Click knows of no command before it is imported.
            close = near(args[0], COMMANDS)
            meant = f" Did you mean {close!r}?" if close else ""
            raise click.UsageError(error.message + meant, ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


def _show_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"parbake {version('parbake')}")
        ctx.exit()


def _help_without_command() -> None:
    ctx = click.get_current_context()
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(Exit.USAGE)


group = _Lazy(
    "parbake",
    help="Serve machine-learning predictions from a table, by the model, or by both.",
    epilog="parbake COMMAND --help explains a command. Every option of serve is also an environment variable "
    "(PARBAKE_PORT) and a key of parbake.toml.",
    params=[
        click.Option(
            ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_show_version,
            help="Show the version.",
        ),
        debug_option(),
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    no_args_is_help=False,
    invoke_without_command=True,
    callback=_help_without_command,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with ``arguments`` (else those of the process) and give its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    meta: dict[str, Any] = {}
    try:
        # Click completes words for the shell in `main`, which knows no exit codes of ours.
        if "_PARBAKE_COMPLETE" in os.environ:
            group.main(words, prog_name="parbake", complete_var="_PARBAKE_COMPLETE")
        with group.make_context("parbake", words) as ctx:
            meta = ctx.meta
            group.invoke(ctx)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "parbake"
        say_error(_lower(error.format_message()), f"{where} --help shows what it takes")
        return Exit.USAGE
    except click.ClickException as error:
        say_error(_lower(error.format_message()))
        return Exit.USAGE
    except ParbakeError as error:
        _traceback(meta)
        say_error(f"{error.message} at {error.path}" if error.path else error.message, error.hint)
        return exit_of(error)
    except (KeyboardInterrupt, click.Abort):
        say_error("interrupted")
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output (head, a pager) has seen enough; Python must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.DONE
    except Exception as error:
        _traceback(meta)
        text = (str(error).strip().splitlines() or [""])[0]
        hint = "" if DEBUG_KEY in meta else "the same command with --debug shows the traceback"
        say_error(f"unexpected {type(error).__name__}: {text}", hint)
        return Exit.BUG
    return Exit.DONE


def _traceback(meta: dict[str, Any]) -> None:
    if DEBUG_KEY in meta:
        import traceback

        traceback.print_exc()


def _lower(sentence: str) -> str:
    """``Missing option`` as it stands after ``error:``."""
    return sentence[:1].lower() + sentence[1:].rstrip(".") if sentence else sentence
