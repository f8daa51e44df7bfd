"""The documentation runs: every Python and console block of README and docs, as a reader would type it.

A page is run from top to bottom in a folder of its own:

- a ``python`` block is a program that must succeed;
- a block with ``title="FILE"`` is written to that file;
- a ``console`` block holds commands behind ``$``, each followed by what it prints (``...`` stands for
  anything; without such lines any output will do). A command that ends with ``&`` is started and, if it
  is a server, waited for; it is stopped at the end of the page and must then exit with 0;
- ``<!-- not run: REASON -->`` in front of a block leaves it out, ``<!-- needs: MODULE -->`` anywhere on
  a page skips the page where an optional module is missing;
- ports 8000 and 8001 stand for free ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]  # its types are a package of their own

from docs.generate import stale
from parbake.settings import Settings, read_settings

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "docs" / "reference"
PAGES = [
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if GENERATED not in path.parents),
]
LANGUAGES = {"python", "console", "toml", "json", "yaml", "text"}


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    title: str
    text: str
    not_run: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    lines = page.read_text().split("\n")
    at = 0
    while at < len(lines):
        if not (opening := re.fullmatch(r"( *)```(\w*)(?: title=\"([^\"]+)\")?", lines[at])):
            assert not lines[at].lstrip().startswith("```"), f"{page}:{at + 1}: not understood: {lines[at]}"
            at += 1
            continue
        indent, language, title = opening.groups()
        before = lines[at - 1].strip() if at else ""
        skip = re.fullmatch(r"<!-- not run: (.+) -->", before)
        end = lines.index(f"{indent}```", at + 1)
        text = "\n".join(line.removeprefix(indent) for line in lines[at + 1 : end]) + "\n"
        yield Block(page, at + 1, language, title or "", text, skip[1] if skip else "")
        at = end + 1


class Page:
    """A folder in which a page's blocks run, with the servers that they started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = {"8000": str(free_port()), "8001": str(free_port())}
        self.started: list[tuple[Block, str, subprocess.Popen[bytes], Path]] = []
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {name: value for name, value in os.environ.items() if not name.startswith("PARBAKE_")}
        self.environment = {**own, "PATH": path, "PARBAKE_PORT": self.ports["8000"], "COLUMNS": "100"}

    def run(self, block: Block) -> None:
        """Do what the block says."""
        text = self._with_ports(block.text)
        if block.title:
            target = self.folder / block.title
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        elif block.language == "python":
            done = self._finish([sys.executable, "-W", "error", "-c", text])
            assert done.returncode == 0, f"{block}:\n{self._without_ports(done.stdout)}"
        elif block.language == "console":
            for command, expected in commands(block):
                self._console(block, command, expected)

    def stop(self) -> None:
        """Stop what was started, last first, and see that it stops as it should."""
        for block, command, process, log in reversed(self.started):
            alive = process.poll() is None
            if alive:
                os.killpg(process.pid, signal.SIGTERM)
            try:
                code = process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            assert alive, f"{block}: {command} ended before the page did:\n{log.read_text()}"
            assert code == 0, f"{block}: {command} exited with {code}:\n{log.read_text()}"

    def _console(self, block: Block, command: str, expected: list[str]) -> None:
        command = self._with_ports(command)
        if command.endswith("&"):
            self._start(block, command.removesuffix("&").strip())
            return
        done = self._finish(["bash", "-euo", "pipefail", "-c", command])
        output = self._without_ports(done.stdout)
        assert done.returncode == 0, f"{block}: {command} exited with {done.returncode}:\n{output}"
        if expected:
            wanted = "\n".join(expected).strip()
            pattern = re.escape(wanted).replace(re.escape("..."), ".*?")
            got = "\n".join(line.rstrip() for line in output.splitlines()).strip()
            assert re.fullmatch(pattern, got, re.DOTALL), (
                f"{block}: {command}\nexpected:\n{wanted}\ngot:\n{got}"
            )

    def _start(self, block: Block, command: str) -> None:
        log = self.folder / f".output-{len(self.started)}"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append((block, command, process, log))
        if "parbake serve" in command:
            port = re.search(r" --port (\d+)", command)
            url = f"http://127.0.0.1:{port[1] if port else self.ports['8000']}/v2/health/ready"
            end = time.monotonic() + 60
            while not answers(url):
                assert process.poll() is None, f"{block}: {command} ended:\n{log.read_text()}"
                assert time.monotonic() < end, f"{block}: {command} did not get ready:\n{log.read_text()}"
                time.sleep(0.05)

    def _finish(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=180,
            check=False,
        )

    def _with_ports(self, text: str) -> str:
        return re.sub(r"\b800[01]\b", lambda found: self.ports[found[0]], text)

    def _without_ports(self, text: str) -> str:
        for shown, port in self.ports.items():
            text = text.replace(port, shown)
        return text


def commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """The commands of a console block, each with the output that is shown for it."""
    command, expected = "", list[str]()
    for line in block.text.splitlines():
        if line.startswith("$ "):
            if command:
                yield command, expected
            command, expected = line[2:], []
        elif command.endswith("\\"):
            command += f"\n{line}"
        else:
            assert command, f"{block}: output in front of the first command"
            expected.append(line)
    if command:
        yield command, expected


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def answers(url: str) -> bool:
    """Whether a URL answers with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@contextmanager
def page_in(folder: Path) -> Iterator[Page]:
    """A page whose servers are killed if one of its blocks fails."""
    page = Page(folder)
    try:
        yield page
        page.stop()
    finally:
        for _, _, process, _ in page.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_page_does_what_it_says(path: Path, tmp_path: Path) -> None:
    for module in re.findall(r"<!-- needs: (\w+) -->", path.read_text()):
        pytest.importorskip(module)
    to_run = [block for block in blocks(path) if not block.not_run]
    if any("$ curl" in block.text for block in to_run) and not shutil.which("curl"):
        pytest.skip("curl is not installed: apt install curl")
    with page_in(tmp_path) as page:
        for block in to_run:
            page.run(block)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_block_has_a_language_that_is_checked(path: Path, tmp_path: Path) -> None:
    for block in blocks(path):
        assert block.language in LANGUAGES, f"{block}: use one of {sorted(LANGUAGES)}"
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "toml" and block.title == "parbake.toml":
            (tmp_path / "parbake.toml").write_text(block.text)
            assert read_settings(tmp_path / "parbake.toml") != Settings()
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "yaml":
            yaml.safe_load(block.text)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_inside_the_repository_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", path.read_text()):
        if "://" not in target:
            page = path.parent / target if target else path
            assert page.exists(), f"{path.relative_to(ROOT)}: {target}"
            if anchor:
                assert anchor in anchors(page), f"{path.relative_to(ROOT)}: {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_reached_from_the_index() -> None:
    reached: set[Path] = set()
    waiting = [ROOT / "docs" / "index.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or not page.is_file():
            continue
        reached.add(page)
        waiting += [
            (page.parent / target).resolve()
            for target in re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", page.read_text())
        ]
    assert set((ROOT / "docs").rglob("*.md")) <= reached


def test_the_reference_is_what_the_code_says() -> None:
    assert not stale(), "make docs"


def test_the_readme_starts_with_two_commands_and_a_model_of_ones_own_in_twelve_lines() -> None:
    readme = ROOT / "README.md"
    found = list(blocks(readme))
    first, own = found[0], found[1]
    assert [command for command, _ in commands(first)] == ["make demo", "make test"]
    assert own.language == "python"
    assert not own.not_run
    code = [line for line in own.text.splitlines() if line.strip()]
    assert len(code) <= 12
    assert own.line + len(code) < 60, "not on the first screen"
