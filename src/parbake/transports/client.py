"""Talk to a running server's admin API, as ``parbake reload`` does."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from parbake.app.jobs import DeadRemoved, JobRemoved, JobsReport, JobsRetried
from parbake.app.routes import RouteChange, RouteStatus
from parbake.app.supervisor import Change, Reloaded, Status
from parbake.errors import GateRefused, ParbakeError, ServerNotFound, SettingsError, by_code
from parbake.settings import REGISTERED
from parbake.transports import statefile

if TYPE_CHECKING:
    from parbake.app.inventory import ServerInventory
    from parbake.app.releases import Back, ReleaseStatus, TuningChange, Wanted
    from parbake.app.traffic import TrafficReport
    from parbake.release.gate import GateReport
    from parbake.release.judge import Judge
    from parbake.transports.http.labels import GivenLabel

_TIMEOUT_S: Final = 300.0
_LABELS: Final = 1000
"""Labels in one request."""


def reload(
    changes: Sequence[Change] = (), *, port: int | None = None, admin_url: str = "", token: str = ""
) -> Reloaded:
    """Have a server read bundles and tables again, with these changes.

    The server is found by ``admin_url`` and ``token``, else by ``port``, else it is the only one on this machine.
    Raises `ServerNotFound`, or the error for which the server refused (then nothing has changed there).
    """
    resolved = [
        Change(
            change.name,
            change.bundle
            if not change.bundle or change.bundle.startswith(REGISTERED)
            else str(Path(change.bundle).resolve()),
            str(Path(change.table).resolve()) if change.table else change.table,
            change.mode,
        )
        for change in changes
    ]
    body = msgspec.json.encode({"changes": resolved})
    reply = _call("POST", "/admin/reload", body, port=port, admin_url=admin_url, token=token)
    return msgspec.json.decode(reply, type=Reloaded)


def status(*, port: int | None = None, admin_url: str = "", token: str = "") -> Status:
    """What a server serves. Raises `ServerNotFound`."""
    reply = _call("GET", "/admin/status", None, port=port, admin_url=admin_url, token=token)
    return msgspec.json.decode(reply, type=Status)


def inventory(*, port: int | None = None, admin_url: str = "", token: str = "") -> ServerInventory:
    """What a server serves or could, on what. Raises `ServerNotFound`."""
    # It needs libraries that take their time to import.
    from parbake.app.inventory import ServerInventory

    reply = _call("GET", "/admin/inventory", None, port=port, admin_url=admin_url, token=token)
    return msgspec.json.decode(reply, type=ServerInventory)


def route(name: str, *, port: int | None = None, admin_url: str = "", token: str = "") -> RouteStatus:
    """How the requests of a deployment are shared out. Raises `ServerNotFound`, `ModelNotFound`."""
    reply = _call("GET", f"/admin/routes/{name}", None, port=port, admin_url=admin_url, token=token)
    return msgspec.json.decode(reply, type=RouteStatus)


def set_route(
    name: str, change: RouteChange, *, port: int | None = None, admin_url: str = "", token: str = ""
) -> RouteStatus:
    """Change it, in all fronts and without a failed request. Raises `ServerNotFound`, or why it was refused."""
    body = msgspec.json.encode(change)
    reply = _call("POST", f"/admin/routes/{name}", body, port=port, admin_url=admin_url, token=token)
    return msgspec.json.decode(reply, type=RouteStatus)


def release(
    name: str, wanted: Wanted, *, port: int | None = None, admin_url: str = "", token: str = ""
) -> ReleaseStatus:
    """Have a version released. Raises `ServerNotFound`, `GateRefused`, `Conflict`, or why it was refused."""
    return _release("POST", name, wanted, port=port, admin_url=admin_url, token=token)


def release_status(
    name: str, *, port: int | None = None, admin_url: str = "", token: str = ""
) -> ReleaseStatus:
    """How the release of a deployment stands. Raises `ServerNotFound`, `ModelNotFound`, `Conflict`."""
    return _release("GET", name, None, port=port, admin_url=admin_url, token=token)


def promote(
    name: str, back: Back, *, port: int | None = None, admin_url: str = "", token: str = ""
) -> ReleaseStatus:
    """One step further. Raises `ServerNotFound`, `Conflict`."""
    return _release("POST", f"{name}/promote", back, port=port, admin_url=admin_url, token=token)


def rollback(
    name: str, back: Back, *, port: int | None = None, admin_url: str = "", token: str = ""
) -> ReleaseStatus:
    """Back to the version before. Raises `ServerNotFound`, `Conflict`, `VersionNotFound`."""
    return _release("POST", f"{name}/rollback", back, port=port, admin_url=admin_url, token=token)


def tune(
    name: str, change: TuningChange, *, port: int | None = None, admin_url: str = "", token: str = ""
) -> ReleaseStatus:
    """Change parameters of a release under way. Raises `ServerNotFound`, `Conflict`, `SettingsError`."""
    return _release("POST", f"{name}/parameters", change, port=port, admin_url=admin_url, token=token)


def judge(name: str, *, port: int | None = None, admin_url: str = "", token: str = "") -> Judge:
    """All that the judge of a release knows. Raises `ServerNotFound`, `ModelNotFound`, `Conflict`, `NotFound`."""
    # It needs libraries that take their time to import.
    from parbake.release.judge import Judge

    reply = _call("GET", f"/admin/releases/{name}/judge", None, port=port, admin_url=admin_url, token=token)
    return msgspec.json.decode(reply, type=Judge)


def _release(
    method: str, path: str, body: Wanted | Back | TuningChange | None, **where: Any
) -> ReleaseStatus:
    # It needs libraries that take their time to import.
    from parbake.app.releases import ReleaseStatus

    content = None if body is None else msgspec.json.encode(body)
    reply = _call(method, f"/admin/releases/{path}", content, **where)
    return msgspec.json.decode(reply, type=ReleaseStatus)


def label(
    name: str, labels: Sequence[GivenLabel], *, port: int | None = None, admin_url: str = "", token: str = ""
) -> tuple[int, int]:
    """Send labels for predictions of a deployment: how many found theirs, and how many did not.

    Raises `ServerNotFound`, or why they were refused.
    """
    accepted = unknown = 0
    for begin in range(0, len(labels), _LABELS):
        body = msgspec.json.encode({"labels": labels[begin : begin + _LABELS]})
        reply = _call("POST", f"/admin/labels/{name}", body, port=port, admin_url=admin_url, token=token)
        taken = json.loads(reply)
        accepted, unknown = accepted + taken["accepted"], unknown + taken["unknown"]
    return accepted, unknown


def jobs(*, port: int | None = None, admin_url: str = "", token: str = "") -> JobsReport:
    """The jobs that there are, and those that were given up. Raises `ServerNotFound`, `QueueAway`, `QueueTorn`."""
    reply = _call("GET", "/admin/jobs", None, port=port, admin_url=admin_url, token=token)
    return msgspec.json.decode(reply, type=JobsReport)


def retry_job(job_id: str, *, port: int | None = None, admin_url: str = "", token: str = "") -> JobsRetried:
    """Have a job begun again that was given up. Raises `ServerNotFound`, `JobNotFound`, `Conflict`, `Overloaded`."""
    body = msgspec.json.encode({"id": job_id})
    reply = _call("POST", "/admin/jobs/retry", body, port=port, admin_url=admin_url, token=token)
    return msgspec.json.decode(reply, type=JobsRetried)


def retry_dead(
    deployment: str = "", *, port: int | None = None, admin_url: str = "", token: str = ""
) -> JobsRetried:
    """Have all jobs begun again that were given up, or a deployment's. Raises `ServerNotFound`, `QueueAway`."""
    body = _all_dead(deployment)
    reply = _call("POST", "/admin/jobs/retry", body, port=port, admin_url=admin_url, token=token)
    return msgspec.json.decode(reply, type=JobsRetried)


def remove_dead(
    deployment: str = "", *, port: int | None = None, admin_url: str = "", token: str = ""
) -> DeadRemoved:
    """Remove all jobs that were given up, or a deployment's. Raises `ServerNotFound`, `QueueAway`."""
    body = _all_dead(deployment)
    reply = _call("POST", "/admin/jobs/remove", body, port=port, admin_url=admin_url, token=token)
    return msgspec.json.decode(reply, type=DeadRemoved)


def _all_dead(deployment: str) -> bytes:
    return msgspec.json.encode({"all_dead": True, **({"deployment": deployment} if deployment else {})})


def remove_job(job_id: str, *, port: int | None = None, admin_url: str = "", token: str = "") -> JobRemoved:
    """Take back a job that waits, or remove one that has an end. Raises `ServerNotFound`, `JobNotFound`, `Conflict`."""
    path = f"/admin/jobs/{urllib.parse.quote(job_id, safe='')}"
    reply = _call("DELETE", path, None, port=port, admin_url=admin_url, token=token)
    return msgspec.json.decode(reply, type=JobRemoved)


def traffic(*, port: int | None = None, admin_url: str = "", token: str = "") -> dict[str, TrafficReport]:
    """What is asked of each deployment of a server. Raises `ServerNotFound`."""
    # It needs a library that takes its time to import.
    from parbake.app.traffic import TrafficReport

    reply = _call("GET", "/admin/traffic", None, port=port, admin_url=admin_url, token=token)
    return msgspec.json.decode(reply, type=dict[str, TrafficReport])


def metrics(*, port: int | None = None, admin_url: str = "", token: str = "") -> str:
    """The page for Prometheus. Raises `ServerNotFound`."""
    return _call("GET", "/metrics", None, port=port, admin_url=admin_url, token=token).decode()


def _call(
    method: str, path: str, body: bytes | None, *, port: int | None, admin_url: str, token: str
) -> bytes:
    if not admin_url:
        running = statefile.find(port)
        admin_url, token = running.admin_url, token or running.token
    if not admin_url.startswith(("http://", "https://")):
        raise SettingsError(f"{admin_url!r} is no URL", hint="for example http://127.0.0.1:8002")
    request = urllib.request.Request(  # noqa: S310  the scheme was checked above
        admin_url.rstrip("/") + path, body, {"authorization": f"Bearer {token}"}, method=method
    )
    try:
        # The admin API is on this machine: a proxy that the environment names has nothing to do with it.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=_TIMEOUT_S) as response:
            content: bytes = response.read()
            return content
    except urllib.error.HTTPError as error:
        raise _refusal(error) from error
    except (urllib.error.URLError, OSError) as error:
        raise ServerNotFound(
            f"no answer from {admin_url}: {error}", hint="is it running, and on this machine?"
        ) from error


def _refusal(error: urllib.error.HTTPError) -> ParbakeError:
    try:
        body = json.loads(error.read())
    except ValueError:
        body = None
    if not isinstance(body, dict):
        return ServerNotFound(f"the server answered {error.code}")
    refusal = by_code(str(body.get("code")), str(body.get("error")), hint=str(body.get("hint", "")))
    if isinstance(refusal, GateRefused) and "gate" in body:
        return GateRefused(refusal.message, hint=refusal.hint, report=_gate(body["gate"]))
    return refusal


def _gate(said: object) -> GateReport | None:
    """What the gate found; None where a server of another version says it in another way."""
    # It needs libraries that take their time to import.
    from parbake.release.gate import GateReport

    try:
        return msgspec.convert(said, GateReport)
    except msgspec.ValidationError:
        return None
