"""Write docs/reference from the code: commands, settings, errors, Python, URLs, metrics. ``--check`` only compares."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import click
from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families

import parbake
from parbake import errors, testing
from parbake.app.control import AllCounts, HeadCounts, LogRows, VersionCounts
from parbake.app.follow import Following
from parbake.app.jobs import JobCounts, JobDepth
from parbake.app.metrics import (
    DemandState,
    RoomsState,
    RoutesState,
    RunnerState,
    ServerState,
    VersionState,
    render,
)
from parbake.app.rooms import LOAD_BOUNDS_S
from parbake.app.routes import RouteCounts
from parbake.cli.exits import EXITS, Exit
from parbake.cli.main import COMMANDS, group
from parbake.contract.model import Contract, Step, TensorSpec
from parbake.monitoring.model import Estimate, Traffic
from parbake.serving.route import Arm, Route
from parbake.serving.service import ServedVersion
from parbake.serving.shadow import ShadowCounts
from parbake.serving.stats import BATCH_BOUNDS, BOUNDS_S, Stats
from parbake.settings import (
    Declared,
    DeploymentSettings,
    QueueSettings,
    ReleaseSettings,
    ServerSettings,
    declared,
)
from parbake.transports import admin
from parbake.transports.grpc import replies as grpc
from parbake.transports.grpc.messages import HEALTH, INFERENCE, pool
from parbake.transports.http import replies as http
from parbake.transports.http.openapi import openapi

REFERENCE = Path(__file__).parent / "reference"
MADE_BY = "<!-- Written by `make docs` from the code: change it there. -->\n"
WIDTH = 100


def pages() -> dict[str, str]:
    """The text of every page, by file name."""
    return {
        "cli.md": "\n".join(_cli()) + "\n",
        "settings.md": "\n".join(_settings()) + "\n",
        "errors.md": "\n".join(_errors()) + "\n",
        "python.md": "\n".join(_python()) + "\n",
        "urls.md": "\n".join(_urls()) + "\n",
        "metrics.md": "\n".join(_metrics()) + "\n",
    }


def stale(folder: Path = REFERENCE) -> list[str]:
    """Names of pages that are not what the code says, or that the code does not write."""
    wanted = pages()
    there = {path.name for path in folder.glob("*.md")}
    return sorted(
        name
        for name in there | set(wanted)
        if name not in wanted or name not in there or (folder / name).read_text() != wanted[name]
    )


def main(arguments: list[str]) -> int:
    """Write the pages, or check them."""
    if arguments == ["--check"]:
        if names := stale():
            print(
                f"error: out of date in docs/reference: {', '.join(names)}\nhint: make docs", file=sys.stderr
            )
            return 1
        return 0
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for name in stale():
        if name in (wanted := pages()):
            (REFERENCE / name).write_text(wanted[name])
        else:
            (REFERENCE / name).unlink()
        print(f"docs/reference/{name}")
    return 0


def _cli() -> Iterator[str]:
    yield "# Commands\n"
    yield MADE_BY
    yield "Data goes to stdout, words to stderr. Colours and progress show on a terminal only, and not with"
    yield "`NO_COLOR` or `--no-progress`.\n"
    names = group.context_settings["help_option_names"]
    root = click.Context(
        group,
        info_name="parbake",
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        help_option_names=names,
    )
    yield _help(root)
    for name in COMMANDS:
        command = group.get_command(root, name)
        assert command is not None
        yield f"## parbake {name}\n"
        context = click.Context(
            command,
            root,
            info_name=name,
            terminal_width=WIDTH,
            max_content_width=WIDTH,
            help_option_names=names,
        )
        yield _help(context)
        for part, below in command.commands.items() if isinstance(command, click.Group) else ():
            yield f"### parbake {name} {part}\n"
            yield _help(
                click.Context(below, context, info_name=part, terminal_width=WIDTH, max_content_width=WIDTH)
            )
    yield "## Exit codes\n"
    yield from _table(("code", "meaning"), ((str(int(code)), code.meaning) for code in Exit))


def _help(ctx: click.Context) -> str:
    return f"```text\n{ctx.get_help()}\n```\n"


def _settings() -> Iterator[str]:
    yield "# Settings of the server\n"
    yield MADE_BY
    yield "Each setting is a flag of `parbake serve`, an environment variable and a key of `parbake.toml`. A flag"
    yield "wins over the variable, the variable over the file, the file over the default.\n"
    for title, kind in (
        ("[server]", ServerSettings),
        ("[[deployments]]", DeploymentSettings),
        ("[release]", ReleaseSettings),
        ("[queue]", QueueSettings),
    ):
        yield f"## {title}\n"
        yield f"{_first_paragraph(kind)}\n"
        yield from _table(
            ("key", "flag", "variable", "default", "values", "what it does"),
            (_setting(setting) for setting in declared(kind)),
        )
        yield ""


def _first_paragraph(kind: type[Struct]) -> str:
    return inspect.getdoc(kind).split("\n\n")[0].replace("``", "`")  # type: ignore[union-attr]  # both have one


def _setting(setting: Declared) -> tuple[str, ...]:
    option = setting.option
    return (
        f"`{setting.field}`",
        f"`{setting.flag}`" if option else "",
        f"`{setting.variable}`" if option else "",
        _default(setting),
        _values(setting),
        option.help if option else _FILE_ONLY[setting.field],
    )


# Keys that no flag can give: what `parbake serve BUNDLE` says by its arguments.
_FILE_ONLY = {
    "bundle": "Directory of the bundle. A relative path starts at the file's folder.",
    "name": "Name of the deployment; without it the model's.",
    "version": "Version that the deployment answers with.",
}


def _default(setting: Declared) -> str:
    if setting.required:
        return "required"
    return "" if setting.default in (None, "") else f"`{str(setting.default).lower()}`"


def _values(setting: Declared) -> str:
    if setting.choices:
        return ", ".join(f"`{choice}`" for choice in setting.choices)
    words = {str: "text", int: "integer", float: "number", bool: "`true`, `false`"}[setting.kind]
    if setting.minimum is not None:
        words += f" {'>' if setting.minimum_open else '>='} {setting.minimum:g}"
    if setting.maximum is not None:
        words += f", <= {setting.maximum:g}"
    return words


def _errors() -> Iterator[str]:
    yield "# Errors\n"
    yield MADE_BY
    yield "`code` is what a program may rely on; it does not change. The statuses are those of replies over HTTP"
    yield "and gRPC, the exit code is that of the `parbake` command.\n"
    rows = []
    for kind, code in EXITS.items():
        doc = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ").replace("``", "`")
        depth = len(kind.__mro__) - len(errors.ParbakeError.__mro__)
        name = f"{'&nbsp;' * 4 * depth}`{kind.__name__}`"
        rows.append(
            (
                name,
                f"`{kind.code}`",
                str(http.status_of(kind)),
                grpc.status_of(kind).name,
                str(int(code)),
                doc,
            )
        )
    yield from _table(("class", "code", "HTTP", "gRPC", "exit code", "meaning"), rows)


def _python() -> Iterator[str]:
    yield "# Python\n"
    yield MADE_BY
    yield "What `parbake` and `parbake.testing` export. Everything else may change without notice.\n"
    for module in (parbake, testing):
        for name in module.__all__:
            if name != "__version__":
                yield from _item(f"{module.__name__}.{name}", getattr(module, name))


def _item(name: str, item: Any) -> Iterator[str]:
    """One class or function: how it is called, and what its docstring says."""
    yield f"## {name}\n"
    if not inspect.isclass(item) or item is testing.MemoryTable:
        yield f"```python\n{name}{_signature(item)}\n```\n"
    yield from _prose(item)
    for member, value in vars(item).items() if inspect.isclass(item) else ():
        if member.startswith("_") or not (inspect.isfunction(value) or isinstance(value, property)):
            continue
        yield f"### .{member}\n"
        if inspect.isfunction(value):
            shown = _signature(value).replace("(self, ", "(").replace("(self)", "()")
            yield f"```python\n.{member}{shown}\n```\n"
        yield from _prose(value)


def _signature(item: Any) -> str:
    """The parameters, each on a line of its own where they are many; annotations as they were written."""
    signature = inspect.signature(item)
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parts: list[str] = []
    for parameter in signature.parameters.values():
        named_only = parameter.kind is parameter.KEYWORD_ONLY
        if named_only and not any(part.startswith("*") for part in parts):
            parts.append("*")
        text = stars.get(parameter.kind, "") + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {parameter.annotation}"
        if parameter.default is not parameter.empty:
            default = parameter.default
            text += f" = {default.name if isinstance(default, Enum) else repr(default)}"
        parts.append(text)
    answer = signature.return_annotation
    result = "" if answer in (signature.empty, "None") else f" -> {answer}"
    short = f"({', '.join(parts)}){result}"
    return short if len(short) <= 80 else "(\n    " + ",\n    ".join(parts) + f",\n){result}"


def _prose(item: Any) -> Iterator[str]:
    """A docstring as Markdown: its sections as lists, its words as they are."""
    for paragraph in (inspect.getdoc(item) or "").replace("``", "`").split("\n\n"):
        if paragraph.startswith(".. code-block"):
            continue
        if paragraph.startswith("    "):
            yield f"```python\n{inspect.cleandoc(paragraph)}\n```\n"
            continue
        title, _, body = paragraph.partition("\n")
        if title not in ("Args:", "Returns:", "Raises:"):
            yield f"{paragraph}\n"
            continue
        yield f"{title.removesuffix(':')}:\n"
        for entry in re.split(r"\n    (?=\S)", f"\n{body}")[1:]:
            words = " ".join(entry.split())
            name, colon, rest = words.partition(": ")
            yield f"- `{name}`: {rest}" if colon and name.isidentifier() else f"- {words}"
        yield ""


def _urls() -> Iterator[str]:
    yield "# URLs and RPCs\n"
    yield MADE_BY
    yield "`NAME` is a deployment, `VERSION` one of its versions; without a version the last one answers. Where GET"
    yield "is answered, HEAD is too. Statuses are those besides 200; [errors](errors.md) says what they mean. The"
    yield "server's own `/openapi.json` has the same with the columns of its models.\n"
    for title, tag in (
        ("Models", "models"),
        ("Jobs", "jobs"),
        ("Server", "server"),
        ("Model repository", "repository"),
    ):
        yield f"## {title}\n"
        yield from _table(("", "URL", "what it does", "statuses"), _operations(tag))
        yield ""
    yield "## Admin API\n"
    yield "On loopback, on a port of its own, with `authorization: Bearer TOKEN`.\n"
    # What goes on in the next line is indented.
    lines = re.findall(
        r"^(GET|POST|DELETE)\s+(\S+)\s{2,}(.+(?:\n\s+.+)*)$", admin.__doc__ or "", re.MULTILINE
    )
    rows = ((method, f"`{url}`", " ".join(words.replace("``", "`").split())) for method, url, words in lines)
    yield from _table(("", "URL", "what it does"), rows)
    yield ""
    yield "## gRPC\n"
    yield from _table(("service", "RPC", "streams"), _rpcs())


def _operations(tag: str) -> Iterator[tuple[str, ...]]:
    contract = Contract(
        "NAME", (TensorSpec("x", "FP64"),), (TensorSpec("y", "FP64"),), (Step("onnx", ""),), "", ""
    )
    served = ServedVersion(
        "NAME", "VERSION", contract, "", mode="dynamic", table=None, batcher=None, deadline_s=1, stats=Stats()
    )
    for path, methods in json.loads(openapi([served]))["paths"].items():
        url = path.replace("{name}", "NAME").replace("{version}", "VERSION").replace("{job}", "ID")
        for method, operation in methods.items():
            if tag in operation["tags"]:
                statuses = ", ".join(status for status in operation["responses"] if status != "200")
                yield method.upper(), f"`{url}`", operation["summary"], statuses


def _rpcs() -> Iterator[tuple[str, ...]]:
    for name in (INFERENCE, HEALTH):
        for method in pool().FindServiceByName(name).methods:
            streams = ("requests", method.client_streaming), ("replies", method.server_streaming)
            yield (
                f"`{name}`",
                f"`{method.name}`",
                " and ".join(word for word, streamed in streams if streamed),
            )


def _metrics() -> Iterator[str]:
    yield "# Metrics\n"
    yield MADE_BY
    yield "`GET /metrics` is one page for the whole server, in the text format of Prometheus. A histogram has"
    yield "`_bucket`, `_sum` and `_count`. Counters begin at 0 with each start of the server.\n"
    stats = Stats()
    stats.answered(1.0, 1.0, 1.0, 1.0, 1, 1)
    stats.batch(1, 1.0)
    stats.refused("overloaded")
    page = render(
        ServerState(0.0, 1, 0, 1, (Following("models:/eta@champion", "eta", "1", "sha256:"),)),
        [VersionState("eta", "1", "hybrid", "sha256:", 1, 1.0)],
        [RunnerState("eta", "1", 0, 1)],
        AllCounts(
            (VersionCounts("eta", "1", stats.counts(0), HeadCounts()),),
            0,
            {},
            LogRows(),
            {"team": 1},
            RouteCounts({"eta": {"1": {"weights": 1}}}, {"eta": {"2": ShadowCounts()}}),
            JobCounts({"eta": JobDepth(1, 1, 1.0)}, 1, {"eta": 1}, {"eta": {"done": 1}}),
        ),
        {"eta": Traffic(1, Estimate(1, 1, 1), 0.0, 1.0, (), 0.0, 0.0, 0.0)},
        RoomsState(
            [DemandState("eta", "1", True, 1, 1, 0)], 0, 0, LOAD_BOUNDS_S, [1] * (len(LOAD_BOUNDS_S) + 1), 1.0
        ),
        RoutesState([Route("eta", "1", (Arm("1", 1.0),))], 1, 1, 1),
    )
    rows = []
    for family in text_string_to_metric_families(page):
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        name = f"{family.name}_total" if family.type == "counter" else family.name
        rows.append(
            (f"`{name}`", family.type, ", ".join(f"`{label}`" for label in labels), family.documentation)
        )
    yield from _table(("name", "type", "labels", "meaning"), rows)
    yield f"\nBuckets of times, in seconds: {', '.join(f'{bound:g}' for bound in BOUNDS_S)}."
    yield f"Buckets of loading times: {', '.join(f'{bound:g}' for bound in LOAD_BOUNDS_S)}."
    yield f"Buckets of batches, in rows: {', '.join(map(str, BATCH_BOUNDS))}."


def _table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield f"|{'|'.join(['---'] * len(titles))}|"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
