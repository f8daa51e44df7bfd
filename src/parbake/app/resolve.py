"""Ask registry and bundle store in a process of its own: a server neither waits for them nor imports them.

``python -m parbake.app.resolve`` reads one question from stdin and writes one answer to stdout.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from parbake.errors import Conflict, ParbakeError, RegistryAway, StoreAway, by_code

_MODULE: Final = "parbake.app.resolve"


class Look(Struct, frozen=True, tag="look"):
    """A question: what these references mean now."""

    registry: str
    references: tuple[str, ...]


class Fetch(Struct, frozen=True, tag="fetch"):
    """A question: where this bundle is, under ``root``."""

    store: str
    digest: str
    root: str


class Meaning(Struct, frozen=True):
    """What a reference means: a version with its bundle; or why it means nothing."""

    reference: str
    version: str = ""
    digest: str = ""
    code: str = ""
    message: str = ""
    hint: str = ""

    def check(self) -> None:
        """Raise the error that this is, if it is one."""
        if self.code:
            raise by_code(self.code, self.message, hint=self.hint)


class Answer(Struct, frozen=True):
    """What came of a question; with a ``code`` it is an error."""

    meanings: tuple[Meaning, ...] = ()
    path: str = ""
    code: str = ""
    message: str = ""
    hint: str = ""


async def look(question: Look, timeout_s: float) -> dict[str, Meaning]:
    """What references mean, by reference. Raises `RegistryAway`, or whatever else the registry as a whole says."""
    answer = await _ask(question, timeout_s)
    if answer is None:
        raise RegistryAway(
            f"the registry did not answer within {timeout_s:g} s", hint="what serves goes on serving"
        )
    return {meaning.reference: meaning for meaning in answer.meanings}


async def fetch(question: Fetch, timeout_s: float) -> Path:
    """Where a bundle lies now, verified. Raises `StoreAway`, `BundleMissing`, `BundleError`."""
    answer = await _ask(question, timeout_s)
    if answer is None:
        raise StoreAway(
            f"the bundle store did not give {question.digest[:19]}... within {timeout_s:g} s",
            hint="--fetch-timeout-s; what is cached goes on serving",
        )
    return Path(answer.path)


async def _ask(question: Look | Fetch, timeout_s: float) -> Answer | None:
    """The answer of a child process; None where there was none in time. Raises the error that it had."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        _MODULE,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        said, words = await asyncio.wait_for(process.communicate(msgspec.json.encode(question)), timeout_s)
    except TimeoutError:
        return None
    finally:
        # Of a server that stops, too: what it asked for is of no use to anybody.
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    try:
        answer = msgspec.json.decode(said, type=Answer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        last = (words.decode(errors="replace").strip().splitlines() or [f"status {process.returncode}"])[-1]
        kind = RegistryAway if isinstance(question, Look) else StoreAway
        raise kind(f"the process that was to ask ended: {last[:300]}") from error
    if answer.code:
        raise by_code(answer.code, answer.message, hint=answer.hint)
    return answer


def main() -> None:
    """Answer the question on stdin."""
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Look | Fetch)
    # What libraries print is no answer.
    output = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        answer = _look(question) if isinstance(question, Look) else _fetch(question)
    except ParbakeError as error:
        answer = Answer(code=error.code, message=error.message, hint=error.hint)
    with os.fdopen(output, "wb") as stream:
        stream.write(msgspec.json.encode(answer))


def _look(question: Look) -> Answer:
    from parbake.app.registry import registry_to_ask
    from parbake.release.registry import parse_reference

    registry = registry_to_ask(question.registry)
    meanings: list[Meaning] = []
    for text in question.references:
        try:
            reference = parse_reference(text)
            version = registry.version(reference.name, reference.which)
            if not version.digest:
                raise Conflict(
                    f"{text} is a model of MLflow's, and no bundle yet",
                    hint=f"parbake pack {text} --out {reference.name}.bundle, then parbake register",
                )
            meanings.append(Meaning(text, version.version, version.digest))
        except RegistryAway:
            # Neither do the others get an answer.
            raise
        except ParbakeError as error:
            meanings.append(Meaning(text, code=error.code, message=error.message, hint=error.hint))
    return Answer(tuple(meanings))


def _fetch(question: Fetch) -> Answer:
    from parbake.app.registry import open_bundles
    from parbake.release.bundles import fetch_bundle

    store = open_bundles(question.store)
    return Answer(path=str(fetch_bundle(store, question.digest, Path(question.root)).path))


if __name__ == "__main__":
    main()
