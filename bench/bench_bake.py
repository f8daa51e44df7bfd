"""How fast `parbake bake` is against the loop of pyarrow and onnxruntime that people write.

``python -m bench.bench_bake [--rows N] [--rounds N] [--json]`` measures it alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import parbake
from bench.machine import this_machine
from bench.report import Section, Table, at_least, show

COLUMNS: Final = 30
ROWS: Final = 2_000_000
_LOOP: Final = Path(__file__).parent / "peers" / "score_loop.py"
_SEED: Final = 11


def run(folder: Path, *, rows: int, rounds: int, say: Callable[[str], None]) -> Section:
    """Score the same file in turn with the loop and with the command, for each model; whole processes."""
    say(f"writing {rows:,} rows")
    source = folder / "rows.parquet"
    example = _write_rows(source, rows)
    models = {
        "logistic regression": _logistic_regression,
        "forest, 100 trees of depth 6": _forest,
    }
    seconds: dict[str, dict[str, list[float]]] = {}
    for number, (what, make) in enumerate(models.items()):
        say(f"{what}: packing")
        onnx = folder / f"{number}.onnx"
        onnx.write_bytes(make())
        bundle = folder / f"{number}.bundle"
        parbake.pack(
            onnx,
            name="eta",
            example=example,
            purpose="measured by bench/",
            owner="bench@parbake.example",
            out=bundle,
        )
        table, out = folder / f"{number}.table", folder / f"{number}.parquet"
        command = Path(sys.executable).with_name("parbake")
        loop = [sys.executable, str(_LOOP), str(onnx), str(source), str(out)]
        bake = [str(command), "bake", str(bundle), "--input", str(source), "--out", str(table)]
        found: dict[str, list[float]] = {"loop": [], "bake": []}
        for round_number in range(rounds):
            for name, arguments in (("loop", loop), ("bake", bake)):
                say(f"{what}: {name}, round {round_number + 1} of {rounds}")
                # Neither has to remove what it wrote the last time.
                out.unlink(missing_ok=True)
                shutil.rmtree(table, ignore_errors=True)
                found[name].append(_seconds(arguments))
        seconds[what] = found
    return _section(rows, seconds)


def _section(rows: int, seconds: dict[str, dict[str, list[float]]]) -> Section:
    ratios = {what: median(found["loop"]) / median(found["bake"]) for what, found in seconds.items()}
    lines = tuple(
        (
            what,
            *(f"{rows / median(found[name]) / 1e6:.2f}" for name in ("loop", "bake")),
            *(f"{median(found[name]):.2f}" for name in ("loop", "bake")),
            f"{ratios[what]:.2f}",
            str(len(found["bake"])),
        )
        for what, found in seconds.items()
    )
    return Section(
        key="bake",
        title="Baking",
        how=(
            f"{rows:,} rows of {COLUMNS} float32 columns in a Parquet file. The loop (bench/peers/score_loop.py) "
            "writes the predictions to a Parquet file; `parbake bake` checks every value, computes every key, and "
            "publishes a synced and verified prediction table. Whole processes, in turn."
        ),
        tables=(
            Table(
                "Million rows per second, medians",
                ("model", "loop", "bake", "loop s", "bake s", "ratio", "rounds"),
                lines,
            ),
        ),
        targets=tuple(
            at_least(f"{what}: bake against the loop", ratio, 0.8) for what, ratio in ratios.items()
        ),
        machine=this_machine(),
        figures={what: {"seconds": found, "ratio": ratios[what]} for what, found in seconds.items()},
    )


def _seconds(arguments: Sequence[str]) -> float:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PARBAKE_")}
    started = time.perf_counter()
    done = subprocess.run(
        arguments, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{arguments} ended with {done.returncode}: {done.stderr}")
    return time.perf_counter() - started


def _write_rows(path: Path, rows: int) -> pa.Table:
    """Write random rows; gives some of them as an example."""
    random = np.random.default_rng(_SEED)
    names = [f"f{i}" for i in range(COLUMNS)]
    example: pa.Table | None = None
    writer: pq.ParquetWriter | None = None
    chunk = 1 << 20
    for start in range(0, rows, chunk):
        values = random.standard_normal((min(chunk, rows - start), COLUMNS), dtype=np.float32)
        table = pa.table({name: np.ascontiguousarray(values[:, i]) for i, name in enumerate(names)})
        if writer is None:
            example, writer = table.slice(0, 256), pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
    return example


def _logistic_regression() -> bytes:
    """The two operators that converters write for a logistic regression."""
    from onnx import TensorProto, helper

    weights = np.random.default_rng(_SEED).normal(size=COLUMNS)
    nodes = [
        helper.make_node(
            "LinearClassifier", ["x"], ["label", "scores"], domain="ai.onnx.ml", classlabels_ints=[0, 1],
            coefficients=[*(-weights).tolist(), *weights.tolist()], intercepts=[0.1, -0.1], post_transform="LOGISTIC",
        ),
        helper.make_node("Normalizer", ["scores"], ["p"], domain="ai.onnx.ml", norm="L1"),
    ]  # fmt: skip
    return _model(nodes, TensorProto, helper)


def _forest(trees: int = 100, depth: int = 6) -> bytes:
    """Full trees with random thresholds, as converters write them."""
    from onnx import TensorProto, helper

    random = np.random.default_rng(_SEED)
    inner, all_nodes = 2**depth - 1, 2 ** (depth + 1) - 1
    leaves = all_nodes - inner
    node = np.tile(np.arange(all_nodes), trees)
    leaf = node >= inner
    probability = random.random(trees * leaves)
    each = {
        "nodes_treeids": np.repeat(np.arange(trees), all_nodes),
        "nodes_nodeids": node,
        "nodes_featureids": np.where(leaf, 0, random.integers(0, COLUMNS, len(node))),
        "nodes_values": np.where(leaf, 0.0, random.normal(size=len(node))),
        "nodes_modes": np.where(leaf, "LEAF", "BRANCH_LEQ"),
        "nodes_truenodeids": np.where(leaf, 0, 2 * node + 1),
        "nodes_falsenodeids": np.where(leaf, 0, 2 * node + 2),
        "nodes_missing_value_tracks_true": np.zeros(len(node), int),
        "class_treeids": np.repeat(np.arange(trees), 2 * leaves),
        "class_nodeids": np.tile(np.repeat(np.arange(inner, all_nodes), 2), trees),
        "class_ids": np.tile([0, 1], trees * leaves),
        "class_weights": np.stack([1 - probability, probability], axis=1).reshape(-1) / trees,
    }
    attributes: dict[str, Any] = {name: values.tolist() for name, values in each.items()}
    nodes = [
        helper.make_node(
            "TreeEnsembleClassifier", ["x"], ["label", "p"], domain="ai.onnx.ml", classlabels_int64s=[0, 1],
            post_transform="NONE", **attributes,
        )
    ]  # fmt: skip
    return _model(nodes, TensorProto, helper)


def _model(nodes: list[Any], kinds: Any, helper: Any) -> bytes:
    graph = helper.make_graph(
        nodes,
        "eta",
        [helper.make_tensor_value_info("x", kinds.FLOAT, ["N", COLUMNS])],
        [
            helper.make_tensor_value_info("label", kinds.INT64, ["N"]),
            helper.make_tensor_value_info("p", kinds.FLOAT, ["N", 2]),
        ],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.bench_bake", description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="figures as JSON on stdout")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="parbake-bench-") as folder:
        section = run(
            Path(folder),
            rows=options.rows,
            rounds=options.rounds,
            say=lambda what: print(what, file=sys.stderr, flush=True),
        )
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(section)).decode())
    else:
        show(section)


if __name__ == "__main__":
    main()
