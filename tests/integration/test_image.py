"""Images: built without a daemon, the same every time, run without rights, and removed when nobody needs them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parbake
from bench.processes import free_port
from parbake.contract.bundle import Goldens, StoredBundle, write_bundle
from parbake.contract.environment import capture
from parbake.contract.model import Contract, Parity, Step, TensorSpec
from parbake.release.database import open_database
from parbake.release.image import FOUNDATIONS, MARK
from parbake.release.model import Proposal
from tests.conftest import write_doubler

pytestmark = pytest.mark.xdist_group("images")

PROGRAMS = ("buildah", "podman", "runc", "mmdebstrap")
# What podman needs where the limits of the machine are lower than its own.
LIMITS = ("--runtime", "runc", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")
RESTRICTED = ("--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges", "--network", "host")


@dataclass(frozen=True, slots=True)
class Workplace:
    """A folder with bundles and a store of images of its own."""

    folder: Path
    state: Path
    """Base and libraries, which take long to make, are kept here from run to run."""
    environment: dict[str, str]

    @property
    def store(self) -> str:
        """The store of releases."""
        return self.environment["PARBAKE_STORE"]

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("parbake")), *map(str, arguments)]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=560, check=False,
        )  # fmt: skip

    def build(self, *arguments: str | Path) -> dict[str, Any]:
        done = self.run("image", "build", *arguments, "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def tool(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def nothing_half_done(self) -> None:
        assert not list((self.state / "images").glob(".new-*"))
        assert self.tool("buildah", "containers", "--quiet").split() == []


def doubler(folder: Path, purpose: str) -> StoredBundle:
    x = np.array([[1.0, 2.0], [3.0, 4.5]], dtype=np.float32)
    contract = Contract(
        name="doubler",
        inputs=(TensorSpec("x", "FP32", (2,), columns=("left", "right")),),
        outputs=(TensorSpec("y", "FP32", (2,)),),
        steps=(Step("onnx", "model.onnx"),),
        purpose=purpose,
        owner='tests "of" $images',
        parity=Parity("onnx", "1.0", 2, 0, exact=True, max_abs_diff=0.0),
    )
    model = write_doubler(folder.with_suffix(".onnx")).read_bytes()
    return write_bundle(folder, contract, {"model.onnx": model}, Goldens({"x": x}, {"y": 2 * x}), capture())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Workplace]:
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        pytest.skip(f"not installed: apt install {' '.join(absent)}")
    if os.geteuid() != 0:
        pytest.skip("images are built and run as root here: sudo make test")
    folder = tmp_path_factory.mktemp("images")
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n'
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("PARBAKE_")}
    assert pytestconfig.cache is not None
    state = pytestconfig.cache.mkdir("parbake")
    (state / "images" / "built.json").unlink(missing_ok=True)
    places = {
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        "PARBAKE_STATE_DIR": str(state),
        "PARBAKE_STORE": f"sqlite:///{folder}/state.db",
    }
    made = Workplace(folder, state, {**own, **places})
    doubler(folder / "one.bundle", "doubles")
    doubler(folder / "two.bundle", "doubles, better")
    yield made
    subprocess.run(
        ["podman", "rm", "--all", "--force"], env=made.environment, capture_output=True, check=False
    )
    subprocess.run(
        ["buildah", "rmi", "--all", "--force"], env=made.environment, capture_output=True, check=False
    )
    subprocess.run(["umount", folder / "graph" / "overlay"], capture_output=True, check=False)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def one(place: Workplace) -> dict[str, Any]:
    return place.build("one.bundle", "--tag", "doubler:1")


@pytest.fixture(scope="module")
def two(place: Workplace, one: dict[str, Any]) -> dict[str, Any]:
    return place.build("two.bundle", "--tag", "doubler:2")


def test_an_image_runs_without_rights_and_answers_as_the_bundle_does(
    place: Workplace, one: dict[str, Any]
) -> None:
    port = free_port()
    place.tool(
        "podman", "run", "--detach", "--name", "runs", *LIMITS, *RESTRICTED, one["tag"], "--port", str(port)
    )
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 60
        while not ready(url):
            assert time.monotonic() < until, place.tool("podman", "logs", "runs")
            time.sleep(0.1)
        rows = [[0.1, -7.25], [1e30, 3.0]]
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 2], "data": rows}]}
        request = urllib.request.Request(
            f"{url}/v2/models/doubler/infer", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as reply:
            got = json.load(reply)["outputs"][0]["data"]
        wanted = parbake.load(place.folder / "one.bundle").predict(np.array(rows, dtype=np.float32))["y"]
        assert np.array_equal(np.array(got, dtype=np.float32), wanted.reshape(-1))
        assert place.tool("podman", "exec", "runs", "id", "--user").strip() == "65532"
        # A state file for `parbake status`, sockets, and nothing of what libraries keep for themselves.
        left = set(place.tool("podman", "exec", "runs", "ls", "-A", "/tmp").split())
        assert not {name for name in left if not name.startswith("parbake")}
        place.tool("podman", "stop", "--time", "30", "runs")
        assert place.tool("podman", "inspect", "runs", "--format", "{{.State.ExitCode}}").strip() == "0"
    finally:
        subprocess.run(
            ["podman", "rm", "--force", "runs"], env=place.environment, capture_output=True, check=False
        )


def test_a_new_model_changes_the_last_layer_only(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["bundle_digest"] != two["bundle_digest"]
    assert one["layers"][:-1] == two["layers"][:-1]
    assert one["layers"][-1] != two["layers"][-1]


def test_the_labels_say_what_is_in_it(place: Workplace, one: dict[str, Any]) -> None:
    found = json.loads(place.tool("podman", "image", "inspect", one["tag"]))[0]
    labels = found["Config"]["Labels"]
    assert labels["dev.parbake.bundle.digest"] == one["bundle_digest"]
    assert labels["dev.parbake.owner"] == 'tests "of" $images'
    assert labels["dev.parbake.purpose"] == labels["org.opencontainers.image.description"] == "doubles"
    assert found["Config"]["User"] == "65532:65532"
    assert found["Config"]["Entrypoint"] == ["parbake", "serve", "/bundle"]


def test_nothing_to_install_things_with_is_left(place: Workplace, one: dict[str, Any]) -> None:
    script = "ls /var/lib/apt/lists /var/cache/apt/archives; python3 -c 'import pip'"
    done = subprocess.run(
        ["podman", "run", "--rm", *LIMITS, *RESTRICTED, "--entrypoint", "sh", one["tag"], "-c", script],
        env=place.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "No module named 'pip'" in done.stderr
    assert ".deb" not in done.stdout
    assert "Packages" not in done.stdout


def test_a_full_disk_is_said_and_leaves_nothing(place: Workplace, one: dict[str, Any]) -> None:
    state = place.folder / "small"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", state], check=True)
    try:
        (state / "images").mkdir()
        (base,) = sorted((place.state / "images").glob("bookworm-*.tar"))[-1:]
        (state / "images" / base.name).symlink_to(base)
        small = Workplace(place.folder, state, {**place.environment, "TMPDIR": str(state)})
        done = small.run("image", "build", "one.bundle", "--tag", "full:1", "--state-dir", state)
        assert done.returncode == 1
        assert "No space left" in done.stderr
        assert "hint: the disk is full" in done.stderr
        assert sorted(path.name for path in (state / "images").iterdir()) == [base.name, "lock"]
    finally:
        subprocess.run(["umount", state], check=True)


def test_a_released_version_is_built_by_its_number_and_prune_leaves_what_is_needed(
    place: Workplace, one: dict[str, Any], two: dict[str, Any]
) -> None:
    three = doubler(place.folder / "three.bundle", "doubles, best")
    doubler(place.folder / "four.bundle", "doubles, worst")
    with closing(open_database(place.store)) as state:
        for version, digest in (("1", one["bundle_digest"]), ("2", three.digest)):
            wanted = Proposal("doubler", version, digest, source=str(three.path))
            state.finish(state.begin_release(wanted, by="ana"), "live", by="ana")
    made = place.build("doubler@2")
    assert (made["tag"], made["bundle_digest"], made["version"]) == (
        "localhost/parbake/doubler:2", three.digest, "2",
    )  # fmt: skip
    with closing(open_database(place.store)) as state:
        facts = state.facts("doubler", "2")
        assert facts is not None
        assert facts.image == f"{made['tag']} {made['id']}"
        assert state.roll_back("doubler", by="ana").proposal.image == f"doubler:1 {one['id']}"
    gone = place.build("four.bundle", "--tag", "doubler:gone")
    place.build("two.bundle", "--tag", "doubler:newest")
    place.tool("podman", "create", "--name", "holds", *LIMITS, made["tag"])
    # Base and libraries of images that are not there any more.
    container = place.tool("buildah", "from", "scratch").strip()
    place.tool("buildah", "config", "--label", f"{MARK}=1", container)
    place.tool("buildah", "commit", "--quiet", "--rm", container, f"{FOUNDATIONS}:old")
    foundations = (
        "buildah",
        "images",
        "--format",
        "{{.Name}}:{{.Tag}}",
        "--filter",
        f"reference={FOUNDATIONS}",
    )
    before = set(place.tool(*foundations).split())
    assert len(before) == 2
    done = place.run("image", "prune", "--keep", "1", "--reference", "doubler:2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {image["tag"]: reason for image, reason in found["kept"]} == {
        "doubler:newest": "one of the 1 newest of doubler",
        made["tag"]: "a container uses it",
        "doubler:2": "referenced",
        "doubler:1": "version 1 of doubler is live",
    }
    assert [image["tag"] for image in found["removed"]] == ["doubler:gone"]
    assert set(place.tool(*foundations).split()) == before - {f"{FOUNDATIONS}:old"}
    assert found["freed_bytes"] > 0
    stored = place.tool("podman", "images", "--all", "--no-trunc", "--quiet").split()
    assert gone["id"] not in stored
    assert {one["id"], two["id"], made["id"]} <= set(stored)
    with closing(open_database(place.store)) as state:
        assert {image.tag for image in state.images()} == {image["tag"] for image, _ in found["kept"]}
    place.tool("podman", "rm", "holds")


def test_a_killed_build_leaves_nothing_and_the_next_one_gives_the_same_image_as_ever(
    place: Workplace, one: dict[str, Any]
) -> None:
    elsewhere = place.folder / "elsewhere.bundle"
    shutil.copytree(place.folder / "one.bundle", elsewhere)
    for path in elsewhere.rglob("*"):
        os.utime(path, (0, 0))
    command = [
        str(Path(sys.executable).with_name("parbake")),
        "image",
        "build",
        "two.bundle",
        "--tag",
        "killed:1",
    ]
    process = subprocess.Popen(
        [*command, "--no-cache"], cwd=place.folder, env=place.environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not place.tool("buildah", "containers", "--quiet").split():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    listed = json.loads(place.run("image", "list", "--json").stdout)
    assert "killed:1" not in {image["tag"] for image in listed}
    again = place.build(elsewhere, "--tag", "doubler:again", "--no-cache")
    assert again["layers"] == one["layers"]
    assert again["id"] == one["id"]
    place.nothing_half_done()


def test_without_a_builder_one_line_says_what_to_install(place: Workplace) -> None:
    empty = place.folder / "empty"
    empty.mkdir()
    nowhere = Workplace(place.folder, place.state, {**place.environment, "PATH": str(empty)})
    done = nowhere.run("image", "build", "one.bundle")
    assert done.returncode == 6
    assert done.stderr.splitlines() == ["error: buildah is not installed", "hint: apt install buildah"]


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
