"""Tell the story on a terminal or in a log: train, pack, bake, serve, replay traffic, compare, go on serving."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

import click
import numpy as np

import parbake
from demo.comparison import MODES, Disagreement, Row, compare, meaning, request_body
from demo.digits import Traffic, Trained, drawn, traffic, train
from parbake.cli.output import colours, emit, emit_table, say_error, stages
from parbake.errors import ParbakeError
from parbake.testing import Server, serving

_PAST_REQUESTS: Final = 20_000
_REQUESTS_PER_S: Final = 30_000
"""More than are sent, so that the traffic does not begin again."""
_ADVISED_ON: Final = 50_000
_TITLES: Final = ("mode", "requests/s", "p50 ms", "p99 ms", "coverage", "agreement", "404")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; gives the exit status."""
    options = _options().parse_args(arguments)
    signal.signal(signal.SIGTERM, _end)
    try:
        _run(options)
    except KeyboardInterrupt:
        return 130
    except (Disagreement, ParbakeError, subprocess.SubprocessError, OSError, RuntimeError) as error:
        say_error(str(error))
        return 1
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make demo ARGS=...", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the comparison")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time per mode  [default: 5]")
    parser.add_argument("--connections", type=int, default=16, help="requests under way  [default: 16]")
    parser.add_argument("--trees", type=int, default=500, help="size of the forest  [default: 500]")
    parser.add_argument("--popular", type=int, default=1000, help="images to bake  [default: 1000]")
    parser.add_argument("--port", type=int, help="port to serve on  [default: 8000, or a free one]")
    parser.add_argument(
        "--folder", type=Path, default=Path(".demo"), help="for what is made  [default: .demo]"
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    trained = _train(options.trees)
    images = trained.held_out.to_numpy()
    coming = traffic(images, _PAST_REQUESTS, int(_REQUESTS_PER_S * (options.seconds + 1)))
    _pack(trained, folder)
    popular = coming.popular(options.popular)
    _bake(trained, coming, popular.tolist(), folder)
    with _serve(folder, options.port) as server:
        rows = _replay(server, trained, coming, popular.tolist(), options)
        _show(rows, len(popular))
        _advise(coming, folder, options.connections)
        if not options.once:
            _stay(server, folder)


def _train(trees: int) -> Trained:
    started = time.perf_counter()
    with stages("training"):
        trained = train(trees)
    scans = trained.fitted_on + len(trained.held_out)
    _head("Train")
    emit(
        f"{scans:,} scans of handwritten digits, 8 x 8 pixels each (bundled with scikit-learn). One of them:"
    )
    emit(_indented(drawn(trained.held_out.to_numpy()[0])))
    emit(
        f"A StandardScaler and a RandomForest of {trees} trees, fitted on {trained.fitted_on:,} of them in "
        f"{time.perf_counter() - started:.1f} s, read {trained.accuracy:.1%} of the other "
        f"{len(trained.held_out)} right."
    )
    return trained


def _pack(trained: Trained, folder: Path) -> None:
    _head("Pack")
    _code('parbake.pack(pipeline, name="digits", example=scans, purpose=..., owner=...)')
    started = time.perf_counter()
    with stages("packing") as stage:
        bundle = parbake.pack(
            trained.pipeline,
            name="digits",
            example=trained.held_out,
            purpose="reads handwritten digits",
            owner="demo@parbake.example",
            out=folder / "digits.bundle",
            replace=True,
            progress=stage,
        )
    parity = bundle.contract.parity
    if parity is None or not parity.exact:
        raise Disagreement(f"the bundle is not bit-equal to scikit-learn: {parity}")
    emit(
        f"Packed in {time.perf_counter() - started:.1f} s: bit-equal to {parity.framework} {parity.framework_version} "
        f"on {parity.example_rows:,} scans and on {parity.threshold_rows:,} rows at the trees' own thresholds."
    )


def _bake(trained: Trained, coming: Traffic, popular: list[int], folder: Path) -> None:
    import pandas as pd

    rows = pd.DataFrame(coming.images[popular], columns=trained.held_out.columns)
    rows.to_parquet(folder / "popular.parquet")
    _head("Bake")
    asked = int((coming.asked_before > 0).sum())
    emit(
        f"{_PAST_REQUESTS:,} requests so far were for {asked:,} images; the {len(popular):,} most popular are baked."
    )
    bundle, table = str(folder / "digits.bundle"), str(folder / "digits.table")
    _command("bake", bundle, "--input", str(folder / "popular.parquet"), "--out", table, "--replace")


def _command(*words: str) -> None:
    """Run ``parbake WORDS``, shown as it would be typed."""
    _code(f"$ parbake {shlex.join(words)}")
    sys.stdout.flush()
    done = subprocess.run(
        [sys.executable, "-m", "parbake", *words, "--no-progress"],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Disagreement(f"parbake {words[0]} ended with {done.returncode}: {done.stderr.strip()}")
    emit(done.stderr.strip())


@contextmanager
def _serve(folder: Path, port: int | None) -> Iterator[Server]:
    """One server with a deployment for each mode."""
    config = folder / "parbake.toml"
    config.write_text(
        "\n".join(
            f'[[deployments]]\nname = "digits-{mode}"\nmode = "{mode}"\nbundle = "digits.bundle"\n'
            + ("" if mode == "dynamic" else 'table = "digits.table"\n')
            for mode in MODES
        )
    )
    _head("Serve")
    chosen = _port(port)
    with serving(arguments=["--config", str(config), "--port", str(chosen)]) as server:
        _code(f"$ parbake serve --config {config} --port {server.port}")
        emit(
            f"Ready after {server.seconds:.1f} s, with a deployment for each mode: digits-{', digits-'.join(MODES)}."
        )
        yield server


def _port(wanted: int | None) -> int:
    """The port to serve on: 0, a free one, where nobody asked for another and 8000 is taken."""
    if wanted is not None:
        return wanted
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 8000))
        except OSError:
            return 0
    return 8000


def _replay(
    server: Server, trained: Trained, coming: Traffic, popular: list[int], options: argparse.Namespace
) -> list[Row]:
    _head("Replay")
    new = int((coming.asked_before == 0).sum())
    emit(
        f"The same peaked traffic at each, {options.seconds:g} s, {options.connections} connections, one image per "
        f"request; {new:,} of its images were never asked for before."
    )
    with stages("replaying traffic") as stage:
        stage("what scikit-learn says of every image")
        expected = trained.predict(coming.images)
        bodies = [request_body(image) for image in coming.images]
        _write_row(trained, coming, options.folder)
        return compare(
            server.port,
            bodies,
            expected,
            coming.requests,
            popular,
            seconds=options.seconds,
            connections=options.connections,
            stage=stage,
        )


def _write_row(trained: Trained, coming: Traffic, folder: Path) -> None:
    """A file for curl: the image that is asked for most, as JSON by column name."""
    image = coming.images[coming.popular(1)[0]]
    row = {name: float(ink) for name, ink in zip(trained.held_out.columns, image, strict=True)}
    (folder / "digit.json").write_text(json.dumps(row))


def _show(rows: list[Row], baked: int) -> None:
    emit()
    emit_table(
        [
            [
                row.mode,
                f"{row.measured.requests_per_s:,.0f}",
                f"{row.measured.p50_ms:.2f}",
                f"{row.measured.p99_ms:.2f}",
                f"{row.coverage:.0%}",
                f"{row.agreement:.0%}",
                f"{row.measured.unknown:,}" if row.measured.unknown else "-",
            ]
            for row in rows
        ],
        titles=_TITLES,
        numbers=_TITLES[1:],
    )
    emit()
    checked = sum(row.measured.right for row in rows)
    emit(
        "coverage: share of requests answered without the model. agreement: predictions equal to scikit-learn's own,"
    )
    emit(f"label and all ten probabilities ({checked:,} checked). 404: the image is not in the table.")
    limited = [row.mode for row in rows if row.measured.busy > 0.9]
    if limited:
        emit(f"The load generator was busy all the time at {', '.join(limited)}: the server could do more.")
    emit()
    emit(_bold(meaning(rows, baked)))


def _advise(coming: Traffic, folder: Path, connections: int) -> None:
    """What the advisor says of this model and this traffic."""
    _head("Advise")
    trace = folder / "requests.trace"
    trace.write_bytes(np.array(coming.requests[:_ADVISED_ON], ">u4").tobytes())
    emit(f"Which way is right for this model? What the advisor says of {_ADVISED_ON:,} of these requests:")
    _command(
        "advise", str(folder / "digits.bundle"), "--trace", str(trace), "--connections", str(connections)
    )


def _stay(server: Server, folder: Path) -> None:
    """Go on serving until Ctrl-C."""
    try:
        emit()
        emit(f"Try it:  {server.url}/")
        emit(f"         curl -s {server.url}/predict/digits-hybrid -d @{folder / 'digit.json'}")
        emit("It serves until Ctrl-C.")
        sys.stdout.flush()
        status = server.process.wait()
    except KeyboardInterrupt:
        # A terminal sends Ctrl-C to the server as well, which then answers what it has accepted.
        server.stop()
        emit()
        return
    if status == 0:
        # Somebody asked it to stop, and it has.
        emit()
        return
    raise Disagreement(f"the server ended with {status}: {server.log()[-2000:]}")


def _head(text: str) -> None:
    emit()
    emit(_bold(text))


def _code(text: str) -> None:
    emit(click.style(text, fg="cyan") if colours(sys.stdout) else text)


def _bold(text: str) -> str:
    return click.style(text, bold=True) if colours(sys.stdout) else text


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def _end(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM is taken like Ctrl-C, so that the server is stopped too."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
