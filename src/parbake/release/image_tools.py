"""buildah, podman or docker: the programs that build images and keep them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from parbake.errors import BuildFailed
from parbake.release.image import EPOCH, FOUNDATIONS, MARK, Base
from parbake.release.image_parts import execute, missing

TOOLS: Final = ("buildah", "podman", "docker")
_ASKED: Final = (
    "import json,platform,site,sys;print(json.dumps(['%d.%d'%sys.version_info[:2],platform.machine(),"
    "platform.libc_ver()[1],site.getsitepackages()[0]]))"
)


@dataclass(frozen=True, slots=True)
class Built:
    """An image in the store of a tool."""

    id: str
    """``sha256:...`` of its configuration, which names every layer: the same wherever the image is pushed to."""
    layers: tuple[str, ...]
    """``sha256:...`` of each layer's content, the lowest first."""
    bytes: int
    labels: dict[str, str]


@dataclass(frozen=True, slots=True)
class Tool:
    """One of `TOOLS`, by its name."""

    name: str

    def build(self, context: Path, tag: str, *, cache: bool = True) -> str:
        """Build what the Containerfile of a folder says, and call it ``tag``; gives its id. Raises `BuildFailed`."""
        written = context.parent / "image.id"
        command = [self.name, "build", "--file", str(context / "Containerfile"), "--iidfile", str(written)]
        command += ["--tag", tag, *([] if cache else ["--no-cache"])]
        if self.name != "docker":
            command += [
                "--isolation", "chroot", "--format", "oci", "--timestamp", str(EPOCH), "--layers", "--quiet",
                "--pull-never" if self.name == "buildah" else "--pull=missing",
            ]  # fmt: skip
        execute([*command, str(context)], {"SOURCE_DATE_EPOCH": str(EPOCH), "DOCKER_BUILDKIT": "1"})
        return _named(written.read_text().strip())

    def look(self, image: str) -> Built:
        """What the store has under a name or id. Raises `BuildFailed` where it is not there."""
        if self.name == "buildah":
            raw = execute([self.name, "inspect", "--type", "image", image], {})
            found = msgspec.json.decode(raw)
            image_id, config, layers = (
                found["FromImageID"],
                found["OCIv1"]["config"],
                found["OCIv1"]["rootfs"],
            )
            listed = msgspec.json.decode(execute([self.name, "images", "--json", image], {}))
            size = _bytes(listed[0]["size"])
            return Built(_named(image_id), tuple(layers["diff_ids"]), size, config.get("Labels") or {})
        found = msgspec.json.decode(execute([self.name, "image", "inspect", image], {}))[0]
        config = found["Config"]
        return Built(
            _named(found["Id"]), tuple(found["RootFS"]["Layers"]), found["Size"], config.get("Labels") or {}
        )

    def ids(self) -> set[str]:
        """Every image of the store, those without a name too."""
        said = execute([self.name, "images", "--all", "--quiet", "--no-trunc"], {})
        return {_named(line.strip()) for line in said.splitlines() if line.strip()}

    def holds(self, image: str) -> bool:
        """Whether the store has an image of that name."""
        return bool(execute([self.name, "images", "--quiet", "--filter", f"reference={image}"], {}).strip())

    def kept(self) -> set[str]:
        """What builds have left in the store to build the next ones faster."""
        found: set[str] = set()
        for which in ("dangling=true", f"reference={FOUNDATIONS}"):
            said = execute(
                [self.name, "images", "--all", "--quiet", "--no-trunc", "--filter", which, "--filter",
                 f"label={MARK}"],
                {},
            )  # fmt: skip
            found |= {_named(line.strip()) for line in said.splitlines() if line.strip()}
        return found

    def remove(self, image: str) -> bool:
        """Take an image out of the store; false where a container, or another image, needs it."""
        try:
            execute([self.name, "rmi", image.removeprefix("sha256:")], {})
        except BuildFailed:
            return False
        return True

    def stored_bytes(self) -> int | None:
        """What all layers of the store take; None where that cannot be told."""
        if self.name == "docker":
            return None
        asked = ["info"] if self.name == "buildah" else ["info", "--format", "json"]
        said = msgspec.json.decode(execute([self.name, *asked], {}))["store"]
        root = said.get("GraphRoot") or said.get("graphRoot")
        driver = said.get("GraphDriverName") or said.get("graphDriverName")
        index = Path(root) / f"{driver}-layers" / "layers.json"
        if not index.is_file():
            return 0
        sizes: list[int] = [layer.get("diff-size", 0) for layer in msgspec.json.decode(index.read_bytes())]
        return sum(sizes)

    def leftovers(self) -> int:
        """Remove the working containers of builds that were killed; gives how many there were."""
        if self.name != "buildah":
            return 0
        found = msgspec.json.decode(execute(["buildah", "containers", "--all", "--json"], {}) or "[]") or []
        left = [one for one in found if "parbake" in _label(one["id"])]
        for one in left:
            execute(["buildah", "rm", one["id"]], {})
        return len(left)

    def base(self, image: str) -> Base:
        """What an image is as a base, by running its Python. Raises `BuildFailed` where it has none."""
        if self.name == "buildah":
            container = execute(["buildah", "from", "--name", _PROBE, "--pull", image], {}).strip()
            try:
                said = execute(
                    ["buildah", "run", "--isolation", "chroot", container, "python3", "-c", _ASKED], {}
                )
            finally:
                execute(["buildah", "rm", container], {})
        else:
            said = execute([self.name, "run", "--rm", "--entrypoint", "python3", image, "-c", _ASKED], {})
        python, machine, glibc, site = msgspec.json.decode(said, type=tuple[str, str, str, str])
        if not glibc:
            raise BuildFailed(
                f"{image} has no glibc, which wheels need", hint="take a base of Debian or the like"
            )
        return Base(python, machine, glibc, site, f"FROM {image} FROM_AS")


_PROBE: Final = "parbake-probe"


def tool(name: str = "") -> Tool:
    """The builder of that name, else the first that is installed. Raises `MissingProgram`."""
    for one in (name,) if name else TOOLS:
        if shutil.which(one) is not None:
            return Tool(one)
    raise missing(name or "buildah")


def _named(image_id: str) -> str:
    return image_id if image_id.startswith("sha256:") else f"sha256:{image_id}"


def _label(container: str) -> str:
    """What marks a working container as a build's of ours, in words."""
    said = msgspec.json.decode(execute(["buildah", "inspect", "--type", "container", container], {}))
    marks: Mapping[str, str] = said["OCIv1"]["config"].get("Labels") or {}
    return "parbake" if MARK in marks or said.get("Container") == _PROBE else ""


def _bytes(shown: str) -> int:
    """``1.5 GB`` as a number, as exactly as it was shown."""
    number, _, unit = shown.partition(" ")
    return round(float(number) * {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}.get(unit, 1))
