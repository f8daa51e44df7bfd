"""`parbake serve` and `parbake reload` from the outside: where it says it is, how it stops, how it is found."""

from __future__ import annotations

import json
import shutil
import urllib.request
from pathlib import Path

import pytest

from parbake.cli.exits import Exit
from parbake.contract.bundle import StoredBundle
from parbake.testing import serving
from tests.conftest import Parbake


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Servers of this test are found by commands of this test alone."""
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    return {"XDG_RUNTIME_DIR": str(runtime)}


def answer(url: str, row: object) -> object:
    """What ``/predict/doubler`` answers to a row."""
    request = urllib.request.Request(f"{url}/predict/doubler", json.dumps(row).encode())
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read())


ROW = {"left": 1.0, "right": 2.5}


def test_it_says_where_it_is_answers_and_stops_when_told(doubler_bundle: StoredBundle) -> None:
    with serving(doubler_bundle.path) as server:
        assert answer(server.url, ROW) == {"y": [2.0, 5.0]}
        assert server.stop() == Exit.DONE


def test_a_flag_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, doubler_bundle: StoredBundle
) -> None:
    file = tmp_path / "parbake.toml"
    file.write_text(
        f'[server]\nhost = "127.0.0.9"\nport = 1\n[[deployments]]\nbundle = "{doubler_bundle.path.name}"\n'
    )
    with serving(arguments=["--config", str(file)], environment={"PARBAKE_HOST": "127.0.0.2"}) as server:
        assert server.url.startswith("http://127.0.0.2:")
        assert server.port != 1
        assert answer(server.url, ROW) == {"y": [2.0, 5.0]}


def test_reload_finds_the_server_and_says_what_changed(
    parbake: Parbake, environment: dict[str, str], doubler_bundle: StoredBundle
) -> None:
    with serving(doubler_bundle.path, environment=environment) as server:
        nothing = parbake("reload", env=environment)
        assert (nothing.returncode, nothing.stdout) == (0, "")
        assert nothing.stderr.endswith("s: nothing had changed\n")
        as_json = parbake("reload", "doubler", "--port", str(server.port), "--json", env=environment)
        assert json.loads(as_json.stdout)["changed"] == []
        unknown = parbake("reload", "halver", env=environment)
        assert unknown.returncode == Exit.NOT_FOUND
        assert unknown.stderr == "error: no deployment 'halver'\nhint: deployments: doubler\n"


def test_reload_puts_a_bundle_under_a_deployment_with_a_name_of_its_own(
    parbake: Parbake, environment: dict[str, str], doubler_bundle: StoredBundle, tmp_path: Path
) -> None:
    file = tmp_path / "parbake.toml"
    file.write_text(f'[[deployments]]\nname = "fare"\nbundle = "{doubler_bundle.path}"\n')
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(doubler_bundle.path, elsewhere)
    with serving(arguments=["--config", str(file)], environment=environment) as server:
        by_its_own = parbake("reload", elsewhere, env=environment)
        assert by_its_own.stderr == "error: no deployment 'doubler'\nhint: deployments: fare\n"
        done = parbake("reload", elsewhere, "--name", "fare", env=environment)
        assert (done.returncode, done.stderr.split(": ")[-1]) == (0, "fare:1\n")
        served = json.loads(parbake("status", "--json", env=environment).stdout)["versions"]
        assert [(version["name"], version["bundle"]) for version in served] == [("fare", str(elsewhere))]
        assert server.stop() == Exit.DONE


def test_status_shows_what_is_served(
    parbake: Parbake, environment: dict[str, str], doubler_bundle: StoredBundle
) -> None:
    with serving(doubler_bundle.path, environment=environment) as server:
        assert answer(server.url, ROW) == {"y": [2.0, 5.0]}
        done = parbake("status", env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        words = done.stdout.splitlines()[-1].split()
        assert words[:3] == ["doubler", "1", "dynamic"]
        assert words[3] == doubler_bundle.digest[:19]
        assert words[4:9] == ["-", "-", "1", "0", "%"]
        as_json = json.loads(parbake("status", "--json", env=environment).stdout)
        assert as_json["versions"][0]["digest"] == doubler_bundle.digest
        assert as_json["versions"][0]["requests"] == 1
    nobody = parbake("status", env=environment)
    assert nobody.returncode == Exit.UNAVAILABLE


def test_reload_without_a_server_says_so(parbake: Parbake, environment: dict[str, str]) -> None:
    done = parbake("reload", env=environment)
    assert done.returncode == Exit.UNAVAILABLE
    assert done.stderr.startswith("error: no server of yours is running on this machine\nhint: ")


def test_reload_of_an_address_that_is_none_is_a_usage_error(
    parbake: Parbake, environment: dict[str, str]
) -> None:
    done = parbake("reload", "--admin-url", "localhost", env=environment)
    assert done.returncode == Exit.USAGE
    assert done.stderr.startswith("error: 'localhost' is no URL\nhint: ")


def test_a_torn_bundle_is_refused_before_anything_listens(
    parbake: Parbake, environment: dict[str, str], doubler_bundle: StoredBundle
) -> None:
    (doubler_bundle.path / "model.onnx").unlink()
    done = parbake("serve", doubler_bundle.path, "--port", "0", env=environment)
    assert done.returncode == Exit.DAMAGED
    assert f"error: {doubler_bundle.path}/model.onnx is missing\n" in done.stderr
    assert done.stdout == ""
