"""Exit codes of the command: one table from the classes of `parbake.errors` to numbers that scripts rely on."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from parbake import errors


class Exit(IntEnum):
    """What an exit code means."""

    DONE = 0
    REFUSED = 1
    USAGE = 2
    NOT_FOUND = 3
    UNAVAILABLE = 4
    DAMAGED = 5
    NOT_INSTALLED = 6
    BUG = 70
    INTERRUPTED = 130

    @property
    def meaning(self) -> str:
        """One line for the reference page."""
        return _MEANINGS[self]


_MEANINGS: Final = {
    Exit.DONE: "done, and nothing is wrong",
    Exit.REFUSED: "refused, or something differs: what was asked for would not have been right",
    Exit.USAGE: "the command, a setting or the data given to it is wrong",
    Exit.NOT_FOUND: "a file, bundle, table, model or key does not exist",
    Exit.UNAVAILABLE: "no server answered, or it cannot answer now: try again",
    Exit.DAMAGED: "a bundle, table or file is torn, altered or from a newer format",
    Exit.NOT_INSTALLED: "an optional library or program is missing",
    Exit.BUG: "an error that parbake did not expect",
    Exit.INTERRUPTED: "stopped by Ctrl-C",
}

EXITS: Final[dict[type[errors.ParbakeError], Exit]] = {
    errors.ParbakeError: Exit.REFUSED,
    errors.InvalidRequest: Exit.USAGE,
    errors.MalformedBody: Exit.USAGE,
    errors.InvalidInput: Exit.USAGE,
    errors.RequestTooLarge: Exit.USAGE,
    errors.RowRejected: Exit.REFUSED,
    errors.RowQuarantined: Exit.REFUSED,
    errors.Unauthenticated: Exit.REFUSED,
    errors.NotAllowed: Exit.REFUSED,
    errors.Conflict: Exit.REFUSED,
    errors.GateRefused: Exit.REFUSED,
    errors.LeaseLost: Exit.REFUSED,
    errors.JobCancelled: Exit.REFUSED,
    errors.NotFound: Exit.NOT_FOUND,
    errors.ModelNotFound: Exit.NOT_FOUND,
    errors.VersionNotFound: Exit.NOT_FOUND,
    errors.BundleMissing: Exit.NOT_FOUND,
    errors.RouteNotFound: Exit.NOT_FOUND,
    errors.MethodNotAllowed: Exit.NOT_FOUND,
    errors.JobNotFound: Exit.NOT_FOUND,
    errors.KeyNotBaked: Exit.NOT_FOUND,
    errors.Unavailable: Exit.UNAVAILABLE,
    errors.Overloaded: Exit.UNAVAILABLE,
    errors.RateLimited: Exit.UNAVAILABLE,
    errors.DeadlineExceeded: Exit.UNAVAILABLE,
    errors.RunnerDown: Exit.UNAVAILABLE,
    errors.NotReady: Exit.UNAVAILABLE,
    errors.StateAway: Exit.UNAVAILABLE,
    errors.RegistryAway: Exit.UNAVAILABLE,
    errors.StoreAway: Exit.UNAVAILABLE,
    errors.QueueAway: Exit.UNAVAILABLE,
    errors.QueueTorn: Exit.DAMAGED,
    errors.JobDead: Exit.REFUSED,
    errors.ModelFailed: Exit.REFUSED,
    errors.BundleError: Exit.DAMAGED,
    errors.BundleTorn: Exit.DAMAGED,
    errors.BundleAltered: Exit.DAMAGED,
    errors.BundleTooNew: Exit.DAMAGED,
    errors.BundleUnsigned: Exit.REFUSED,
    errors.GoldensDiffer: Exit.REFUSED,
    errors.EnvironmentDiffers: Exit.REFUSED,
    errors.TableError: Exit.DAMAGED,
    errors.TableTorn: Exit.DAMAGED,
    errors.TableMissing: Exit.NOT_FOUND,
    errors.TableForeign: Exit.REFUSED,
    errors.TableTooNew: Exit.DAMAGED,
    errors.StateError: Exit.DAMAGED,
    errors.StateTorn: Exit.DAMAGED,
    errors.StateTooNew: Exit.DAMAGED,
    errors.RegisterRefused: Exit.REFUSED,
    errors.PackRefused: Exit.REFUSED,
    errors.ParityRefused: Exit.REFUSED,
    errors.NotConvertible: Exit.REFUSED,
    errors.InputFileError: Exit.USAGE,
    errors.SettingsError: Exit.USAGE,
    errors.MissingExtra: Exit.NOT_INSTALLED,
    errors.MissingProgram: Exit.NOT_INSTALLED,
    errors.BuildFailed: Exit.REFUSED,
    errors.ServerNotFound: Exit.UNAVAILABLE,
}


def exit_of(error: errors.ParbakeError) -> Exit:
    """The exit code of an error: that of its class, or of the nearest class above that has one."""
    return next(EXITS[kind] for kind in type(error).__mro__ if kind in EXITS)
