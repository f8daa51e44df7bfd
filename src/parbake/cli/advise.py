"""`parbake advise`: which way of serving is right, with what each would cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypedDict, cast

import click

from parbake.cli.options import (
    BUNDLE,
    FILE,
    Command,
    json_option,
    pickle_option,
    progress_option,
    server_options,
)
from parbake.cli.output import emit, emit_json, emit_table, emit_title, say, size, stages
from parbake.errors import ModelNotFound, NotFound, NotReady, SettingsError
from parbake.settings import Mode, Placement

if TYPE_CHECKING:
    from parbake.advisor.model import Figure, Prediction, Served
    from parbake.app.advise import Advice
    from parbake.app.verify import Check, Counters
    from parbake.monitoring.model import Traffic

_FOLLOWED: Final = 4000


class _Shares(click.ParamType[tuple[float, ...]]):
    """``0.01,0.05,0.2``."""

    name = "shares"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """The shares. Fails where one is not above 0 and at most 1."""
        if isinstance(value, tuple):
            return value
        try:
            shares = tuple(sorted({float(word) for word in str(value).split(",")}))
        except ValueError:
            self.fail(f"{value!r} is no list of shares such as 0.01,0.05,0.2", param, ctx)
        if not all(0 < share <= 1 for share in shares):
            self.fail(f"{value!r}: a share is above 0 and at most 1", param, ctx)
        return shares


@click.command(cls=Command, short_help="Say which way of serving is right, and what each would cost.")
@click.argument("bundle", type=BUNDLE, required=False)
@click.option(
    "--trace", type=FILE, metavar="FILE", help="Traffic: a file of keys in the order they were asked for."
)
@click.option(
    "--log",
    "log_folder",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    metavar="DIR",
    help="Traffic: the folder of a prediction log.",
)
@click.option("--name", metavar="NAME", help="Deployment, where a log or a server has several.")
@click.option(
    "--budget",
    "budgets",
    type=_Shares(),
    default="0.01,0.05,0.2,1",
    metavar="SHARES",
    show_default=True,
    help="Sizes of a hybrid head to look at, as shares of the distinct keys.",
)
@click.option(
    "--connections",
    type=click.IntRange(min=1, max=10_000),
    default=64,
    metavar="N",
    show_default=True,
    help="Callers that are served at a time.",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="Requests per second that come.  [default: that of the traffic, where it is known]",
)
@click.option(
    "--deadline-ms",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MS",
    help="Time within which callers need the answer.  [default: the contract's, else 10 seconds]",
)
@click.option(
    "--price-core-hour", type=click.FloatRange(min=0), metavar="X", help="What a core costs in an hour."
)
@click.option(
    "--price-gb-month", type=click.FloatRange(min=0), metavar="Y", help="What a gigabyte costs in a month."
)
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the picture to FILE (.svg or .png); needs the extra plots.",
)
@click.option(
    "--verify",
    "watch_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Watch a running server for so long, and show what was predicted for it against what is observed.",
)
@server_options
@pickle_option
@progress_option
@json_option
def command(
    bundle: Path | None,
    trace: Path | None,
    log_folder: Path | None,
    name: str | None,
    budgets: tuple[float, ...],
    connections: int,
    rate: float | None,
    deadline_ms: float | None,
    price_core_hour: float | None,
    price_gb_month: float | None,
    picture: Path | None,
    watch_s: float | None,
    port: int | None,
    admin_url: str,
    token: str,
    allow_pickle: bool,
    show_progress: bool,
    as_json: bool,
) -> None:
    """Say which way of serving is right for a BUNDLE and its traffic, and what each would cost.

    The traffic is that of a trace or a prediction log; without either that of a running server, whose bundle is
    taken too. The bundle is measured on this machine, which takes a quarter to half a minute, longer for a slow
    model: predictions hold for machines like it.
    """
    from parbake.advisor.model import Load, Prices
    from parbake.app.advise import Asked, advise, asked_in_log, asked_in_trace, asked_of_server

    if trace is not None and log_folder is not None:
        raise SettingsError("both a trace and a log are given", hint="the traffic is that of one of them")
    of_server = trace is None and log_folder is None
    if bundle is None and not of_server:
        raise SettingsError("no bundle is given", hint="parbake advise BUNDLE --trace FILE")
    if watch_s is not None and not of_server:
        raise SettingsError("--verify watches a running server", hint="leave --trace and --log out")
    if picture is not None and not picture.absolute().parent.is_dir():
        raise SettingsError(
            f"no folder {picture.absolute().parent}", hint="--picture names a file in a folder that is there"
        )
    prices = Prices()
    if price_core_hour is not None or price_gb_month is not None:
        prices = Prices(
            core_hour=prices.core_hour if price_core_hour is None else price_core_hour,
            gb_month=prices.gb_month if price_gb_month is None else price_gb_month,
            given=True,
        )
    server: _Server | None = None
    placement: Placement = "auto"
    with stages("advise", wanted=show_progress and not as_json) as stage:
        stage("the traffic")
        asked: Asked
        if trace is not None:
            asked = asked_in_trace(trace)
        elif log_folder is not None:
            asked = asked_in_log(log_folder, name)
        else:
            server = _Server(name, port, admin_url, token)
            if bundle is not None:
                _refuse_another(bundle, server.name)
            asked = asked_of_server(server.traffic(), server.name)
            bundle = bundle or Path(server.status.bundle)
            placement = "inline" if server.status.placement == "inline" else "process"
        assert bundle is not None
        if watch_s is not None and server is not None:
            stage(f"the server, for {watch_s:g} s")
            server.watch(watch_s)
        advice = advise(
            bundle,
            asked,
            budgets=budgets,
            load=Load(connections, rate or asked.traffic.rate_per_s),
            prices=prices,
            deadline_ms=deadline_ms,
            placement=placement,
            allow_pickle=allow_pickle,
            served=server.served() if server is not None else None,
            stage=stage,
        )
        checks: tuple[Check, ...] = ()
        if watch_s is not None and server is not None:
            stage("predicted against observed")
            checks = server.checks(advice)
    if picture is not None:
        from parbake.cli.pictures import write_picture

        write_picture(advice, picture)
    if as_json:
        emit_json({**_fields(advice), "checks": checks} if watch_s is not None else advice)
        return
    if watch_s is not None and server is not None:
        show_checks(server.status.mode, checks, watch_s)
        return
    show(advice)
    if picture is not None:
        say(f"picture: {picture}")


def _refuse_another(bundle: Path, name: str) -> None:
    """The traffic of one model says nothing about another. Raises `SettingsError`."""
    from parbake.contract.bundle import read_bundle

    contract = read_bundle(bundle, verify=False).contract
    if contract.name != name:
        raise SettingsError(
            f"{bundle} holds model {contract.name!r}, and the traffic would be that of {name!r}",
            hint="--name picks a deployment of the server; --trace or --log bring other traffic",
        )


class _Server:
    """A running server and one of its deployments, as the command needs them."""

    def __init__(self, name: str | None, port: int | None, admin_url: str, token: str) -> None:
        from parbake.transports import client

        self._where: _Where = {"port": port, "admin_url": admin_url, "token": token}
        self._all = client.status(**self._where)
        names = list(dict.fromkeys(version.name for version in self._all.versions))
        if name is None and len(names) != 1:
            raise SettingsError(
                f"the server has {len(names)} deployments: {', '.join(names) or 'none is loaded'}",
                hint="--name picks one of them",
            )
        self.name = name or names[0]
        mine = [version for version in self._all.versions if version.name == self.name]
        if not mine:
            raise ModelNotFound(f"no model {self.name!r}", hint=f"models there: {', '.join(names)}")
        self.status = mine[-1]
        self._before = self._now()
        self._after = self._before

    def traffic(self) -> Traffic:
        """What was asked of the deployment. Raises `NotReady` where nothing was yet."""
        from parbake.transports import client

        report = client.traffic(**self._where).get(self.name)
        if report is None or not report.traffic.requests:
            raise NotReady(
                f"nothing is known of the traffic of {self.name!r} yet",
                hint="ask again when there was some, or give --trace or --log",
            )
        return report.traffic

    def watch(self, seconds: float) -> None:
        """Let the server work for a while."""
        self._before = self._now()
        time.sleep(seconds)
        self._after = self._now()

    def served(self) -> Served:
        """What runs, for its antipatterns."""
        from parbake.app.verify import served_of

        inline = self.status.placement == "inline"
        others = sum(
            version.placement == "inline" for version in self._all.versions if version is not self.status
        )
        mode = cast(Mode, self.status.mode)
        return served_of(self.name, mode, inline, others, self._after, self._after.logged)

    def checks(self, advice: Advice) -> tuple[Check, ...]:
        """Predicted against observed, while the server was watched. Raises `NotFound` where nobody asked."""
        from parbake.advisor.predict import Question
        from parbake.app.verify import verify

        question = Question(
            advice.traffic, advice.costs, advice.promise, advice.load, advice.prices, followed=_FOLLOWED
        )
        try:
            return verify(question, cast(Mode, self.status.mode), self._before, self._after)
        except ValueError as error:
            raise NotFound(
                f"nobody asked {self.name!r} for anything meanwhile", hint="--verify 60 watches for a minute"
            ) from error

    def _now(self) -> Counters:
        from parbake.app.verify import counters
        from parbake.transports import client

        pids = (*self._all.front_pids, *self.status.runner_pids)
        return counters(client.metrics(**self._where), self.name, time.monotonic(), pids)


class _Where(TypedDict):
    port: int | None
    admin_url: str
    token: str


def _fields(advice: Advice) -> dict[str, object]:
    return {field.name: getattr(advice, field.name) for field in fields(advice)}


def show_checks(mode: str, checks: Sequence[Check], seconds: float) -> None:
    """Print predicted against observed."""
    rows = [
        (
            check.what + (f", {check.unit}" if check.unit else ""),
            f"{check.predicted:.4g}",
            f"{check.observed:.4g}",
            "" if check.error is None else f"{100 * check.error:+.0f} %",
        )
        for check in checks
    ]
    titles = (f"{mode}, {seconds:g} s", "predicted", "observed", "off by")
    emit_table(rows, titles=titles, numbers=titles[1:])


def show(advice: Advice) -> None:
    """Print an advice for a person."""
    from parbake.cli.pictures import terminal_picture

    for line in traffic_lines(advice):
        emit(line)
    for note in advice.notes:
        emit(f"note: {note}")
    emit()
    _show_options(advice)
    emit()
    best = advice.recommendation.best
    emit_title(f"{best.name}: {advice.recommendation.reason}")
    emit(_how(best))
    for found in advice.recommendation.antipatterns:
        emit(f"{found.name}: {found.what} ({found.hint})")
    emit()
    for line in terminal_picture(advice):
        emit(line)


def traffic_lines(advice: Advice) -> list[str]:
    """What the traffic is made of, in three lines."""
    traffic = advice.traffic
    distinct = traffic.distinct
    window = f" in {_span(traffic.window_s)}" if traffic.window_s else ""
    rate = f", {traffic.rate_per_s:,.4g}/s" if traffic.rate_per_s else ""
    sample = f", a sample of {traffic.sampled:.3g} of the keys" if traffic.sampled < 1 else ""
    points = dict.fromkeys(max(round(distinct.value * share), 1) for share in (0.01, 0.05, 0.2))
    shares = ", ".join(
        f"top {keys:,} key{'' if keys == 1 else 's'} {100 * traffic.share_of(keys):.0f} %" for keys in points
    )
    first = f"{100 * traffic.first_touch:.1f} %"
    turnover = "" if traffic.turnover is None else f"; {100 * traffic.turnover:.0f} % of the head changes"
    return [
        f"traffic      {traffic.requests:,} requests{window}{rate} ({traffic.source}{sample})",
        f"cardinality  {_figure(distinct, ',.0f')} different keys; {first} of the requests are the first for their key",
        f"peakedness   {traffic.peakedness:.2f} (0 flat, 1 one key only); {shares}{turnover}",
    ]


def _show_options(advice: Advice) -> None:
    options = advice.recommendation.options
    priced = advice.prices.given
    titles = [
        "",
        "way",
        "coverage",
        "p50",
        "p99",
        "most/s",
        "per core",
        "CPU s/h",
        "wasted",
        "storage",
        "stale",
    ]
    titles += ["cost/h"] if priced else []
    rows = [
        [
            "*" if option is advice.recommendation.best else "x" if option.refused else " ",
            option.name,
            f"{100 * option.coverage:.1f} %",
            _time(option.p50_s),
            _time(option.p99_s),
            f"{option.most_per_s:,.0f}",
            f"{option.per_core_s:,.0f}",
            f"{option.compute_s:,.1f}",
            "?" if option.wasted_s is None else f"{option.wasted_s:,.2g}" if option.wasted_s else "0",
            size(option.storage_bytes),
            _stale(option),
            *([f"{option.hour_cost:.4g}"] if priced else []),
        ]
        for option in options
    ]
    emit_table(rows, titles=titles, numbers=[title for title in titles if title not in ("", "way")])
    rate = options[0].rate_per_s
    how = (
        f"at {rate:,.4g} requests/s"
        if advice.load.rate_per_s
        else f"with {advice.load.connections} connections that never rest; CPU at {rate:,.4g} requests/s"
    )
    costs = advice.costs
    place = "in the front" if costs.inline else "in a process of its own"
    emit(
        f"p50 and p99 {how}; the model takes {_time(costs.model.one_s)} for a row, "
        f"{_time(costs.model.best_row_s)} at best, {place}"
    )
    for option in options:
        for words in option.refused:
            emit(f"x {option.name}: {words}")


def _how(best: Prediction) -> str:
    """The options of `parbake serve` for a way."""
    if best.mode == "static":
        return "parbake bake BUNDLE --input ROWS --out TABLE, then parbake serve BUNDLE --mode static --table TABLE"
    if best.mode == "hybrid":
        return f"parbake serve BUNDLE --mode hybrid --head-rows {best.rows}"
    return "parbake serve BUNDLE --mode dynamic"


def _stale(option: Prediction) -> str:
    if option.stale_s is None:
        return "release"
    return _span(option.stale_s) if option.stale_s else "0"


def _figure(figure: Figure, form: str) -> str:
    text = format(figure.value, form)
    return f"{text} +- {format(figure.error, form)}" if figure.error else text


def _span(seconds: float) -> str:
    """A length of time as a person says it."""
    for unit, length in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def _time(seconds: float) -> str:
    """A latency in the unit that fits."""
    for unit, length in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
