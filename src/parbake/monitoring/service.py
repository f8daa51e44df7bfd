"""What a front keeps of its traffic: recorders, and one background thread that empties them into log and profiles."""

from __future__ import annotations

from dataclasses import replace
from threading import Event, Lock, Thread
from time import monotonic
from typing import TYPE_CHECKING, Final

from parbake.contract.where import REFUSED
from parbake.logs import log
from parbake.monitoring.model import LogCounts
from parbake.monitoring.profile import TrafficProfile, ids_of
from parbake.monitoring.recorder import Recorder, Rows

if TYPE_CHECKING:
    from parbake.monitoring.log import PredictionLog

_LOOK_S: Final = 0.1
_EARLY_ROWS: Final = 16384
"""Rows in a recorder that are taken out before they are due. The more are taken out at once, the longer the event loop
is held up; the fewer, the more often the two threads have to take turns."""


class Monitor:
    """Hands out recorders and empties them every ``interval_s`` seconds. Either consumer may be off.

    At most what came within the last interval is lost if the process is killed. Threads may call all methods.
    """

    def __init__(
        self,
        prediction_log: PredictionLog | None = None,
        *,
        profiles: bool = True,
        interval_s: float = 1.0,
        window_s: float = 60.0,
    ) -> None:
        self._log = prediction_log
        self._profiling = profiles
        self._window_s = window_s
        self._interval_s = interval_s
        self._recorders: list[Recorder] = []
        self._retired: list[Recorder] = []
        self._dropped_before = 0
        self._profiles: dict[str, TrafficProfile] = {}
        # The event loop takes the first one only, which is never held for long.
        self._lock, self._profile_lock, self._turn = Lock(), Lock(), Lock()
        self._stop = Event()
        if profiles:
            # The library behind it is loaded here, and not while the first requests are answered.
            TrafficProfile()
        self._thread = Thread(target=self._run, name="parbake-monitor", daemon=True)
        self._thread.start()

    def recorder(
        self, deployment: str, version: str, mode: str, digest: str, *, rows: int = 128 * 1024
    ) -> Recorder:
        """A recorder for one served version; give it back with `retire`."""
        options = self._log.options if self._log is not None else None
        made = Recorder(
            deployment,
            version,
            mode,
            digest,
            rows=rows,
            wants_inputs=options is not None and options.inputs != "off",
            wants_outputs=options is not None and options.outputs,
            keys_only=options is None,
        )
        with self._lock:
            self._recorders.append(made)
        return made

    def retire(self, recorder: Recorder) -> None:
        """Nothing more is added to it, but for answers that are under way; what is in it is still written."""
        with self._lock:
            if recorder in self._recorders:
                self._recorders.remove(recorder)
                self._retired.append(recorder)

    def drain(self) -> None:
        """Empty all recorders now; may take as long as finishing a file takes."""
        with self._turn:
            with self._lock:
                recorders, retired = [*self._recorders], [*self._retired]
            drained: list[tuple[Recorder, Rows]] = []
            for recorder in [*recorders, *retired]:
                if recorder.note_key is not None:
                    keys = recorder.drain_keys()
                    if keys and self._profiling:
                        with self._profile_lock:
                            self._count(recorder.deployment, keys)
                    elif not keys and recorder in retired:
                        # Empty a second time: nobody holds it any more.
                        with self._lock:
                            self._retired.remove(recorder)
                            self._dropped_before += recorder.dropped
                    continue
                rows = recorder.drain()
                if rows is not None:
                    drained.append((recorder, rows))
                elif recorder in retired:
                    # Empty a second time: nobody holds it any more.
                    with self._lock:
                        self._retired.remove(recorder)
                        self._dropped_before += recorder.dropped
            if self._profiling:
                for recorder, rows in drained:
                    with self._profile_lock:
                        self._feed(recorder.deployment, rows)
            if self._log is not None:
                self._log.write(drained)

    def counts(self) -> LogCounts:
        """What became of all rows; does not wait for a disk."""
        with self._lock:
            dropped = self._dropped_before + sum(one.dropped for one in [*self._recorders, *self._retired])
            counts = self._log.counts if self._log is not None else LogCounts()
            return replace(counts, dropped_ring=dropped)

    @property
    def logging(self) -> bool:
        """Whether a prediction log is written."""
        return self._log is not None

    def current(self) -> dict[str, bytes]:
        """The profiles with everything that has been answered until now."""
        self.drain()
        return self.profiles()

    def profiles(self) -> dict[str, bytes]:
        """The profile of each deployment's traffic, as `TrafficProfile.from_bytes` reads it.

        Takes milliseconds for each deployment: not for an event loop's thread.
        """
        with self._profile_lock:
            return {name: profile.to_bytes() for name, profile in self._profiles.items()}

    def forget(self, deployment: str) -> None:
        """Begin the profile of a deployment anew."""
        with self._profile_lock:
            self._profiles.pop(deployment, None)

    def close(self) -> None:
        """Write what is there, finish the file, and end the thread."""
        self._stop.set()
        self._thread.join()
        self.drain()
        self.drain()
        with self._turn:
            if self._log is not None:
                self._log.close()

    def _feed(self, deployment: str, rows: Rows) -> None:
        keys = rows.joined
        if REFUSED in rows.where:
            # A refused request is not one that a table could have answered.
            keys = b"".join(
                key for key, where in zip(rows.keys(), rows.where, strict=True) if where != REFUSED
            )
        self._count(deployment, keys)

    def _count(self, deployment: str, keys: bytes) -> None:
        profile = self._profiles.get(deployment)
        if profile is None:
            profile = self._profiles[deployment] = TrafficProfile(self._window_s)
        # The same clock in all processes of a machine, and it does not jump.
        profile.feed(ids_of(keys), monotonic())

    def _run(self) -> None:
        due = monotonic() + self._interval_s
        while not self._stop.wait(min(_LOOK_S, self._interval_s)):
            with self._lock:
                waiting = max((one.backlog for one in self._recorders), default=0)
            if monotonic() < due and waiting < _EARLY_ROWS:
                continue
            due = monotonic() + self._interval_s
            try:
                self.drain()
            except Exception:
                # Serving goes on without its log, and the next turn may succeed.
                log().exception("monitor.failed")
