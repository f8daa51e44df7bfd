"""How long it takes until more servers answer: with the model in their image, and with a model that they fetch.

The demo's digits model, in containers on one node. Needs root, buildah and podman.
"""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

import parbake
from bench.machine import this_machine
from bench.processes import free_port
from bench.report import Section, Table
from demo.digits import train
from parbake.app.image import build
from parbake.app.measure import examples_of
from parbake.contract.bundle import read_bundle

LIMITS: Final = ("--runtime", "runc", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")
RESTRICTED: Final = ("--read-only", "--cap-drop", "all", "--network", "host")
_LIMIT_S: Final = 120.0
_SERVERS: Final = 4


@dataclass(frozen=True, slots=True)
class _Node:
    """A store of images, as one machine of a cluster has it."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        config = self.folder / "storage.conf"
        # Once: a program that is just starting would read half of it.
        if not config.exists():
            config.parent.mkdir(parents=True, exist_ok=True)
            config.write_text(
                f'[storage]\ndriver = "overlay"\ngraphroot = "{self.folder}/graph"\nrunroot = "{self.folder}/run"\n'
            )
        return {**os.environ, "CONTAINERS_STORAGE_CONF": str(config)}

    def run(self, *command: str) -> str:
        return subprocess.run(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    def log(self, container: str) -> str:
        """What a container has written, or why there is none."""
        done = subprocess.run(
            ["podman", "logs", container],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.stdout

    def empty(self) -> None:
        self.run("podman", "rmi", "--all", "--force")

    def gone(self) -> None:
        subprocess.run(
            ["podman", "rm", "--all", "--force"], env=self.environment, capture_output=True, check=False
        )
        subprocess.run(["umount", self.folder / "graph" / "overlay"], capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def run(folder: Path, *, starts: int, quick: bool, say: Callable[[str], None]) -> Section:
    """Build images of two versions of the model, then start servers in every way, in turn."""
    say("training and packing")
    for trees, name in ((20 if quick else 200, "v1"), (30 if quick else 300, "v2")):
        trained = train(trees)
        parbake.pack(
            trained.pipeline, name="digits", example=trained.held_out, purpose="reads handwritten digits",
            owner="demo@parbake.example", out=folder / "store" / name,
        )  # fmt: skip
    bundle = folder / "store" / "v2"
    body = examples_of(read_bundle(bundle)).bodies[0]
    home, node = _Node(folder / "home"), _Node(folder / "node")
    before = os.environ.get("CONTAINERS_STORAGE_CONF")
    os.environ.update(home.environment)
    try:
        built_s, sizes = [], []
        for name in ("v1", "v2"):
            say(f"building an image of {name}")
            started = time.perf_counter()
            made = build(str(folder / "store" / name), folder / "state", tag=f"localhost/digits:{name}")
            built_s.append(time.perf_counter() - started)
            sizes.append(made.bytes)
            # As a registry would have it.
            home.run("buildah", "push", made.tag, f"oci:{folder / 'registry'}:{name}")
        times = _times(folder, node, body, starts, say)
    finally:
        home.gone()
        node.gone()
        if before is None:
            os.environ.pop("CONTAINERS_STORAGE_CONF", None)
        else:
            os.environ["CONTAINERS_STORAGE_CONF"] = before
    rows = tuple(
        (what, *(f"{median(times[what, how]):.2f}" for how in ("image", "load")))
        for what in dict.fromkeys(what for what, _ in times)
    )
    return Section(
        key="scale-out",
        title="Scale-out: model in the image, or loaded",
        how=(
            f"Seconds until the first prediction of the demo's digits model (or, of {_SERVERS} servers started "
            f"at once, the last first one), median of {starts}. Containers on one machine; images come from a "
            "folder on its disk (an OCI layout), bundles from another: what a network adds is not in it. The "
            "server that loads runs in the image of another version, copies its bundle out of the store and "
            "verifies it."
        ),
        tables=(
            Table(
                "Seconds to the first prediction", ("what the node has", "model in image", "model-load"), rows
            ),
            Table(
                "Sizes and builds",
                ("what", "value"),
                (
                    ("image, unpacked", f"{sizes[1] / 1e6:.0f} MB"),
                    ("bundle, which is all that a new version adds", f"{_bytes(bundle) / 1e6:.1f} MB"),
                    ("first build, base and libraries included", f"{built_s[0]:.0f} s"),
                    ("build of the next version", f"{built_s[1]:.0f} s"),
                ),
            ),
        ),
        targets=(),
        machine=this_machine(),
        figures={
            "seconds": {f"{what}, {how}": found for (what, how), found in times.items()},
            "image_bytes": sizes[1],
            "bundle_bytes": _bytes(bundle),
            "build_s": built_s,
        },
    )


def _times(
    folder: Path, node: _Node, body: bytes, starts: int, say: Callable[[str], None]
) -> dict[tuple[str, str], list[float]]:
    found: dict[tuple[str, str], list[float]] = {}
    nothing = "nothing: the image is unpacked first"
    other = "the image of another version"
    ready = "the image it needs"
    several = f"the image it needs; {_SERVERS} servers at once"

    for number in range(starts):
        say(f"round {number + 1} of {starts}")
        for what, count in ((nothing, 1), (other, 1), (ready, 1), (several, _SERVERS)):
            for how in ("image", "load"):
                wanted = "v2" if how == "image" else "v1"
                if what == nothing:
                    node.empty()
                elif what == other:
                    node.empty()
                    _pulled(node, folder, "v1")
                started = time.perf_counter()
                image = _pulled(node, folder, wanted)
                if what in (ready, several):
                    started = time.perf_counter()
                with _servers(node, image, folder, how, count, say) as servers:
                    for name, port in servers.items():
                        _wait(node, name, port, body)
                    found.setdefault((what, how), []).append(time.perf_counter() - started)
    return found


def _pulled(node: _Node, folder: Path, name: str) -> str:
    """The id of an image, fetched if the node does not have it."""
    return node.run("podman", "pull", "--quiet", f"oci:{folder / 'registry'}:{name}").splitlines()[-1]


@contextmanager
def _servers(
    node: _Node, image: str, folder: Path, how: str, count: int, say: Callable[[str], None]
) -> Iterator[dict[str, int]]:
    """Start servers at once, and give their ports; those that load fetch their bundle first."""
    ports: dict[str, int] = {}
    running = []
    for number in range(count):
        port, name = free_port(), f"server-{number}"
        extra: list[str] = []
        words = ["--port", str(port)]
        if how == "load":
            fetched = folder / "fetched" / str(number)
            shutil.rmtree(fetched, ignore_errors=True)
            shutil.copytree(folder / "store" / "v2", fetched)
            read_bundle(fetched)
            extra = ["--volume", f"{fetched}:/fetched:ro", "--entrypoint", "parbake"]
            words = ["serve", "/fetched", *words]
        command = ["podman", "run", "--detach", "--name", name, *LIMITS, *RESTRICTED, *extra, image, *words]
        running.append(
            subprocess.Popen(
                command,
                env=node.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        )
        ports[name] = port
    try:
        yield ports
    finally:
        for process in running:
            said = process.communicate(timeout=60)[1].decode(errors="replace").strip()
            if process.returncode:
                say(f"podman: {said[-500:]}")
        node.run("podman", "rm", "--force", "--time", "0", *(f"server-{number}" for number in range(count)))


def _wait(node: _Node, name: str, port: int, body: bytes) -> None:
    until = time.perf_counter() + _LIMIT_S
    while (said := _answer(port, body)) != "200":
        if time.perf_counter() > until:
            raise RuntimeError(
                f"no prediction on port {port} within {_LIMIT_S:g} s: {said}\n{node.log(name)[-4000:]}"
            )
        time.sleep(0.01)


def _answer(port: int, body: bytes) -> str:
    """The status, with what is said where it is an error."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_LIMIT_S)
    try:
        connection.request("POST", "/v2/models/digits/infer", body, {"content-type": "application/json"})
        reply = connection.getresponse()
        text = reply.read().decode(errors="replace")
        return f"{reply.status}" if reply.status == http.client.OK else f"{reply.status} {text[:300]}"
    except (OSError, http.client.HTTPException) as error:
        return str(error)
    finally:
        connection.close()


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
