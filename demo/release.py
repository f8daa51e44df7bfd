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
from dataclasses import dataclass
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
_COVERAGE: Final = 0.95
_FEW: Final = 500
"""Fewer rows than this say nothing about coverage: on a busy machine a window is as long as they take."""


@dataclass(frozen=True, slots=True)
class _Pace:
    """How long things take."""

    warm_s: float
    """The head learns what is asked for."""
    window_s: float
    """Coverage is that of so long, or longer: see `_FEW`."""
    every_s: int
    requests: int
    """That a step needs."""
    slower: float
    """Margin for the latencies."""
    trees: int
    pixels: slice
    scans: slice


_WHOLE: Final = _Pace(
    warm_s=10, window_s=2, every_s=5, requests=1000, trees=60, pixels=slice(None), scans=slice(None),
    slower=0.5,
)  # fmt: skip
_QUICK: Final = _Pace(
    warm_s=2, window_s=1, every_s=1, requests=300, trees=4, pixels=slice(16, 48, 2), scans=slice(0, None, 2),
    # In a second or two a busy machine makes either of two versions many times as slow: outputs decide.
    slower=1000,
)  # fmt: skip


class Broken(Exception):
    """A release did not do what is promised."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; gives the exit status."""
    parser = argparse.ArgumentParser(prog="make demo-release ARGS=...", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="few scans and pixels, short steps, no registry: half a minute"
    )
    parser.add_argument("--trees", type=int, help="size of the forest  [default: 60, or 4 with --quick]")
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
    pace = _QUICK if options.quick else _WHOLE
    small: int = options.trees or pace.trees
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows, truth = _scans(pace)

    def bundle(number: str) -> Path:
        return folder / f"digits-{number}.bundle"

    _tell("Three versions of a model of digits are trained and packed; for the second, labels were mixed up.")
    with stages("training and packing three versions") as stage:
        for number, trees in (("1", small), ("2", 8 * small), ("3", small)):
            stage(f"version {number}")
            labels = _mixed_up(rows, truth) if number == "2" else truth
            _pack(_fitted(rows, labels, trees, seed=int(number)), rows, bundle(number))
    state = folder / "state"

    def register(number: str) -> None:
        if not options.quick:
            _command("register", str(bundle(number)), state=state)

    if not options.quick:
        _tell("The first two are registered: look at the numbers that they get.")
    register("1")
    register("2")
    _tell("Version 1 is served, and asked without a pause from here on: no request may fail.")
    first = str(bundle("1")) if options.quick else "models:/digits@1"
    with (
        serving(first, workers=1, mode="hybrid", state_dir=state) as server,
        _Watch(server, pace.window_s) as watch,
        pouring(_load(server, rows, options.connections)),
    ):
        emit()
        emit(f"$ parbake serve {first} --mode hybrid --port {server.port}")
        time.sleep(pace.warm_s)
        while watch.requests < 3 * len(rows):
            # As long as it takes on a busy machine.
            time.sleep(0.1)
        watch.begin()
        _tell("Version 2, worse for one scanner and slower, gets 20 %: watch the judge take it back.")
        _release(server, pace, "2", "rolled_back", "the new forest", bundle("2") if options.quick else None)
        _tell("Version 3, which is sound, gets 20 %: watch the judge give it more, then all of the traffic.")
        register("3")
        _release(
            server, pace, "3", "live", "with the labels as they are", bundle("3") if options.quick else None
        )
        time.sleep(2 * pace.window_s)
    _tell("What has happened stands in the history: who did what, with which bundle, and why.")
    _command("history", "digits", state=state)
    emit()
    before, lowest, alone = watch.coverage()
    emit(
        f"{watch.requests:,} requests meanwhile, none of them failed. Coverage was {before:.1%} before the releases, "
        f"and never below {lowest:.1%} in any {pace.window_s:g} s of them or in {_FEW} requests, nor below {alone:.1%} "
        "for a version alone."
    )
    if min(lowest, alone) < _COVERAGE * before:
        raise Broken(f"coverage fell from {before:.1%} to {min(lowest, alone):.1%}")


def _release(server: Server, pace: _Pace, version: str, wanted: str, why: str, bundle: Path | None) -> None:
    words = [
        "deploy", f"digits@{version}", *([] if bundle is None else [str(bundle)]),
        "--canary", "20%,50%,100%", "--every", f"{pace.every_s}s", "--segment", "scanner",
        "--margin", f"requests={pace.requests}", "--margin", f"p50={pace.slower}", "--margin", f"p99={pace.slower}",
        "--margin", "outputs=0.1", "--why", why, "--wait", "--port", str(server.port),
    ]  # fmt: skip
    _command(*words, refusable=True)
    found = client.release_status("digits", port=server.port)
    if (found.version, found.state) != (version, wanted):
        raise Broken(f"version {found.version} is {found.state}; version {version} should be {wanted}")


def _scans(pace: _Pace) -> tuple[pd.DataFrame, Any]:
    """Scikit-learn's scans of digits, each with the scanner that it came from, and the digits."""
    from sklearn.datasets import load_digits

    digits = load_digits(as_frame=True)
    rows = digits.data.astype("float32").iloc[pace.scans, pace.pixels].copy()
    random = np.random.default_rng(_SEED)
    rows.insert(0, "scanner", np.where(random.random(len(rows)) < _SHARE_OF_POST, *reversed(_SCANNERS)))
    return rows, digits.target.to_numpy()[pace.scans]


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
    """Peaked traffic without end over the scans, behind each of them once: then the head has them all."""
    columns = list(rows.columns)
    bodies = tuple(
        msgspec.json.encode(dict(zip(columns, row, strict=True)))
        for row in rows.itertuples(index=False, name=None)
    )
    random = np.random.default_rng(_SEED)
    popularity = np.arange(1, len(bodies) + 1) ** -_ZIPF
    order = random.choice(random.permutation(len(bodies)), 50 * _REQUESTS, p=popularity / popularity.sum())
    order = np.concatenate([random.permutation(len(bodies)), order])
    return Load(server.port, "/predict/digits", bodies, tuple(order.tolist()), connections, seconds=3600.0)


class _Watch:
    """Reads off a server, again and again, how much it answers without the model."""

    def __init__(self, server: Server, window_s: float) -> None:
        self._server = server
        self._window_s = window_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._seen: list[dict[str, tuple[int, int]]] = []
        """At each look, by version: rows, and those of them that were answered without the model."""
        self._before = 0

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def begin(self) -> None:
        """The releases begin."""
        self._before = len(self._seen)

    def _read(self) -> None:
        while not self._stop.wait(self._window_s):
            versions = client.status(port=self._server.port).versions
            self._seen.append({v.version: (v.rows, v.baked_rows) for v in versions})

    @property
    def requests(self) -> int:
        """Rows that were answered while it watched, but for the last moments of a version that went."""
        return sum(rows for window in self._increases() for rows, _ in window.values())

    def coverage(self) -> tuple[float, float, float]:
        """Just before the releases; the lowest in any window since; and the lowest of one version in any of them.

        Raises `Broken` where too little was asked.
        """
        windows = self._increases()
        totals = [
            (sum(rows for rows, _ in window.values()), sum(baked for _, baked in window.values()))
            for window in windows
        ]
        first = max(self._before - 1, 0)
        before, since = _shares(totals[:first]), _shares(totals[first:])
        versions = {version for window in windows for version in window}
        alone = [
            share
            for version in versions
            for share in _shares([window[version] for window in windows[first:] if version in window])
        ]
        if not before or not since or not alone:
            raise Broken(f"hardly any requests in {len(windows)} windows: coverage cannot be told")
        return before[-1], min(since), min(alone)

    def _increases(self) -> list[dict[str, tuple[int, int]]]:
        """What each version did in each window. One that goes takes its counts with it, one that comes begins at 0."""
        found: list[dict[str, tuple[int, int]]] = []
        for earlier, later in itertools.pairwise(list(self._seen)):
            window: dict[str, tuple[int, int]] = {}
            for version, (n, b) in later.items():
                n0, b0 = earlier.get(version, (0, 0))
                window[version] = (n - n0, b - b0) if n >= n0 else (n, b)
            found.append(window)
        return found


def _shares(counts: Sequence[tuple[int, int]]) -> list[float]:
    """Coverage of one window after the other, each with those behind it until it has rows enough."""
    found: list[float] = []
    rows = baked = 0
    for more, of_them in counts:
        rows, baked = rows + more, baked + of_them
        if rows >= _FEW:
            found.append(baked / rows)
            rows = baked = 0
    return found


def _tell(words: str) -> None:
    """What is about to happen, and what to look at."""
    emit()
    emit(f"# {words}")
    sys.stdout.flush()


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
