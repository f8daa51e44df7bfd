"""The traffic profiles of a prediction log: what the live ones would say, from the files, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from parbake.contract.where import NAMES, REFUSED
from parbake.monitoring.log import key_ids
from parbake.monitoring.profile import TrafficProfile


def profiles_of(tables: Iterable[pa.Table], window_s: float = 60.0) -> dict[str, TrafficProfile]:
    """The profile of each deployment, from the tables that `read_log` gives; refused requests are left out.

    Of a log that holds a sample of the keys, the profile is that of the sample: its cardinality and its rate are the
    traffic's times the sampling rate, and its coverage curve belongs to as large a share of the keys.
    """
    profiles: dict[str, TrafficProfile] = {}
    for table in tables:
        answered = pc.not_equal(table.column("where").cast(pa.string()), NAMES[REFUSED])
        table = table.filter(pc.and_(answered, pc.is_valid(table.column("key"))))
        names = table.column("deployment").cast(pa.string())
        for name in pc.unique(names).to_pylist():
            part = table.filter(pc.equal(names, name))
            profile = profiles.setdefault(name, TrafficProfile(window_s))
            keys = key_ids(part.column("key"))
            times = part.column("time").cast(pa.int64()).to_numpy() / 1e6
            # A table of little traffic spans many windows.
            cuts = np.flatnonzero(np.diff(times // window_s)) + 1
            for chunk, seconds in zip(np.split(keys, cuts), np.split(times, cuts), strict=True):
                if len(chunk):
                    profile.feed(chunk[:1], float(seconds[0]))
                    profile.feed(chunk[1:], float(seconds[-1]))
    return profiles
