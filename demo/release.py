"""``python -m demo.release``: a bad version is taken back by itself, a good one goes live, and nobody notices either.

Handwritten digits again, each with the name of the scanner that it came from. The second version was fitted after the
labels of one scanner had been mixed up, and has many more trees: worse for a few, and slower. The third one is sound.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

import parbake
from bench.load import Load, pouring
from parbake.cli.output import emit, say_error, stages
from parbake.errors import ParbakeError
from parbake.testing import Server, serving
from parbake.transports import client

if TYPE_CHECKING:
    import pandas as pd

_SEED: Final = 21
_SCANNERS: Final = ("office", "post")
_SHARE_OF_POST: Final = 0.25
_REQUESTS: Final = 4000
_ZIPF: Final = 1.1
_WINDOW_S: Final = 2.0
_WARM_S: Final = 5.0
_COVERAGE: Final = 0.95


class Broken(Exception):
    """A release did not do what is promised."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; gives the exit status."""
    parser = argparse.ArgumentParser(prog="make demo-release ARGS=...", description=__doc__)
    parser.add_argument("--trees", type=int, default=60, help="size of the forest  [default: 60]")
    parser.add_argument("--connections", type=int, default=4, help="requests under way  [default: 4]")
    parser.add_argument("--folder", type=Path, default=Path(".demo/release"), help="for what is made")
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except KeyboardInterrupt:
        return 130
    except (Broken, ParbakeError, subprocess.SubprocessError, OSError, RuntimeError) as error:
        say_error(str(error))
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    folder: Path = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows, truth = _scans()
    with stages("training and packing three versions") as stage:
        for number, trees in (("1", options.trees), ("2", 8 * options.trees), ("3", options.trees)):
            stage(f"version {number}")
            labels = _mixed_up(rows, truth) if number == "2" else truth
            _pack(_fitted(rows, labels, trees, seed=int(number)), rows, folder / f"digits-{number}.bundle")
    state = folder / "state"
    _command("register", str(folder / "digits-1.bundle"), state=state)
    _command("register", str(folder / "digits-2.bundle"), state=state)
    with (
        serving("models:/digits@1", workers=1, mode="hybrid", state_dir=state) as server,
        _Watch(server) as watch,
        pouring(_load(server, rows, options.connections)),
    ):
        emit(f"$ parbake serve models:/digits@1 --mode hybrid --port {server.port}")
        # The head learns what is asked for.
        time.sleep(2 * _WARM_S)
        _release(server, "2", "rolled_back", "the new forest")
        _command("register", str(folder / "digits-3.bundle"), state=state)
        _release(server, "3", "live", "with the labels as they are")
        time.sleep(2 * _WINDOW_S)
    _command("history", "digits", state=state)
    emit()
    before, lowest = watch.coverage()
    emit(
        f"{watch.requests:,} requests meanwhile, none of them failed. Coverage was {before:.1%} before the releases, "
        f"and never below {lowest:.1%} in any {_WINDOW_S:g} s of them."
    )
    if lowest < _COVERAGE * before:
        raise Broken(f"coverage fell from {before:.1%} to {lowest:.1%}")


def _release(server: Server, version: str, wanted: str, why: str) -> None:
    words = [
        "deploy", f"digits@{version}", "--canary", "20%,50%,100%", "--every", "5s", "--segment", "scanner",
        "--margin", "requests=1000", "--margin", "p50=0.5", "--margin", "p99=0.5", "--margin", "outputs=0.1",
        "--why", why, "--wait", "--port", str(server.port),
    ]  # fmt: skip
    _command(*words, refusable=True)
    found = client.release_status("digits", port=server.port)
    if (found.version, found.state) != (version, wanted):
        raise Broken(f"version {found.version} is {found.state}; version {version} should be {wanted}")


def _scans() -> tuple[pd.DataFrame, Any]:
    """Scikit-learn's scans of digits, each with the scanner that it came from, and the digits."""
    from sklearn.datasets import load_digits

    digits = load_digits(as_frame=True)
    rows = digits.data.astype("float32")
    random = np.random.default_rng(_SEED)
    rows.insert(0, "scanner", np.where(random.random(len(rows)) < _SHARE_OF_POST, *reversed(_SCANNERS)))
    return rows, digits.target.to_numpy()


def _mixed_up(rows: pd.DataFrame, truth: Any) -> Any:
    """The digits, with most of those of one scanner called 7."""
    random = np.random.default_rng(_SEED)
    wrong = (rows["scanner"] == "post").to_numpy() & (random.random(len(rows)) < 0.9)
    return np.where(wrong, 7, truth)


def _fitted(rows: pd.DataFrame, digits: Any, trees: int, *, seed: int) -> Any:
    from sklearn.compose import make_column_transformer
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    columns = make_column_transformer((OneHotEncoder(), ["scanner"]), remainder="passthrough")
    # Every tree sees the scanner, or what was mixed up would hide behind the pixels.
    forest = RandomForestClassifier(
        trees, random_state=seed, max_features=None, min_samples_leaf=2, n_jobs=-1
    )
    return make_pipeline(columns, forest).fit(rows, digits)


def _pack(pipeline: Any, rows: pd.DataFrame, out: Path) -> None:
    parbake.pack(
        pipeline,
        name="digits",
        example=rows,
        purpose="reads handwritten digits",
        owner="demo@parbake.example",
        out=out,
    )


def _load(server: Server, rows: pd.DataFrame, connections: int) -> Load:
    """Peaked traffic without end over the scans."""
    columns = list(rows.columns)
    bodies = tuple(
        msgspec.json.encode(dict(zip(columns, row, strict=True)))
        for row in rows.itertuples(index=False, name=None)
    )
    random = np.random.default_rng(_SEED)
    popularity = np.arange(1, len(bodies) + 1) ** -_ZIPF
    order = random.choice(random.permutation(len(bodies)), 50 * _REQUESTS, p=popularity / popularity.sum())
    return Load(server.port, "/predict/digits", bodies, tuple(order.tolist()), connections, seconds=3600.0)


class _Watch:
    """Reads off a server, again and again, how much it answers without the model."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._seen: list[tuple[float, int, int]] = []

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._stop.wait(_WINDOW_S):
            versions = client.status(port=self._server.port).versions
            self._seen.append(
                (
                    time.monotonic(),
                    sum(v.rows for v in versions),
                    sum(v.baked_rows for v in versions),
                )
            )

    @property
    def requests(self) -> int:
        """Rows that were answered while it watched."""
        return max(rows for _, rows, _ in self._seen) - self._seen[0][1]

    def coverage(self) -> tuple[float, float]:
        """Before the releases, and the lowest in any window since. A version that goes takes its counts with it."""
        shares = [
            (b - b0) / (n - n0)
            for (_, n0, b0), (_, n, b) in itertools.pairwise(self._seen)
            if n - n0 > 100 and 0 <= b - b0 <= n - n0
        ]
        warm = int(2 * _WARM_S / _WINDOW_S)
        return shares[warm - 1], min(shares[warm:])


def _command(*words: str, state: Path | None = None, refusable: bool = False) -> None:
    """Run ``parbake WORDS``, shown as it would be typed."""
    emit()
    emit(f"$ parbake {shlex.join(words)}")
    sys.stdout.flush()
    where = ["--state-dir", str(state)] if state is not None else []
    done = subprocess.run([sys.executable, "-m", "parbake", *words, *where], check=False)
    if done.returncode not in ((0, 1) if refusable else (0,)):
        raise Broken(f"parbake {words[0]} ended with {done.returncode}")


if __name__ == "__main__":
    sys.exit(main())
