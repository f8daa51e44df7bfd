"""Every option, declared once: flag, environment variable, key of parbake.toml and reference page.

A settings struct's field is an option. Its annotation carries an `Option` with the help text; the flag
is the field's name with dashes, the environment variable ``PARBAKE_`` and the name in capitals.
A flag wins over the environment, the environment over the file, the file over the default.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, get_args, get_origin, get_type_hints
from urllib.parse import quote

import msgspec
from msgspec import Struct

from parbake.errors import SettingsError
from parbake.names import Name

Mode = Literal["dynamic", "static", "hybrid"]
WantedMode = Literal["dynamic", "static", "hybrid", "auto"]
Placement = Literal["auto", "inline", "process"]
LoadWhen = Literal["always", "on-demand"]

CONFIG_FILE: Final = "parbake.toml"
ENVIRONMENT_PREFIX: Final = "PARBAKE_"

_S = TypeVar("_S", bound=Struct)


@dataclass(frozen=True, slots=True)
class Option:
    """How one setting is shown to people."""

    help: str
    metavar: str = ""
    short: str = ""


@dataclass(frozen=True, slots=True)
class Declared:
    """One setting as every place that shows or reads it needs it: the CLI, the environment, the reference page."""

    field: str
    """Name of the struct's field, and key in the file."""
    kind: type[str] | type[int] | type[float] | type[bool]
    default: Any
    """None where nothing is the default."""
    option: Option | None
    """None for a key that exists in the file only."""
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    minimum_open: bool = False
    """Whether the minimum itself is not allowed."""
    maximum: float | None = None
    required: bool = False

    @property
    def flag(self) -> str:
        """``--grpc-port``."""
        return "--" + self.field.replace("_", "-")

    @property
    def variable(self) -> str:
        """``PARBAKE_GRPC_PORT``."""
        return ENVIRONMENT_PREFIX + self.field.upper()


class ServerSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The server as a whole: ``[server]`` in parbake.toml, flags of ``parbake serve``."""

    host: Annotated[str, Option("Address to listen on.", "ADDRESS")] = "127.0.0.1"
    port: Annotated[int, Option("HTTP port; 0 takes a free one.", "PORT"), msgspec.Meta(ge=0, le=65535)] = (
        8000
    )
    grpc_port: Annotated[
        Annotated[int, msgspec.Meta(ge=0, le=65535)] | None,
        Option("gRPC port; 0 takes a free one; without it gRPC is off.", "PORT"),
    ] = None
    admin_port: Annotated[
        int,
        Option("Port of the admin API, always on loopback; 0 takes a free one.", "PORT"),
        msgspec.Meta(ge=0, le=65535),
    ] = 0
    admin_token: Annotated[
        str, Option("Token of the admin API; without it one is made for each start.", "TOKEN")
    ] = ""
    workers: Annotated[
        int, Option("Front processes; 0 takes half of the CPU quota, at least one.", "N"), msgspec.Meta(ge=0)
    ] = 0
    tls_cert: Annotated[str, Option("PEM file of the certificate; turns on TLS.", "FILE")] = ""
    tls_key: Annotated[str, Option("PEM file of the certificate's key.", "FILE")] = ""
    tls_client_ca: Annotated[
        str,
        Option(
            "PEM file of the authority whose certificates clients must have; without it none is asked for.",
            "FILE",
        ),
    ] = ""
    api_keys: Annotated[
        str, Option("File of API keys (parbake keys); with it every request for a model needs one.", "FILE")
    ] = ""
    repository_api: Annotated[
        Literal["local", "token", "off"],
        Option(
            "Who may load and unload models over the serving port: callers on this machine while the "
            "server listens on loopback only (local), holders of the admin token (token), nobody (off)."
        ),
    ] = "local"
    max_body_bytes: Annotated[int, Option("Largest request body.", "BYTES"), msgspec.Meta(ge=1)] = (
        64 * 1024 * 1024
    )
    max_connections: Annotated[int, Option("Open connections per front.", "N"), msgspec.Meta(ge=1)] = 10_000
    request_timeout_s: Annotated[
        float, Option("Time a request may take to arrive.", "SECONDS"), msgspec.Meta(gt=0)
    ] = 30.0
    idle_timeout_s: Annotated[
        float, Option("Time a connection may stay without a request.", "SECONDS"), msgspec.Meta(gt=0)
    ] = 75.0
    memory_bytes: Annotated[
        int,
        Option("Memory for the models that are loaded on demand; 0 sets no limit.", "BYTES"),
        msgspec.Meta(ge=0),
    ] = 0
    drain_timeout_s: Annotated[
        float, Option("Time given to accepted requests when stopping.", "SECONDS"), msgspec.Meta(ge=0)
    ] = 30.0
    trusted_keys: Annotated[
        str,
        Option(
            "Public keys, as a folder or a file; only bundles signed by one of them (parbake sign) are run.",
            "PATH",
        ),
    ] = ""
    runner_network: Annotated[
        bool,
        Option("Let models in processes of their own see the network; without it Linux takes it from them."),
    ] = False
    runner_user: Annotated[
        str, Option("User that models' processes run as, where the server runs as root.", "USER")
    ] = ""
    state_dir: Annotated[
        str, Option("Folder of what the server keeps; without it .parbake in the working directory.", "DIR")
    ] = ""
    empty: Annotated[
        bool,
        Option("Start with nothing to serve: parbake reload brings models, and until then it is not ready."),
    ] = False
    allow_pickle: Annotated[bool, Option("Load bundles that hold a pickle (it can run any code).")] = False
    allow_mismatch: Annotated[
        bool, Option("Serve bundles whose required libraries have other versions here.")
    ] = False
    log_format: Annotated[
        Literal["auto", "text", "json"], Option("Log lines; auto is text on a terminal.")
    ] = "auto"
    traffic_profile: Annotated[
        bool, Option("Measure the cardinality and peakedness of the traffic, for the advisor.")
    ] = True
    auto_s: Annotated[
        float, Option("How often mode auto asks the advisor.", "SECONDS"), msgspec.Meta(gt=0)
    ] = 60.0
    prediction_log: Annotated[
        str, Option("Folder for the prediction log; without it nothing is logged.", "DIR")
    ] = ""
    log_sample: Annotated[
        float,
        Option("Share of the keys that are logged, each with all its rows.", "SHARE"),
        msgspec.Meta(gt=0, le=1),
    ] = 1.0
    log_inputs: Annotated[
        Literal["off", "hashed", "plain"],
        Option("Whether the log has the rows' inputs: left out, hashed with a secret, or as they are."),
    ] = "off"
    log_outputs: Annotated[bool, Option("Whether the log has the predictions.")] = False
    log_file_bytes: Annotated[
        int, Option("Size at which a file of the log is finished.", "BYTES"), msgspec.Meta(ge=1)
    ] = 64 * 1024 * 1024
    log_file_s: Annotated[
        float, Option("Age at which a file of the log is finished.", "SECONDS"), msgspec.Meta(gt=0)
    ] = 3600.0
    log_keep_bytes: Annotated[
        int, Option("Size of the log beyond which its oldest files are removed.", "BYTES"), msgspec.Meta(ge=1)
    ] = 4 * 1024 * 1024 * 1024
    log_keep_s: Annotated[
        float, Option("Age at which files of the log are removed.", "SECONDS"), msgspec.Meta(gt=0)
    ] = 30 * 24 * 3600.0

    def __post_init__(self) -> None:
        """Refuse what is no TLS without the rest."""
        if bool(self.tls_cert) != bool(self.tls_key):
            given, missing = ("tls_cert", "tls_key") if self.tls_cert else ("tls_key", "tls_cert")
            raise ValueError(f"{given} is given without {missing}")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("tls_client_ca is given without tls_cert and tls_key")


class ReleaseSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """How new versions are released: ``[release]`` in parbake.toml."""

    store: Annotated[
        str,
        Option(
            "Store of releases and their history: sqlite:///PATH or postgresql://USER@HOST/DATABASE; without it "
            "SQLite in the state directory.",
            "URL",
        ),
    ] = ""
    registry: Annotated[
        str,
        Option(
            "Registry of models: URL of an MLflow server, or sqlite:///PATH; without it MLflow on SQLite in the state "
            "directory.",
            "URL",
        ),
    ] = ""
    bundle_store: Annotated[
        str,
        Option(
            "Where registered bundles are kept: a directory, or s3://BUCKET/PREFIX; without it bundles in the state "
            "directory.",
            "DIR|URL",
        ),
    ] = ""
    follow_s: Annotated[
        float,
        Option(
            "How often the registry is asked whether an alias that is followed has moved; 0: only by parbake reload.",
            "SECONDS",
        ),
        msgspec.Meta(ge=0),
    ] = 10.0
    lease_s: Annotated[
        float,
        Option(
            "How long a server that judges a release may be silent before another one with the same store goes on.",
            "SECONDS",
        ),
        msgspec.Meta(gt=0, lt=86_400),
    ] = 20.0
    fetch_timeout_s: Annotated[
        float,
        Option("Longest that a bundle may take to come from the bundle store.", "SECONDS"),
        msgspec.Meta(gt=0),
    ] = 600.0


class QueueSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Jobs: requests whose callers do not wait (docs/how-to/async.md). ``[queue]`` in parbake.toml."""

    jobs_waiting: Annotated[
        int,
        Option(
            "Most unanswered jobs of a deployment; what comes beyond is refused. 0: no jobs are taken.", "N"
        ),
        msgspec.Meta(ge=0),
    ] = 1000
    jobs_at_once: Annotated[
        int, Option("Most jobs that a front has answered at a time.", "N"), msgspec.Meta(ge=1)
    ] = 4
    jobs_bytes: Annotated[
        int,
        Option(
            "Size of the queue, results included, beyond which no job is taken; requests of dead jobs make room.",
            "BYTES",
        ),
        msgspec.Meta(ge=1),
    ] = 1024 * 1024 * 1024
    job_keep_s: Annotated[float, Option("How long results are kept.", "SECONDS"), msgspec.Meta(gt=0)] = (
        24 * 3600.0
    )
    job_attempts: Annotated[
        int,
        Option(
            "How often a job is begun before it is given up; a refusal before any work does not count.", "N"
        ),
        msgspec.Meta(ge=1),
    ] = 5
    job_give_up_s: Annotated[
        float, Option("Age at which an unanswered job is given up.", "SECONDS"), msgspec.Meta(gt=0)
    ] = 24 * 3600.0
    job_lease_s: Annotated[
        float,
        Option("How long a front may be silent before others begin its jobs again.", "SECONDS"),
        msgspec.Meta(gt=0, lt=86_400),
    ] = 5.0


DEFAULT_ANSWER: Final = "default"
LAST_ANSWER: Final = "last"
"""The fallbacks that are no other deployment."""

DEADLINE_MS: Final = 10_000.0
"""The deadline where neither the deployment nor its contract has one."""


class DeploymentSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """One deployment: ``[[deployments]]`` in parbake.toml; as flags they hold for all bundles named."""

    bundle: str
    name: Name | None = None
    version: Name | None = None
    mode: Annotated[
        WantedMode | None,
        Option(
            "How to answer; without it hybrid where a table is given, else dynamic. auto follows the advisor, "
            "while it serves."
        ),
    ] = None
    table: Annotated[str, Option("Prediction table for static and hybrid.", "DIR")] = ""
    deadline_ms: Annotated[
        Annotated[float, msgspec.Meta(gt=0)] | None,
        Option(
            "Time within which callers need the answer; what would wait past it is refused. Without it the "
            "contract's, else 10 seconds.",
            "MS",
        ),
    ] = None
    fallback: Annotated[
        str,
        Option(
            "What answers where the model cannot in time, or at all: default (the contract's), last (what was "
            "answered last for the same key), or the name of another deployment.",
            "NAME",
        ),
    ] = ""
    placement: Annotated[
        Placement, Option("Where the model runs: in the front, in a process of its own, or as measured.")
    ] = "auto"
    load: Annotated[
        LoadWhen,
        Option(
            "When the model is loaded: at the start, for good, or when it is wanted (docs/how-to/many-models.md)."
        ),
    ] = "always"
    pinned: Annotated[
        bool, Option("Of models that are loaded on demand: load it at the start, and never put it away.")
    ] = False
    group: Annotated[
        str,
        Option(
            "Models loaded on demand that may share a process; without it those of the same owner do.", "NAME"
        ),
    ] = ""
    runners: Annotated[int, Option("Runner processes per version.", "N"), msgspec.Meta(ge=1)] = 1
    max_runner_bytes: Annotated[
        int,
        Option(
            "Memory of a runner beyond which another process takes its place; 0: half of what this machine, or "
            "container, has.",
            "BYTES",
        ),
        msgspec.Meta(ge=0),
    ] = 0
    threads: Annotated[
        int, Option("Threads per runner; 0 shares the CPU quota out.", "N"), msgspec.Meta(ge=0)
    ] = 0
    max_queue_rows: Annotated[int, Option("Most rows waiting per front.", "N"), msgspec.Meta(ge=1)] = 8192
    max_batch_rows: Annotated[
        int, Option("Largest batch; 0 learns it from measured time.", "N"), msgspec.Meta(ge=0)
    ] = 0
    batch_delay_ms: Annotated[
        float, Option("Time to wait for company; 0 never waits.", "MS"), msgspec.Meta(ge=0)
    ] = 0.0
    head_rows: Annotated[
        int,
        Option(
            "Most predictions that hybrid mode keeps by itself in each front, beside the table; 0 learns nothing.",
            "N",
        ),
        msgspec.Meta(ge=0),
    ] = 100_000
    head_bytes: Annotated[int, Option("Most memory for them in each front.", "BYTES"), msgspec.Meta(ge=0)] = (
        256 * 1024 * 1024
    )
    warm_s: Annotated[
        float,
        Option(
            "Longest that a new version is baked for the current head before it takes traffic.", "SECONDS"
        ),
        msgspec.Meta(ge=0),
    ] = 60.0


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """A whole parbake.toml."""

    server: ServerSettings = ServerSettings()
    deployments: tuple[DeploymentSettings, ...] = ()
    release: ReleaseSettings = ReleaseSettings()
    queue: QueueSettings = QueueSettings()


_SQLITE: Final = "sqlite:///"
REGISTERED: Final = "models:/"
"""How the bundle of a deployment begins that is a version in the registry."""

_PATHS: Final = (
    "tls_cert", "tls_key", "tls_client_ca", "api_keys", "trusted_keys", "prediction_log", "state_dir",
)  # fmt: skip
"""Settings of the server that are paths."""


def read_settings(path: Path) -> Settings:
    """Read parbake.toml; relative paths in it are taken from its folder. Raises `SettingsError`."""
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from error
    deployments = content.get("deployments", [])
    for deployment in deployments if isinstance(deployments, list) else []:
        named = isinstance(deployment, dict) and str(deployment.get("bundle")).startswith(REGISTERED)
        _from_folder(path.parent, deployment, ("table",) if named else ("bundle", "table"))
    _from_folder(path.parent, content.get("server"), _PATHS)
    release = content.get("release")
    for key in ("store", "registry"):
        if isinstance(release, dict) and str(release.get(key)).startswith(_SQLITE):
            file = release[key].removeprefix(_SQLITE)
            release[key] = f"{_SQLITE}{Path(quote(str(path.parent.absolute()))) / file}"
    if isinstance(release, dict) and "://" not in str(release.get("bundle_store")):
        _from_folder(path.parent, release, ("bundle_store",))
    try:
        return msgspec.convert(content, Settings)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{path}: {error}", hint="docs/reference/settings.md lists the keys") from error


def override(settings: _S, given: Mapping[str, object]) -> _S:
    """The same settings with some fields changed. Raises `SettingsError` naming the field."""
    if not given:
        return settings
    values = {name: getattr(settings, name) for name in settings.__struct_fields__}
    try:
        return msgspec.convert({**values, **given}, type(settings))
    except msgspec.ValidationError as error:
        raise SettingsError(str(error), hint="docs/reference/settings.md lists the settings") from error


def declared(kind: type[Struct]) -> tuple[Declared, ...]:
    """The settings that a struct declares, in its order."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple(_declared(field, hints[field.name]) for field in msgspec.structs.fields(kind))


def _declared(field: msgspec.structs.FieldInfo, annotation: Any) -> Declared:
    option: Option | None = None
    metas: list[msgspec.Meta] = []
    choices: tuple[str, ...] = ()
    kind: Any = None
    waiting = [annotation]
    while waiting:
        item = waiting.pop()
        if get_origin(item) is Annotated:
            inner, *extras = get_args(item)
            waiting.append(inner)
            metas += [extra for extra in extras if isinstance(extra, msgspec.Meta)]
            option = next((extra for extra in extras if isinstance(extra, Option)), option)
        elif get_origin(item) is Literal:
            kind, choices = str, get_args(item)
        elif get_args(item):
            waiting += [member for member in get_args(item) if member is not type(None)]
        else:
            kind = item
    bounds = {
        name: next((value for meta in metas if (value := getattr(meta, name)) is not None), None)
        for name in ("ge", "gt", "le")
    }
    return Declared(
        field=field.name,
        kind=kind,
        default=None if field.required else field.default,
        option=option,
        choices=choices,
        minimum=bounds["ge"] if bounds["gt"] is None else bounds["gt"],
        minimum_open=bounds["gt"] is not None,
        maximum=bounds["le"],
        required=field.required,
    )


def _from_folder(folder: Path, table: object, keys: tuple[str, ...]) -> None:
    """Take relative paths of a TOML table from ``folder``."""
    if not isinstance(table, dict):
        return
    for key in keys:
        if isinstance(value := table.get(key), str) and value:
            table[key] = str(folder / value)
