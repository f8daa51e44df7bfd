"""The worker process of a bake: scores the pieces it is sent, and ends when the bake does.

Started as ``python -m parbake.batch.worker FD`` with one end of a socket pair. It imports what every model
needs while the bake is still looking at its input.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback

from parbake.batch.ports import Task
from parbake.batch.scorer import Scorer
from parbake.batch.wire import Begin, Connection, Done, End, Failed, Ready, Written, failure
from parbake.contract.ort import onnxruntime
from parbake.errors import ModelFailed, ParbakeError


def main(descriptor: int) -> int:
    """Score until told to end. Gives the exit status."""
    # Whoever presses Ctrl-C means the bake, which then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(socket.socket(fileno=descriptor))
    orders: queue.SimpleQueue[Begin | Task | End] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, orders), daemon=True).start()
    import pyarrow.parquet  # noqa: F401

    onnxruntime()

    try:
        _work(connection, orders)
    except ParbakeError as error:
        connection.send(failure(error))
        return 1
    except OSError as error:
        failed = Failed("os", str(error.errno or 0), error.strerror or str(error), error.filename or "")
        connection.send(failed)
        return 1
    except Exception as error:
        traceback.print_exc()
        connection.send(failure(ModelFailed(f"{type(error).__name__}: {error}")))
        return 1
    return 0


def _work(connection: Connection, orders: queue.SimpleQueue[Begin | Task | End]) -> None:
    begin = orders.get()
    if not isinstance(begin, Begin):
        return
    scorer = Scorer(begin.job)
    connection.send(Ready())
    while True:
        order = orders.get()
        if not isinstance(order, Task):
            break
        started = time.perf_counter()
        tally = scorer.score(order)
        connection.send(Done(tally, time.perf_counter() - started))
        if scorer.due():
            for segment in scorer.flush():
                connection.send(Written(str(segment.path)))
    for segment in scorer.flush(last=True):
        connection.send(Written(str(segment.path)))
    connection.send(End())


def _listen(connection: Connection, orders: queue.SimpleQueue[Begin | Task | End]) -> None:
    """Take orders while the model runs; end the process at once when the bake is gone."""
    try:
        while True:
            order = connection.order()
            orders.put(order)
            if isinstance(order, End):
                return
    except (EOFError, OSError):
        os._exit(1)


if __name__ == "__main__":
    os._exit(main(int(sys.argv[1])))
