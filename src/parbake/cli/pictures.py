"""Draw an advice (coverage curve, latency against budget), in the terminal too, and a verdict, as SVG or PNG."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from parbake.errors import MissingExtra, SettingsError
from parbake.runtime.observation import LATENCY_EDGES_MS

if TYPE_CHECKING:
    from parbake.app.advise import Advice
    from parbake.release.judge import Judge

_HEIGHT: Final = 11
"""Odd, so that a line stands for one half."""
_WIDTH_WITHOUT_TERMINAL: Final = 110
_DOTS: Final = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a braille character by row and column (Unicode chapter 21.1)."""
_MOST_LINES: Final = 5
_LINES: Final = ("-", "--", ":", "-.", ".-")
_BLOCKS: Final = " ▏▎▍▌▋▊▉█"


class Canvas:
    """A field of braille characters: twice as wide and four times as high in dots as in characters."""

    def __init__(self, columns: int, lines: int) -> None:
        self._cells = [[0] * columns for _ in range(lines)]
        self.width, self.height = 2 * columns, 4 * lines

    def dot(self, x: int, y: int) -> None:
        """Set a dot; (0, 0) is at the bottom left. What lies outside is left out."""
        if 0 <= x < self.width and 0 <= y < self.height:
            row = self.height - 1 - y
            self._cells[row // 4][x // 2] |= _DOTS[row % 4][x % 2]

    def curve(self, of: Callable[[float], float]) -> None:
        """Draw ``of`` (0 to 1) over 0 to 1, without gaps."""
        before: int | None = None
        for x in range(self.width):
            y = round(of(x / (self.width - 1)) * (self.height - 1))
            low, high = (y, y) if before is None else (min(y, before), max(y, before))
            for between in range(low, high + 1):
                self.dot(x, between)
            before = y

    def lines(self) -> list[str]:
        """The characters, from top to bottom."""
        return ["".join(chr(0x2800 + cell) for cell in line) for line in self._cells]


def terminal_picture(advice: Advice, *, width: int | None = None, plain: bool | None = None) -> list[str]:
    """The picture as lines; ``plain`` (by default where stdout is no terminal) uses ASCII only."""
    room = width or shutil.get_terminal_size((_WIDTH_WITHOUT_TERMINAL, 24)).columns
    simple = not sys.stdout.isatty() if plain is None else plain
    return [*_coverage_lines(advice, room, simple), "", *_latency_lines(advice, room, simple)]


def _coverage_lines(advice: Advice, room: int, plain: bool) -> list[str]:
    traffic = advice.traffic
    most = max(traffic.distinct.value, 2.0)

    def share(x: float) -> float:
        return min(traffic.share_of(most**x), 1.0)

    columns = max(min(room - 8, 100), 20)
    title = "requests that the most asked-for keys make up (keys on a logarithmic axis)"
    if plain:
        inner = _plain_curve(share, columns)
    else:
        canvas = Canvas(columns, _HEIGHT)
        canvas.curve(share)
        inner = canvas.lines()
    lines = [title]
    for number, line in enumerate(inner):
        at = 1 - number / (len(inner) - 1)
        label = f"{100 * at:.0f} %" if number in (0, len(inner) - 1) or number == len(inner) // 2 else ""
        lines.append(f"{label:>6} {'|' if plain else '│'}{line.rstrip()}")
    decades = int(math.log10(most))
    axis = [" "] * columns
    for decade in range(decades + 1):
        word = f"{10**decade:,}"
        at = min(round(decade / math.log10(most) * (columns - 1)), columns - len(word))
        axis[at : at + len(word)] = word
    lines.append(f"{'':6} {'+' if plain else '└'}{''.join(axis).rstrip()} keys")
    return lines


def _plain_curve(of: Callable[[float], float], columns: int) -> list[str]:
    field = [[" "] * columns for _ in range(_HEIGHT)]
    for x in range(columns):
        y = round(of(x / (columns - 1)) * (_HEIGHT - 1))
        field[_HEIGHT - 1 - y][x] = "*"
    return ["".join(line) for line in field]


def _latency_lines(advice: Advice, room: int, plain: bool) -> list[str]:
    from parbake.advisor.model import Prediction

    def order(option: Prediction) -> tuple[int, float]:
        return {"dynamic": 0, "hybrid": 1, "static": 2}[option.mode], option.budget or 0.0

    options = sorted(advice.recommendation.options, key=order)
    means = [option.mean_s for option in options]
    least, most = min(means), max(means)
    name = max(len(option.name) for option in options)
    columns = max(min(room - name - 14, 60), 10)
    lines = ["mean latency against budget" + (" (logarithmic)" if most > 20 * least else "")]
    for option in options:
        if most > 20 * least:
            # One tenth of the axis for the least, so that it can be seen.
            length = 0.1 + 0.9 * math.log(option.mean_s / least) / math.log(most / least)
        else:
            length = option.mean_s / most
        lines.append(f"{option.name:<{name}}  {_bar(length, columns, plain)} {_ms(option.mean_s)}")
    return lines


def _bar(share: float, columns: int, plain: bool) -> str:
    if plain:
        return "#" * max(1, round(share * columns))
    eighths = max(1, round(share * columns * 8))
    return "█" * (eighths // 8) + _BLOCKS[eighths % 8].strip()


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def write_picture(advice: Advice, path: Path) -> None:
    """Write the picture as SVG or PNG, by the file's name. Raises `MissingExtra` or `SettingsError`."""
    if path.suffix.lower() not in (".svg", ".png"):
        raise SettingsError(f"{path} is neither .svg nor .png", hint="--picture advice.svg")
    figure, (left, right) = new_figure(2)
    traffic = advice.traffic
    keys = [point.keys for point in traffic.curve]
    shares = [100 * point.share for point in traffic.curve]
    left.plot(keys, shares, color="black")
    if any(point.error for point in traffic.curve):
        left.fill_between(
            keys,
            [100 * (point.share - point.error) for point in traffic.curve],
            [100 * (point.share + point.error) for point in traffic.curve],
            color="0.85",
        )
    left.set_xscale("log")
    left.set_ylim(0, 100)
    left.set_xlabel("most asked-for keys")
    left.set_ylabel("% of the requests")
    left.set_title(f"coverage curve: {traffic.requests:,} requests, {traffic.distinct.value:,.0f} keys")
    hybrids = sorted(
        (option for option in advice.recommendation.options if option.mode == "hybrid"),
        key=lambda option: option.budget or 0.0,
    )
    budgets = [100 * (option.budget or 0.0) for option in hybrids]
    for name, values, style in (
        ("p50", [1e3 * option.p50_s for option in hybrids], "o-"),
        ("mean", [1e3 * option.mean_s for option in hybrids], "s-"),
        ("p99", [1e3 * option.p99_s for option in hybrids], "^-"),
    ):
        right.plot(budgets, values, style, color="black", label=f"hybrid, {name}", markerfacecolor="white")
    for option in advice.recommendation.options:
        if option.mode != "hybrid":
            right.axhline(
                1e3 * option.mean_s, color="0.6", linestyle="--" if option.mode == "static" else ":"
            )
            right.annotate(
                f"{option.mode}, mean", (budgets[0] if budgets else 1, 1e3 * option.mean_s), va="bottom"
            )
    right.set_yscale("log")
    right.set_xlabel("budget, % of the keys")
    right.set_ylabel("ms")
    right.set_title("latency against budget")
    if hybrids:
        right.legend(frameon=False)
    save(figure, path)


def evidence_bar(share: float, columns: int = 10, plain: bool | None = None) -> str:
    """How much of the evidence that is needed there is, as a bar with its percentage; ``plain`` uses ASCII only."""
    simple = not sys.stdout.isatty() if plain is None else plain
    share = min(max(share, 0.0), 1.0)
    inner = _bar(share, columns, simple) if share >= 1 / (8 * columns) else ""
    return f"{inner:<{columns}}|{100 * share:>4.0f} %"


def new_figure(panels: int, height: float = 3.6) -> tuple[Any, Sequence[Any]]:
    """A figure with panels side by side, and the panels. Raises `MissingExtra`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib, which draws pictures,", "plots") from error
    figure = Figure(figsize=(5.2 * panels, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def save(figure: Any, path: Path) -> None:
    """Write a figure; the same figure gives the same bytes as SVG."""
    import matplotlib

    if path.suffix.lower() == ".svg":
        with matplotlib.rc_context({"svg.hashsalt": "parbake", "svg.fonttype": "none"}):
            figure.savefig(path, metadata={"Date": None, "Creator": None})
    else:
        figure.savefig(path, dpi=150)


def write_verdict(judge: Judge, path: Path) -> None:
    """Write what a verdict rests on as SVG or PNG: evidence over time, latencies now. Raises as `write_picture`."""
    if path.suffix.lower() not in (".svg", ".png"):
        raise SettingsError(f"{path} is neither .svg nor .png", hint="--plot verdict.svg")
    verdict = judge.verdict()
    figure, (left, right) = new_figure(2)
    minutes = [point.seconds / 60 for point in judge.points]
    loudest = verdict.evidence[:_MOST_LINES]
    for found, style in zip(loudest, _LINES, strict=False):
        title = f"{found.test} of {found.segment}" if found.segment else found.test
        shown = [100 * point.odds.get(title, 0.0) for point in judge.points]
        left.plot(minutes, shown, style, color="black", label=title)
    left.axhline(100, color="0.6", linestyle="--")
    left.set_xlabel("minutes")
    left.set_ylabel("% of the evidence that is needed")
    left.set_title(f"evidence of harm: {verdict.decision.value.replace('_', ' ')}")
    if loudest:
        left.legend(frameon=False)
    edges = [edge for edge in LATENCY_EDGES_MS if math.isfinite(edge)]
    for who, seen, style in (("champion", judge.champion, "--"), ("challenger", judge.challenger, "-")):
        total = sum(seen.latency)
        if total:
            below = [100 * sum(seen.latency[: at + 1]) / total for at in range(len(edges))]
            right.plot(edges, below, style, color="black", label=who)
    right.set_xscale("log")
    right.set_ylim(0, 100)
    right.set_xlabel("ms")
    right.set_ylabel("% of the requests")
    right.set_title(f"latency, {judge.challenger.requests:,} against {judge.champion.requests:,} requests")
    if any(judge.champion.latency) or any(judge.challenger.latency):
        right.legend(frameon=False)
    save(figure, path)
