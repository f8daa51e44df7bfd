"""One target in a process of its own: ``python -m fuzz.session TARGET [LIBFUZZER ARGUMENT]...``."""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["parbake"]):
    from fuzz.targets import TARGETS


def main(arguments: list[str]) -> None:
    """Fuzz until libFuzzer ends the process."""
    target, *rest = arguments
    # What is logged of bad input is right, and would be all that there is to see.
    logging.disable(logging.CRITICAL)
    # In memory, where there is such a place: it is written to thousands of times a second.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="parbake-fuzz-", dir=memory if memory.is_dir() else None
    ) as folder:
        run = TARGETS[target].make(Path(folder))
        for seed in TARGETS[target].seeds():
            run(seed)
        atheris.Setup([sys.argv[0], *rest], run)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
