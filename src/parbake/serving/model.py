"""What goes into a prediction and what comes out of it, as raw bytes (see `parbake.contract.tensors`)."""

from __future__ import annotations

from collections.abc import Sequence

from parbake.contract.tensors import Shape


class Answer:
    """The outputs of one request: per output its raw bytes and row shape, in the contract's order.

    ``fallback`` names what answered in the model's place; "" where nothing had to.
    """

    __slots__ = ("baked_rows", "fallback", "model_s", "queue_s", "raws", "rows", "shapes")

    def __init__(
        self,
        raws: Sequence[bytes],
        shapes: Sequence[Shape],
        rows: int,
        baked_rows: int = 0,
        queue_s: float = 0.0,
        model_s: float = 0.0,
    ) -> None:
        self.fallback = ""
        self.raws = raws
        self.shapes = shapes
        self.rows = rows
        self.baked_rows = baked_rows
        self.queue_s = queue_s
        self.model_s = model_s
