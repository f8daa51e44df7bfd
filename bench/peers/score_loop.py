"""What people write to score a file: a loop of pyarrow and onnxruntime, Parquet in, Parquet out.

Run as ``python bench/peers/score_loop.py MODEL.onnx ROWS.parquet OUT.parquet``. The model has one matrix
input ``x``; the file has one column for each of its positions, in order.
"""

import sys

import numpy as np
import onnxruntime as ort
import pyarrow as pa
import pyarrow.parquet as pq


def main(model: str, rows: str, out: str) -> None:
    """Score the file."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    writer: pq.ParquetWriter | None = None
    for batch in pq.ParquetFile(rows).iter_batches(batch_size=65536):
        x = np.column_stack([column.to_numpy() for column in batch.columns])
        columns = {}
        for name, values in zip(names, session.run(names, {"x": x}), strict=True):
            if values.ndim == 1:
                columns[name] = pa.array(values)
            else:
                for i in range(values.shape[1]):
                    columns[f"{name}_{i}"] = pa.array(values[:, i])
        table = pa.table(columns)
        if writer is None:
            writer = pq.ParquetWriter(out, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
