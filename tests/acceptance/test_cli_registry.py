"""`parbake register`, `versions` and `alias` as a person runs them, against an MLflow server and a bundle store."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import Parbake
from tests.functions import write_scaled
from tests.mlflow_server import MlflowServer
from tests.sockets import free_port

# With the others that ask this server.
pytestmark = pytest.mark.xdist_group("mlflow")


@pytest.fixture
def where(tmp_path: Path, mlflow_server: MlflowServer) -> Mapping[str, str]:
    """Variables that say where registry and bundle store are."""
    return {
        "PARBAKE_REGISTRY": mlflow_server.url,
        "PARBAKE_BUNDLE_STORE": str(tmp_path / "store"),
        "PARBAKE_STORE": f"sqlite:///{tmp_path / 'releases.db'}",
    }


def test_bundles_become_versions_that_aliases_point_at(
    parbake: Parbake, tmp_path: Path, where: Mapping[str, str]
) -> None:
    # The server keeps what other tests have registered.
    name = f"m{uuid.uuid4().hex[:12]}"
    two, three = (write_scaled(tmp_path / f"by{factor}.bundle", factor, name=name) for factor in (2, 3))
    done = parbake("register", "by2.bundle", "--alias", "champion", "--by", "ana", env=where)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"registered {name}@1, {two.digest[:19]}..., which champion points at now\n"
    second = json.loads(parbake("register", "by3.bundle", "--by", "bob", "--json", env=where).stdout)
    assert (second["version"], second["digest"], second["by"], second["aliases"]) == (
        "2", three.digest, "bob", [],
    )  # fmt: skip
    assert {path.name for path in (tmp_path / "store").iterdir()} == {
        bundle.digest.replace(":", "-") for bundle in (two, three)
    }
    listed = parbake("versions", name, env=where)
    titles, *lines = (re.split(" {2,}", line.strip()) for line in listed.stdout.splitlines())
    assert titles[:4] == ["model", "version", "aliases", "digest"]
    assert [[*line[:4], *line[5:]] for line in lines] == [
        [name, "1", "champion", two.digest[:19], "ana", "tests@parbake.example", "multiplies"],
        [name, "2", "-", three.digest[:19], "bob", "tests@parbake.example", "multiplies"],
    ]
    moved = parbake("alias", name, "champion", "2", "--by", "eve", "--why", "it is better", env=where)
    assert (moved.returncode, moved.stderr) == (0, f"champion of {name} points at version 2\n")
    told = json.loads(parbake("history", name, "--json", env=where).stdout)
    assert [(e["what"], e["version"], e["by"], e["why"], e["details"]) for e in told] == [
        ("alias", "1", "ana", "", {"alias": "champion", "before": ""}),
        ("alias", "2", "eve", "it is better", {"alias": "champion", "before": "1"}),
    ]
    assert "alias champion points at it, not at 1 any more" in parbake("history", name, env=where).stdout
    # Where the history is away, or nobody knows of one, it moves all the same, and says so.
    for store, says in (
        (f"postgresql://nobody@127.0.0.1:{free_port()}/none", "this does not stand in the history: "),
        (
            "",
            "this does not stand in a history: no store of releases is known here; --store says where one is\n",
        ),
    ):
        back = parbake("alias", name, "champion", "1", env={**where, "PARBAKE_STORE": store})
        assert back.returncode == 0
        assert back.stderr.startswith(says)
        assert back.stderr.endswith(f"champion of {name} points at version 1\n")
    assert json.loads(parbake("alias", name, "--json", env=where).stdout) == {"champion": "1"}
    assert len(json.loads(parbake("history", name, "--json", env=where).stdout)) == 2
    # The gate takes what serve and deploy take.
    asked = parbake("gate", f"models:/{name}@champion", "--against", f"{name}@2", "--json", env=where)
    report = json.loads(asked.stdout)
    assert (asked.returncode, report["digest"], report["against"]) == (0, two.digest, three.digest)
    assert parbake("gate", f"{name}@7", env=where).returncode == 3


def test_what_cannot_be_registered_or_found_is_said_in_a_line_with_what_to_do(
    parbake: Parbake, tmp_path: Path, where: Mapping[str, str]
) -> None:
    name = f"m{uuid.uuid4().hex[:12]}"
    write_scaled(tmp_path / "nobodys.bundle", 2, name=name, owner="")
    refused = parbake("register", "nobodys.bundle", env=where)
    assert refused.returncode == 1
    assert refused.stderr.splitlines() == [
        "error: nobodys.bundle does not say its owner",
        "hint: parbake pack --owner ..., or --force, which is recorded",
    ]
    missing = parbake("versions", name, env=where)
    assert (missing.returncode, missing.stdout) == (3, "")
    assert f"no model '{name}'" in missing.stderr
    forced = parbake("register", "nobodys.bundle", "--force", env=where)
    assert forced.stderr.splitlines()[1:] == ["recorded: no owner"]
    # What is waived stands in the history of the version that was named.
    waived = parbake("gate", f"models:/{name}@1", "--waive", "metadata", "--why", "a test", env=where)
    assert waived.returncode == 0, waived.stdout
    (event,) = json.loads(parbake("history", name, "--json", env=where).stdout)
    assert (event["what"], event["version"], event["details"]["check"]) == ("waiver", "1", "metadata")
    unknown = parbake("alias", name, "champion", "7", env=where)
    assert unknown.returncode == 3
    assert "has no version '7'" in unknown.stderr
    away = {**where, "PARBAKE_REGISTRY": f"http://127.0.0.1:{free_port()}"}
    nobody = parbake("versions", env=away)
    assert nobody.returncode == 4
    assert re.match(r"error: .*127\.0\.0\.1.* does not answer", nobody.stderr)
