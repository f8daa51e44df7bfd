"""Images with a bundle in them: build, list, and remove those that nobody needs."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct

from parbake.app.registry import cache_root, open_bundles, open_registry, registry_url, store_place, who
from parbake.app.state import open_state
from parbake.contract.bundle import StoredBundle, read_bundle
from parbake.errors import (
    BuildFailed,
    BundleError,
    Conflict,
    MissingExtra,
    NotFound,
    ParbakeError,
    RegistryAway,
    VersionNotFound,
)
from parbake.names import NAME_PATTERN
from parbake.release import image_parts as parts
from parbake.release.bundles import fetch_bundle
from parbake.release.image import Base, containerfile, foundation, labels, pins, reference, wanted
from parbake.release.image_tools import Tool, tool
from parbake.release.mlflow_sqlite import is_made
from parbake.release.model import ImageRecord, Proposal
from parbake.release.registry import SCHEME, Reference, Version, is_reference, parse_reference
from parbake.settings import Settings

if TYPE_CHECKING:
    from parbake.release.state import State

IMAGES: Final = "images"
DEFAULT_BASE: Final = f"{parts.BOOTSTRAP}bookworm"
_BUILT: Final = "built.json"


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


def resolver(settings: Settings) -> Resolve:
    """Finds a bundle by its path, ``models:/NAME@3`` in the registry, and ``NAME@3`` there or among the releases."""

    def resolve(ref: str) -> Source:
        if is_reference(ref) or ("@" in ref and not Path(ref).exists()):
            return _registered(settings, ref)
        return resolve_path(ref)

    return resolve


def _registered(settings: Settings, ref: str) -> Source:
    """A version by its number or alias. Raises `NotFound`, `Conflict`, `RegistryAway`, `StoreAway`, `BundleError`."""
    only_registry = is_reference(ref)
    wanted = parse_reference(ref if only_registry else f"{SCHEME}{ref}")
    version, missing = _in_registry(settings, wanted)
    release = None if only_registry else _released(settings, wanted)
    if version is None and release is None:
        raise missing or VersionNotFound(
            f"no version {wanted.which!r} of {wanted.name!r} is registered or released here",
            hint=f"parbake versions {wanted.name}; --registry, --store and --state-dir say where to look",
        )
    if version is not None and not version.digest:
        raise Conflict(
            f"{ref} is a model of MLflow's, and no bundle yet",
            hint=f"parbake pack {wanted} --out {wanted.name}.bundle, then parbake register",
        )
    if version is not None and release is not None and version.digest != release.bundle_digest:
        raise Conflict(
            f"{ref} is {version.digest[:19]}... in the registry, and {release.bundle_digest[:19]}... was released",
            hint=f"{wanted} takes the registry's; the path of a bundle takes that one",
        )
    if version is not None:
        return Source(_fetched(settings, version.digest).path, version.version)
    assert release is not None
    with contextlib.suppress(BundleError):
        # Where it was released from, if that is what it was.
        if read_bundle(release.source).digest == release.bundle_digest:
            return Source(Path(release.source), release.version)
    return Source(_fetched(settings, release.bundle_digest).path, release.version)


def _fetched(settings: Settings, digest: str) -> StoredBundle:
    return fetch_bundle(open_bundles(store_place(settings)), digest, cache_root(settings))


def _in_registry(settings: Settings, wanted: Reference) -> tuple[Version | None, ParbakeError | None]:
    """What the registry has, or the error that says why there is nothing."""
    url = registry_url(settings)
    try:
        # Asking for it would make one.
        if url.startswith("sqlite:///") and not is_made(Path(url.removeprefix("sqlite:///"))):
            return None, None
        return open_registry(url).version(wanted.name, wanted.which), None
    except (NotFound, RegistryAway) as error:
        return None, error


def _released(settings: Settings, wanted: Reference) -> Proposal | None:
    """What was released under that number last."""
    with _store(settings) as state:
        if state is None:
            return None
        mine = [one for one in state.releases(wanted.name) if one.proposal.version == wanted.which]
        # What never came to answer anybody was not released.
        mine = [one for one in mine if one.state not in ("refused", "aborted")]
        return mine[-1].proposal if mine else None


@contextmanager
def _store(settings: Settings, *, create: bool = False) -> Iterator[State | None]:
    """The store of releases; None where there is none, or nobody here can open one."""
    try:
        state = open_state(settings, create=create)
    except NotFound:
        yield None
        return
    except MissingExtra:
        if settings.release.store:
            raise
        yield None
        return
    with contextlib.closing(state):
        yield state


def record(settings: Settings, image: Image) -> bool:
    """Tell the store of releases which bundle is in an image; false where there is no store to be told.

    Raises `StateAway` and its like: the image is there all the same, and building it again takes what there is.
    """
    with _store(settings, create=True) as state:
        if state is not None:
            state.record_image(_recorded(image))
        return state is not None


def _recorded(image: Image) -> ImageRecord:
    name, version = (one if NAME_PATTERN.fullmatch(one) else "" for one in (image.name, image.version))
    return ImageRecord(image.tag, image.id, image.bundle_digest, name, version, who())


def references(settings: Settings) -> dict[str, str]:
    """What the store of releases needs: id of an image or digest of a bundle, with who needs it.

    That is what is live, what is under way, and where a rollback goes. Raises `StateAway` and its like: nobody
    removes what may be needed.
    """
    found: dict[str, str] = {}
    with _store(settings) as state:
        for deployment in state.deployments() if state is not None else ():
            assert state is not None
            name = deployment.name
            needed = [(one, "being released") for one in state.releases(name, under_way=True)]
            needed += [(one, "live") for one in (state.live(name),) if one is not None]
            needed += [(one, "the last good") for one in (state.last_good(name),) if one is not None]
            # While a release is under way, that is the live one; when it has ended, it is this one again.
            before = [one for one in state.releases(name) if one.state == "superseded"]
            needed += [(one, "the last good") for one in sorted(before, key=lambda one: one.changed)[-1:]]
            for release, what in needed:
                _, _, image_id = release.proposal.image.partition(" ")
                for key in (image_id, release.proposal.bundle_digest):
                    if key:
                        found.setdefault(key, f"version {release.proposal.version} of {name} is {what}")
    return found


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
    stage("bundle")
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
            # By content: the same name of a base may be something else tomorrow.
            beginning = parts.digest(tar) if tar is not None else program.look(reference(base)).id
            recipe = foundation(ground)
            ground_tag = parts.foundation_tag(beginning, libraries.name, recipe)
            with parts.staging(folder) as work:
                under = work / "foundation"
                under.mkdir()
                if tar is not None:
                    (under / "base.tar").hardlink_to(tar)
                (under / "Containerfile").write_text(recipe)
                if not cache or not program.holds(ground_tag):
                    _lay(program, under, libraries, ground_tag, cache=cache)
                context = work / "context"
                context.mkdir()
                server = parts.server(context / "server")
                parts.command(context / "command")
                parts.bundle(stored, context / "bundle")
                (context / "Containerfile").write_text(
                    containerfile(ground_tag, ground.site, labels(stored, source.version, server))
                )
                stage("image")
                try:
                    program.build(context, named, cache=cache)
                except BuildFailed:
                    if program.holds(ground_tag):
                        raise
                    # Another project, with the same store of images and a lock of its own, has just pruned it.
                    _lay(program, under, libraries, ground_tag, cache=cache)
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


def _lay(program: Tool, under: Path, libraries: Path, tag: str, *, cache: bool) -> None:
    """Build the image of base and libraries from a folder that has all but the libraries. Raises `BuildFailed`."""
    if not (under / "libraries").exists():
        shutil.copytree(libraries, under / "libraries", copy_function=os.link)
    program.build(under, tag, cache=cache)


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


def prune(
    state: Path,
    *,
    keep: int = 2,
    referenced: Collection[str] = (),
    needed: Mapping[str, str] | None = None,
    dry_run: bool = False,
) -> Pruned:
    """Remove images but the ``keep`` newest of each name, those that are ``referenced`` (tag or id) or run.

    ``needed`` is what `references` gives: of a bundle that is needed, the newest image stays. What builds keep to be
    faster goes as well, unless an image that stays is made of it.
    """
    why = needed or {}
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
            held = any(other.bundle_digest == one.bundle_digest for other, _ in kept)
            if one.tag in referenced or one.id in referenced:
                kept.append((one, "referenced"))
            elif one.id in why or (one.bundle_digest in why and not held):
                kept.append((one, why.get(one.id) or why[one.bundle_digest]))
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


def forget(settings: Settings, images: Iterable[Image]) -> None:
    """Tell the store of releases that images are gone. Raises `StateAway` and its like."""
    with _store(settings) as state:
        if state is not None:
            for image in images:
                state.forget_image(_recorded(image), by=who())


def _forget_layers(program: Tool, kept: list[tuple[str, ...]]) -> None:
    """Remove what builds kept, again and again: an image that others are made of goes after these."""
    waiting = program.kept()
    while waiting:
        spare = [one for one in waiting if not _below(program.look(one).layers, kept)]
        gone = {one for one in spare if program.remove(one)}
        if not gone:
            return
        waiting = program.kept() & (waiting - gone)


def _below(layers: tuple[str, ...], kept: list[tuple[str, ...]]) -> bool:
    return any(whole[: len(layers)] == layers for whole in kept)


def _read(folder: Path) -> list[Image]:
    try:
        return msgspec.json.decode((folder / _BUILT).read_bytes(), type=list[Image])
    except FileNotFoundError:
        return []
    except msgspec.DecodeError as error:
        raise BuildFailed(f"{folder / _BUILT} is not readable: {error}", hint="remove it") from error


def _write(folder: Path, found: list[Image]) -> None:
    with tempfile.NamedTemporaryFile("wb", dir=folder, prefix=".new-", delete=False) as handle:
        handle.write(msgspec.json.format(msgspec.json.encode(found)))
    Path(handle.name).replace(folder / _BUILT)


__all__ = [
    "Base", "Image", "Pruned", "Source", "build", "forget", "images", "prune", "record", "references", "resolve_path",
    "resolver",
]  # fmt: skip
