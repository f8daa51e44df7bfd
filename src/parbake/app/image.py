"""Images with a bundle in them: build, list, and remove those that nobody needs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from parbake.contract.bundle import read_bundle
from parbake.errors import BuildFailed, NotFound
from parbake.release import image_parts as parts
from parbake.release.image import Base, containerfile, labels, pins, reference, wanted
from parbake.release.image_tools import Tool, tool

IMAGES: Final = "images"
DEFAULT_BASE: Final = f"{parts.BOOTSTRAP}bookworm"
_LEDGER: Final = "built.json"


@dataclass(frozen=True, slots=True)
class Source:
    """What goes into an image: a bundle, and the version under which it is known."""

    path: Path
    version: str = ""
    """Empty: none but its digest."""


Resolve = Callable[[str], Source]
"""Where ``NAME@3`` lies on this machine. Raises `NotFound`."""


class Image(Struct, frozen=True):
    """An image that was built here."""

    id: str
    """``sha256:...``: the same for the same input."""
    tag: str
    name: str
    version: str
    bundle_digest: str
    layers: tuple[str, ...]
    bytes: int
    base: str
    tool: str
    built: str


@dataclass(frozen=True, slots=True)
class Pruned:
    """What `prune` did."""

    removed: tuple[Image, ...]
    kept: tuple[tuple[Image, str], ...]
    """With the reason."""
    freed_bytes: int | None
    """None where the tool does not tell."""


def resolve_path(ref: str) -> Source:
    """A bundle by its path. Raises `NotFound`."""
    path = Path(ref)
    if not path.exists():
        raise NotFound(f"no bundle at {ref}", hint="parbake pack MODEL --out DIR writes one")
    return Source(path)


def build(
    ref: str,
    state: Path,
    *,
    tag: str = "",
    base: str = DEFAULT_BASE,
    mirrors: tuple[str, ...] = (),
    builder: str = "",
    cache: bool = True,
    resolve: Resolve = resolve_path,
    stage: Callable[[str], None] = lambda _: None,
) -> Image:
    """Build an image with the server, the locked libraries and a bundle; the same input gives the same id.

    What is made on the way is kept under ``state``. A build that fails or is killed leaves no image, and the next one
    clears up after it.
    Raises `NotFound`, `BundleTorn`, `BundleAltered`, `EnvironmentDiffers`, `MissingProgram`, `BuildFailed`.
    """
    source = resolve(ref)
    stored = read_bundle(source.path)
    program = tool(builder)
    version = source.version or stored.digest.removeprefix("sha256:")[:12]
    named = reference(tag or f"localhost/parbake/{stored.contract.name.lower()}:{version}")
    folder = state / IMAGES
    try:
        with parts.alone(folder):
            program.leftovers()
            stage("base")
            tar: Path | None = None
            if base.startswith(parts.BOOTSTRAP):
                ground, tar = parts.bootstrap(base, folder, mirrors)
            else:
                ground = program.base(reference(base))
            stage("libraries")
            locked = parts.locked(wanted(pins(parts.requirements()), stored.environment, ground), ground)
            libraries = parts.libraries(locked, ground, folder)
            with parts.staging(folder) as work:
                context = work / "context"
                context.mkdir()
                if tar is not None:
                    (context / "base.tar").hardlink_to(tar)
                shutil.copytree(libraries, context / "libraries", copy_function=os.link)
                server = parts.server(context / "server")
                parts.command(context / "command")
                parts.bundle(stored, context / "bundle")
                (context / "Containerfile").write_text(
                    containerfile(ground, labels(stored, source.version, server))
                )
                stage("image")
                program.build(context, named, cache=cache)
            found = program.look(named)
            made = Image(
                id=found.id,
                tag=named,
                name=stored.contract.name,
                version=version,
                bundle_digest=stored.digest,
                layers=found.layers,
                bytes=found.bytes,
                base=base,
                tool=program.name,
                built=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            _write(folder, [*(one for one in _read(folder) if one.tag != named), made])
            return made
    except OSError as error:
        raise BuildFailed(
            f"{error.filename or folder} cannot be written: {error.strerror}",
            hint="parbake image prune makes room",
        ) from error


def images(state: Path) -> list[Image]:
    """What was built here and is still there, the newest last. Raises `MissingProgram`."""
    folder = state / IMAGES
    there: dict[str, set[str]] = {}
    found = []
    for one in _read(folder):
        if one.tool not in there:
            there[one.tool] = tool(one.tool).ids()
        if one.id in there[one.tool]:
            found.append(one)
    return found


def prune(state: Path, *, keep: int = 2, referenced: Collection[str] = (), dry_run: bool = False) -> Pruned:
    """Remove images but the ``keep`` newest of each name, those that are ``referenced`` (tag or id) or run.

    What builds keep to be faster goes as well, unless an image that stays is made of it.
    """
    folder = state / IMAGES
    with parts.alone(folder):
        there = images(state)
        tools = {one.tool: tool(one.tool) for one in there} or {
            program.name: program for program in (tool(),)
        }
        before = {name: program.stored_bytes() for name, program in tools.items()}
        removed: list[Image] = []
        kept: list[tuple[Image, str]] = []
        for one in reversed(there):
            newer = sum(other.name == one.name for other, _ in kept)
            if one.tag in referenced or one.id in referenced:
                kept.append((one, "referenced"))
            elif newer < keep:
                kept.append((one, f"one of the {keep} newest of {one.name}"))
            elif dry_run or tools[one.tool].remove(one.tag):
                removed.append(one)
            else:
                kept.append((one, "a container uses it"))
        if dry_run:
            return Pruned(tuple(removed), tuple(kept), None)
        for name, program in tools.items():
            program.leftovers()
            _forget_layers(program, [one.layers for one, _ in kept if one.tool == name])
        gone = {one.tag for one in removed}
        _write(folder, [one for one in there if one.tag not in gone])
        after = {name: program.stored_bytes() for name, program in tools.items()}
        freed = [None if (a := after[n]) is None or b is None else b - a for n, b in before.items()]
        total = None if None in freed else sum(one or 0 for one in freed)
        return Pruned(tuple(removed), tuple(kept), total)


def _forget_layers(program: Tool, kept: list[tuple[str, ...]]) -> None:
    """Remove the unnamed images of builds, again and again: one that others are made of goes after these."""
    waiting = program.unnamed()
    while waiting:
        spare = [one for one in waiting if not _below(program.look(one).layers, kept)]
        gone = {one for one in spare if program.remove(one)}
        if not gone:
            return
        waiting = program.unnamed() & (waiting - gone)


def _below(layers: tuple[str, ...], kept: list[tuple[str, ...]]) -> bool:
    return any(whole[: len(layers)] == layers for whole in kept)


def _read(folder: Path) -> list[Image]:
    try:
        return msgspec.json.decode((folder / _LEDGER).read_bytes(), type=list[Image])
    except FileNotFoundError:
        return []
    except msgspec.DecodeError as error:
        raise BuildFailed(f"{folder / _LEDGER} is not readable: {error}", hint="remove it") from error


def _write(folder: Path, found: list[Image]) -> None:
    with tempfile.NamedTemporaryFile("wb", dir=folder, prefix=".new-", delete=False) as handle:
        handle.write(msgspec.json.format(msgspec.json.encode(found)))
    Path(handle.name).replace(folder / _LEDGER)


__all__ = ["Base", "Image", "Pruned", "Source", "build", "images", "prune", "resolve_path"]
