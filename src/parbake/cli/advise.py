"""`parbake advise`: which way of serving is right, with what each would cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from parbake.cli.options import BUNDLE, FILE, Command, json_option, pickle_option, progress_option
from parbake.cli.output import emit, emit_json, emit_table, emit_title, say, size, stages
from parbake.errors import SettingsError

if TYPE_CHECKING:
    from parbake.advisor.model import Figure, Prediction
    from parbake.app.advise import Advice


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
    "--budget",
    "budgets",
    type=_Shares(),
    default="0.01,0.05,0.2",
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
@pickle_option
@progress_option
@json_option
def command(
    bundle: Path | None,
    trace: Path | None,
    budgets: tuple[float, ...],
    connections: int,
    rate: float | None,
    deadline_ms: float | None,
    price_core_hour: float | None,
    price_gb_month: float | None,
    picture: Path | None,
    allow_pickle: bool,
    show_progress: bool,
    as_json: bool,
) -> None:
    """Say which way of serving is right for a BUNDLE and its traffic, and what each would cost.

    The bundle is measured on this machine, for some seconds; the predictions hold for machines like it.
    """
    from parbake.advisor.model import Load, Prices
    from parbake.app.advise import advise, asked_in_trace

    if bundle is None or trace is None:
        raise SettingsError("nothing says what the traffic is", hint="parbake advise BUNDLE --trace FILE")
    prices = Prices()
    if price_core_hour is not None or price_gb_month is not None:
        prices = Prices(
            core_hour=prices.core_hour if price_core_hour is None else price_core_hour,
            gb_month=prices.gb_month if price_gb_month is None else price_gb_month,
            given=True,
        )
    with stages("advise", wanted=show_progress and not as_json) as stage:
        stage("the traffic")
        asked = asked_in_trace(trace)
        load = Load(connections, rate or asked.traffic.rate_per_s)
        advice = advise(
            bundle,
            asked,
            budgets=budgets,
            load=load,
            prices=prices,
            deadline_ms=deadline_ms,
            allow_pickle=allow_pickle,
            stage=stage,
        )
    if picture is not None:
        from parbake.cli.pictures import write_picture

        write_picture(advice, picture)
    if as_json:
        emit_json(advice)
        return
    show(advice)
    if picture is not None:
        say(f"picture: {picture}")


def show(advice: Advice) -> None:
    """Print an advice for a person."""
    from parbake.cli.pictures import terminal_picture

    for line in traffic_lines(advice):
        emit(line)
    emit()
    _show_options(advice)
    emit()
    emit_title(f"{advice.recommendation.best.name}: {advice.recommendation.reason}")
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
    points = [round(distinct.value * share) for share in (0.01, 0.05, 0.2)]
    shares = ", ".join(
        f"top {max(keys, 1):,} keys {100 * traffic.share_of(max(keys, 1)):.0f} %" for keys in points
    )
    first = f"{100 * traffic.first_touch:.1f} %"
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
