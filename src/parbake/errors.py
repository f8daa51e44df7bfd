"""Every error that parbake raises on purpose, as one tree.

::

    ParbakeError
    |-- InvalidRequest            the caller's fault; names the path of the fault
    |   |-- MalformedBody         not JSON, torn binary data, wrong content type or encoding
    |   |-- InvalidInput          wrong name, datatype, shape or value of a tensor or column
    |   |-- RequestTooLarge       over a size limit
    |   |-- RowRejected           the model's own code refused the row (it raised ValueError)
    |   |   `-- RowQuarantined    the model's process ended over this row before
    |   |-- Unauthenticated       no API key, or one that is not known
    |   |-- NotAllowed            needs a token or another key, or is switched off
    |   `-- Conflict              not in this state (load of something that was never configured, ...)
    |       |-- GateRefused       checks failed that nobody has waived
    |       |-- LeaseLost         another controller has taken over
    |       `-- JobCancelled      the job was taken back before it was answered
    |-- NotFound
    |   |-- ModelNotFound
    |   |-- VersionNotFound
    |   |-- BundleMissing         the bundle store does not have that digest
    |   |-- RouteNotFound
    |   |-- MethodNotAllowed
    |   |-- JobNotFound           there is no such job, or it is somebody else's
    |   `-- KeyNotBaked           static mode, key not in the prediction table
    |-- Unavailable               try again later; has retry_after_s
    |   |-- Overloaded            the queue is full, or the deadline cannot be met
    |   |-- RateLimited           this client asks more often than its API key allows
    |   |-- DeadlineExceeded      work was accepted but did not finish in time
    |   |-- RunnerDown            the model's process is being restarted
    |   |-- NotReady              starting, draining or unloaded
    |   |-- StateAway             the store of releases cannot be reached or written
    |   |-- RegistryAway          the registry does not answer
    |   |-- StoreAway             the bundle store does not answer, or cannot be written
    |   `-- QueueAway             the queue of jobs cannot be read or written
    |       `-- QueueTorn         its file is damaged
    |-- ModelFailed               the model raised; details are logged under a correlation id
    |-- JobDead                   given up: no answer within its attempts, or its time
    |-- BundleError
    |   |-- BundleTorn            a file is missing, cut short or not readable
    |   |-- BundleAltered         content does not match the digest
    |   |-- BundleTooNew          written by a newer format
    |   |-- BundleUnsigned        no valid signature by a key that is trusted here
    |   |-- GoldensDiffer         this machine does not reproduce the goldens
    |   `-- EnvironmentDiffers    libraries that the bundle's code needs have other versions here
    |-- TableError
    |   |-- TableMissing
    |   |-- TableTorn
    |   |-- TableForeign          lineage names another bundle than the one served
    |   `-- TableTooNew
    |-- StateError
    |   |-- StateTorn             the store of releases is damaged
    |   `-- StateTooNew           a newer parbake has changed its schema
    |-- RegisterRefused           the bundle does not say what the inventory needs; nothing was registered
    |-- PackRefused               nothing was written
    |   |-- ParityRefused         source and bundle disagree; has the rows
    |   `-- NotConvertible        no exact conversion is known
    |-- InputFileError            a file of rows cannot be read as the contract's inputs
    |-- SettingsError             flag, environment variable or configuration file
    |-- MissingExtra              an optional dependency is not installed; names the extra
    |-- MissingProgram            a program of the system is not installed; names its package
    |-- BuildFailed               an image could not be built, and none was left
    `-- ServerNotFound            no running server to talk to, or it refused

A class has a stable ``code`` for machines; its message says what and which value, its ``hint`` what to
do. HTTP statuses, gRPC codes and exit codes are given to classes in the transports and the CLI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from msgspec import Struct


class ParbakeError(Exception):
    """Base of all errors. ``path`` says where (``$.inputs[0].data[3]``), ``hint`` what to do."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, hint: str = "", path: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.path = path

    def __str__(self) -> str:
        text = f"{self.message} at {self.path}" if self.path else self.message
        return f"{text}\nhint: {self.hint}" if self.hint else text


class InvalidRequest(ParbakeError):
    """The request cannot be answered as it stands."""

    code = "invalid_request"


class MalformedBody(InvalidRequest):
    """The body is not what its headers say it is."""

    code = "malformed_body"


class InvalidInput(InvalidRequest):
    """A tensor or column does not fit the contract."""

    code = "invalid_input"


class RequestTooLarge(InvalidRequest):
    """Something is over a limit; the message names the limit and the setting."""

    code = "too_large"


class RowRejected(InvalidRequest):
    """The model's own code raised ValueError for this row; the message is the model's."""

    code = "row_rejected"


class RowQuarantined(RowRejected):
    """The model's process ended, or hung, over this row more than once; it is not tried again for a while."""

    code = "row_quarantined"


class Unauthenticated(InvalidRequest):
    """An API key is needed, and none was given or it is not known."""

    code = "unauthenticated"


class NotAllowed(InvalidRequest):
    """A token or another API key is needed, or the operation is switched off."""

    code = "not_allowed"


class Conflict(InvalidRequest):
    """The operation does not fit the present state."""

    code = "conflict"


class GateRefused(Conflict):
    """A version must not take traffic: checks failed that nobody has waived."""

    code = "gate_refused"

    def __init__(self, message: str, *, hint: str = "", path: str = "", report: Struct | None = None) -> None:
        super().__init__(message, hint=hint, path=path)
        self.report = report
        """What the gate found: a `parbake.release.gate.GateReport`."""


class LeaseLost(Conflict):
    """Another controller has the lease now; nothing was written."""

    code = "lease_lost"


class JobCancelled(Conflict):
    """The job was taken back before it was answered."""

    code = "job_cancelled"


class NotFound(ParbakeError):
    """Something named does not exist."""

    code = "not_found"


class ModelNotFound(NotFound):
    """No deployment of that name."""

    code = "model_not_found"


class VersionNotFound(NotFound):
    """The deployment has no such version."""

    code = "version_not_found"


class BundleMissing(NotFound):
    """The bundle store has no bundle of that digest."""

    code = "bundle_missing"


class RouteNotFound(NotFound):
    """No such URL."""

    code = "route_not_found"


class MethodNotAllowed(NotFound):
    """The URL exists, the method does not fit; ``methods`` are those that do."""

    code = "method_not_allowed"

    def __init__(
        self, message: str, *, hint: str = "", path: str = "", methods: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, hint=hint, path=path)
        self.methods = methods


class JobNotFound(NotFound):
    """No such job: it never was, its result has been removed, or it belongs to another API key."""

    code = "job_not_found"


class KeyNotBaked(NotFound):
    """Static mode answers from its table alone, and the key is not in it."""

    code = "key_not_baked"


class Unavailable(ParbakeError):
    """Try again after ``retry_after_s`` seconds."""

    code = "unavailable"

    def __init__(self, message: str, *, hint: str = "", path: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, hint=hint, path=path)
        self.retry_after_s = retry_after_s


class Overloaded(Unavailable):
    """Refused before any work was spent on it."""

    code = "overloaded"


class RateLimited(Unavailable):
    """The client asks more often than its API key allows; nobody else is concerned."""

    code = "rate_limited"


class DeadlineExceeded(Unavailable):
    """The answer did not come within the deadline."""

    code = "deadline_exceeded"


class RunnerDown(Unavailable):
    """The model's process died or was stopped, and is being started again."""

    code = "runner_down"


class NotReady(Unavailable):
    """Starting, draining, or unloaded."""

    code = "not_ready"


class StateAway(Unavailable):
    """The store of releases cannot be reached or written; what serves goes on serving."""

    code = "state_away"


class RegistryAway(Unavailable):
    """The registry does not answer; what serves goes on serving."""

    code = "registry_away"


class StoreAway(Unavailable):
    """The bundle store does not answer, or cannot be written; what is cached goes on serving."""

    code = "store_away"


class QueueAway(Unavailable):
    """The queue of jobs cannot be read or written; whoever waits for an answer gets it as ever."""

    code = "queue_away"


class QueueTorn(QueueAway):
    """The file of the queue is damaged; nothing in it is touched."""

    code = "queue_torn"


class JobDead(ParbakeError):
    """The job was given up: no attempt came to an answer, or its time was over."""

    code = "job_dead"


class ModelFailed(ParbakeError):
    """The model raised. What it said is in the log, under the correlation id."""

    code = "model_failed"


class BundleError(ParbakeError):
    """A bundle cannot be used."""

    code = "bundle_error"


class BundleTorn(BundleError):
    """A file of the bundle is missing, cut short or unreadable."""

    code = "bundle_torn"


class BundleAltered(BundleError):
    """The content does not match the digest."""

    code = "bundle_altered"


class BundleTooNew(BundleError):
    """Written in a format newer than this parbake knows."""

    code = "bundle_too_new"


class BundleUnsigned(BundleError):
    """No key that is trusted here has signed the bundle."""

    code = "bundle_unsigned"


class GoldensDiffer(BundleError):
    """This machine does not reproduce what training produced."""

    code = "goldens_differ"


class EnvironmentDiffers(BundleError):
    """A library that the bundle's own code runs on has another version here."""

    code = "environment_differs"


class TableError(ParbakeError):
    """A prediction table cannot be used."""

    code = "table_error"


class TableTorn(TableError):
    """A file of the table is missing, cut short or altered."""

    code = "table_torn"


class TableMissing(TableError):
    """There is no table at that path."""

    code = "table_missing"


class TableForeign(TableError):
    """The table was baked by another bundle than the one that is served."""

    code = "table_foreign"


class TableTooNew(TableError):
    """Written in a format newer than this parbake knows."""

    code = "table_too_new"


class StateError(ParbakeError):
    """The store of releases cannot be used."""

    code = "state_error"


class StateTorn(StateError):
    """The store of releases is damaged."""

    code = "state_torn"


class StateTooNew(StateError):
    """The store has a schema newer than this parbake knows."""

    code = "state_too_new"


class RegisterRefused(ParbakeError):
    """Nothing was registered."""

    code = "register_refused"


class PackRefused(ParbakeError):
    """The bundle was not written."""

    code = "pack_refused"


class ParityRefused(PackRefused):
    """The converted model answers differently from its source."""

    code = "parity_refused"


class NotConvertible(PackRefused):
    """No exact conversion of this model is known."""

    code = "not_convertible"


class InputFileError(ParbakeError):
    """A file of rows does not fit the contract."""

    code = "input_file"


class SettingsError(ParbakeError):
    """A flag, an environment variable or a key of the configuration file is wrong."""

    code = "settings"


class MissingExtra(ParbakeError):
    """Something optional is not installed."""

    code = "missing_extra"

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} is not installed", hint=f"pip install 'parbake[{extra}]'")
        self.extra = extra

    @classmethod
    def told(cls, message: str, *, hint: str = "", path: str = "") -> MissingExtra:
        """As another process said it; which extra is in the hint."""
        error = cls("", "")
        ParbakeError.__init__(error, message, hint=hint, path=path)
        return error


class MissingProgram(ParbakeError):
    """A program that does the work is not installed."""

    code = "missing_program"


class BuildFailed(ParbakeError):
    """An image could not be built. What was begun is gone."""

    code = "build_failed"


class ServerNotFound(ParbakeError):
    """No running server answered."""

    code = "server_not_found"


def by_code(code: str, message: str, *, hint: str = "", path: str = "") -> ParbakeError:
    """The error of that code, as another process reported it; a plain `ParbakeError` for a code not known here."""
    pending: list[type[ParbakeError]] = [ParbakeError]
    while pending:
        kind = pending.pop()
        if kind.code == code:
            # It is made from other things than a message.
            make = MissingExtra.told if kind is MissingExtra else kind
            return make(message, hint=hint, path=path)
        pending.extend(kind.__subclasses__())
    return ParbakeError(message, hint=hint, path=path)
