"""The installed command as a person or a script uses it: output, streams and exit codes."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from parbake.cli.exits import Exit
from parbake.contract.bundle import StoredBundle
from tests.conftest import Parbake


def test_help_lists_the_commands(parbake: Parbake) -> None:
    done = parbake("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for command in ("pack", "inspect", "check", "bake", "serve", "reload", "completion"):
        assert f"\n  {command} " in done.stdout


def test_without_a_command_the_help_is_shown_as_a_mistake(parbake: Parbake) -> None:
    done = parbake()
    assert done.returncode == Exit.USAGE
    assert done.stdout == ""
    assert "Commands:" in done.stderr


def test_the_version_is_the_installed_one(parbake: Parbake) -> None:
    assert parbake("--version").stdout == f"parbake {version('parbake')}\n"


def test_an_unknown_command_says_where_to_look(parbake: Parbake) -> None:
    done = parbake("inspekt")
    assert done.returncode == Exit.USAGE
    assert done.stderr.splitlines() == [
        "error: no such command 'inspekt'. Did you mean 'inspect'?",
        "hint: parbake --help shows what it takes",
    ]
    done = parbake("xyzzy")
    assert done.stderr == "error: no such command 'xyzzy'\nhint: parbake --help shows what it takes\n"


def test_a_bundle_that_is_not_there_is_not_found(parbake: Parbake) -> None:
    for command in ("inspect", "check", "serve"):
        done = parbake(command, "nowhere.bundle")
        assert done.returncode == Exit.NOT_FOUND
        assert "at nowhere.bundle\nhint: " in done.stderr


def test_inspect_shows_the_contract(parbake: Parbake, doubler_bundle: StoredBundle) -> None:
    done = parbake("inspect", doubler_bundle.path)
    assert (done.returncode, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    for fact in (
        "doubler: shows that a number can be doubled",
        "owner tests@parbake.example",
        f"digest {doubler_bundle.digest}",
        "goldens 2 rows",
        "key the whole row",
        "tolerance exact",
        "batches a row's bits do not depend on its company",
        "parity bit-equal to onnx 1.0 on 2 examples and 0 rows at thresholds",
        "needs nothing but parbake",
        "x FP32 2 m no left, right",
        "y FP32 2",
        "model.onnx",
    ):
        assert fact in text
    assert "\x1b" not in done.stdout


def test_inspect_as_json_is_complete(parbake: Parbake, doubler_bundle: StoredBundle) -> None:
    found = json.loads(parbake("inspect", doubler_bundle.path, "--json").stdout)
    assert found["digest"] == doubler_bundle.digest
    assert found["goldens"] == 2
    assert found["contract"]["tolerance"] == {"rtol": 0.0, "atol": 0.0}
    assert {library["name"] for library in found["environment"]["libraries"]} >= {"numpy", "onnxruntime"}
    assert {entry["path"] for entry in found["files"]} >= {"contract.json", "model.onnx"}


def test_inspect_of_a_torn_bundle_says_what_is_torn(parbake: Parbake, doubler_bundle: StoredBundle) -> None:
    (doubler_bundle.path / "goldens.bin").unlink()
    done = parbake("inspect", doubler_bundle.path)
    assert done.returncode == Exit.DAMAGED
    assert done.stderr.startswith(f"error: {doubler_bundle.path}/goldens.bin is missing\nhint: ")


def test_colours_show_on_a_terminal_only_and_not_with_no_color(
    tmp_path: Path, doubler_bundle: StoredBundle
) -> None:
    plain = {"PATH": os.environ["PATH"], "TERM": "xterm-256color"}
    assert b"\x1b[1" in on_a_terminal(["inspect", str(doubler_bundle.path)], plain)
    assert b"\x1b[31" not in on_a_terminal(["inspect", "nowhere"], {**plain, "NO_COLOR": "1"})
    assert b"\x1b[31m\x1b[1merror:" in on_a_terminal(["inspect", "nowhere"], plain)


def test_output_that_nobody_reads_to_the_end_is_no_error(doubler_bundle: StoredBundle) -> None:
    command = Path(sys.executable).with_name("parbake")
    with subprocess.Popen(
        [command, "inspect", doubler_bundle.path, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_the_shell(parbake: Parbake, shell: str) -> None:
    done = parbake("completion", shell)
    assert done.returncode == 0
    assert f"_PARBAKE_COMPLETE={shell}_complete" in done.stdout


def test_completion_completes_commands_and_options(parbake: Parbake) -> None:
    def completed(words: str, at: int) -> list[str]:
        env = {"_PARBAKE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(at)}
        return [line.partition(",")[2] for line in parbake(env=env).stdout.splitlines()]

    assert completed("parbake rel", 1) == ["release", "reload"]
    assert completed("parbake serve --grpc", 2) == ["--grpc-port"]
    assert completed("parbake serve --mode ", 3) == ["dynamic", "static", "hybrid", "auto"]


def test_serve_without_anything_to_serve_is_a_usage_error(parbake: Parbake) -> None:
    done = parbake("serve")
    assert done.returncode == Exit.USAGE
    assert done.stderr.startswith("error: nothing to serve\nhint: parbake serve BUNDLE")


def test_a_wrong_environment_variable_is_named(parbake: Parbake, doubler_bundle: StoredBundle) -> None:
    done = parbake("serve", doubler_bundle.path, env={"PARBAKE_PORT": "99999"})
    assert done.returncode == Exit.USAGE
    assert done.stderr.startswith("error: invalid value for '--port': 99999 is not in the range 0<=x<=65535")


def test_a_wrong_key_in_the_file_is_named(parbake: Parbake, tmp_path: Path) -> None:
    (tmp_path / "parbake.toml").write_text("[server]\nprot = 1\n")
    done = parbake("serve")
    assert done.returncode == Exit.USAGE
    assert "unknown field `prot` - at `$.server`" in done.stderr


def on_a_terminal(arguments: list[str], env: dict[str, str]) -> bytes:
    """What the command prints when stdout and stderr are a terminal."""
    command = Path(sys.executable).with_name("parbake")
    ours, theirs = pty.openpty()
    with subprocess.Popen([command, *arguments], stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        parts = []
        # Linux ends a terminal that nobody writes to any more with an error, not with an empty read.
        try:
            while part := os.read(ours, 65536):
                parts.append(part)
        except OSError:
            pass
        process.wait(30)
    os.close(ours)
    return b"".join(parts)
