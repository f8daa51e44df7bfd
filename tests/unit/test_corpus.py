"""Every input in the corpus of the fuzzer, and every seed, is read without a bug."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.__main__ import corpus_of
from fuzz.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_is_read(target: str, tmp_path: Path) -> None:
    run = TARGETS[target].make(tmp_path)
    seeds = TARGETS[target].seeds()
    kept = [path.read_bytes() for path in corpus_of(target)]
    assert seeds
    assert kept
    for data in [b"", *seeds, *kept]:
        run(data)
    # A few bytes less, and one byte changed.
    for data in seeds:
        for at in range(0, len(data), 1 + len(data) // 20):
            run(data[:at])
            run(data[:at] + b"\xff" + data[at + 1 :])
