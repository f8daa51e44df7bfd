"""A wall clock that jumps: the server's processes get another time of day, which a preloaded library gives them."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from chaos.bundles import BAKED, TAIL, asking, multiplier, table
from chaos.load import calling
from chaos.model import NotTested, Observed, Scenario, Stage, at_least, held, none
from chaos.servers import status, version, wait_for
from parbake.testing import serving

_SOURCE: Final = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile long *ahead;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("CHAOS_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *page = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
    if (page != MAP_FAILED) ahead = page;
    close(file);
}

int clock_gettime(clockid_t id, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, id, now);
    if (!failed && ahead && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += *ahead;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (out) *out = exact.tv_sec;
    return exact.tv_sec;
}
"""
_HOUR_S: Final = 3600


class _Clock:
    """A clock that can be set. Raises `NotTested` where there is no compiler, or the system does not take it."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if sys.platform != "linux" or compiler is None:
            raise NotTested("the library that moves the clock needs Linux and a C compiler (apt install gcc)")
        source, library, self._file = folder / "clock.c", folder / "clock.so", folder / "clock"
        source.write_text(_SOURCE)
        built = subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source)],
            capture_output=True,
            text=True,
            check=False,
        )
        if built.returncode:
            raise NotTested(f"the library that moves the clock was not built: {built.stderr[-300:]}")
        self.environment = {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(self._file)}
        self.set(7 * 24 * _HOUR_S)
        words = [sys.executable, "-c", "import time; print(time.time())"]
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=True)
        if float(done.stdout) < time.time() + 24 * _HOUR_S:
            raise NotTested("this Python does not take its time from the preloaded library")
        self.set(0)

    def set(self, ahead_s: int) -> None:
        """From now on, be so far ahead of the real time."""
        if not self._file.exists():
            self._file.write_bytes(struct.pack("l", ahead_s))
        with self._file.open("r+b", buffering=0) as file:
            file.write(struct.pack("l", ahead_s))


def _jump(stage: Stage) -> Observed:
    clock = _Clock(stage.folder)
    stage.say("starting a server")
    bundle = multiplier(stage.folder / "fresh.bundle", 3, name="fresh", freshness_s=_HOUR_S)
    baked = table(bundle, stage.folder / "fresh.table")
    with (
        serving(
            bundle, table=baked, workers=1, placement="process", head_rows=0, environment=clock.environment
        ) as server,
        calling(server.port, asking("baked rows", "fresh", BAKED, 3), asking("other rows", "fresh", TAIL, 3)) as calls,
    ):  # fmt: skip
        time.sleep(stage.seconds / 4)
        stage.say("half an hour back")
        clock.set(-_HOUR_S // 2)
        time.sleep(stage.seconds / 4)
        still = version(server, "fresh").baked_rows
        stage.say("a day ahead")
        clock.set(24 * _HOUR_S)
        expired_s = wait_for(lambda: "table.expired" in server.log(), 15)
        time.sleep(0.2)
        stale = version(server, "fresh").baked_rows
        time.sleep(stage.seconds / 4)
        stale = version(server, "fresh").baked_rows - stale
        stage.say("two days back")
        clock.set(-24 * _HOUR_S)
        time.sleep(stage.seconds / 4)
        after = status(server)
    checks = [
        none("failed requests, deadlines included", sum(len(h.failed) for h in calls.heard.values())),
        held("answered from the table while it was fresh", still),
        at_least("the table was given up when it was too old", expired_s < 15, 1),
        none("answers from it afterwards", stale),
        none(
            "processes started again", after.front_restarts + sum(v.runner_restarts for v in after.versions)
        ),
    ]
    return Observed(list(calls.heard.values()), checks, {"given up after, s": expired_s})


SCENARIOS: Final = (
    Scenario(
        "clock-jump",
        "the wall clock of all processes goes back by half an hour, ahead by a day, and back by two",
        "no request fails; a table is not answered from when it is too old by that clock",
        _jump,
    ),
)
