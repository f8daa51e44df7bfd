"""`parbake image`: build images with a bundle in them, list them, remove old ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from parbake.cli.options import (
    Command,
    Group,
    json_option,
    progress_option,
    registry_options,
    settings_options,
    state_settings,
)
from parbake.cli.output import emit, emit_json, emit_table, say, size, stages
from parbake.settings import ReleaseSettings

state_option = click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(".parbake"),
    envvar="PARBAKE_STATE_DIR",
    metavar="DIR",
    help="Folder of what the server keeps.  [default: .parbake]",
)

store_option = settings_options(ReleaseSettings, only=("store",))


@click.group(cls=Group, short_help="Build OCI images with a bundle in them, list them, remove old ones.")
def command() -> None:
    """Build OCI images with a bundle in them, list them, remove old ones.

    An image has the server, the exact libraries of the bundle's lock and the bundle in it. It is built with buildah
    (else podman, else docker), and no daemon is needed.
    """


@command.command(cls=Command, short_help="Build an image of a bundle.")
@click.argument("ref", metavar="BUNDLE|NAME@VERSION|models:/NAME@VERSION")
@click.option("--tag", default="", metavar="NAME:TAG", help="Name of the image.  [default: after the bundle]")
@click.option(
    "--base",
    default="debootstrap:bookworm",
    metavar="IMAGE",
    help="What it starts from: an image with Python, or debootstrap:SUITE for a root made from Debian's packages.  "
    "[default: debootstrap:bookworm]",
)
@click.option(
    "--mirror",
    "mirrors",
    multiple=True,
    metavar="URL",
    help="Where Debian's packages come from.  [repeatable]",
)
@click.option(
    "--builder",
    type=click.Choice(["buildah", "podman", "docker"]),
    default=None,
    help="What builds it.  [default: the first that is installed]",
)
@click.option("--cache/--no-cache", default=True, help="Take layers of earlier builds.", show_default=True)
@store_option
@registry_options
@progress_option
@json_option
def build(
    ref: str,
    tag: str,
    base: str,
    mirrors: tuple[str, ...],
    builder: str | None,
    cache: bool,
    show_progress: bool,
    as_json: bool,
    config: Path | None,
    **values: Any,
) -> None:
    """Build an image of a bundle. The same bundle on the same base gives the same image, bit for bit.

    A version by its number or alias comes from the registry (models:/NAME@3 from nowhere else), else from what was
    released under it. The store of releases keeps which image has which version. The image runs without root and with
    a read-only root file system; what it needs to write goes to /tmp.
    """
    from parbake.app import image
    from parbake.app.state import state_dir

    settings = state_settings(config, values)
    with stages("building", wanted=show_progress) as stage:
        made = image.build(
            ref,
            state_dir(settings),
            tag=tag,
            base=base,
            mirrors=mirrors,
            builder=builder or "",
            cache=cache,
            resolve=image.resolver(settings),
            stage=stage,
        )
        image.record(settings, made)
    if as_json:
        emit_json(made)
        return
    emit(made.tag)
    say(
        f"{made.id[:19]}... is {size(made.bytes)} in {len(made.layers)} layers, of bundle {made.bundle_digest[:19]}..."
    )


@command.command("list", cls=Command, short_help="Show the images that were built here.")
@state_option
@json_option
def show(state_dir: Path, as_json: bool) -> None:
    """Show the images that were built here and are still there, the newest last."""
    from parbake.app import image

    found = image.images(state_dir)
    if as_json:
        emit_json(found)
        return
    if not found:
        say("no images: parbake image build BUNDLE makes one")
        return
    emit_table(
        [(one.tag, one.id[7:19], one.bundle_digest[7:19], size(one.bytes), one.built) for one in found],
        ("image", "id", "bundle", "size", "built"),
        ("size",),
    )


@command.command(cls=Command, short_help="Remove images that nobody needs.")
@click.option(
    "--keep",
    type=click.IntRange(0),
    default=2,
    metavar="N",
    help="Newest of each name that stay.  [default: 2]",
)
@click.option(
    "--reference",
    "referenced",
    multiple=True,
    metavar="IMAGE",
    help="Image that stays, by tag or id.  [repeatable]",
)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@store_option
@registry_options
@json_option
def prune(
    keep: int, referenced: tuple[str, ...], dry_run: bool, as_json: bool, config: Path | None, **values: Any
) -> None:
    """Remove images that were built here, but the newest of each name, those that releases need, and those that run.

    Releases need what is live, what is under way, and what a rollback goes back to. Where their store is away, nothing
    is removed.
    """
    from parbake.app import image
    from parbake.app.state import state_dir

    settings = state_settings(config, values)
    done = image.prune(
        state_dir(settings),
        keep=keep,
        referenced=referenced,
        needed=image.references(settings),
        dry_run=dry_run,
    )
    if not dry_run:
        image.forget(settings, done.removed)
    if as_json:
        emit_json(done)
        return
    for one, reason in done.kept:
        say(f"kept {one.tag}: {reason}")
    for one in done.removed:
        emit(f"{'would remove' if dry_run else 'removed'} {one.tag}")
    if not dry_run:
        say(
            "freed as much as nobody else uses"
            if done.freed_bytes is None
            else f"freed {size(done.freed_bytes)}"
        )
